// Conversations and preferences in this browser's localStorage: one entry a conversation, so that saving one does not
// write all. Where the room is used up, what tokens were chosen from is forgotten first, of the oldest conversations.

const ONE = "tinyllm.conversation.";
const PREFERENCES = "tinyllm.preferences";
const FORMAT = "tinyllm-conversations";

export class Store {
  constructor(storage = localStorage) {
    this.storage = storage;
  }

  /** Conversations without their messages, the latest first. */
  list() {
    const found = [];
    for (let i = 0; i < this.storage.length; i++) {
      const key = this.storage.key(i);
      if (!key.startsWith(ONE)) continue;
      const conversation = this.load(key.slice(ONE.length));
      if (conversation) found.push({ id: conversation.id, title: conversation.title, updated: conversation.updated });
    }
    return found.sort((a, b) => b.updated - a.updated);
  }

  /** A conversation, or null where there is none that can be read. */
  load(id) {
    try {
      return checked(JSON.parse(this.storage.getItem(ONE + id)));
    } catch {
      return null;
    }
  }

  /** Keeps a conversation. False where even without its tokens' choices there is no room. */
  save(conversation) {
    const room = this.#makeRoom(conversation);
    do {
      try {
        this.storage.setItem(ONE + conversation.id, JSON.stringify(conversation));
        return true;
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
      }
    } while (!room.next().done);
    return false;
  }

  *#makeRoom(conversation) {
    for (const { id } of this.list().reverse()) {
      const other = id === conversation.id ? null : this.load(id);
      if (other) yield this.storage.setItem(ONE + id, JSON.stringify(forget(other)));
    }
    yield forget(conversation);
  }

  remove(id) {
    this.storage.removeItem(ONE + id);
  }

  /** All conversations as a text to keep elsewhere. */
  exported() {
    const conversations = this.list().map(({ id }) => this.load(id));
    return JSON.stringify({ format: FORMAT, version: 1, conversations });
  }

  /** Adds the conversations of an exported text, in place of those of the same id; how many there were. */
  import(text) {
    let found;
    try {
      found = JSON.parse(text);
    } catch {
      throw new Error("This file is no JSON.");
    }
    if (found?.format !== FORMAT || !Array.isArray(found.conversations)) {
      throw new Error("This file holds no conversations of tinyllm.");
    }
    const conversations = found.conversations.map(checked);
    for (const conversation of conversations) {
      if (!this.save(conversation)) throw new Error("This browser has no room left for these conversations.");
    }
    return conversations.length;
  }

  preferences() {
    try {
      return JSON.parse(this.storage.getItem(PREFERENCES)) ?? {};
    } catch {
      return {};
    }
  }

  prefer(changed) {
    try {
      this.storage.setItem(PREFERENCES, JSON.stringify({ ...this.preferences(), ...changed }));
    } catch {
      // A preference that is not kept is asked for again.
    }
  }
}

function forget(conversation) {
  for (const node of Object.values(conversation.nodes)) {
    for (const token of node.tokens ?? []) delete token.a;
  }
  return conversation;
}

/** A conversation from outside, with only what we know in it. Throws where it is none. */
function checked(given) {
  const text = (value) => (typeof value === "string" ? value : "");
  const number = (value) => (Number.isFinite(value) ? value : 0);
  if (typeof given?.id !== "string" || typeof given.nodes !== "object" || typeof given.chosen !== "object") {
    throw new Error("This file holds a conversation that cannot be read.");
  }
  const nodes = {};
  for (const [id, node] of Object.entries(given.nodes)) {
    if (id === "__proto__" || !["user", "assistant"].includes(node?.role)) continue;
    nodes[id] = {
      id,
      parent: typeof node.parent === "string" ? node.parent : null,
      role: node.role,
      text: text(node.text),
      created: number(node.created),
      ...(node.reasoning ? { reasoning: text(node.reasoning) } : {}),
      ...(node.model ? { model: text(node.model) } : {}),
      ...(node.finish ? { finish: text(node.finish) } : {}),
      ...(node.error ? { error: text(node.error) } : {}),
      ...(Number.isInteger(node.branchedAt) ? { branchedAt: node.branchedAt } : {}),
      ...(Array.isArray(node.files) ? { files: node.files.map((f) => ({ name: text(f?.name), text: text(f?.text) })) } : {}),
      ...(Array.isArray(node.references) ? { references: node.references.map(checkedReference) } : {}),
      ...(Array.isArray(node.tokens) ? { tokens: node.tokens.map(checkedToken) } : {}),
      ...(node.stats && typeof node.stats === "object"
        ? { stats: Object.fromEntries(Object.entries(node.stats).map(([k, v]) => [k, number(v)])) }
        : {}),
    };
  }
  const isChild = ([parent, id]) => nodes[id] && (nodes[id].parent ?? "") === parent;
  const chosen = Object.fromEntries(Object.entries(given.chosen).filter(isChild));
  return {
    id: given.id,
    title: text(given.title),
    created: number(given.created),
    updated: number(given.updated),
    settings: given.settings && typeof given.settings === "object" ? given.settings : {},
    nodes,
    chosen,
  };
}

function checkedReference(given) {
  const text = (value) => (typeof value === "string" ? value : "");
  const number = (value) => (Number.isInteger(value) ? value : -1);
  return { file: text(given?.file), text: text(given?.text), page: number(given?.page), from: number(given?.from), to: number(given?.to) };
}

function checkedToken(token) {
  const one = (t) => ({
    i: Number.isInteger(t?.i) ? t.i : 0,
    t: typeof t?.t === "string" ? t.t : "",
    p: Number.isFinite(t?.p) ? t.p : null,
    ...(Array.isArray(t?.b) ? { b: t.b.filter(Number.isInteger) } : {}),
    ...(t?.end ? { end: true } : {}),
  });
  return { ...one(token), ...(Array.isArray(token?.a) ? { a: token.a.map(one) } : {}) };
}
