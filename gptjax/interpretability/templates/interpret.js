"use strict";
// Draws the findings in #data (page.py says what they are). Tables are the pictures: every cell has
// its number as text, the arrow keys move in them, and `choose` tells the page what was chosen.
const DATA = JSON.parse(document.getElementById("data").textContent);
const TOKENS = DATA.tokens.map((word) => DATA.words[word]);
const LAST = TOKENS.length - 1;
const state = { position: LAST, layer: 0, head: 0 };
const listeners = [];
const choose = (change) => {
  Object.assign(state, change);
  for (const listener of listeners) listener();
};
const whenChosen = (listener) => { listeners.push(listener); listener(); };

// Elements

const el = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};
const percent = (p) =>
  p >= 0.1 ? Math.round(100 * p) + "%" : p >= 0.001 ? (100 * p).toFixed(1) + "%" : "<0.1%";
// About three digits of the largest number beside it.
const short = (x, most = Math.abs(x)) => {
  if (x === null) return "from 0";
  const digits = Math.min(Math.max(2 - Math.round(Math.log10(most || 1)), 0), 6);
  const text = x.toFixed(digits);
  return Number(text) ? text.replace("-", "−") : "0";
};
const share = (x) => (x === null ? "more than all of it, which was 0" : percent(x));
const quoted = (word) => "“" + word + "”";
// Colours, of the scheme that the page is shown in; `painted` is painted again when it changes.
const scheme = matchMedia("(prefers-color-scheme: dark)");
const painted = new Map(), repaints = [];
let colours;
const readColours = () => {
  const style = getComputedStyle(document.documentElement);
  const [none, above, below] = ["--panel", "--hot", "--cold"].map((name) =>
    style.getPropertyValue(name).trim().match(/\w\w/g).map((part) => parseInt(part, 16)));
  colours = (value) => {
    const size = Math.min(Math.abs(value), 1), to = value < 0 ? below : above;
    return none.map((from, i) => Math.round(from + (to[i] - from) * size));
  };
};
// Black or white, whichever can be read better on a colour (WCAG 2, relative luminance).
const ink = (rgb) => {
  const [r, g, b] = rgb.map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
};
// Colours a cell by a value of -1 to 1.
const paint = (node, value) => {
  painted.set(node, value);
  const colour = colours(value);
  node.style.backgroundColor = `rgb(${colour.join(" ")})`;
  node.style.color = ink(colour);
};
readColours();
scheme.addEventListener("change", () => {
  readColours();
  painted.forEach((value, node) => paint(node, value));
  repaints.forEach((repaint) => repaint());
});
const largest = (values) =>
  values.flat().reduce((most, x) => Math.max(most, Math.abs(x ?? 0)), 0) || 1;

const section = (id, title, text) => {
  const node = el("section", { "aria-labelledby": id }, el("h2", { id }, title));
  if (text) node.append(el("p", { class: "soft" }, text));
  document.querySelector("main").append(node);
  return node;
};

// The cell that has the focus is the one that Tab reaches; arrows, Home and End move it.
const walk = (cells, columns) => {
  const focus = (i) => {
    cells.forEach((cell) => { cell.tabIndex = -1; });
    cells[i].tabIndex = 0;
    cells[i].focus();
  };
  cells.forEach((cell, i) => {
    cell.tabIndex = i ? -1 : 0;
    cell.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
      const column = i % columns;
      const next = event.key === "Home" ? i - column
        : event.key === "End" ? i - column + columns - 1 : i + moves[event.key];
      const leaves = (event.key === "ArrowLeft" && !column)
        || (event.key === "ArrowRight" && column === columns - 1);
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        cell.click();
      } else if (!Number.isNaN(next)) {
        event.preventDefault();
        if (cells[next] && !leaves) focus(next);
      }
    });
  });
};

