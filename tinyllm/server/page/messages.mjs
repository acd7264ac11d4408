// The messages of a conversation, as they are shown: one item each, built once and then kept up to date.

import { parts } from "./answer.mjs";
import { find, h, icon, iconButton } from "./dom.mjs";
import { clearMarkdown, copyButton, showMarkdown } from "./render.mjs";
import { path, show, siblings } from "./tree.mjs";

export class Messages {
  /** `actions`: again, goOn, edit, resend, shown, openToken: what the buttons do. */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    list.addEventListener("click", (event) => this.#click(event));
    list.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Shows a conversation's messages; `writing` is the one being written, or null. */
  show(conversation, writing = null) {
    this.conversation = conversation;
    this.writing = writing;
    this.list.replaceChildren(...path(conversation).map((node) => this.#item(node)));
  }

  /** Shows what a message has gained. */
  update(node, writing) {
    this.writing = writing;
    const item = this.item(node);
    if (item) this.#fill(item, node);
  }

  item(node) {
    return find(`[data-id="${CSS.escape(node.id)}"]`, this.list);
  }

  #item(node) {
    const mine = node.role === "user";
    const item = h(
      "li",
      { class: `message ${node.role}`, "data-id": node.id },
      h("h2", { class: "visually-hidden" }, mine ? "You" : "Answer"),
      mine ? this.#asked(node) : this.#answer(),
      h("div", { class: "tools" }),
    );
    this.#fill(item, node);
    return item;
  }

  #asked(node) {
    const files = (node.files ?? []).map((f) => h("li", { class: "chip" }, icon("file"), f.name));
    return h("div", { class: "bubble" }, files.length ? h("ul", { class: "chips", "aria-label": "Attached files" }, files) : null,
      h("div", { class: "words" }, node.text));
  }

  #answer() {
    return h(
      "div",
      { class: "answer" },
      h("details", { class: "reasoning", hidden: true }, h("summary", {}, "Reasoning"), h("div", { class: "prose" })),
      h("div", { class: "prose text" }),
      h("details", { class: "references", hidden: true }, h("summary", {}), h("ol", {})),
      h("p", { class: "waiting", hidden: true }, h("span", { class: "dots", "aria-hidden": "true" }), "Reading"),
      h("p", { class: "error", hidden: true }),
    );
  }

  #fill(item, node) {
    const writing = this.writing === node;
    item.classList.toggle("writing", writing);
    if (node.role === "assistant") this.#fillAnswer(item, node, writing);
    const tools = find(".tools", item);
    tools.hidden = writing;
    if (!writing) tools.replaceChildren(...this.#tools(node));
  }

