// The page: what each button does, and what is shown when.

import { branch, parts, write } from "./answer.mjs";
import * as api from "./api.mjs";
import { Choices } from "./choices.mjs";
import { Composer } from "./composer.mjs";
import { askKey, openSettings, openShortcuts } from "./dialogs.mjs";
import { find, h, icon } from "./dom.mjs";
import { Messages } from "./messages.mjs";
import { DEFAULTS } from "./settings.mjs";
import { Sidebar } from "./sidebar.mjs";
import { Store } from "./store.mjs";
import { startTheme } from "./theme.mjs";
import { joined } from "./tokens.mjs";
import { add, newConversation, path, titleOf } from "./tree.mjs";

const STARTERS = ["Tell me a short story about a lighthouse.", "Explain what a hash table is, with an example.", "Write a haiku about rain."];
const FRAME_MS = 50; // between two pictures of an answer that is being written

const store = new Store();
const scroller = find("#scroll");
let models = [];
let conversation = null;
let running = null; // {node, stop} of the answer being written

const messages = new Messages(find("#messages"), { again, goOn, resend, rewrite, shown: () => (keep(), showAll()), openToken });
const choices = new Choices(find("#choices"), {
  branch: (node, k, choice) => branchWith(node, k, [{ ...choice, a: node.tokens[k].a }]),
  write: branchWithWords,
  move: (node, span) => messages.focusToken(node, span),
});
const composer = new Composer({ send, stop, say });
const sidebar = new Sidebar(store, {
  open: openConversation,
  renamed(id, title) {
    const found = id === conversation.id ? conversation : store.load(id);
    if (found) {
      found.title = title;
      store.save(found);
    }
    sidebar.show(conversation.id);
  },
  remove(id) {
    store.remove(id);
    if (id === conversation.id) {
      stop();
      begin();
    } else sidebar.show(conversation.id);
    find("#new").focus();
  },
  imported(text) {
    try {
      const n = store.import(text);
      announce(`${n} ${n === 1 ? "conversation" : "conversations"} imported.`);
      sidebar.show(conversation.id);
    } catch (error) {
      say(error.message);
    }
  },
});

// ---- conversations

function begin() {
  stop();
  const { settings } = store.preferences();
  conversation = newConversation({ ...DEFAULTS, ...settings, system: "" });
  location.hash = "";
  showAll();
  composer.box.focus();
}

function openConversation(id) {
  if (id !== conversation?.id) stop();
  conversation = store.load(id) ?? conversation ?? newConversation(DEFAULTS);
  location.hash = conversation.id;
  showAll();
  sidebar.slide(false);
  toEnd();
}

/** Keeps the conversation in this browser. */
function keep(of = conversation) {
  if (!Object.keys(of.nodes).length) return;
  of.updated = Date.now();
  if (!store.save(of)) say("This browser has no room left for conversations: delete some, or export them first.");
}

function showAll() {
  choices.close();
  messages.show(conversation, running?.node ?? null);
  const empty = !path(conversation).length;
  find("#welcome").hidden = !empty;
  document.title = conversation.title ? `${conversation.title} · tinyllm` : "tinyllm";
  sidebar.show(conversation.id);
  showContext();
}

// ---- writing

function send({ text, files }) {
  const last = path(conversation).at(-1);
  const node = add(conversation, last?.id ?? null, { role: "user", text, ...(files.length ? { files } : {}) });
  conversation.title ||= titleOf(text || files[0].name);
  location.hash = conversation.id;
  return answer(node.id);
}

/** Another wording of what was asked, as a sibling, with an answer of its own. */
function resend(node, text) {
  stop();
  const other = add(conversation, node.parent, { role: "user", text, ...(node.files ? { files: node.files } : {}) });
  return answer(other.id);
}

/** Another wording of an answer, as a sibling. */
function rewrite(node, text) {
  add(conversation, node.parent, { role: "assistant", text, model: node.model, finish: "edited" });
  keep();
  showAll();
}

function again(node) {
  return answer(node.parent);
}

/** Writes on where an answer ended. */
function goOn(node) {
  while (node.tokens?.at(-1)?.b || node.tokens?.at(-1)?.end) node.tokens.pop(); // half a character
  const { text } = parts(node);
  if (text) node.text = joined(node.tokens).text.slice(text.end - node.text.length);
  return run(node);
}

function branchWith(node, k, tokens) {
  const begun = branch(node, k, tokens);
  const other = add(conversation, node.parent, { role: "assistant", model: currentModel(), ...begun });
  if (!tokens.at(-1).end) return run(other);
  other.finish = "stop"; // the end was chosen: there is nothing to write
  keep();
  return showAll();
}

async function branchWithWords(node, k, text) {
  try {
    const token = node.tokens[k];
    const spaced = token.t.startsWith(" ") && !text.startsWith(" ") ? ` ${text}` : text;
    const found = await api.tokenize(node.model ?? currentModel(), spaced);
    const tokens = found.map(({ id, piece }) => (typeof piece === "string" ? { i: id, t: piece, p: null } : { i: id, t: "", b: piece, p: null }));
    if (tokens.length) await branchWith(node, k, tokens);
  } catch (error) {
    say(error.message);
  }
}

function answer(parent) {
  return run(add(conversation, parent, { role: "assistant", text: "", model: currentModel() }));
}