// A table of cells by row and column. cell(row, column): {text, value, label, classes}; chosen(row,
// column): whether it is; pick: called with what is clicked, look: with what is pointed at.
const grid = ({ label, corner, rows, columns, cell, chosen, pick, look, classes = "" }) => {
  const cells = [];
  const head = el("tr", {}, el("th", { scope: "col" }, corner ?? ""));
  for (const name of columns) head.append(el("th", { scope: "col" }, el("span", {}, name)));
  const body = rows.map((name, row) => {
    const line = el("tr", {}, el("th", { scope: "row" }, name));
    columns.forEach((_, column) => {
      const { text, value, label: told, classes: kinds } = cell(row, column);
      const node = el("td", { "aria-label": told, class: kinds }, text);
      if (value !== undefined) paint(node, value);
      node.addEventListener("click", () => pick?.(row, column));
      for (const kind of ["pointerenter", "focus"]) {
        node.addEventListener(kind, () => look?.(row, column));
      }
      cells.push(node);
      line.append(node);
    });
    return line;
  });
  walk(cells, columns.length);
  if (chosen) {
    whenChosen(() => cells.forEach((node, i) => {
      const at = chosen(Math.floor(i / columns.length), i % columns.length);
      node.classList.toggle("chosen", at);
      node.setAttribute("aria-selected", at);
    }));
  }
  const table = el("table", { role: "grid", "aria-label": label }, el("thead", {}, head),
    el("tbody", {}, ...body));
  return el("div", { class: "map " + classes }, el("div", { class: "scroll" }, table));
};

// A map of DATA: {title, text, rows, columns, values, signed}; rows and columns are names.
const map = (spec, { pick, chosen, classes = "" } = {}) => {
  const most = largest(spec.values);
  const reading = el("output", { "aria-live": "off" }, "\u00a0");
  const number = (row, column) => short(spec.values[row][column], most);
  const told = (row, column) =>
    `${spec.rows[row]}, ${spec.columns[column]}: ${number(row, column)}`;
  const table = grid({
    label: spec.title,
    rows: spec.rows.map((name) => name.replace("layer ", "")),
    columns: spec.columns.map((name) => name.replace("head ", "")),
    cell: (row, column) => {
      const value = spec.values[row][column];
      return { text: number(row, column), value: (value ?? most) / most, label: told(row, column) };
    },
    look: (row, column) => { reading.textContent = told(row, column); },
    pick, chosen, classes,
  });
  const scale = el("span", { class: "scale" + (spec.signed ? " signed" : "") },
    spec.signed ? short(-most) : "0", el("i"), short(most));
  return el("figure", {},
    el("figcaption", {}, el("h3", {}, spec.title), el("p", {}, spec.text), scale),
    reading, table);
};

// The prompt as buttons, of which one is chosen. shade(i): {value, note} of a token.
const strip = (node, label, { shade, hover } = {}) => {
  node.setAttribute("role", "radiogroup");
  node.setAttribute("aria-label", label);
  const buttons = TOKENS.map((word, i) => el("button", {
    role: "radio", type: "button",
    onclick: () => choose({ position: i }),
    onpointerenter: () => hover?.(i),
    onpointerleave: () => hover?.(state.position),
  }, word));
  node.replaceChildren(...buttons);
  walk(buttons, buttons.length);
  const colour = () => buttons.forEach((button, i) => {
    if (!shade) return;
    const { value, note } = shade(i);
    paint(button, value);
    button.replaceChildren(TOKENS[i], el("small", {}, note));
  });
  whenChosen(() => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i === state.position);
      button.tabIndex = i === state.position ? 0 : -1;
    });
    colour();
  });
  return colour;
};

