// What the page says to its own server, and what comes back. Addresses are relative: no other
// server is ever asked.

const KEY = "gptjax.key";

/** The server answered, and it was an error: `status`, the field it is about, seconds to wait. */
export class ServerError extends Error {
  constructor(message, { status = 0, param = null, wait = 0 } = {}) {
    super(message);
    Object.assign(this, { status, param, wait });
  }
}

/** The server did not answer, or the connection ended before the answer did. */
export class Unreachable extends Error {}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (fault) {
    if (fault.name === "AbortError") throw fault;
    throw new Unreachable("The server does not answer.");
  }
  if (!response.ok) throw await serverError(response);
  return response;
}

async function serverError(response) {
  const wait = Number(response.headers.get("Retry-After")) || 0;
  let body = {};
  try {
    body = (await response.json()).error ?? {};
  } catch {
    // Not an answer of the API: the status says what there is to say.
  }
  const message = body.message || `The server answered ${response.status} ${response.statusText}`;
  return new ServerError(message, { status: response.status, param: body.param, wait });
}

/** The models that the server has: [{id, parent, chat, context_length}]. */
export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

/** "ok", "starting" (its first program is being compiled), "stopping", or "gone". */
export async function health() {
  try {
    return (await (await fetch("health", { cache: "no-store" })).json()).status;
  } catch {
    return "gone";
  }
}

/** The chunks of a streamed answer, as objects. Aborted by `signal`. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, { param: chunk.error.param });
    yield chunk;
  }
  throw new Unreachable("The connection ended before the answer did.");
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (waiting + value).replaceAll("\r\n", "\n").split("\n\n");
      waiting = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (fault) {
    if (fault.name === "AbortError") throw fault; // else: the end, which `stream` says
  } finally {
    reader.cancel().catch(() => {});
  }
}