/** Has the server write an answer, or the rest of one. */
async function run(node) {
  stop();
  say("");
  const of = conversation;
  const control = new AbortController();
  const mine = { node, stop: () => control.abort() };
  running = mine;
  composer.setBusy(true);
  keep();
  showAll();
  toEnd();
  announce("The answer is being written.");
  const draw = paced(() => {
    if (of !== conversation) return;
    const follow = atEnd();
    messages.update(node, running === mine ? node : null);
    showContext();
    if (follow) toEnd();
  });
  try {
    await write(of, node, { signal: control.signal, changed: draw, waiting: (text) => say(text, "quiet") });
  } catch (error) {
    if (await askKey(error.message)) {
      delete node.error;
      loadModels();
      if (running === mine) return run(node);
    }
  }
  if (running === mine) {
    running = null;
    composer.setBusy(false);
  }
  keep(of);
  draw.now();
  announce(node.error ?? (node.finish === "stopped" ? "Stopped." : `Answer: ${node.text}`));
  if (of === conversation) sidebar.show(of.id);
  if (!contextOf(node.model)) loadModels(); // now it is loaded, and known
  return undefined;
}

function stop() {
  running?.stop();
}

/** Calls `draw` now and then, however often it is asked for; `now` without delay. */
function paced(draw) {
  let timer = 0;
  const later = () => {
    timer ||= setTimeout(later.now, FRAME_MS);
  };
  later.now = () => {
    clearTimeout(timer);
    timer = 0;
    draw();
  };
  return later;
}

// ---- models

async function loadModels() {
  try {
    models = await api.models();
  } catch (error) {
    if (error.kind === "key" && (await askKey(error.message))) return loadModels();
    say(error.message);
    if (error.kind === "gone" || error.kind === "loading") setTimeout(loadModels, 3000);
    return undefined;
  }
  say("");
  const wanted = currentModel();
  const select = find("#model");
  select.replaceChildren(...models.map((m) => h("option", { value: m.id }, m.id)));
  select.value = models.some((m) => m.id === wanted) ? wanted : (models[0]?.id ?? "");
  return showContext();
}

const currentModel = () => find("#model").value || store.preferences().model || models[0]?.id;
const contextOf = (name) => models.find((m) => m.id === name)?.meta?.n_ctx ?? 0;

/** How much of the context the conversation takes. */
function showContext() {
  const last = path(conversation).findLast((node) => node.role === "assistant" && node.stats?.tokens);
  const used = last?.stats.used ?? 0;
  const limit = contextOf(last?.model ?? currentModel());
  const place = find("#context");
  const number = (n) => n.toLocaleString("en");
  place.textContent = used ? (limit ? `${number(used)} of ${number(limit)} tokens` : `${number(used)} tokens`) : "";
  place.style.setProperty("--used", limit ? `${Math.min(100, (100 * used) / limit)}%` : "0%");
  place.classList.toggle("measured", Boolean(used && limit));
  if (running && last?.stats.speed && last === running.node) {
    place.textContent = `${last.stats.tokens} tokens, ${last.stats.speed.toFixed(1)} tokens/s`;
    place.classList.remove("measured");
  }
}

// ---- tokens

function openToken(node, k, span) {
  choices.open(node, k, span);
}

function setHeat(on) {
  document.body.classList.toggle("heat", on);
  find("#heat").setAttribute("aria-pressed", String(on));
  store.prefer({ heat: on });
}

// ---- what is said beside the messages

function say(text, tone = "") {
  const notice = find("#notice");
  notice.textContent = text;
  notice.hidden = !text;
  notice.className = tone;
}

function announce(text) {
  find("#status").textContent = text;
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

// ---- the page itself

const LAST_ANSWER = () => path(conversation).findLast((node) => node.role === "assistant");
const KEYS = {
  KeyN: begin,
  KeyM: () => composer.box.focus(),
  KeyR: () => LAST_ANSWER() && !running && again(LAST_ANSWER()),
  KeyT: () => find('.message.assistant:last-child [aria-label="Walk through the tokens"]')?.click(),
  KeyH: () => setHeat(!document.body.classList.contains("heat")),
  KeyS: showSettings,
  Slash: openShortcuts,
};

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
  else if (event.altKey && !event.ctrlKey && !event.metaKey && KEYS[event.code] && !find("dialog[open]")) KEYS[event.code]();
  else return;
  event.preventDefault();
});

function showSettings() {
  openSettings(conversation.settings, (settings) => {
    conversation.settings = settings;
    store.prefer({ settings });
    keep();
  });
}

for (const [id, name] of Object.entries({
  "sidebar-open": "menu", "sidebar-close": "close", heat: "heat", "settings-open": "sliders", help: "help", attach: "clip", "to-end": "down",
})) {
  find(`#${id}`).replaceChildren(icon(name));
}
find("#new").prepend(icon("plus"));
find("#new").addEventListener("click", () => (sidebar.slide(false), begin()));
find("#heat").addEventListener("click", KEYS.KeyH);
find("#settings-open").addEventListener("click", showSettings);
find("#help").addEventListener("click", openShortcuts);
find("#to-end").addEventListener("click", toEnd);
find("#model").addEventListener("change", (event) => (store.prefer({ model: event.target.value }), showContext()));
find("#starters").append(...STARTERS.map((text) => h("li", {}, h("button", { type: "button", onclick: () => composer.fill(text) }, text))));
scroller.addEventListener("scroll", () => {
  find("#to-end").hidden = atEnd();
  choices.close();
}, { passive: true });
addEventListener("storage", () => conversation && sidebar.show(conversation.id)); // another tab has written
addEventListener("pagehide", () => running && keep());
startTheme(find("#theme"), store);
setHeat(Boolean(store.preferences().heat));

const asked = location.hash.slice(1);
if (asked && store.load(asked)) openConversation(asked);
else begin();
loadModels();
