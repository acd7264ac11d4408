// What a token was chosen from: a small window beside it. Each line is a way to go on from there.

import { find, h, iconButton } from "./dom.mjs";
import { choices, percent, visible } from "./tokens.mjs";

export class Choices {
  /** `branch(node, k, choice)` goes on with another token; `write(node, k, text)` with words of one's own. */
  constructor(panel, { branch, write, move }) {
    this.panel = panel;
    this.actions = { branch, write, move };
    panel.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("pointerdown", (event) => {
      if (!panel.hidden && !panel.contains(event.target) && !event.target.closest(".token")) this.close();
    });
    addEventListener("resize", () => this.close());
  }

  open(node, k, span) {
    this.close();
    Object.assign(this, { node, k, span });
    span.classList.add("looked-at");
    this.panel.replaceChildren(this.#head(), this.#list(), this.#own());
    this.panel.hidden = false;
    this.#place();
    find(".choice", this.panel)?.focus({ preventScroll: true });
  }

  close(giveBack = false) {
    if (this.panel.hidden) return;
    this.panel.hidden = true;
    this.span.classList.remove("looked-at");
    if (giveBack && this.span.isConnected) this.actions.move(this.node, this.span);
  }

  #head() {
    return h(
      "div",
      { class: "choices-head" },
      h("h2", { id: "choices-title" }, "Chosen from"),
      h("span", { class: "count" }, `${this.k + 1} of ${this.node.tokens.length}`),
      iconButton("left", "The token before", () => this.#step(-1)),
      iconButton("right", "The token after", () => this.#step(1)),
      iconButton("close", "Close", () => this.close(true)),
    );
  }

  #list() {
    const token = this.node.tokens[this.k];
    const all = choices(token);
    const known = all.reduce((sum, c) => sum + (c.p === null ? 0 : Math.exp(c.p)), 0);
    const lines = all.map((choice) => {
      const chosen = choice.i === token.i;
      const p = choice.p === null ? 0 : Math.exp(choice.p);
      const hidden = (text) => h("span", { class: "visually-hidden" }, text);
      const bar = h("span", { class: "bar", "aria-hidden": "true" }, h("span"));
      bar.firstChild.style.setProperty("width", `${Math.max(100 * p, 0.5)}%`);
      const button = h(
        "button",
        { type: "button", class: "choice", "aria-current": chosen ? "true" : null,
          onclick: () => this.#go(() => this.actions.branch(this.node, this.k, choice)) },
        h("span", { class: choice.end ? "what end" : "what" }, choice.end ? "end of the answer" : visible(choice)),
        bar,
        h("span", { class: "percent" }, percent(choice.p)),
        hidden(chosen ? "chosen; write on again from here" : "go on with this"),
      );
      return h("li", {}, button);
    });
    const rest = 1 - known;
    return h("div", { class: "choices-list" }, h("ul", {}, lines),
      rest > 0.0005 && all.length > 1 ? h("p", { class: "hint" }, `Everything else together: ${percent(Math.log(rest))}`) : null,
      all.length < 2 ? h("p", { class: "hint" }, "The alternatives were not kept.") : null);
  }

  #own() {
    const box = h("input", { type: "text", "aria-label": "Words of your own", placeholder: "Or your own words", autocomplete: "off" });
    const submit = (event) => {
      event.preventDefault();
      if (box.value) this.#go(() => this.actions.write(this.node, this.k, box.value));
    };
    return h("form", { class: "own", onsubmit: submit }, box, h("button", { type: "submit", class: "plain-button" }, "Go on"));
  }

  #go(action) {
    this.close();
    action();
  }

  #step(n) {
    const spans = [...this.span.closest(".message").querySelectorAll(".token")];
    let to = spans.indexOf(this.span) + n;
    while (spans[to] && Number(spans[to].dataset.token) === this.k) to += n; // a token may be in two pieces
    if (!spans[to]) return;
    spans[to].scrollIntoView({ block: "nearest" });
    this.open(this.node, Number(spans[to].dataset.token), spans[to]);
    find(`[aria-label="The token ${n < 0 ? "before" : "after"}"]`, this.panel).focus();
  }

  #key(event) {
    const lines = [...this.panel.querySelectorAll(".choice")];
    const k = lines.indexOf(document.activeElement);
    if (event.key === "Escape") this.close(true);
    else if (event.key === "ArrowDown" && k >= 0) lines[Math.min(k + 1, lines.length - 1)].focus();
    else if (event.key === "ArrowUp" && k >= 0) lines[Math.max(k - 1, 0)].focus();
    else if (event.key === "ArrowLeft" && k >= 0) this.#step(-1);
    else if (event.key === "ArrowRight" && k >= 0) this.#step(1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Below the token, or above it where there is more room; on a narrow screen the style sheet puts it at the bottom. */
  #place() {
    const token = this.span.getClientRects()[0] ?? this.span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.panel;
    const below = innerHeight - token.bottom > height + 16 || token.top < height + 16;
    const top = below ? Math.min(token.bottom + 8, innerHeight - height - 8) : token.top - height - 8;
    this.panel.style.setProperty("--top", `${Math.max(8, top)}px`);
    this.panel.style.setProperty("--left", `${Math.max(8, Math.min(token.left - 12, innerWidth - width - 8))}px`);
  }
}
