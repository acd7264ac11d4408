// A conversation is a tree: an edit or another answer is a sibling of what was there, and nothing is lost.
// `chosen` says which child of a message is shown; "" stands for the root.

/** A name that no other has. */
export const newId = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(12))].join("-");

/** A conversation without messages. */
export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...settings }, nodes: {}, chosen: {} };
}

/** Puts a message below another (null: at the beginning), and shows it. */
export function add(conversation, parent, message) {
  const node = { id: newId(), parent, created: Date.now(), ...message };
  conversation.nodes[node.id] = node;
  show(conversation, node);
  return node;
}

/** Shows this message among its siblings. */
export function show(conversation, node) {
  conversation.chosen[node.parent ?? ""] = node.id;
}

/** Messages below the same one, oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((n) => n.parent === node.parent);
}

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const found = [];
  let node = conversation.nodes[conversation.chosen[""]];
  while (node) {
    found.push(node);
    node = conversation.nodes[conversation.chosen[node.id]];
  }
  return found;
}

/** The messages above one, from the first. */
export function above(conversation, node) {
  const found = [];
  for (let n = conversation.nodes[node.parent]; n; n = conversation.nodes[n.parent]) found.unshift(n);
  return found;
}

/** A title from the first words that were asked. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length > 48 ? `${line.slice(0, 47).trimEnd()}…` : line;
}

/** A message as the model reads it: attached files come before the words. */
export function contentOf(node) {
  const files = (node.files ?? []).map(({ name, text }) => {
    const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map((run) => run[0].length));
    const fence = "`".repeat(longest + 1);
    return `File ${name}:\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}\n\n`;
  });
  return files.join("") + node.text;
}
