// Tokens of an answer: read from the server's log-probabilities, drawn as spans, looked at one by
// one. A token is [text, logprob, [[other text, logprob], ...]].

const inspector = document.getElementById("inspector");
const spoken = document.getElementById("token-spoken");
const LEVELS = [0.7, 0.35, 0.12, 0.02]; // the legend's, in index.html
const round = (logprob) => Math.round(Math.max(logprob, -99) * 1000) / 1000;
let shown = null; // the span that the inspector is about
let leaving = 0;

/** Reads `logprobs` of chunks in order; a character may be cut into several tokens. */
export class TokenReader {
  decoder = new TextDecoder();

  read(logprobs) {
    if (!logprobs) return [];
    if (logprobs.content) return logprobs.content.map((entry) => this.chat(entry));
    return (logprobs.tokens ?? []).map((token, i) => {
      const others = Object.entries(logprobs.top_logprobs?.[i] ?? {});
      return [this.text(bytesOf(token)), round(logprobs.token_logprobs[i] ?? 0), sorted(others)];
    });
  }

  text(bytes) {
    return this.decoder.decode(new Uint8Array(bytes), { stream: true });
  }

  chat({ token, bytes, logprob, top_logprobs }) {
    const text = this.text(bytes ?? bytesOf(token));
    const others = (top_logprobs ?? []).map((other) => [other.token, other.logprob]);
    return [text, round(logprob), sorted(others)];
  }
}

/** A part of a character is written out as its bytes: "bytes:\\xe2\\x82". */
const PART = /^bytes:(\\x[0-9a-f]{2})+$/;
const bytesOf = (token) =>
  PART.test(token)
    ? token.match(/[0-9a-f]{2}(?=\\|$)/g).map((byte) => parseInt(byte, 16))
    : new TextEncoder().encode(token);

const sorted = (others) =>
  others.map(([text, logprob]) => [text, round(logprob)]).sort((a, b) => b[1] - a[1]);

/** Spans of the tokens that make up `content`, and what is left of it as plain text. */
export function draw(element, content, tokens) {
  element.replaceChildren();
  grow(element, content, tokens, true);
}

/** As `draw`, where the element already has the first tokens, and more of the text may come. */
export function grow(element, content, tokens, isEnded = false) {
  if (element.lastChild?.nodeType === Node.TEXT_NODE) element.lastChild.remove();
  let at = 0;
  for (let i = 0; i < tokens.length; i++) {
    const text = part(content, at, tokens[i][0], isEnded);
    if (text === null) break;
    at += text.length;
    if (i >= element.childNodes.length) element.append(span(i, text, tokens[i]));
  }
  if (at < content.length) element.append(content.slice(at));
}

/** What of a token's text stands at a place of the content; null where they differ. */
function part(content, at, text, isEnded) {
  const here = at === 0 && !content.startsWith(text) ? text.trimStart() : text;
  if (content.startsWith(here, at)) return here;
  const rest = content.slice(at); // cut by a stop text, or not here yet
  return isEnded && here.startsWith(rest) ? rest : null;
}

function span(index, text, [, logprob]) {
  const element = document.createElement("span");
  element.className = "token";
  element.textContent = text;
  element.dataset.index = index;
  const level = LEVELS.findIndex((least) => Math.exp(logprob) > least);
  element.dataset.surprise = level < 0 ? LEVELS.length : level;
  return element;
}

export const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  if (value >= 99.95) return value > 99.995 ? "100 %" : "over 99.9 %";
  return value < 0.01 ? "below 0.01 %" : `${value.toPrecision(value < 1 ? 1 : value < 10 ? 2 : 3)} %`;
};

/** A token's text with what one cannot see written out. */
export const visible = (text) =>
  text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(no text)";

const said = (text) =>
  text.replaceAll("\n", " line break ").replace(/^ /, "") || "no text";

/**
 * Shows a token when it is pointed at or focused. `find(span)` gives {token, instead}: `instead`,
 * where there is one, is called with an alternative that was chosen, [text, logprob].
 */
export function watch(root, find) {
  const show = (target) => {
    clearTimeout(leaving);
    const details = find(target);
    if (details) open(target, details);
  };
  const tokenOf = (event) => event.target.closest?.(".token[data-index]");
  root.addEventListener("pointerover", (event) => tokenOf(event) && show(tokenOf(event)));
  root.addEventListener("click", (event) => tokenOf(event) && show(tokenOf(event)));
  root.addEventListener("focusin", (event) => {
    if (!tokenOf(event)) return;
    show(tokenOf(event));
    spoken.textContent = sentence(find(tokenOf(event)));
  });
  root.addEventListener("pointerout", leave);
  root.addEventListener("focusout", (event) => inspector.contains(event.relatedTarget) || leave());
  root.addEventListener("scroll", close);
  root.addEventListener("keydown", walk);
  inspector.addEventListener("pointerenter", () => clearTimeout(leaving));
  inspector.addEventListener("pointerleave", leave);
  inspector.addEventListener("focusout", leave);
  inspector.addEventListener("focusin", () => clearTimeout(leaving));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || inspector.hidden) return;
    if (inspector.contains(document.activeElement)) shown.focus();
    close();
    event.stopImmediatePropagation();
  });
}