// Rows of words with probabilities as bars; with a second number, two bars.
const odds = (rows) => el("table", { class: "odds" }, el("tbody", {}, ...rows.map(
  ([word, p, q]) => el("tr", {},
    el("th", { scope: "row" }, DATA.words[word]),
    el("td", { class: "number" }, percent(p)),
    ...(q === undefined ? [] : [el("td", { class: "number" }, percent(q))]),
    el("td", { class: "track" },
      el("span", { style: `width: ${(100 * p).toFixed(1)}%` }),
      ...(q === undefined ? []
        : [el("span", { class: "second", style: `width: ${(100 * q).toFixed(1)}%` })]))))));

const choices = (legend, names, change) => {
  const group = el("fieldset", { class: "choices" }, el("legend", {}, legend));
  names.forEach((name, i) => group.append(el("label", {},
    el("input", { type: "radio", name: legend, checked: !i, onchange: () => change(name) }),
    " " + name)));
  return group;
};

// The layers' predictions

const drawLenses = () => {
  const names = Object.keys(DATA.lenses);
  const node = section("lens", "What each layer would say next",
    "The residual stream after each layer, read as if it were the last: its likeliest next token, "
    + "darker where it is surer, bold where it is what the model says in the end. Point at a cell "
    + "for its ten likeliest.");
  const place = el("div"), panel = el("div", { class: "sticky", "aria-live": "polite" });
  const layers = DATA.lens_rows;
  let lens = DATA.lenses[names[0]], row = layers.length - 1;
  const detail = (column) => panel.replaceChildren(
    el("h3", {}, layers[row]), el("p", { class: "note" }, "after " + quoted(TOKENS[column])),
    odds(lens.top[row][column]));
  const draw = (name) => {
    lens = DATA.lenses[name];
    const final = lens.top[layers.length - 1].map((top) => top[0][0]);
    place.replaceChildren(grid({
      label: name, classes: "lens", columns: TOKENS,
      rows: layers.map((layer) => layer.replace("layer ", "")),
      cell: (layer, column) => {
        const [word, p] = lens.top[layer][column][0];
        return {
          text: DATA.words[word], value: p, classes: word === final[column] ? "final" : undefined,
          label: `${layers[layer]}, after ${TOKENS[column]}: ${DATA.words[word]} ${percent(p)}`,
        };
      },
      chosen: (layer, column) => layer === row && column === state.position,
      look: (layer, column) => { row = layer; detail(column); },
      pick: (layer, column) => { row = layer; choose({ position: column }); },
    }));
    detail(state.position);
  };
  if (names.length > 1) node.append(choices("lens", names, draw));
  node.append(el("div", { class: "side" }, place, panel));
  draw(names[0]);
  whenChosen(() => {
    detail(state.position);
    const cell = place.querySelector(".chosen"), window = place.querySelector(".scroll");
    window.scrollLeft = cell.offsetLeft - window.clientWidth / 2;
  });
  node.append(el("details", {},
    el("summary", {}, "how soon the layers agree with the output"),
    el("p", { class: "note" },
      "Log-probability of what the model says in the end, the mean over the prompt's tokens."),
    el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "after"),
        ...names.map((name) => el("th", { scope: "col", class: "number" }, name)))),
      el("tbody", {}, ...layers.map((layer, i) => el("tr", {}, el("th", { scope: "row" }, layer),
        ...names.map((name) => el("td", { class: "number" },
          short(DATA.lenses[name].agreement[i]))))))))));
};

// What speaks for the prediction

