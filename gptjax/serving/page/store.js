// Conversations in this browser, a key each, so that two tabs never write one another's away: every
// change reads what is stored now, changes it and writes it back.
//
// A conversation: {id, title, mode: "chat" | "text", model, settings, messages, changed}.
// A message: {id, role: "user" | "assistant", content, and of an answer: tokens, model, ended, error}.

const PREFIX = "gptjax.conversation.";
const memory = new Map(); // where the browser keeps nothing
let fullListener = () => {};

export const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

/** `listener` is called when the storage is full. */
export function onFull(listener) {
  fullListener = listener;
}

function get(key) {
  if (memory.has(key)) return memory.get(key);
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function put(key, text) {
  try {
    localStorage.setItem(key, text);
    memory.delete(key);
  } catch {
    memory.set(key, text);
    fullListener();
  }
}

function keys() {
  const names = new Set(memory.keys());
  try {
    for (let i = 0; i < localStorage.length; i++) names.add(localStorage.key(i));
  } catch {
    // Nothing is kept here.
  }
  return [...names].filter((name) => name.startsWith(PREFIX));
}

export function isConversation(key) {
  return key === null || key.startsWith(PREFIX);
}

export function read(id) {
  const text = get(PREFIX + id);
  try {
    return text && cleaned(JSON.parse(text));
  } catch {
    return null; // written by something else: never in the way
  }
}

/** All conversations, the last changed one first. */
export function all() {
  const conversations = keys().map((key) => read(key.slice(PREFIX.length)));
  return conversations.filter(Boolean).sort((a, b) => b.changed - a.changed);
}

export function create(values) {
  const conversation = cleaned({ ...values, id: newId(), changed: Date.now() });
  put(PREFIX + conversation.id, JSON.stringify(conversation));
  return conversation;
}

/**
 * Reads, edits in place and writes a conversation; null where it was deleted meanwhile. One that is
 * `touched` comes first in the list.
 */
export function change(id, edit, isTouched = true) {
  const conversation = read(id);
  if (!conversation) return null;
  edit(conversation);
  if (isTouched) conversation.changed = Date.now();
  put(PREFIX + id, JSON.stringify(conversation));
  return conversation;
}

export function remove(id) {
  memory.delete(PREFIX + id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // It was in memory only.
  }
}

export function exported() {
  return JSON.stringify({ format: "gptjax conversations", version: 1, conversations: all() }, null, 1);
}

/** Adds the conversations of an exported text, beside those that are there; returns how many. */
export function imported(text) {
  const { format, version, conversations } = JSON.parse(text);
  if (format !== "gptjax conversations" || version !== 1 || !Array.isArray(conversations)) {
    throw new Error("this is no export of conversations");
  }
  return conversations.map(cleaned).map(create).length;
}

const string = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : 0);
const list = (value) => (Array.isArray(value) ? value : []);

/** A conversation of the known form, from whatever was in a file or in the storage. */
function cleaned(value) {
  const settings = {};
  for (const [name, setting] of Object.entries(value.settings ?? {})) {
    if (["string", "boolean"].includes(typeof setting)) settings[name] = setting;
  }
  return {
    id: string(value.id),
    title: string(value.title),
    mode: value.mode === "text" ? "text" : "chat",
    model: string(value.model),
    settings,
    messages: list(value.messages).map(cleanedMessage),
    changed: number(value.changed),
  };
}

function cleanedMessage(value) {
  const message = {
    id: string(value.id) || newId(),
    role: value.role === "assistant" ? "assistant" : "user",
    content: string(value.content),
  };
  if (message.role === "user") return message;
  return {
    ...message,
    tokens: list(value.tokens).map(([text, logprob, others]) => [
      string(text),
      number(logprob),
      list(others).map(([other, value]) => [string(other), number(value)]),
    ]),
    model: string(value.model),
    ended: string(value.ended),
    error: string(value.error),
    speed: number(value.speed),
  };
}
