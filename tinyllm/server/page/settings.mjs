// What can be set for a conversation, and what of it goes into a request. One table serves the form and the request.

/** The defaults are tinyllm's own, not OpenAI's: a small model answers better with them. */
export const FIELDS = [
  { name: "temperature", label: "Temperature", value: 0.8, min: 0, max: 2, step: 0.05,
    help: "How freely the next token is drawn. 0 takes the most probable one each time." },
  { name: "top_p", label: "Top p", value: 0.95, min: 0.05, max: 1, step: 0.01,
    help: "Draws among the most probable tokens that together have this probability." },
  { name: "top_k", label: "Top k", value: 40, min: 0, max: 200, step: 1,
    help: "Draws among this many tokens at most. 0: among all." },
  { name: "min_p", label: "Min p", value: 0, min: 0, max: 1, step: 0.01,
    help: "Leaves out tokens that are less probable than this share of the best one." },
  { name: "repeat_penalty", label: "Repeat penalty", value: 1, min: 1, max: 2, step: 0.01,
    help: "Makes tokens that were just used less probable. 1: no change." },
  { name: "presence_penalty", label: "Presence penalty", value: 0, min: -2, max: 2, step: 0.1,
    help: "Lowers every token that has appeared, however often." },
  { name: "frequency_penalty", label: "Frequency penalty", value: 0, min: -2, max: 2, step: 0.1,
    help: "Lowers a token more the more often it has appeared." },
];

export const CHOICES_SHOWN = [0, 5, 10, 20];

/** The settings of a new conversation. */
export const DEFAULTS = {
  ...Object.fromEntries(FIELDS.map(({ name, value }) => [name, value])),
  system: "",
  max_tokens: null,
  seed: null,
  stop: "",
  thinking: true,
  choices: 10,
};

/** The fields of a request that the settings ask for; what changes nothing is left out. */
export function sampling(settings) {
  const s = { ...DEFAULTS, ...settings };
  const found = { temperature: s.temperature, top_p: s.top_p, top_k: s.top_k };
  if (s.min_p > 0) found.min_p = s.min_p;
  if (s.repeat_penalty !== 1) found.repeat_penalty = s.repeat_penalty;
  if (s.presence_penalty) found.presence_penalty = s.presence_penalty;
  if (s.frequency_penalty) found.frequency_penalty = s.frequency_penalty;
  if (s.max_tokens) found.max_tokens = s.max_tokens;
  if (s.seed !== null) found.seed = s.seed;
  const stop = s.stop.split("\n").filter(Boolean);
  if (stop.length) found.stop = stop;
  if (!s.thinking) found.chat_template_kwargs = { enable_thinking: false };
  if (s.choices) Object.assign(found, { logprobs: true, top_logprobs: s.choices });
  return found;
}
