// Markdown as language models write it, read into a plain tree. Nothing here knows the DOM, and nothing of the text is
// ever treated as HTML. Every piece of text in the tree knows where it stands in the source (`at`), so that the
// renderer can tell which token wrote it.
//
// Blocks:  {type: "p" | "h" | "code" | "list" | "quote" | "table" | "hr", from, to, ...}
// Inlines: {type: "text" | "code", text, at} | {type: "em" | "strong" | "del", kids} | {type: "link", href, kids} | {type: "br"}

const DEEPEST = 12; // quotes and lists inside of each other; deeper ones are text
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const ALIGN = /^\|?(?: *:?-+:? *\|)* *:?-+:? *\|?$/;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)[^\s]+$/i;
const BARE_LINK = /https?:\/\/[^\s<>"'`\])]*[^\s<>"'`\]).,;:!?]/iy;
const PUNCTUATION = /[\p{P}\p{S}]/u;

/** The blocks of a text. */
export function parse(text) {
  const lines = [];
  let at = 0;
  for (const line of text.split("\n")) {
    lines.push({ text: line.replace(/\r$/, ""), at });
    at += line.length + 1;
  }
  return blocksOf(lines, 0);
}

/** Lines joined to one text that remembers where each character came from. */
export class Source {
  constructor(lines) {
    this.lines = lines;
    this.starts = [];
    let n = 0;
    for (const line of lines) {
      this.starts.push(n);
      n += line.text.length + 1;
    }
    this.text = lines.map((line) => line.text).join("\n");
  }

  /** The position in the whole source of character i of the joined text. */
  at(i) {
    let low = 0;
    let high = this.starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= i) low = middle;
      else high = middle - 1;
    }
    return this.lines[low].at + i - this.starts[low];
  }
}

const cut = (line, n) => ({ text: line.text.slice(n), at: line.at + n });
const blank = (line) => !line.text.trim();
/** The number of the first line from i on that is not blank. */
function filled(lines, i) {
  while (i < lines.length && blank(lines[i])) i++;
  return i;
}
const indent = (line) => line.text.length - line.text.trimStart().length;

function blocksOf(lines, depth) {
  const found = [];
  let i = 0;
  while (i < lines.length) {
    if (blank(lines[i])) {
      i++;
      continue;
    }
    const read = READERS.find((reader) => reader.begins(lines, i, depth)) ?? PARAGRAPH;
    const [block, next] = read.take(lines, i, depth);
    const last = lines[next - 1];
    found.push({ ...block, from: lines[i].at, to: last.at + last.text.length });
    i = next;
  }
  return found;
}

