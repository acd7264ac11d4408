// One answer: the request for it, and what the stream adds to its message until it ends.

import { Failure, chat } from "./api.mjs";
import { sampling } from "./settings.mjs";
import { align, joined, tokenOf } from "./tokens.mjs";
import { above, contentOf } from "./tree.mjs";

const ATTEMPTS = 8; // while the server is busy or loads the model

/**
 * Writes the answer `node` of a conversation. `node.tokens` and `node.text`, where it has some, are its beginning: the
 * model reads them and goes on.
 *
 * `changed()` is called after each piece; `waiting(text)` when the server lets us wait, with "" when it is over.
 */
export async function write(conversation, node, { signal, changed, waiting }) {
  const body = requestOf(conversation, node);
  const began = performance.now();
  const stats = { written: 0, began, first: 0 };
  node.stats = {};
  delete node.error;
  delete node.finish;
  try {
    for await (const chunk of patiently(body, signal, waiting)) {
      hear(node, chunk, stats);
      changed();
    }
  } catch (error) {
    if (signal.aborted) node.finish = "stopped";
    else node.error = error instanceof Failure ? error.message : `Something went wrong: ${error.message}`;
    if (error.kind === "key") throw error;
  } finally {
    changed();
  }
}

function requestOf(conversation, node) {
  const { settings } = conversation;
  const messages = above(conversation, node).map((n) => ({ role: n.role, content: contentOf(n) }));
  if (settings.system?.trim()) messages.unshift({ role: "system", content: settings.system });
  const body = { model: node.model, messages, ...sampling(settings) };
  const ids = (node.tokens ?? []).filter((t) => !t.end).map((t) => t.i);
  if (ids.length) body.prefix_ids = ids;
  else if (node.text) {
    messages.push({ role: "assistant", content: node.text });
    body.continue_final_message = true;
  }
  return body;
}

/** The stream; a server that is busy is asked again when it says so. */
async function* patiently(body, signal, waiting) {
  for (let attempt = 1; ; attempt++) {
    try {
      for await (const chunk of chat(body, signal)) {
        waiting("");
        yield chunk;
      }
      return;
    } catch (error) {
      if (!["busy", "loading"].includes(error.kind) || attempt === ATTEMPTS) throw error;
      await countdown(error, signal, waiting);
    }
  }
}

async function countdown(error, signal, waiting) {
  for (let left = Math.ceil(error.wait); left > 0; left--) {
    waiting(`${error.message} Trying again in ${left} s.`);
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener("abort", () => {
        clearTimeout(timer);
        reject(signal.reason);
      }, { once: true });
    });
  }
  waiting("");
}

function hear(node, chunk, stats) {
  const [choice] = chunk.choices;
  if (choice) {
    const { delta, logprobs } = choice;
    if (delta.reasoning_content) node.reasoning = (node.reasoning ?? "") + delta.reasoning_content;
    if (delta.content) node.text += delta.content;
    for (const entry of logprobs?.content ?? []) (node.tokens ??= []).push(tokenOf(entry));
    const n = logprobs?.content?.length ?? (delta.content || delta.reasoning_content ? 1 : 0);
    if (n) {
      stats.first ||= performance.now();
      stats.written += n;
    }
    if (choice.references) node.references = choice.references;
    if (choice.finish_reason) node.finish = choice.finish_reason;
  }
  Object.assign(node.stats, statsOf(chunk, stats));
}

/** Tokens, tokens a second, seconds to the first token, and the context that is used. */
function statsOf({ usage, timings }, { written, began, first }) {
  if (usage) {
    return {
      tokens: usage.completion_tokens,
      used: usage.total_tokens,
      read: usage.prompt_tokens,
      ...(timings?.predicted_per_second ? { speed: timings.predicted_per_second } : {}),
    };
  }
  const seconds = (performance.now() - first) / 1000;
  return {
    tokens: written,
    ...(first ? { wait: (first - began) / 1000 } : {}),
    ...(written > 1 && seconds > 0.05 ? { speed: (written - 1) / seconds } : {}),
  };
}

/**
 * The beginning of another answer: that of `node` up to its token k, and other tokens in its place.
 */
export function branch(node, k, others) {
  const tokens = [...node.tokens.slice(0, k), ...others];
  const fitted = parts(node);
  const begins = joined(node.tokens).starts[k];
  const added = joined(others).text;
  const inReasoning = fitted.reasoning && begins < fitted.reasoning.end;
  if (inReasoning) {
    const { reasoning } = fitted;
    return { tokens, branchedAt: k, text: "", reasoning: node.reasoning.slice(0, Math.max(0, reasoning.starts[k])) + added };
  }
  const kept = fitted.text ? node.text.slice(0, Math.max(0, fitted.text.starts[k])) : joined(node.tokens.slice(0, k)).text;
  return { tokens, branchedAt: k, text: kept + added, ...(node.reasoning ? { reasoning: node.reasoning } : {}) };
}

/** Where the tokens of an answer stand in its reasoning and in its text: {reasoning, text}, each null where unknown. */
export function parts(node) {
  const reasoning = align(node.tokens, node.reasoning);
  return { reasoning, text: align(node.tokens, node.text, reasoning?.end ?? 0) };
}