function sentence({ token: [text, logprob, others] }) {
  const rest = others.filter(([other]) => other !== text).slice(0, 4);
  const also = rest.map(([other, value]) => `${said(other)}, ${percent(value)}`).join("; ");
  return `${said(text)}, ${percent(logprob)}. ${also ? `Instead: ${also}` : ""}`;
}

/** Arrow keys go through the tokens of an answer; Enter goes into what is shown. */
function walk(event) {
  const group = event.target.closest(".tokens");
  if (!group || event.ctrlKey || event.metaKey || event.altKey) return;
  const spans = [...group.querySelectorAll(".token")];
  const here = spans.indexOf(event.target);
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: spans.length - 1 }[event.key];
  if (event.key === "Enter" && here >= 0) {
    inspector.querySelector("button")?.focus();
    event.preventDefault();
  } else if (to !== undefined && spans[to]) {
    spans[to].tabIndex = -1;
    spans[to].focus();
    event.preventDefault();
  }
}

function leave() {
  clearTimeout(leaving);
  leaving = setTimeout(() => {
    if (!inspector.contains(document.activeElement) && document.activeElement !== shown) close();
  }, 200);
}

/** Shows no token that is not on the page any more. */
export function closeGone() {
  if (shown && !shown.isConnected) close();
}

function close() {
  inspector.hidden = true;
  shown?.removeAttribute("data-shown");
  shown = null;
}

function open(target, { token: [text, logprob, others], instead }) {
  if (shown === target) return;
  close();
  shown = target;
  target.dataset.shown = "";
  const head = row(text, logprob, "p");
  head.classList.add("chosen");
  const alternatives = document.createElement("ul");
  for (const [other, value] of others) {
    const isOther = other !== text && !PART.test(other);
    const item = row(other, value, "li", instead && isOther ? () => instead([other, value]) : null);
    if (other === text) item.setAttribute("aria-current", "true");
    alternatives.append(item);
  }
  const hint = document.createElement("p");
  hint.className = "soft";
  const bits = -logprob / Math.LN2;
  hint.textContent = `${bits.toFixed(bits < 10 ? 1 : 0)} bits of surprise${instead ? " · choose another to go on from there" : ""}`;
  inspector.replaceChildren(head, alternatives, hint);
  inspector.hidden = false;
  place(target.getClientRects()[0] ?? target.getBoundingClientRect());
}

/** The surprise of each token as a bar, one after the other; 8 bits are the full height. */
export function pulse(tokens) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  const width = Math.max(tokens.length, 120);
  drawing.setAttribute("viewBox", `0 0 ${width} 8`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  drawing.classList.add("pulse");
  const bars = document.createElementNS(space, "path");
  const heights = tokens.map(([, logprob]) => Math.min(Math.max(-logprob / Math.LN2, 0.4), 8));
  bars.setAttribute("d", heights.map((h, i) => `M${i} 8v${-h}h.7v${h}z`).join(""));
  bars.setAttribute("fill", "currentColor");
  drawing.append(bars);
  return drawing;
}

function row(text, logprob, tag, chosen = null) {
  const item = document.createElement(tag);
  const name = document.createElement(chosen ? "button" : "code");
  name.textContent = visible(text);
  if (chosen) {
    name.type = "button";
    name.setAttribute("aria-label", `Go on with ${said(text)}, ${percent(logprob)}`);
    name.addEventListener("click", chosen);
  }
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.style.setProperty("--share", Math.exp(logprob));
  const share = document.createElement("span");
  share.textContent = percent(logprob);
  item.append(name, bar, share);
  return item;
}

/** Under the token, or above it where there is no room; inside the window in any case. */
function place(box) {
  const { offsetWidth: width, offsetHeight: height } = inspector;
  const left = Math.min(Math.max(box.left, 8), innerWidth - width - 8);
  const below = box.bottom + 6;
  const top = below + height < innerHeight - 8 ? below : Math.max(box.top - height - 6, 8);
  inspector.style.setProperty("left", `${left}px`);
  inspector.style.setProperty("top", `${top}px`);
}
