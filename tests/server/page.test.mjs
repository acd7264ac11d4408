// What the page makes of text and tokens, without a browser: node --test tests/server/page.test.mjs

import assert from "node:assert/strict";
import test from "node:test";

const page = new URL("../../tinyllm/server/page/", import.meta.url);
const load = (name) => import(new URL(name, page));
const { parse } = await load("markdown.mjs");
const { paint } = await load("highlight.mjs");
const tokens = await load("tokens.mjs");
const tree = await load("tree.mjs");
const { Store } = await load("store.mjs");
const { branch } = await load("answer.mjs");
const { events } = await load("api.mjs");
const { sampling } = await load("settings.mjs");
const docs = await load("docs.mjs");

/** A tree of Markdown in short: "p(a em(b))". */
function short(list) {
  return list
    .map((n) => {
      if (n.type === "text") return n.text;
      if (n.source) return `code:${n.language}(${n.source.text})`;
      if (n.type === "code") return `code(${n.text})`;
      if (n.type === "table") return `table(${[n.head, ...n.rows].map((row) => row.map(short).join("|")).join("/")})`;
      if (n.items) return `${n.ordered ? `ol${n.start}` : "ul"}(${n.items.map((item) => `li(${short(item)})`).join("")})`;
      const name = n.type === "h" ? `h${n.level}` : n.href ? `link:${n.href}` : n.type;
      return `${name}(${short(n.kids ?? n.blocks ?? [])})`;
    })
    .join("");
}

/** The leaves of a tree with where they stand. */
function leaves(list) {
  return list.flatMap((n) => {
    if (n.type === "table") return [n.head, ...n.rows].flat(2).flatMap((kid) => leaves([kid]));
    if (n.items) return n.items.flatMap(leaves);
    if (n.kids || n.blocks) return leaves(n.kids ?? n.blocks);
    return n.text ? [n] : [];
  });
}

for (const [text, expected] of [
  ["plain", "p(plain)"],
  ["a\nb\n\nc", "p(abr()b)p(c)"],
  ["# One\n### Three #", "h1(One)h3(Three)"],
  ["**b** *i* ***both*** ~~no~~ `c`", "p(strong(b) em(i) strong(em(both)) del(no) code(c))"],
  ["snake_case_name and 2 * 3 * 4", "p(snake_case_name and 2 * 3 * 4)"],
  ["**open", "p(**open)"],
  ["`` a`b `` and `open", "p(code(a`b) and `open)"],
  ["- a\n- b\n  - c\n1. d\n2. e", "ul(li(p(a))li(p(b)ul(li(p(c)))))ol1(li(p(d))li(p(e)))"],
  ["3. c\n\n   more", "ol3(li(p(c)p(more)))"],
  ["> q\n> > r", "quote(p(q)quote(p(r)))"],
  ["```py\nx = 1\n\ny\n```\nz", "code:py(x = 1\n\ny)p(z)"],
  ["```\nnever closed", "code:(never closed)"],
  ["| a | b |\n|--|:-:|\n| 1 | 2\\|3 |", "table(a|b/1|2|3)"],
  ["---", "hr()"],
  ["[x](https://e.org/a_(b)) https://e.org/c.", "p(link:https://e.org/a_(b)(x) link:https://e.org/c(https://e.org/c).)"],
  ["\\*no\\*", "p(*no*)"],
]) {
  test(`Markdown: ${JSON.stringify(text)}`, () => assert.equal(short(parse(text)), expected));
}

test("links go to the web or to mail, and nowhere else", () => {
  for (const href of ["javascript:alert(1)", "JaVaScRiPt:x", "data:text/html,x", "vbscript:x", "file:///etc/passwd", "//e.org", "/x", "java\tscript:x"]) {
    assert.ok(!short(parse(`[x](${href}) ![y](${href})`)).includes("link:"), href);
  }
});

test("each leaf knows where it stands", () => {
  const text = "# T *e*\n\n> - a **b** `c`\n>   d\n\n| x | y |\n|---|---|\n| \\* | z |\n\n1. [l](https://e.org) m";
  for (const leaf of leaves(parse(text))) assert.equal(text.slice(leaf.at, leaf.at + leaf.text.length), leaf.text);
});

test("hostile text is read in time that grows with its length", () => {
  const n = 20000;
  const hostile = ["*a ", "_", "[", ">", "- ", "[a](", "![", "`", "|", "~~", "**a _b ", "\\", "http://", "1. a\n", "> a\n", "- a\n\n"].map((s) => s.repeat(n));
  hostile.push(`|a|\n${" ".repeat(n)}-x`, `- a\n${"\n".repeat(n)}x`, Array.from({ length: 300 }, (_, i) => "`".repeat(i + 1)).join(" "));
  for (const text of hostile) {
    parse(text);
    for (const language of ["py", "js", "sql", "html", ""]) paint(text, language);
  }
});

