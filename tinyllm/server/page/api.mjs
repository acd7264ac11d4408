// What the page asks of the server that it comes from.

const KEY = "tinyllm.key";

/** Something that did not work, in words for people. */
export class Failure extends Error {
  constructor(kind, message, wait = 0) {
    super(message);
    this.kind = kind; // "gone", "key", "busy", "loading", "refused", "broken"
    this.wait = wait; // seconds after which it may work
  }
}

/** The key is kept until the tab is closed, and no longer. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

async function ask(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure("gone", "The server does not answer. Is tinyllm serve still running?");
  }
  if (!answer.ok) throw await failureOf(answer);
  return answer;
}

async function failureOf(answer) {
  let message = `The server answered ${answer.status}.`;
  try {
    message = (await answer.json()).error?.message ?? message;
  } catch {
    // Not JSON: the status has to do.
  }
  const wait = Math.min(Math.max(Number(answer.headers.get("Retry-After")) || 2, 1), 60);
  if (answer.status === 401) return new Failure("key", key.get() ? "The key is wrong." : "This server asks for a key.");
  if (answer.status === 429) return new Failure("busy", "The server is busy with other requests.", wait);
  if (answer.status === 503) return new Failure("loading", "The model is being loaded.", wait);
  return new Failure(answer.status >= 500 ? "broken" : "refused", sentence(message));
}

/** An error's text as a sentence. */
function sentence(text) {
  const found = text.trim();
  return `${found.charAt(0).toUpperCase()}${found.slice(1)}${/[.!?]$/.test(found) ? "" : "."}`;
}

/** The models of the server, the default first. */
export async function models() {
  return (await (await ask("/v1/models")).json()).data;
}

/** The tokens of a text, as {id, piece}. */
export async function tokenize(model, text) {
  const body = { model, content: text, parse_special: false, with_pieces: true };
  return (await (await ask("/tokenize", body)).json()).tokens;
}

/** The chunks of a chat's stream, one by one. */
export async function* chat(body, signal) {
  const answer = await ask("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let done = false;
  for await (const event of events(answer.body, signal)) {
    if (event === "[DONE]") {
      done = true;
      break;
    }
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Failure("broken", sentence(chunk.error.message));
    yield chunk;
  }
  if (!done) throw new Failure("gone", "The answer broke off: the connection to the server was lost.");
}

/** The data of server-sent events. */
export async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure("gone", "The answer broke off: the connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
