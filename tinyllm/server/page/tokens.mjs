// Tokens of an answer: what was chosen, how probable it was, and what else there was.
//
// A token is kept as small as it can be, since conversations are stored: {i: id, t: text, b: bytes where they are no
// text by themselves, p: log probability, a: alternatives [{i, t, b, p}], end: true for one that is no text}.

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const encoder = new TextEncoder();

/** A token from an entry of the server's `logprobs.content`. */
export function tokenOf(entry) {
  const found = { ...choiceOf(entry), a: (entry.top_logprobs ?? []).map(choiceOf) };
  return found;
}

function choiceOf({ id, token, bytes, logprob }) {
  const found = { i: id, t: token, p: logprob === null ? null : Math.round(logprob * 1e4) / 1e4 };
  if (bytes && bytes.length === 0 && token) found.end = true;
  else if (bytes && textOf(bytes) === null) found.b = bytes;
  return found;
}

function textOf(bytes) {
  try {
    return decoder.decode(new Uint8Array(bytes));
  } catch {
    return null; // half a character
  }
}

const bytesOf = (token) => (token.end ? new Uint8Array() : token.b ? new Uint8Array(token.b) : encoder.encode(token.t));

/** The text of tokens, and where each begins in it; half a character belongs to the token that ends it. */
export function joined(tokens) {
  const reader = new TextDecoder("utf-8", { ignoreBOM: true });
  const starts = [];
  let text = "";
  for (const token of tokens) {
    starts.push(text.length);
    text += reader.decode(bytesOf(token), { stream: true });
  }
  return { text: text + reader.decode(), starts };
}

/**
 * Where the tokens begin in `text`, a part of what they spell: an answer has no marks of reasoning, and may be trimmed.
 * `after` is how much of the spelled text came before. Null where the two do not fit.
 */
export function align(tokens, text, after = 0) {
  if (!tokens?.length || !text) return null;
  const whole = joined(tokens);
  const shift = whole.text.indexOf(text, after);
  return shift < 0 ? null : { starts: whole.starts.map((start) => start - shift), end: shift + text.length };
}

/** The pieces of text[at, at + length) by token: [{token, text}], in order. */
export function split(starts, text, at) {
  const found = [];
  let k = tokenAt(starts, at);
  let from = at;
  while (from < at + text.length) {
    while (k + 1 < starts.length && starts[k + 1] <= from) k++;
    const to = Math.min(k + 1 < starts.length ? starts[k + 1] : Infinity, at + text.length);
    found.push({ token: k, text: text.slice(from - at, to - at) });
    from = to;
  }
  return found;
}

function tokenAt(starts, at) {
  let low = 0;
  let high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= at) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Probability as people read it. */
export function percent(logprob) {
  if (logprob === null || logprob === undefined) return "";
  const p = 100 * Math.exp(logprob);
  if (p >= 99.95) return "100 %";
  if (p < 0.01) return "< 0.01 %";
  return `${p >= 9.95 ? Math.round(p) : p >= 0.095 ? p.toFixed(1) : p.toFixed(2)} %`;
}

/** How unexpected a token was, from 0 (certain) to 1 (a chance of one in 256 or less). */
export const surprise = (logprob) => (logprob === null ? 0 : Math.min(1, Math.abs(logprob) / Math.LN2 / 8));

/** A token's text with its spaces visible. */
export function visible(token) {
  if (token.b) return token.b.map((b) => `\\x${b.toString(16).padStart(2, "0")}`).join("");
  if (token.t === "") return "(nothing)";
  return token.t.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
}

/** The choices at a token: what was chosen, with the alternatives, the most probable first. */
export function choices(token) {
  const found = [...(token.a ?? [])];
  if (!found.some((c) => c.i === token.i)) found.push({ i: token.i, t: token.t, b: token.b, p: token.p, end: token.end });
  return found.sort((a, b) => (b.p ?? -Infinity) - (a.p ?? -Infinity));
}
