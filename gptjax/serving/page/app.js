// Puts the page together: which conversation is shown, what is sent, and what comes back.

import * as api from "./api.js";
import * as messages from "./messages.js";
import * as panels from "./panels.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import * as tokens from "./tokens.js";

const $ = (id) => document.getElementById(id);
const running = new Map(); // conversation id -> {message, controller}
const fresh = new Set(); // ids of messages that this tab added a moment ago
const FRESH = 5000; // ms in which another tab may still write a state without them
const SAVE_EVERY = 400; // ms, while an answer grows
const SLOW = 2000; // ms without a token, after which the page asks why
const TEXT_TOKENS = 100; // of a text, where the user says nothing: the API's own default is 16
let current = null; // the conversation on the screen
let known = []; // the server's models
let isEditing = false;
let isComplaining = false; // about a setting, until it is changed

// --- the screen ---

function draw() {
  const model = known.find(({ id }) => id === current.model);
  if (model) $("model").value = model.id;
  const isChatless = model?.chat === false;
  const mode = current.mode;
  for (const radio of document.querySelectorAll("#modes input")) {
    radio.checked = radio.value === mode;
    radio.disabled = isChatless && radio.value === "chat";
  }
  document.body.dataset.mode = mode;
  document.title = `${titleOf(current)} · gptjax`;
  const isChat = mode === "chat";
  $("text-label").textContent = isChat ? "Message" : "Text to go on from";
  $("text").placeholder = isChat ? "Message" : "Text to go on from";
  $("text-hint").textContent = isChat
    ? "Enter sends, Shift + Enter makes a new line."
    : `Ctrl + Enter goes on from all the text above.${isChatless ? " This model has no chat template." : ""}`;
  $("send").textContent = isChat ? "Send" : "Go on";
  if (!isEditing) drawMessages();
  drawList();
  drawRunning();
}

function drawMessages() {
  const growing = running.get(current.id)?.message;
  const latest = current.messages.map((m) => (m.id === growing?.id ? growing : m));
  const isRunning = (message) => message.id === growing?.id;
  messages.draw({ ...current, messages: latest }, { edit, again, remove, copy, example }, isRunning);
}

function drawRunning() {
  const isRunning = running.has(current.id);
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  if (hadFocus) (isRunning ? $("stop") : $("text")).focus();
}

function drawList() {
  const items = store.all().map((conversation) => {
    const item = messages.make("li");
    const title = titleOf(conversation);
    const open = messages.button(title, "", () => {
      show(conversation.id);
      panels.close("conversations", false);
      $("text").focus();
    });
    if (conversation.id === current.id) open.setAttribute("aria-current", "true");
    open.classList.add("title");
    const rename = messages.button("✎", `Rename ${title}`, () => renameIn(item, conversation));
    const remove = messages.button("✕", `Delete ${title}`, () => removeConversation(conversation));
    item.append(open, rename, remove);
    return item;
  });
  if (!$("list").querySelector("input")) $("list").replaceChildren(...items);
}

const titleOf = ({ title, messages: [first] }) =>
  title || first?.content.trim().slice(0, 60) || "Untitled";

function renameIn(item, conversation) {
  const field = messages.make("input");
  field.value = titleOf(conversation);
  field.setAttribute("aria-label", "Name of the conversation");
  let isDone = false;
  const end = (title) => {
    if (isDone) return;
    isDone = true;
    field.remove();
    if (title) store.change(conversation.id, (c) => (c.title = title), false);
    reread();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(field.value.trim());
    if (event.key === "Escape") end("");
    event.stopPropagation();
  });
  field.addEventListener("blur", () => end(field.value.trim()));
  item.replaceChildren(field);
  field.select();
}

function removeConversation(conversation) {
  if (!confirm(`Delete "${titleOf(conversation)}"?`)) return;
  running.get(conversation.id)?.controller.abort();
  store.remove(conversation.id);
  if (conversation.id === current.id) showLast();
  else draw();
  say("Deleted.");
}

/** Says something to a screen reader; `sayMore` after what is being said. */
function say(text) {
  $("spoken").replaceChildren();
  sayMore(text);
}

const sayMore = (text) => text.trim() && $("spoken").append(messages.make("p", "", text.trim()));