const CODE = {
  begins: (lines, i) => FENCE.test(lines[i].text),
  take(lines, i) {
    const [, space, fence, info] = FENCE.exec(lines[i].text);
    const inside = [];
    let n = i + 1;
    let closed = false;
    for (; n < lines.length && !closed; n++) {
      const end = /^ {0,3}(`{3,}|~{3,})[ \t]*$/.exec(lines[n].text);
      closed = end !== null && end[1][0] === fence[0] && end[1].length >= fence.length;
      if (!closed) inside.push(cut(lines[n], Math.min(space.length, indent(lines[n]))));
    }
    return [{ type: "code", language: info.trim().split(/\s/)[0], source: new Source(inside), closed }, n];
  },
};

const TITLE = {
  begins: (lines, i) => HEADING.test(lines[i].text),
  take(lines, i) {
    const [mark, signs] = HEADING.exec(lines[i].text);
    const line = cut(lines[i], mark.length);
    line.text = line.text.trimEnd().replace(/(?:^|[ \t])#+$/, "");
    return [{ type: "h", level: signs.length, kids: inlines(new Source([line])) }, i + 1];
  },
};

const BREAK = {
  begins: (lines, i) => RULE.test(lines[i].text),
  take: (lines, i) => [{ type: "hr" }, i + 1],
};

const QUOTED = {
  begins: (lines, i, depth) => depth < DEEPEST && QUOTE.test(lines[i].text),
  take(lines, i, depth) {
    const inside = [];
    let n = i;
    for (; n < lines.length && QUOTE.test(lines[n].text); n++) {
      inside.push(cut(lines[n], QUOTE.exec(lines[n].text)[0].length));
    }
    return [{ type: "quote", blocks: blocksOf(inside, depth + 1) }, n];
  },
};

const LIST = {
  begins: (lines, i, depth) => depth < DEEPEST && ITEM.test(lines[i].text),
  take(lines, i, depth) {
    const [, base, mark] = ITEM.exec(lines[i].text);
    const ordered = /\d/.test(mark);
    const items = [];
    let n = i;
    while (n < lines.length) {
      const item = ITEM.exec(lines[n].text);
      if (!item || /\d/.test(item[2]) !== ordered || item[1].length > base.length + 1 || RULE.test(lines[n].text)) break;
      const [inside, next] = itemLines(lines, n, item);
      items.push(blocksOf(inside, depth + 1));
      n = next;
      const after = filled(lines, n);
      if (after < lines.length && ITEM.test(lines[after].text)) n = after;
    }
    return [{ type: "list", ordered, start: ordered ? parseInt(mark, 10) : 1, items }, n];
  },
};

/** The lines of a list's item, without their indentation, and the number of the line after it. */
function itemLines(lines, i, [whole, space, mark, gap]) {
  const width = space.length + mark.length + (gap.length > 4 ? 1 : Math.max(gap.length, 1));
  const inside = [cut(lines[i], Math.min(width, whole.length))];
  let n = i + 1;
  for (; n < lines.length; n++) {
    const line = lines[n];
    if (blank(line)) {
      const next = filled(lines, n);
      if (next === lines.length || indent(lines[next]) < Math.min(width, space.length + 2)) break;
      inside.push(cut(line, line.text.length));
      n = next - 1;
    } else if (indent(line) >= Math.min(width, space.length + 2)) {
      inside.push(cut(line, Math.min(width, indent(line))));
    } else if (blank(lines[n - 1]) || opens(lines, n)) {
      break;
    } else {
      inside.push(line); // the paragraph goes on without indentation
    }
  }
  return [inside, n];
}

const TABLE = {
  begins: (lines, i) =>
    lines[i].text.includes("|") &&
    i + 1 < lines.length &&
    lines[i + 1].text.includes("-") &&
    ALIGN.test(lines[i + 1].text.trim()) &&
    cells(lines[i]).length === cells(lines[i + 1]).length,
  take(lines, i) {
    const align = cells(lines[i + 1]).map(({ text }) => {
      const right = text.endsWith(":");
      return text.startsWith(":") ? (right ? "center" : "left") : right ? "right" : "";
    });
    const row = (line) => align.map((_, k) => inlines(new Source(cells(line).slice(k, k + 1))));
    const rows = [];
    let n = i + 2;
    for (; n < lines.length && !blank(lines[n]) && lines[n].text.includes("|"); n++) rows.push(row(lines[n]));
    return [{ type: "table", align, head: row(lines[i]), rows }, n];
  },
};

/** The cells of a table's line, each a line of its own. */
function cells(line) {
  const found = [];
  let begin = indent(line);
  const { text } = line;
  const end = text.trimEnd().length;
  if (text[begin] === "|") begin++;
  for (let i = begin; i <= end; i++) {
    if (text[i] === "\\") i++;
    else if (i === end ? begin < end : text[i] === "|") {
      const cell = text.slice(begin, i);
      found.push({ text: cell.trim(), at: line.at + begin + (cell.length - cell.trimStart().length) });
      begin = i + 1;
    }
  }
  return found;
}

const READERS = [CODE, TITLE, BREAK, QUOTED, LIST, TABLE];
const opens = (lines, i) => READERS.some((reader) => reader !== TABLE && reader.begins(lines, i, 0));

const PARAGRAPH = {
  take(lines, i) {
    let n = i + 1;
    while (n < lines.length && !blank(lines[n]) && !opens(lines, n) && !TABLE.begins(lines, n)) n++;
    const inside = lines.slice(i, n).map((line) => cut(line, indent(line)));
    return [{ type: "p", kids: inlines(new Source(inside)) }, n];
  },
};

/** The inlines of a text: one walk from left to right, with a stack of marks that may still be closed. */
function inlines(source) {
  return new Inlines(source).read();
}

const MARKS = 64; // open marks that are remembered; so hostile text costs no more than other text

class Inlines {
  constructor(source) {
    this.source = source;
    this.text = source.text;
    this.out = [];
    this.open = []; // {mark, index into out}
    this.unclosed = new Set(); // lengths of runs of backticks that have no second
    this.pending = 0; // where plain text began that is not in `out` yet
  }

  read() {
    let i = 0;
    while (i < this.text.length) i = this.step(i);
    this.flush(i);
    return this.out;
  }

  /** Puts the plain text before i out, a leaf for each line. */
  flush(i) {
    let from = this.pending;
    while (from < i) {
      const end = this.text.indexOf("\n", from);
      const to = end < 0 || end > i ? i : end;
      if (to > from) this.out.push({ type: "text", text: this.text.slice(from, to), at: this.source.at(from) });
      if (to < i) this.out.push({ type: "br" });
      from = to + 1;
    }
    this.pending = i;
  }

  step(i) {
    const c = this.text[i];
    if (c === "\\" && i + 1 < this.text.length && PUNCTUATION.test(this.text[i + 1])) {
      this.flush(i);
      this.pending = i + 1;
      return i + 2;
    }
    if (c === "`") return this.code(i);
    if (c === "*" || c === "_" || c === "~") return this.emphasis(i, c);
    if (c === "[") return this.bracket(i);
    if (c === "]") return this.link(i);
    if (c === "h" || c === "H") return this.bare(i);
    return i + 1;
  }

  code(i) {
    let begin = i;
    while (this.text[begin] === "`") begin++;
    const n = begin - i;
    if (this.unclosed.has(n)) return begin;
    const runs = /`+/g;
    runs.lastIndex = begin;
    let end = runs.exec(this.text);
    while (end && end[0].length !== n) end = runs.exec(this.text);
    if (!end) {
      this.unclosed.add(n);
      return begin;
    }
    this.flush(i);
    let [from, to] = [begin, end.index];
    if (/^ .*\S.* $/s.test(this.text.slice(from, to))) [from, to] = [from + 1, to - 1];
    this.out.push({ type: "code", text: this.text.slice(from, to).replaceAll("\n", " "), at: this.source.at(from) });
    this.pending = end.index + n;
    return this.pending;
  }

  emphasis(i, c) {
    let end = i;
    while (this.text[end] === c) end++;
    let n = end - i;
    if (c === "~" ? n !== 2 : n > 3) return end;
    const [before, after] = [this.text[i - 1] ?? " ", this.text[end] ?? " "];
    const [word, space] = [/[\p{L}\p{N}]/u, /\s/];
    const inside = c === "_" && word.test(before) && word.test(after);
    const opens = !space.test(after) && !inside && !(PUNCTUATION.test(after) && word.test(before));
    const closes = !space.test(before) && !inside && !(PUNCTUATION.test(before) && word.test(after));
    this.flush(i);
    let at = i;
    while (closes && n > 0) {
      const k = this.open.findLastIndex((o) => o.mark[0] === c);
      if (k < 0) break;
      const { mark, index } = this.open[k];
      if (mark.length > n) break;
      this.open.length = k;
      const kids = this.out.splice(index).slice(1); // without the mark itself
      this.out.push({ type: c === "~" ? "del" : mark.length === 2 ? "strong" : "em", kids });
      n -= mark.length;
      at += mark.length;
    }
    this.pending = at;
    if (n > 0 && opens && this.open.length < MARKS) {
      // The mark stands as text until it is closed; then it is taken out again.
      for (const mark of n === 3 ? [c + c, c] : [c.repeat(n)]) {
        this.open.push({ mark, index: this.out.length });
        this.out.push({ type: "text", text: mark, at: this.source.at(at) });
        at += mark.length;
      }
      this.pending = at;
    }
    return end;
  }

  bracket(i) {
    this.flush(i);
    if (this.open.length < MARKS) this.open.push({ mark: "[", index: this.out.length });
    return i + 1;
  }

  link(i) {
    const k = this.open.findLastIndex((o) => o.mark === "[");
    const target = /\]\([ \t]*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:[ \t]+"[^"\n]*")?[ \t]*\)/y;
    target.lastIndex = i;
    const found = k < 0 ? null : target.exec(this.text);
    if (!found || !SAFE_LINK.test(found[1])) {
      if (k >= 0) this.open.splice(k, 1);
      return i + 1;
    }
    this.flush(i);
    const { index } = this.open[k];
    this.open.length = k;
    const kids = this.out.splice(index);
    kids[0] = { ...kids[0], text: kids[0].text.slice(1), at: kids[0].at + 1 }; // without "["
    const before = this.out.at(-1); // an image is shown as a link: nothing is fetched
    if (before?.type === "text" && before.text.endsWith("!")) before.text = before.text.slice(0, -1);
    this.out.push({ type: "link", href: found[1], kids });
    this.pending = i + found[0].length;
    return this.pending;
  }

  bare(i) {
    if (this.open.some((o) => o.mark === "[")) return i + 1;
    BARE_LINK.lastIndex = i;
    const found = BARE_LINK.exec(this.text);
    if (!found) return i + 1;
    this.flush(i);
    const leaf = { type: "text", text: found[0], at: this.source.at(i) };
    this.out.push({ type: "link", href: found[0], kids: [leaf] });
    this.pending = i + found[0].length;
    return this.pending;
  }
}