const drawAttribution = () => {
  const { target, logit, importance } = DATA;
  const word = quoted(DATA.words[target.word]);
  const node = section("attribution", "What speaks for " + word,
    `The model gives ${word} ${percent(target.p)} after the last token. `
    + "Each part of it adds to the residual stream; what a part adds to the logit of that token "
    + "is exact, and all parts together are the logit.");
  const rows = [...logit.rest.map(([name, value]) => [name, value, null]),
    ...logit.attention.map((value, i) => ["layer " + i, value, logit.mlp[i]])];
  const most = largest(rows.map(([, a, b]) => [a, b ?? 0]));
  const track = (value) => {
    if (value === null) return [el("td"), el("td", { class: "track" })];
    const size = 50 * Math.abs(value) / most;
    const bar = el("span", { class: value < 0 ? "below" : "",
      style: `left: ${value < 0 ? 50 - size : 50}%; width: ${size}%` });
    return [el("td", { class: "number" }, short(value, most)), el("td", { class: "track" }, bar)];
  };
  const head = el("tr", {}, ...["", "attention", "", "MLP", ""].map((name) =>
    el("th", { scope: "col" }, name)));
  const bars = el("figure", {}, el("figcaption", {}, el("h3", {}, "By layer"),
    el("p", {}, `logit of ${word}: ${short(logit.total)}`)),
    el("div", { class: "scroll" }, el("table", { class: "bars" }, el("thead", {}, head),
      el("tbody", {}, ...rows.map(([name, a, b]) =>
        el("tr", {}, el("th", { scope: "row" }, name), ...track(a), ...track(b)))))));
  const parts = el("figure", {}, el("figcaption", {}, el("h3", {}, "By token of the prompt"),
    el("p", {}, "How much each token pushes its log-probability up (blue) or down (orange).")));
  for (const { title, text, values } of importance) {
    const shaded = el("div", { class: "tokens" });
    const most = largest(values);
    strip(shaded, title, { shade: (i) => ({ value: values[i] / most, note: short(values[i], most) }) });
    parts.append(el("h3", {}, title), el("p", { class: "note" }, text), shaded);
  }
  node.append(el("div", { class: "side even" }, bars, parts));
};

// Attention

const decodePatterns = () => {
  const bytes = Uint8Array.from(atob(DATA.attention), (c) => c.charCodeAt(0));
  const size = (TOKENS.length * (TOKENS.length + 1)) / 2;
  return (layer, head, query, key) => key > query ? 0
    : bytes[(layer * DATA.heads + head) * size + (query * (query + 1)) / 2 + key] / 255;
};