function notify(text, retry = null) {
  $("notice").hidden = !text;
  $("notice").querySelector("p").textContent = text;
  $("notice").querySelector("button").hidden = !retry;
  $("notice").querySelector("button").onclick = retry;
}

// --- conversations ---

function show(id) {
  current = store.read(id);
  isEditing = false;
  location.replace(`#${id}`);
  chooseModel(current.model);
  settings.show(current.settings);
  draw();
  messages.toEnd();
}

const showLast = () => show((store.all()[0] ?? create()).id);

/** A conversation without messages, with the settings of the one on the screen. */
function create() {
  const empty = store.all().find((conversation) => !conversation.messages.length);
  if (empty) return empty;
  const { mode, model, settings: values } = current ?? { mode: "chat", model: "", settings: {} };
  return store.create({ mode, model, settings: { ...values }, messages: [] });
}

function change(edit, isTouched = true) {
  current = store.change(current.id, edit, isTouched) ?? current;
}

function add(message) {
  fresh.add(message.id);
  setTimeout(() => fresh.delete(message.id), FRESH);
  change((c) => c.messages.push(message));
}

/**
 * Shows what is stored now: another tab may have written it. What that tab did not know of yet, and
 * so wrote over, comes back.
 */
function reread() {
  const stored = store.read(current.id);
  if (!stored) return showLast();
  const isLost = ({ id }) => fresh.has(id) && !stored.messages.some((other) => other.id === id);
  const lost = current.messages.filter(isLost);
  current = stored;
  if (lost.length) change((c) => c.messages.push(...lost));
  settings.show(current.settings);
  draw();
}

/** Takes a model, or the first one where the server has none of that name. */
function chooseModel(id) {
  const model = known.find((row) => row.id === id) ?? known[0];
  if (!model) return;
  const mode = model.chat === false ? "text" : current.mode;
  if (current.model === model.id && current.mode === mode) return;
  change((c) => Object.assign(c, { model: model.id, mode }), false);
}

// --- what one does with messages ---

const cutAt = (id, from = 0) => (c) => {
  const at = c.messages.findIndex((message) => message.id === id);
  if (at >= 0) c.messages.splice(at + from);
};

function again(message) {
  change(cutAt(message.id));
  answer();
}

function remove(message) {
  running.get(current.id)?.controller.abort();
  change(cutAt(message.id));
  draw();
  $("text").focus();
}

async function copy(message) {
  try {
    await navigator.clipboard.writeText(message.content);
    say("Copied.");
  } catch {
    notify("The browser lets this page copy nothing: select the text and copy it yourself.");
  }
}

function example(text) {
  $("text").value = text;
  $("text").focus();
}

function edit(message) {
  if (isEditing) return;
  running.get(current.id)?.controller.abort();
  isEditing = true;
  messages.edit(message, {
    cancel: () => {
      isEditing = false;
      draw();
      messages.find(message.id)?.querySelector(".actions button")?.focus();
    },
    save: (text) => {
      isEditing = false;
      change(cutAt(message.id, 1));
      change((c) => {
        const last = c.messages.at(-1);
        if (last.content !== text && last.tokens) last.tokens = [];
        last.content = text;
        if (last.role === "assistant") last.ended = "stop";
      });
      draw();
      $("text").focus();
      if (message.role === "user") answer();
    },
  });
}

/** Goes on from a token of a text with another of its alternatives in its place. */
function goOnWith(message, span, [text, logprob]) {
  const index = Number(span.dataset.index);
  const spans = [...span.parentNode.children].slice(0, index);
  const content = spans.map((before) => before.textContent).join("") + text;
  const others = message.tokens[index][2];
  change(cutAt(message.id));
  answer({ content, tokens: [...message.tokens.slice(0, index), [text, logprob, others]] });
}

function send() {
  const text = $("text").value;
  const isChat = current.mode === "chat";
  const isWaiting = current.messages.at(-1)?.role === (isChat ? "user" : "assistant");
  if (running.has(current.id) || !(text.trim() || isWaiting) || !isSendable()) return;
  if (text.trim()) add({ id: store.newId(), role: "user", content: text });
  $("text").value = "";
  fit();
  answer();
}

// --- answers ---

