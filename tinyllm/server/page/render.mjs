// A tree of Markdown as elements. Leaves know which token wrote them: each token is a <span class="token">.

import { h, icon } from "./dom.mjs";
import { paint } from "./highlight.mjs";
import { parse } from "./markdown.mjs";
import { split, surprise } from "./tokens.mjs";

/**
 * Shows a text in an element. Blocks that have not changed since the last call keep their elements, so that a long
 * answer is not built anew with each token, and what is selected stays selected.
 *
 * `fit` says where the tokens begin in the text (see tokens.align), or is null.
 */
export function showMarkdown(into, text, tokens, fit) {
  const before = into.shownBlocks ?? [];
  const starts = fit?.starts ?? null;
  const after = parse(text).map((block, k) => {
    const source = text.slice(block.from, block.to);
    const old = before[k];
    const same = old && old.source === source && old.from === block.from && old.fitted === (starts !== null);
    return same ? old : { source, from: block.from, fitted: starts !== null, element: new Renderer(tokens, starts).block(block) };
  });
  after.forEach((block, k) => {
    if (before[k]?.element !== block.element) {
      if (into.children[k]) into.children[k].replaceWith(block.element);
      else into.append(block.element);
    }
  });
  while (into.children.length > after.length) into.lastChild.remove();
  into.shownBlocks = after;
}

/** Forgets what was shown: another text comes. */
export function clearMarkdown(into) {
  into.replaceChildren();
  into.shownBlocks = [];
}

class Renderer {
  constructor(tokens, starts) {
    this.tokens = tokens;
    this.starts = starts;
  }

  block(block) {
    return this[block.type](block);
  }

  blocks(list) {
    return list.map((block) => this.block(block));
  }

  p({ kids }) {
    return h("p", {}, this.inlines(kids));
  }

  /** An answer's headings lie below the page's own: its first level is the third. */
  h({ level, kids }) {
    return h(`h${Math.min(level + 2, 6)}`, { class: `level-${level}` }, this.inlines(kids));
  }

  hr() {
    return h("hr");
  }

  quote({ blocks }) {
    return h("blockquote", {}, this.blocks(blocks));
  }

  list({ ordered, start, items }) {
    const kids = items.map((item) => h("li", {}, item.map((b) => (b.type === "p" ? h("div", {}, this.inlines(b.kids)) : this.block(b)))));
    return ordered ? h("ol", { start: start === 1 ? null : start }, kids) : h("ul", {}, kids);
  }

  table({ align, head, rows }) {
    const row = (tag, scope) => (cells) =>
      h("tr", {}, cells.map((kids, k) => h(tag, { scope, class: align[k] || null }, this.inlines(kids))));
    const table = h("table", {}, h("thead", {}, row("th", "col")(head)), h("tbody", {}, rows.map(row("td", null))));
    return h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Table" }, table);
  }

  code({ language, source }) {
    const code = h("code");
    let at = 0;
    for (const { text, kind } of paint(source.text, language)) {
      const into = kind ? h("span", { class: `code-${kind}` }) : code;
      for (const line of text.split(/(?<=\n)/)) {
        into.append(...this.leaf(line, source.lines.length ? source.at(at) : 0));
        at += line.length;
      }
      if (kind) code.append(into);
    }
    const label = language ? `Code, ${language}` : "Code";
    return h(
      "figure",
      { class: "code" },
      h("figcaption", {}, h("span", {}, language || "code"), copyButton(() => source.text)),
      h("pre", { tabindex: "0", role: "region", "aria-label": label }, code),
    );
  }

  inlines(list) {
    return list.flatMap((inline) => {
      if (inline.type === "text") return this.leaf(inline.text, inline.at);
      if (inline.type === "code") return h("code", {}, this.leaf(inline.text, inline.at));
      if (inline.type === "br") return h("br");
      const kids = this.inlines(inline.kids);
      if (inline.type !== "link") return h(inline.type, {}, kids);
      return h("a", { href: inline.href, target: "_blank", rel: "noopener noreferrer" }, kids);
    });
  }

  leaf(text, at) {
    if (!this.starts) return [text];
    return split(this.starts, text, at).map((piece) => tokenSpan(piece.text, piece.token, this.tokens[piece.token]));
  }
}

/** A piece of text that a token wrote. */
function tokenSpan(text, k, token) {
  const span = h("span", { class: "token", "data-token": k }, text);
  span.style.setProperty("--surprise", `${Math.round(100 * surprise(token.p))}%`);
  return span;
}

/** A button that copies, and says so. */
export function copyButton(text, label = "Copy code") {
  const button = h("button", { type: "button", class: "icon-button small", "aria-label": label, title: label }, icon("copy"));
  button.addEventListener("click", async () => {
    const done = await copied(text());
    button.replaceChildren(icon(done ? "check" : "close"));
    button.setAttribute("aria-label", done ? "Copied" : "Could not copy");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "visually-hidden", value: text }); // pages without TLS have no clipboard
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
