// Draws a conversation's messages. All text goes in as text, never as HTML.

import * as tokens from "./tokens.js";

const log = document.getElementById("messages");
const ENDS = {
  length: "cut at max tokens",
  stopped: "stopped",
  content_filter: "ended by the server",
  "": "not finished",
};
const EXAMPLES = {
  chat: ["What is the capital of France?", "Write two lines about the sea.", "Why is the sky blue?"],
  text: ["Once upon a time", "The three laws of", "def fibonacci(n):"],
};

export const make = (tag, className, text = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
};

export function button(text, label, action, className = "quiet") {
  const element = make("button", className, text);
  element.type = "button";
  if (label) element.setAttribute("aria-label", label);
  element.addEventListener("click", action);
  return element;
}

/** Draws all messages; `actions` has edit, again, remove and example; `isRunning(message)` says whether it grows. */
export function draw(conversation, actions, isRunning) {
  const messages = conversation?.messages ?? [];
  const mode = conversation?.mode ?? "chat";
  const isFollowing = isAtEnd();
  const drawn = new Map([...log.children].map((element) => [element.state, element]));
  const elements = messages.map((message) => {
    const state = JSON.stringify([message, mode, isRunning(message)]);
    const element = drawn.get(state) ?? drawMessage(message, mode, actions, isRunning(message));
    return Object.assign(element, { state });
  });
  place(elements.length ? elements : [empty(mode, actions)]);
  tokens.closeGone();
  if (isFollowing) toEnd();
}

/** What is there already stays where it is, with the focus that it may have. */
function place(elements) {
  for (const old of [...log.children]) if (!elements.includes(old)) old.remove();
  elements.forEach((element, i) => {
    if (log.children[i] !== element) log.insertBefore(element, log.children[i] ?? null);
  });
}

const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
export const toEnd = () => log.scrollTo(0, log.scrollHeight);

function empty(mode, actions) {
  const box = make("div", "empty");
  box.append(make("h2", "", mode === "chat" ? "Ask something." : "Begin a text."));
  const hint = "Point at a token of the answer, or walk through them with the arrow keys, to see what else the model might have written.";
  box.append(make("p", "soft", hint));
  const list = make("ul", "examples");
  for (const example of EXAMPLES[mode]) {
    const item = make("li");
    item.append(button(example, "", () => actions.example(example)));
    list.append(item);
  }
  box.append(list);
  return box;
}

function drawMessage(message, mode, actions, isRunning) {
  const article = make("article", `message ${message.role}`);
  article.dataset.id = message.id;
  const name = message.role === "user" ? "You" : message.model || "Answer";
  article.setAttribute("aria-label", message.role === "user" ? "You" : `Answer of ${name}`);
  const head = make("h3", "who", name);
  const text = make("div", "content");
  if (message.role === "user") text.textContent = message.content;
  else drawAnswer(text, message);
  article.append(head, text);
  if (message.role === "assistant") {
    if (message.tokens.length && !isRunning) article.append(tokens.pulse(message.tokens));
    article.append(make("p", "note soft", isRunning ? "" : note(message)));
  }
  if (message.error) {
    const fault = make("p", "error", message.error);
    fault.setAttribute("role", "alert");
    article.append(fault);
  }
  article.classList.toggle("running", isRunning);
  if (!isRunning) article.append(buttons(message, mode, actions));
  return article;
}

function drawAnswer(element, message) {
  element.classList.add("tokens");
  if (message.tokens.length) {
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", `Answer of ${message.tokens.length} tokens: arrow keys go through them`);
  }
  tokens.draw(element, message.content, message.tokens);
}

function note(message) {
  const count = message.tokens.length;
  const facts = [];
  if (message.error) return "";
  if (message.ended !== "stop") facts.push(ENDS[message.ended] ?? message.ended);
  if (count) {
    const bits = message.tokens.reduce((sum, [, logprob]) => sum - logprob, 0) / Math.LN2 / count;
    facts.push(`${count} tokens`, `${bits.toFixed(2)} bits a token`);
    if (message.speed) facts.push(`${message.speed.toFixed(message.speed < 10 ? 1 : 0)} tokens/s`);
  }
  return facts.join(" · ");
}

function buttons(message, mode, actions) {
  const row = make("div", "row actions");
  const what = message.role === "user" ? "your message" : "the answer";
  if (message.role === "assistant") row.append(button("Again", "Write the answer again", () => actions.again(message)));
  row.append(button("Edit", `Edit ${what}`, () => actions.edit(message)));
  row.append(button("Copy", `Copy ${what}`, () => actions.copy(message)));
  row.append(button("Delete", `Delete ${what} and what follows`, () => actions.remove(message)));
  return row;
}

export const find = (id) => log.querySelector(`[data-id="${CSS.escape(id)}"]`);

/** Says something under a growing answer, as long as there is none of it; whether it did. */
export function remark(message, text) {
  const note = find(message.id)?.querySelector(".note");
  if (!note || message.content || message.ended) return false;
  note.textContent = text;
  return true;
}

/** Draws what a growing answer has got since. */
export function grow(message) {
  const element = find(message.id)?.querySelector(".content");
  if (!element) return;
  const isFollowing = isAtEnd();
  if (message.content) find(message.id).querySelector(".note").textContent = "";
  tokens.grow(element, message.content, message.tokens);
  if (isFollowing) toEnd();
}

/** Puts a box in the place of a message's text; `save(text)` or `cancel()` ends it. */
export function edit(message, { save, cancel }) {
  const article = find(message.id);
  const form = make("form", "editor");
  const box = make("textarea");
  box.value = message.content;
  box.rows = Math.min(12, message.content.split("\n").length + 1);
  box.setAttribute("aria-label", message.role === "user" ? "Your message" : "The answer");
  const row = make("div", "row");
  const submit = make("button", "first", message.role === "user" ? "Save and answer" : "Save");
  row.append(submit, button("Cancel", "", cancel), make("span", "soft", "What follows is replaced."));
  form.append(box, row);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    save(box.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(box.value);
  });
  article.replaceChildren(article.querySelector(".who"), form);
  box.focus();
  article.scrollIntoView({ block: "nearest" });
}