test("what is painted is the code, whatever it is", () => {
  for (const code of ["", "def f(x): # c\n  return 'a", '"""doc', "/* open", "<!-- x", "SELECT 1 -- c", "\u0000\ud800"]) {
    for (const language of ["python", "c", "sql", "html", "text", "__proto__"]) {
      assert.equal(paint(code, language).map((p) => p.text).join(""), code);
    }
  }
  assert.deepEqual(paint("return 1", "js").map((p) => p.kind), ["word", "", "number"]);
});

const entry = (id, token, logprob, bytes, top = []) => ({
  id, token, logprob, bytes: bytes ?? [...new TextEncoder().encode(token)], top_logprobs: top,
});
const some = [entry(1, "Hi", -0.5), entry(2, "\ufffd", -1, [0xc3]), entry(3, "\ufffd", -0.1, [0xa9]), entry(4, "!", -2), entry(5, "</s>", -1, [])].map(tokens.tokenOf);

test("tokens spell the text, half characters together", () => {
  assert.deepEqual(tokens.joined(some), { text: "Hié!", starts: [0, 2, 2, 3, 4] });
  assert.deepEqual(tokens.align(some, "é!").starts, [-2, 0, 0, 1, 2]);
  assert.equal(tokens.align(some, "other"), null);
  assert.deepEqual(tokens.split([0, 2, 2, 3], "ié!", 1), [{ token: 0, text: "i" }, { token: 2, text: "é" }, { token: 3, text: "!" }]);
});

test("probabilities are told as people read them", () => {
  assert.deepEqual([0, -0.7, -3, -6, -20].map(tokens.percent), ["100 %", "50 %", "5.0 %", "0.2 %", "< 0.01 %"]);
  assert.equal(tokens.surprise(0), 0);
  assert.equal(tokens.surprise(-100), 1);
});

test("a branch keeps what came before the token", () => {
  const node = { text: "Hié!", tokens: some };
  const begun = branch(node, 3, [{ i: 9, t: "?", p: -1 }]);
  assert.equal(begun.text, "Hié?");
  assert.deepEqual(begun.tokens.map((t) => t.i), [1, 2, 3, 9]);
  const thinking = [entry(1, "<t>", -1), entry(2, "so", -1), entry(3, "</t>", -1), entry(4, "yes", -1)].map(tokens.tokenOf);
  const thought = { reasoning: "so", text: "yes", tokens: thinking };
  assert.equal(branch(thought, 1, [{ i: 8, t: "hm", p: -1 }]).reasoning, "hm");
  assert.deepEqual([branch(thought, 3, [{ i: 8, t: "no", p: -1 }])].map((b) => [b.reasoning, b.text])[0], ["so", "no"]);
});

test("a conversation is a tree whose branches stay", () => {
  const c = tree.newConversation();
  const asked = tree.add(c, null, { role: "user", text: "a" });
  const first = tree.add(c, asked.id, { role: "assistant", text: "b" });
  const second = tree.add(c, asked.id, { role: "assistant", text: "c" });
  assert.deepEqual(tree.path(c), [asked, second]);
  tree.show(c, first);
  assert.deepEqual(tree.path(c), [asked, first]);
  assert.deepEqual(tree.siblings(c, first), [first, second]);
  assert.deepEqual(tree.above(c, second), [asked]);
});

test("an attached file cannot end its fence", () => {
  const text = tree.contentOf({ text: "see", files: [{ name: "a.md", text: "```\nx\n```" }] });
  assert.equal(text, "File a.md:\n````\n```\nx\n```\n````\n\nsee");
});

class Memory extends Map {
  constructor(room) {
    super();
    this.room = room;
  }
  get length() {
    return this.size;
  }
  key(i) {
    return [...this.keys()][i];
  }
  getItem(key) {
    return this.get(key) ?? null;
  }
  setItem(key, value) {
    const used = [...this].reduce((sum, [k, v]) => sum + (k === key ? 0 : v.length), value.length);
    if (used > this.room) throw Object.assign(new Error("full"), { name: "QuotaExceededError" });
    this.set(key, value);
  }
  removeItem(key) {
    this.delete(key);
  }
}