const drawAttention = () => {
  const node = section("attention", "Where each head looks",
    "One small picture a head: each row is a token, each column what it looks at, from the first "
    + "token (left) to itself. Choose a head to see it large.");
  const count = TOKENS.length, weight = decodePatterns();
  const pictures = [];
  const body = Array.from({ length: DATA.layers }, (_, layer) => el("tr", {},
    el("th", { scope: "row" }, String(layer)),
    ...Array.from({ length: DATA.heads }, (_, head) => {
      const canvas = el("canvas", { width: count, height: count, "aria-hidden": "true" });
      const button = el("button", { type: "button", "aria-label": `layer ${layer}, head ${head}`,
        onclick: () => choose({ layer, head }) }, canvas);
      pictures.push({ layer, head, canvas, button });
      return el("td", {}, button);
    })));
  walk(pictures.map((picture) => picture.button), DATA.heads);
  const small = el("div", { class: "heads" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, ""),
      ...Array.from({ length: DATA.heads }, (_, head) => el("th", { scope: "col" }, String(head))))),
    el("tbody", {}, ...body)));
  const title = el("h3"), shaded = el("div", { class: "tokens" });
  const reading = el("output", { "aria-live": "polite" });
  const large = el("canvas", { id: "pattern", tabindex: 0, role: "img" });
  const values = el("tbody");
  let query = LAST, cursor = [LAST, 0];
  const shade = (i) => {
    const share = weight(state.layer, state.head, query, i);
    return { value: Math.sqrt(share), note: i > query ? "\u00a0" : percent(share) };
  };
  const recolour = strip(shaded, "token that looks", {
    shade, hover: (i) => { query = i; recolour(); },
  });
  const thumbnails = () => {
    for (const { layer, head, canvas } of pictures) {
      const image = new ImageData(count, count);
      for (let i = 0; i < count * count; i++) {
        const share = weight(layer, head, Math.floor(i / count), i % count);
        image.data.set([...colours(Math.sqrt(share)), 255], 4 * i);
      }
      canvas.getContext("2d").putImageData(image, 0, 0);
    }
  };
  const frame = () => {
    const room = Math.min(large.parentElement.clientWidth || 500, 704);
    const margin = Math.min(90, room / 4), width = Math.min(room, margin + 60 * count);
    return { width, margin, cell: (width - margin) / count };
  };
  const matrix = () => {
    const { width, margin, cell } = frame(), ratio = window.devicePixelRatio || 1;
    large.width = large.height = Math.round(width * ratio);
    large.style.width = width + "px";
    const context = large.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    context.scale(ratio, ratio);
    context.font = `${Math.max(Math.min(cell * 0.8, 13), 6)}px system-ui, sans-serif`;
    for (let i = 0; i < count; i++) {
      for (let j = 0; j <= i; j++) {
        const share = Math.sqrt(weight(state.layer, state.head, i, j));
        context.fillStyle = `rgb(${colours(share).join(" ")})`;
        context.fillRect(margin + j * cell, margin + i * cell, cell - 0.5, cell - 0.5);
      }
      const at = margin + (i + 0.5) * cell;
      context.fillStyle = style.getPropertyValue(i === cursor[0] ? "--second" : "--text");
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(TOKENS[i].slice(0, 14), margin - 5, at, margin - 5);
      context.save();
      context.translate(at, margin - 5);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillStyle = style.getPropertyValue(i === cursor[1] ? "--second" : "--text");
      context.fillText(TOKENS[i].slice(0, 14), 0, 0, margin - 5);
      context.restore();
    }
    context.strokeStyle = style.getPropertyValue("--second");
    context.lineWidth = 2;
    context.strokeRect(margin + cursor[1] * cell, margin + cursor[0] * cell, cell, cell);
  };
  const point = (i, j) => {
    cursor = [Math.min(Math.max(i, 0), LAST), Math.min(Math.max(j, 0), LAST)];
    cursor[1] = Math.min(cursor[1], cursor[0]);
    [query] = cursor;
    const share = weight(state.layer, state.head, ...cursor);
    reading.textContent =
      `${quoted(TOKENS[cursor[0]])} looks at ${quoted(TOKENS[cursor[1]])}: ${percent(share)}`;
    recolour();
    matrix();
  };
  const place = (event) => {
    const { margin, cell } = frame(), area = large.getBoundingClientRect();
    return [event.clientY - area.top, event.clientX - area.left].map((x) =>
      Math.floor((x - margin) / cell));
  };
  large.addEventListener("pointermove", (event) => point(...place(event)));
  large.addEventListener("click", (event) => {
    point(...place(event));
    choose({ position: cursor[0] });
  });
  large.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!move[event.key]) return;
    event.preventDefault();
    const [down, right] = move[event.key];
    point(cursor[0] + down, cursor[1] + right);
  });
  const table = el("details", {}, el("summary", {}, "as a table"), el("div", { class: "scroll" },
    el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "token"),
      el("th", { scope: "col" }, "looks most at"))), values)));
  const shown = el("figure", { class: "sticky" }, el("figcaption", {}, title,
    el("p", {}, "What the chosen token looks at; point at another one, here or below.")),
    shaded, reading, large, table);
  node.append(el("div", { class: "side even" }, small, shown));
  whenChosen(() => {
    const { layer, head, position } = state;
    title.textContent = `Layer ${layer}, head ${head}`;
    large.setAttribute("aria-label",
      `attention pattern of layer ${layer}, head ${head}; the arrow keys read it cell by cell`);
    for (const picture of pictures) {
      const pressed = picture.layer === layer && picture.head === head;
      picture.button.setAttribute("aria-pressed", pressed);
      if (pressed) {
        const line = picture.button.closest("tr");
        small.scrollTop = line.offsetTop + line.offsetHeight - small.clientHeight / 2;
      }
    }
    values.replaceChildren(...TOKENS.map((word, i) => {
      const shares = TOKENS.slice(0, i + 1).map((_, j) => [weight(layer, head, i, j), j]);
      shares.sort((a, b) => b[0] - a[0]);
      const text = shares.slice(0, 3).map(([share, j]) => `${TOKENS[j]} ${percent(share)}`);
      return el("tr", {}, el("th", { scope: "row" }, word), el("td", {}, text.join(", ")));
    }));
    const best = TOKENS.slice(0, position + 1)
      .reduce((top, _, j) => weight(layer, head, position, j) > weight(layer, head, position, top)
        ? j : top, 0);
    point(position, best);
  });
  const repaint = () => { thumbnails(); matrix(); };
  repaint();
  repaints.push(repaint);
  new ResizeObserver(matrix).observe(large.parentElement);
};

