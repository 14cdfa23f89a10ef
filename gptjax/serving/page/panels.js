// The two panels at the sides, the appearance, and the dialog that asks for a key.

const wide = { conversations: matchMedia("(min-width: 56rem)"), settings: matchMedia("(min-width: 80rem)") };
const rest = () => document.querySelectorAll("main, .top, .skip, .panel:not(.open)");

/** A panel stands beside the text where there is room; else a button opens it over the text. */
export function start() {
  for (const name of Object.keys(wide)) {
    const opener = document.getElementById(`open-${name}`);
    const panel = document.getElementById(name);
    opener.addEventListener("click", () => open(name));
    panel.querySelector(".close").addEventListener("click", () => close(name));
    panel.addEventListener("keydown", (event) => event.key === "Escape" && close(name));
    wide[name].addEventListener("change", () => close(name, false));
  }
  document.addEventListener("click", ({ target }) => {
    if (target === document.body || target === document.documentElement) Object.keys(wide).map((name) => close(name));
  });
  startTheme();
}

function open(name) {
  const panel = document.getElementById(name);
  panel.classList.add("open");
  document.getElementById(`open-${name}`).setAttribute("aria-expanded", "true");
  for (const element of rest()) element.inert = true;
  panel.querySelector("button").focus();
}

export function close(name, refocus = true) {
  const panel = document.getElementById(name);
  if (!panel.classList.contains("open")) return;
  panel.classList.remove("open");
  for (const element of rest()) element.inert = false;
  const opener = document.getElementById(`open-${name}`);
  opener.setAttribute("aria-expanded", "false");
  if (refocus) opener.focus();
}

function startTheme() {
  const chosen = document.documentElement.dataset.theme ?? "device";
  for (const radio of document.querySelectorAll("#theme input")) {
    radio.checked = radio.value === chosen;
    radio.addEventListener("change", () => setTheme(radio.value));
  }
}

function setTheme(theme) {
  if (theme === "device") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("gptjax.theme", theme);
  } catch {
    // It holds until the page is closed.
  }
}

/** The key that the user types; asks once however often it is called meanwhile. */
let asking = null;
export function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    field.value = dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => resolve(dialog.returnValue && field.value), { once: true });
  }).finally(() => (asking = null));
  return asking;
}
