// The settings of a conversation: the form, and what a request says of it. What is left empty is not
// sent, so that the server's own choice holds.

const form = document.getElementById("settings-form");
const schemaError = document.getElementById("schema-error");
const NUMBERS = [
  ...["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"],
  ...["repetition_penalty", "frequency_penalty", "presence_penalty"],
];

/** A setting that cannot be sent, and its field. */
export class SettingError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

export function onChange(listener) {
  form.addEventListener("input", () => {
    complain(null);
    listener(values());
  });
  form.addEventListener("submit", (event) => event.preventDefault());
}

export function values() {
  const fields = [...form.elements].filter((field) => field.name);
  return Object.fromEntries(fields.map((f) => [f.name, f.type === "checkbox" ? f.checked : f.value]));
}

export function show(settings) {
  for (const field of form.elements) {
    if (!field.name || field === document.activeElement) continue;
    if (field.type === "checkbox") field.checked = settings[field.name] ?? true;
    else field.value = settings[field.name] ?? "";
  }
  complain(null);
}

/** The fields of a request. Raises SettingError for what is no number, no JSON. */
export function request(settings, mode) {
  const body = {};
  for (const name of NUMBERS) {
    const text = (settings[name] ?? "").trim();
    if (!text) continue;
    if (!Number.isFinite(Number(text))) throw new SettingError(name, `${name} is no number: ${text}`);
    body[name] = Number(text);
  }
  const stops = (settings.stop_texts ?? "").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  const schema = (settings.schema ?? "").trim();
  if (schema) {
    body.response_format = {
      type: "json_schema",
      json_schema: { name: "answer", schema: parsed(schema) },
    };
  }
  if (settings.probabilities ?? true) {
    Object.assign(body, mode === "chat" ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 });
  }
  return body;
}

function parsed(schema) {
  try {
    return JSON.parse(schema);
  } catch (fault) {
    throw new SettingError("schema", `The schema is not JSON: ${fault.message}`);
  }
}

/** Marks the field that an error is about; none for null. */
export function complain(name, message = "") {
  for (const field of form.elements) {
    if (field.name === name) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
  }
  schemaError.hidden = name !== "schema";
  schemaError.textContent = name === "schema" ? message : "";
}
