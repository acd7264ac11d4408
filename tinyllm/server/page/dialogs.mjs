// Windows over the page: settings, shortcuts, the key. The browser's own <dialog> keeps the keyboard inside.

import { key } from "./api.mjs";
import { find, h, iconButton } from "./dom.mjs";
import { CHOICES_SHOWN, DEFAULTS, FIELDS } from "./settings.mjs";

function open(dialog, title, ...content) {
  const head = h("div", { class: "dialog-head" }, h("h2", { id: dialog.getAttribute("aria-labelledby") }, title),
    iconButton("close", "Close", () => dialog.close()));
  dialog.replaceChildren(head, ...content);
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close(); // beside the window
  };
  dialog.showModal();
}

/** The settings of a conversation; `changed(settings)` with each change. */
export function openSettings(settings, changed) {
  const now = { ...DEFAULTS, ...settings };
  const set = (name, value) => {
    now[name] = value;
    changed({ ...now });
  };
  const show = () => {
    const numbers = FIELDS.map((field) => slider(field, now[field.name], (value) => set(field.name, value)));
    const form = h(
      "form",
      { class: "settings", onsubmit: (event) => event.preventDefault() },
      labelled("System message", "What the model is told before the conversation.",
        h("textarea", { rows: 4, value: now.system, placeholder: "You are …", oninput: (e) => set("system", e.target.value) })),
      h("fieldset", {}, h("legend", {}, "Sampling"), numbers),
      h("fieldset", {}, h("legend", {}, "Length and chance"),
        labelled("Longest answer", "In tokens. Empty: until the context is full.",
          whole(now.max_tokens, 1, (value) => set("max_tokens", value))),
        labelled("Seed", "The same number gives the same answer. Empty: another one each time.",
          whole(now.seed, 0, (value) => set("seed", value))),
        labelled("Stop at", "Texts that end an answer, one on each line.",
          h("textarea", { rows: 2, value: now.stop, oninput: (e) => set("stop", e.target.value) }))),
      h("fieldset", {}, h("legend", {}, "Looking inside"),
        labelled("Alternatives kept for each token", "What a click on a token shows. They take room in this browser.",
          h("select", { onchange: (e) => set("choices", Number(e.target.value)) },
            CHOICES_SHOWN.map((n) => h("option", { value: String(n), selected: n === now.choices }, n ? String(n) : "none")))),
        h("label", { class: "tick" },
          h("input", { type: "checkbox", checked: now.thinking, onchange: (e) => set("thinking", e.target.checked) }),
          "Let models that can reason do so")),
      h("button", { type: "button", class: "quiet-button", onclick: () => {
        Object.assign(now, DEFAULTS);
        changed({ ...now });
        show();
      } }, "Back to the defaults"),
    );
    const dialog = find("#settings");
    if (dialog.open) dialog.lastChild.replaceWith(form);
    else open(dialog, "Settings", form);
  };
  show();
}

let labels = 0;

function labelled(label, help, field) {
  const id = `field-${++labels}`;
  field.id = id;
  field.setAttribute("aria-describedby", `${id}-help`);
  return h("div", { class: "field" }, h("label", { for: id }, label), field, h("p", { id: `${id}-help`, class: "hint" }, help));
}

function slider({ label, help, min, max, step }, value, set) {
  const shown = h("output", {}, String(value));
  const field = h("input", { type: "range", min, max, step, oninput: (event) => {
    shown.textContent = event.target.value;
    set(Number(event.target.value));
  } });
  field.value = String(value);
  const found = labelled(label, help, field);
  found.classList.add("slider");
  found.insertBefore(shown, field);
  return found;
}

function whole(value, min, set) {
  return h("input", { type: "number", min, step: 1, inputmode: "numeric", value: value === null ? "" : String(value), oninput: (event) => {
    const n = event.target.value === "" ? null : Math.trunc(Number(event.target.value));
    if (n === null || n >= min) set(n);
  } });
}

const SHORTCUTS = [
  ["Enter", "Send"],
  ["Shift + Enter", "A new line"],
  ["Esc", "Stop the answer; close a window"],
  ["Alt + N", "New conversation"],
  ["Alt + M", "To the message box"],
  ["Alt + R", "Answer again"],
  ["Alt + T", "Walk through the last answer's tokens"],
  ["← →", "Among tokens: to the one before or after"],
  ["Enter", "On a token: what it was chosen from"],
  ["Alt + H", "Colour tokens by probability"],
  ["Alt + S", "Settings"],
  ["Alt + /", "This list"],
];

export function openShortcuts() {
  const lines = SHORTCUTS.map(([keys, what]) =>
    h("tr", {}, h("td", {}, keys.split(" + ").flatMap((k, n) => [n ? " + " : null, h("kbd", {}, k)])), h("td", {}, what)));
  open(find("#shortcuts"), "Keyboard shortcuts",
    h("table", { class: "shortcuts" }, h("thead", { class: "visually-hidden" }, h("tr", {}, h("th", { scope: "col" }, "Keys"), h("th", { scope: "col" }, "What they do"))),
      h("tbody", {}, lines)));
}

/** Asks for the server's key; true once one was given, false where the window was closed. */
export function askKey(message) {
  const dialog = find("#key-dialog");
  return new Promise((resolve) => {
    const box = h("input", { type: "password", autocomplete: "off", required: true });
    let given = false;
    const form = h(
      "form",
      { class: "settings", onsubmit: (event) => {
        event.preventDefault();
        key.set(box.value.trim());
        given = true;
        dialog.close();
      } },
      h("p", {}, `${message} It is what tinyllm serve was started with: --api-key.`),
      labelled("Key", "Kept until this tab is closed.", box),
      h("button", { type: "submit", class: "plain-button" }, "Use this key"),
    );
    dialog.addEventListener("close", () => resolve(given), { once: true });
    if (dialog.open) dialog.close();
    open(dialog, "A key is needed", form);
    box.focus();
  });
}