/** Whether the settings can be sent; says what is wrong with them. */
function isSendable() {
  try {
    settings.request(current.settings, current.mode);
    return true;
  } catch (fault) {
    if (!(fault instanceof settings.SettingError)) throw fault;
    settings.complain(fault.field, fault.message);
    notify(fault.message);
    isComplaining = true;
    return false;
  }
}

function requestOf(conversation) {
  const { mode, model, settings: values } = conversation;
  const body = { model, ...settings.request(values, mode) };
  if (mode === "text") {
    const prompt = conversation.messages.map((message) => message.content).join("");
    const context = known.find((row) => row.id === model)?.context_length ?? 4 * TEXT_TOKENS;
    const max_tokens = Math.min(TEXT_TOKENS, Math.max(1, Math.floor(context / 4)));
    return ["v1/completions", { max_tokens, ...body, prompt }];
  }
  const system = (values.system ?? "").trim();
  const turns = conversation.messages
    .filter(({ role, content }) => role === "user" || content)
    .map(({ role, content }) => ({ role, content }));
  const all = system ? [{ role: "system", content: system }, ...turns] : turns;
  return ["v1/chat/completions", { ...body, messages: all }];
}

/** Asks for an answer, which goes on from the text and tokens of `begun`. */
async function answer(begun = { content: "", tokens: [] }) {
  if (!isSendable()) return draw();
  settings.complain(null);
  const { id } = current;
  const message = { id: store.newId(), role: "assistant", ...begun };
  Object.assign(message, { model: current.model, ended: "", error: "" });
  const controller = new AbortController();
  running.set(id, { message, controller });
  add(message);
  const request = requestOf(current);
  draw();
  messages.toEnd();
  say("Writing.");
  try {
    await receive(id, message, request, controller.signal);
  } catch (fault) {
    if (fault.name === "AbortError") message.ended = "stopped";
    else fail(id, message, fault);
  }
  save(id, message);
  running.delete(id);
  if (current.id !== id) return drawList();
  reread();
  sayMore(message.error ? "" : `${message.ended === "stopped" ? "Stopped. " : ""}${message.rest ?? ""}`);
}

async function receive(id, message, [path, body], signal) {
  const reader = new tokens.TokenReader();
  const asking = setTimeout(() => explain(message), SLOW);
  let saved = Date.now();
  let began = 0; // when the first tokens came, and how many there were then
  let first = 0;
  for await (const chunk of api.stream(path, body, signal)) {
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (choice.delta?.content || choice.text) clearTimeout(asking);
    message.content += choice.delta?.content ?? choice.text ?? "";
    message.tokens.push(...reader.read(choice.logprobs));
    message.ended = choice.finish_reason ?? message.ended;
    if (began) message.speed = ((message.tokens.length - first) * 1000) / (Date.now() - began + 1);
    else if (choice.logprobs) [began, first] = [Date.now(), message.tokens.length];
    if (current.id === id) {
      messages.grow(message);
      speak(message);
    }
    if (Date.now() - saved > SAVE_EVERY) {
      saved = Date.now();
      if (!save(id, message)) return; // deleted in another tab
    }
  }
}

/** Says why nothing has come yet, where the server knows. */
async function explain(message) {
  const isStarting = (await api.health()) === "starting";
  const text = isStarting ? "The server compiles its programs: the first answer takes longer." : "";
  if (messages.remark(message, text)) sayMore(text);
}

/** Whole sentences go to the screen reader as they come; `rest` is what it has not said. */
function speak(message) {
  const unsaid = message.content.slice(message.said ?? 0);
  const end = Math.max(...[". ", "? ", "! ", "\n"].map((mark) => unsaid.lastIndexOf(mark)));
  if (end > 0) {
    sayMore(unsaid.slice(0, end + 1));
    message.said = (message.said ?? 0) + end + 1;
  }
  message.rest = message.content.slice(message.said ?? 0);
}

function save(id, message) {
  let isThere = false;
  store.change(id, (c) => {
    const at = c.messages.findIndex(({ id: other }) => other === message.id);
    isThere = at >= 0;
    if (isThere) c.messages[at] = message;
  });
  return isThere || fresh.has(message.id); // one that was written over comes back: see reread
}