function talk(title, updated) {
  const c = { ...tree.newConversation(), title, updated };
  const asked = tree.add(c, null, { role: "user", text: "a" });
  tree.add(c, asked.id, { role: "assistant", text: "b", tokens: [{ i: 1, t: "b", p: -1, a: [{ i: 1, t: "b", p: -1 }, { i: 2, t: "c", p: -2 }] }] });
  return c;
}

test("conversations are kept, exported and imported", () => {
  const store = new Store(new Memory(1e6));
  const one = talk("one", 1);
  assert.ok(store.save(one) && store.save(talk("two", 2)));
  assert.deepEqual(store.list().map((c) => c.title), ["two", "one"]);
  assert.deepEqual(store.load(one.id), one);
  const other = new Store(new Memory(1e6));
  assert.equal(other.import(store.exported()), 2);
  assert.deepEqual(other.load(one.id), one);
  for (const text of ["", "{}", "[]", '{"format":"tinyllm-conversations","conversations":[{"id":1}]}']) assert.throws(() => other.import(text), /This file/);
});

test("an imported conversation holds nothing that we do not know, and no circles", () => {
  const bad = { id: "x", title: 5, nodes: { a: { role: "user", parent: "a", text: {}, evil: 1 }, b: { role: "system", text: "x" } }, chosen: { "": "a", a: "a", b: 7 } };
  const store = new Store(new Memory(1e6));
  store.import(JSON.stringify({ format: "tinyllm-conversations", conversations: [bad] }));
  const found = store.load("x");
  assert.deepEqual(found.nodes, { a: { id: "a", parent: "a", role: "user", text: "", created: 0 } });
  assert.deepEqual(tree.path(found), []);
});

test("where room is short, alternatives of the oldest go first, and never a word", () => {
  const storage = new Memory(1e6);
  const store = new Store(storage);
  const [old, now] = [talk("old", 1), talk("new", 2)];
  store.save(old);
  storage.room = storage.getItem(storage.key(0)).length + JSON.stringify(now).length - 10;
  assert.ok(store.save(now));
  const answer = (c) => Object.values(store.load(c.id).nodes).find((n) => n.role === "assistant");
  assert.equal(answer(old).tokens[0].a, undefined);
  assert.equal(answer(old).text, "b");
  assert.equal(answer(now).tokens[0].a.length, 2);
  const full = new Store(new Memory(10));
  assert.equal(full.save(now), false);
});

test("a request says only what differs from the defaults", () => {
  assert.deepEqual(sampling({}), { temperature: 0.8, top_p: 0.95, top_k: 40, logprobs: true, top_logprobs: 10 });
  assert.deepEqual(sampling({ choices: 0, seed: 0, stop: "a\n\nb", thinking: false, min_p: 0.1 }), {
    temperature: 0.8, top_p: 0.95, top_k: 40, min_p: 0.1, seed: 0, stop: ["a", "b"], chat_template_kwargs: { enable_thinking: false },
  });
});

test("events are read wherever the stream is cut", async () => {
  const bytes = new TextEncoder().encode(': ping\n\ndata: {"é": 1}\n\ndata: [DONE]\n\n');
  for (let size = 1; size < bytes.length; size++) {
    const parts = [];
    for (let i = 0; i < bytes.length; i += size) parts.push(bytes.slice(i, i + size));
    const found = [];
    for await (const event of events(ReadableStream.from(parts))) found.push(event);
    assert.deepEqual(found, ['{"é": 1}', "[DONE]"]);
  }
});

test("the page of endpoints tells types and fields", () => {
  const api = {
    paths: { "/a": { get: {}, post: {} } },
    components: {
      schemas: {
        B: { title: "B", required: ["x"], properties: { x: { $ref: "#/components/schemas/C" }, y: { anyOf: [{ type: "integer" }, { type: "null" }] } } },
        C: { title: "C", properties: { again: { type: "array", items: { $ref: "#/components/schemas/B" } }, kind: { enum: ["a", "b"] } } },
      },
    },
  };
  const b = { $ref: "#/components/schemas/B" };
  assert.deepEqual(docs.fieldsOf(b, api), [
    { name: "x", type: "C", required: true },
    { name: "y", type: "integer | null", required: false },
  ]);
  assert.deepEqual(docs.fieldsOf({ $ref: "#/components/schemas/C" }, api).map((f) => f.type), ["list of B", '"a" | "b"']);
  assert.deepEqual([...docs.shapesOf(b, api).keys()], ["B", "C"]);
  assert.deepEqual(docs.endpoints(api).map((e) => `${e.method} ${e.path}`), ["GET /a", "POST /a"]);
});