  #fillAnswer(item, node, writing) {
    const { reasoning, text } = parts(node);
    const box = find(".reasoning", item);
    box.hidden = !node.reasoning;
    if (node.reasoning) {
      find("summary", box).textContent = writing && !node.text ? "Reasoning…" : "Reasoning";
      showMarkdown(find(".prose", box), node.reasoning, node.tokens, reasoning);
    }
    const prose = find(".text", item);
    if (node.text) showMarkdown(prose, node.text, node.tokens, text);
    else clearMarkdown(prose);
    find(`.token[data-token="${node.branchedAt}"]`, item)?.classList.add("branched");
    find(".waiting", item).hidden = !writing || Boolean(node.text || node.reasoning);
    this.#fillReferences(find(".references", item), node.references ?? []);
    const error = find(".error", item);
    error.hidden = !node.error;
    error.textContent = node.error ?? "";
  }

  /** The documents that an answer rests on: where each excerpt stands, and its text. */
  #fillReferences(box, references) {
    box.hidden = !references.length;
    find("summary", box).textContent = `From ${references.length === 1 ? "a document" : `${references.length} excerpts of documents`}`;
    find("ol", box).replaceChildren(...references.map((r) => h("li", {}, h("strong", {}, placeOf(r)), h("blockquote", {}, r.text))));
  }

  #tools(node) {
    const { actions } = this;
    if (node.role === "user") {
      return [this.#branches(node), iconButton("edit", "Edit", () => this.edit(node)), copyButton(() => node.text, "Copy message")].filter(Boolean);
    }
    const goesOn = ["length", "stopped", "edited"].includes(node.finish) || (node.error && node.text);
    return [
      this.#branches(node),
      copyButton(() => node.text, "Copy answer"),
      iconButton("again", "Answer again", () => actions.again(node)),
      iconButton("edit", "Edit", () => this.edit(node)),
      goesOn && iconButton("forward", "Go on writing", () => actions.goOn(node)),
      node.tokens?.length && iconButton("tokens", "Walk through the tokens", () => this.#walk(node)),
      h("span", { class: "stats" }, statsText(node, this.#severalModels())),
    ].filter(Boolean);
  }

  #severalModels() {
    return new Set(Object.values(this.conversation.nodes).map((n) => n.model).filter(Boolean)).size > 1;
  }

  #branches(node) {
    const all = siblings(this.conversation, node);
    if (all.length < 2) return null;
    const k = all.indexOf(node);
    const to = (step, name) => {
      const label = `${name} version`;
      const go = () => {
        show(this.conversation, all[k + step]);
        this.actions.shown();
        find(`[data-step="${step}"]:not(:disabled), [data-step]`, this.item(all[k + step]))?.focus();
      };
      return iconButton(step < 0 ? "left" : "right", label, go, { disabled: !all[k + step], "data-step": step });
    };
    return h("span", { class: "branches", role: "group", "aria-label": "Versions" }, to(-1, "Earlier"),
      h("span", { class: "count" }, `${k + 1} / ${all.length}`), to(1, "Later"));
  }

  /** Puts a box for another wording in a message's place. */
  edit(node) {
    const item = this.item(node);
    const box = h("textarea", { "aria-label": "The message's new text", value: node.text });
    const back = () => {
      item.replaceWith(this.#item(node));
      find('[aria-label="Edit"]', this.item(node))?.focus();
    };
    const save = () => (node.role === "user" ? this.actions.resend(node, box.value) : this.actions.rewrite(node, box.value));
    const form = h(
      "form",
      { class: "edit", onsubmit: (event) => (event.preventDefault(), save()) },
      box,
      h("div", { class: "row" },
        h("span", { class: "hint" }, "What was there stays as another version."),
        h("button", { type: "button", class: "quiet-button", onclick: back }, "Cancel"),
        h("button", { type: "submit", class: "plain-button" }, node.role === "user" ? "Send" : "Save")),
    );
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") back();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    item.replaceChildren(h("h2", { class: "visually-hidden" }, "Editing"), form);
    box.style.height = `${Math.min(box.scrollHeight + 2, 400)}px`;
    box.focus();
  }

  /** Puts the keyboard on an answer's first token; the arrow keys go on from there. */
  #walk(node) {
    const item = this.item(node);
    const first = find(".text .token", item) ?? find(".token", item);
    if (first) this.focusToken(node, first);
  }

  /** Makes a token a button while the keyboard is on it: a thousand buttons would be in the way. */
  focusToken(node, span) {
    const token = node.tokens[Number(span.dataset.token)];
    const p = token.p === null ? "" : `, ${Math.round(100 * Math.exp(token.p))} percent`;
    span.setAttribute("role", "button");
    span.setAttribute("aria-label", `${span.textContent.trim() || "space"}${p}`);
    span.tabIndex = 0;
    span.addEventListener("blur", () => ["role", "aria-label", "tabindex"].forEach((name) => span.removeAttribute(name)), { once: true });
    span.focus();
  }

  #nodeOf(element) {
    return this.conversation.nodes[element.closest(".message")?.dataset.id];
  }

  #click(event) {
    const span = event.target.closest(".token");
    if (!span || event.target.closest("a") || !getSelection().isCollapsed) return;
    const node = this.#nodeOf(span);
    if (node && this.writing !== node) this.actions.openToken(node, Number(span.dataset.token), span);
  }

  #key(event) {
    const span = event.target.closest?.(".token");
    if (!span) return;
    const node = this.#nodeOf(span);
    const all = [...span.closest(".message").querySelectorAll(".token")];
    const k = all.indexOf(span);
    const to = { ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.actions.openToken(node, Number(span.dataset.token), span);
    else if (event.key === "Escape") find('[aria-label="Walk through the tokens"]', this.item(node))?.focus();
    else if (to === undefined) return;
    else if (all[to]) this.focusToken(node, all[to]);
    event.preventDefault();
    event.stopPropagation();
  }
}

/** A reference's file, page and lines; -1 stands for a number that is not known. */
function placeOf({ file, page, from, to }) {
  const found = [file];
  if (page >= 0) found.push(`page ${page}`);
  if (from >= 0) found.push(from === to ? `line ${from}` : `lines ${from} to ${to}`);
  return found.join(", ");
}

const ENDS = { length: "cut at its length", stopped: "stopped", edited: "edited" };

/** How an answer went, in a line. */
function statsText({ stats = {}, finish, model }, several) {
  const found = [];
  if (stats.tokens) found.push(`${stats.tokens.toLocaleString("en")} tokens`);
  if (stats.speed) found.push(`${stats.speed >= 99.5 ? Math.round(stats.speed) : stats.speed.toFixed(1)} tokens/s`);
  if (ENDS[finish]) found.push(ENDS[finish]);
  if (model && several) found.push(model);
  return found.join(" · ");
}