function fail(id, message, fault) {
  message.ended = "error";
  message.error = fault.message;
  if (fault instanceof api.Unreachable) gone();
  else if (fault.status === 401) askForKey();
  else if (fault.status === 429) message.error += fault.wait ? ` Try again in ${fault.wait} s.` : "";
  else if (!(fault instanceof api.ServerError)) console.error(fault);
  if (/response_format|schema/.test(fault.param ?? "") && current.id === id) {
    setTimeout(() => settings.complain("schema", fault.message));
  }
}

/** The server is away: says so, and looks for it until it is back. */
let looking = 0;
function gone() {
  const look = async () => {
    if (["gone", "stopping"].includes(await api.health())) return;
    clearInterval(looking);
    looking = 0;
    notify("");
    say("The server is back.");
    if (!known.length) loadModels();
  };
  notify("The server does not answer. Is python -m gptjax.serve still running? What you wrote is kept.", look);
  looking ||= setInterval(look, 3000);
}

async function askForKey() {
  const key = await panels.askForKey();
  if (!key) return notify("The server asks for a key.", askForKey);
  api.useKey(key);
  loadModels();
}

async function loadModels() {
  try {
    known = await api.models();
  } catch (fault) {
    if (fault instanceof api.Unreachable) return gone();
    if (fault.status === 401) return askForKey();
    return notify(fault.message, loadModels);
  }
  notify("");
  $("model").replaceChildren(...known.map(({ id, parent }) => new Option(parent ? `${id} (adapter)` : id, id)));
  chooseModel(current.model);
  draw();
}

// --- what one does on the page ---

function fit() {
  const box = $("text");
  box.style.setProperty("height", "auto");
  box.style.setProperty("height", `${Math.min(box.scrollHeight + 2, innerHeight / 3)}px`);
}

function start() {
  panels.start();
  store.onFull(() => notify("The browser's storage is full: this is kept until the page is closed. Export, then delete what you can spare."));
  const asked = location.hash.slice(1);
  if (asked && store.read(asked)) show(asked);
  else showLast();
  loadModels();

  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("text").addEventListener("input", fit);
  $("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || event.shiftKey) return;
    if (current.mode === "text" && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", () => running.get(current.id)?.controller.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !isEditing) running.get(current.id)?.controller.abort();
  });
  $("model").addEventListener("change", () => {
    chooseModel($("model").value);
    draw();
  });
  $("modes").addEventListener("change", (event) => {
    change((c) => (c.mode = event.target.value), false);
    draw();
  });
  settings.onChange((values) => {
    if (isComplaining) notify("");
    isComplaining = false;
    change((c) => (c.settings = values), false);
  });
  $("new").addEventListener("click", () => {
    show(create().id);
    panels.close("conversations", false);
    $("text").focus();
  });
  $("export").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importFile);
  $("colour").addEventListener("change", colour);
  $("colour").checked = localStorage.getItem("gptjax.colour") === "yes";
  colour();
  tokens.watch($("messages"), detailsOf);
  addEventListener("storage", (event) => store.isConversation(event.key) && reread());
  addEventListener("hashchange", () => {
    const id = location.hash.slice(1);
    if (id !== current.id && store.read(id)) show(id);
  });
  addEventListener("pagehide", () => running.forEach(({ message }, id) => save(id, message)));
}

function colour() {
  document.body.classList.toggle("colour", $("colour").checked);
  $("legend").hidden = !$("colour").checked;
  localStorage.setItem("gptjax.colour", $("colour").checked ? "yes" : "no");
}

function detailsOf(span) {
  const { id } = span.closest("[data-id]").dataset;
  const growing = running.get(current.id)?.message;
  const message = growing?.id === id ? growing : current.messages.find((m) => m.id === id);
  const token = message?.tokens[span.dataset.index];
  if (!token) return null;
  const isFree = current.mode === "text" && !growing;
  return { token, instead: isFree ? (other) => goOnWith(message, span, other) : null };
}

function exportAll() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  link.download = "gptjax-conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function importFile() {
  const [file] = $("import-file").files;
  $("import-file").value = "";
  if (!file) return;
  try {
    const count = store.imported(await file.text());
    draw();
    say(`${count} conversations imported.`);
  } catch (fault) {
    notify(`${file.name} was not imported: ${fault.message}.`);
  }
}

start();