// Maps

const pickHead = (layer, head) => choose({ layer, head });
const chosenHead = (layer, head) => layer === state.layer && head === state.head;

const drawHeads = () => {
  const node = section("heads", "What each head does",
    "Rows are layers, columns heads. Choose a cell to see where that head looks.");
  const maps = el("div", { class: "maps" });
  for (const spec of DATA.head_maps) {
    maps.append(map(spec, { pick: pickHead, chosen: chosenHead }));
  }
  node.append(maps);
};

const drawPatching = () => {
  const { corrupted, meaning, maps } = DATA.patching;
  const node = section("patching", "Where the fact is", meaning);
  node.append(el("p", {}, "The other prompt: ",
    el("strong", {}, corrupted.map((word) => DATA.words[word]).join(" "))));
  const place = el("div", { class: "maps" });
  for (const spec of maps) {
    const ofHeads = spec.columns[0].startsWith("head ");
    place.append(map(spec, ofHeads ? { pick: pickHead, chosen: chosenHead }
      : { classes: spec.columns.length > 16 ? "tall bare" : "tall" }));
  }
  node.append(place);
};

const drawDifference = () => {
  const { other, settings, map: tensors, single, unmatched, kl, predictions, reason } =
    DATA.difference;
  const node = section("difference", `Against ${other}`,
    `${DATA.difference.moved_count} of ${DATA.difference.count} tensors moved.`);
  const facts = [...settings.map(([name, a, b]) => `${name}: ${a} here, ${b} there`),
    ...Object.entries(single).map(([path, change]) => `${path} moved by ${share(change)}`),
    ...unmatched, ...(reason ? [`The predictions are not compared: ${reason}.`] : [])];
  if (facts.length) node.append(el("ul", {}, ...facts.map((fact) => el("li", {}, fact))));
  if (predictions.length) {
    const panel = el("div", { "aria-live": "polite" }), shaded = el("div", { class: "tokens" });
    const most = Math.max(...kl);
    const show = (i) => panel.replaceChildren(
      el("p", { class: "note" }, `after ${quoted(TOKENS[i])}: here (blue), there (orange)`),
      odds(predictions[i]));
    strip(shaded, "predictions that changed", {
      shade: (i) => ({ value: most ? kl[i] / most : 0, note: short(kl[i], most) }), hover: show,
    });
    whenChosen(() => show(state.position));
    node.append(el("h3", {}, "Which predictions changed"),
      el("p", { class: "note" }, "KL(here || there) in nats of what follows each token."),
      el("div", { class: "side" }, shaded, panel));
  }
  if (tensors) node.append(map(tensors, { classes: "tall" }));
};

strip(document.getElementById("prompt"), "token of the prompt");
[state.layer, state.head] = DATA.chosen_head;
drawLenses();
drawAttribution();
drawAttention();
drawHeads();
if (DATA.patching) drawPatching();
if (DATA.difference) drawDifference();
document.querySelector("nav").append(...[...document.querySelectorAll("h2")].map((h2) =>
  el("a", { href: "#" + h2.id }, h2.textContent)));
