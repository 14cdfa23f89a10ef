// The calls of client_calls.py by the npm package `openai`: {url, key, table, constants} comes as
// JSON on the standard input, and {name: value} goes out; a call that fails says {error}.
// NODE_PATH is a folder with the package in it.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const find = createRequire(process.env.NODE_PATH + "/");
const { default: OpenAI } = await import(pathToFileURL(find.resolve("openai")).href);
const { url, key, table, constants } = JSON.parse(readFileSync(0, "utf8"));
const { QUICK, HELLO, GREEDY, ENDS, TOOL, CALLED, LONG, POINT } = constants;

const client = (settings = {}) => new OpenAI({ baseURL: url + "/v1", apiKey: key, ...settings });
const api = client();
const said = (choice) => choice.text ?? choice.message.content;
const outcome = (choices) =>
  Object.fromEntries(choices.map((c) => [c.index, [said(c), c.finish_reason]]));

function create(endpoint, { extra_body, ...parameters }, more = {}, from = api) {
  const resource = endpoint === "completions" ? from.completions : from.chat.completions;
  return resource.create({ model: "base", ...parameters, ...extra_body, ...more });
}

async function all(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

function joined(choices) {
  const whole = {};
  for (const c of choices) {
    const entry = (whole[c.index] ??= ["", null]);
    entry[0] += c.text ?? c.delta.content ?? "";
    entry[1] = c.finish_reason ?? entry[1];
  }
  return whole;
}

/** A row of the table, whole and, where a row may be streamed, as a stream too. */
async function row(endpoint, parameters) {
  const whole = outcome((await create(endpoint, parameters)).choices);
  if (!parameters.best_of && !(parameters.echo && parameters.logprobs)) {
    const chunks = await all(await create(endpoint, parameters, { stream: true }));
    assert.deepEqual(joined(chunks.flatMap((chunk) => chunk.choices)), whole);
  }
  return whole;
}

async function refusal(kind, call) {
  try {
    await call();
  } catch (error) {
    assert(error instanceof OpenAI[kind], `${error.constructor.name}: ${error.message}`);
    assert(error.error.message);
    return [error.status, error.type, error.param, error.code];
  }
  throw new Error("nothing was refused");
}

/** Whether all slots are free again within five seconds. */
async function allFree() {
  for (let i = 0; i < 100; i++) {
    const headers = { authorization: `Bearer ${key}` };
    const body = await (await fetch(url + "/metrics", { headers })).text();
    if (Number(/^gptjax_slots_used(?:\{.*\})? (\S+)$/m.exec(body)[1]) === 0) return true;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return false;
}

const saysCall = { ...TOOL, guided_choice: [CALLED] };
const vector = async (settings, from = api) =>
  (await from.embeddings.create({ model: "base", input: QUICK, ...settings })).data[0].embedding;

const special = {
  async lists_models() {
    return (await api.models.list()).data.map((m) => [m.id, m.object, m.parent ?? null]);
  },
  async retrieves_a_model() {
    return (await api.models.retrieve("base")).id;
  },
  async retrieves_an_adapter() {
    const { id, parent } = await api.models.retrieve("fox");
    return [id, parent];
  },
  async embeds_a_text() {
    const floats = await vector({ encoding_format: "float" });
    assert(Math.abs(Math.hypot(...floats) - 1) < 1e-4);
    return floats.length;
  },
  async embeds_in_base64() {
    const floats = await vector({ encoding_format: "float" });
    const decoded = await vector({}); // the client asks for base64 and decodes it
    assert.deepEqual(decoded.map(Math.fround), floats.map(Math.fround));
    return decoded.length;
  },
  async embeds_several() {
    const { data } = await api.embeddings.create({ model: "base", input: ["A", QUICK, "A"] });
    assert.deepEqual(data[0].embedding, data[2].embedding);
    assert.notDeepEqual(data[0].embedding, data[1].embedding);
    return data.map((item) => item.index);
  },
  async embeds_ids() {
    const input = [[84, 104, 101], [84, 104]];
    return (await api.embeddings.create({ model: "base", input })).data.length;
  },
  async streams_by_the_helper() {
    const { extra_body, ...settings } = ENDS;
    const stream = api.chat.completions.stream({ model: "base", ...settings, ...extra_body });
    let text = "";
    stream.on("content", (delta) => (text += delta));
    const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
    assert.equal(text, message.content);
    assert.equal(finish_reason, "stop");
    return text;
  },
  async parses_an_answer() {
    const format = { name: "point", schema: POINT, strict: true };
    const answer = await api.chat.completions.parse({
      model: "base",
      messages: HELLO,
      response_format: { type: "json_schema", json_schema: format },
      max_tokens: 99,
      seed: 3,
    });
    const point = JSON.parse(answer.choices[0].message.content);
    assert(Number.isInteger(point.x) && typeof point.ok === "boolean");
    return answer.choices[0].finish_reason;
  },
  async answers_with_an_object() {
    const answer = await api.chat.completions.create({
      model: "base",
      messages: HELLO,
      response_format: { type: "json_object" },
      max_tokens: 4,
      temperature: 0,
    });
    return answer.choices[0].message.content;
  },
  async calls_a_tool() {
    const { message, finish_reason } = (await create("chat", saysCall)).choices[0];
    const call = message.tool_calls[0];
    assert(call.type === "function" && call.id && !message.content);
    return [finish_reason, call.function.name, call.function.arguments];
  },
  async streams_a_tool_call() {
    const chunks = await all(await create("chat", saysCall, { stream: true }));
    const choices = chunks.flatMap((chunk) => chunk.choices);
    const calls = choices.flatMap((choice) => choice.delta.tool_calls ?? []);
    const text = calls.map((call) => call.function.arguments ?? "").join("");
    assert(!choices.some((choice) => choice.delta.content));
    return [choices.at(-1).finish_reason, calls[0].function.name, text, calls[0].index];
  },
  async forces_a_tool() {
    const tool_choice = { type: "function", function: { name: "weather" } };
    const { message, finish_reason } = (await create("chat", TOOL, { tool_choice })).choices[0];
    const call = message.tool_calls[0];
    assert(["Bern", "Rome"].includes(JSON.parse(call.function.arguments).town));
    return [finish_reason, call.function.name, call.function.arguments];
  },
  async gives_raw_responses() {
    const call = api.chat.completions.create({ model: "base", messages: HELLO, ...GREEDY });
    const { data, response, request_id } = await call.withResponse();
    assert(request_id);
    return [response.status, response.headers.get("content-type"), data.object];
  },
  async takes_options_for_one_call() {
    const body = { model: "base", prompt: QUICK, ...GREEDY };
    const answer = await api.completions.create(body, { timeout: 30000, maxRetries: 0 });
    return answer.choices[0].text;
  },
  async gives_up_after_a_time() {
    const hasty = client({ timeout: 50, maxRetries: 0 });
    await assert.rejects(create("completions", LONG, {}, hasty), OpenAI.APIConnectionTimeoutError);
    return await allFree();
  },
  async cancels_a_stream() {
    const stream = await create("completions", LONG, { stream: true });
    for await (const chunk of stream) {
      assert(chunk.choices);
      break; // leaves the connection
    }
    stream.controller.abort();
    return await allFree();
  },
  async comes_again_when_refused() {
    const many = { ...LONG, prompt: Array(16).fill(QUICK), max_tokens: 150 };
    const hasty = client({ maxRetries: 0 });
    const calls = [1, 2, 3, 4].map(() => create("completions", many, { stream: true }, hasty));
    const settled = await Promise.allSettled(calls);
    const refused = settled.find((call) => call.status === "rejected").reason;
    assert(refused instanceof OpenAI.RateLimitError, String(refused));
    assert(Number(refused.headers.get("retry-after")) >= 1);
    for (const call of settled) call.value?.controller.abort();
    const patient = client({ maxRetries: 30 });
    const answer = await create("completions", { prompt: QUICK, ...GREEDY }, {}, patient);
    return [refused.status, answer.choices[0].text];
  },
  refuses_a_wrong_key: () =>
    refusal("AuthenticationError", () => client({ apiKey: "wrong" }).models.list()),
  knows_no_other_model: () =>
    refusal("NotFoundError", () => create("completions", { prompt: "A" }, { model: "gpt-9" })),
  retrieves_no_other_model: () => refusal("NotFoundError", () => api.models.retrieve("gpt-9")),
  has_no_other_endpoint: () =>
    refusal("NotFoundError", () => api.responses.create({ model: "base", input: "A" })),
  refuses_a_suffix: () =>
    refusal("BadRequestError", () => create("completions", { prompt: "A", suffix: "B" })),
  refuses_an_unknown_field: () =>
    refusal("BadRequestError", () => create("chat", { messages: HELLO, temprature: 1 })),
  refuses_an_image: () => {
    const image = { type: "image_url", image_url: { url: "data:image/png;base64,AA==" } };
    const messages = [{ role: "user", content: [image] }];
    return refusal("BadRequestError", () => create("chat", { messages }));
  },
  refuses_a_long_prompt: () =>
    refusal("BadRequestError", () => create("completions", { prompt: "A b ".repeat(2000) })),
  refuses_a_wrong_type: () =>
    refusal("APIError", () => create("completions", { prompt: "A", max_tokens: "many" })),
  async refuses_a_hundred_megabytes() {
    const hasty = client({ maxRetries: 0 });
    const error = await create("completions", { prompt: "A".repeat(1e8) }, {}, hasty).catch((e) => e);
    assert(error instanceof OpenAI.APIError, String(error));
    return error.status ?? 413; // without a status: closed before all of it was sent
  },
};

const values = {};
const calls = Object.entries(table).map(([name, call]) => [name, () => row(...call)]);
for (const [name, call] of [...calls, ...Object.entries(special)]) {
  try {
    values[name] = await call();
  } catch (error) {
    values[name] = { error: String(error?.stack ?? error).slice(0, 600) };
  }
}
console.log(JSON.stringify(values));
process.exit();
