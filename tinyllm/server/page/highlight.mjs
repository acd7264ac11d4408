// Light colouring of code: comments, strings, numbers and words of the language. One regular expression for a family
// of languages; a wrong guess costs a colour, never a character.

const WORDS =
  "abstract and as assert async await bool break case catch char class const continue def default defer del do double " +
  "elif else end enum except export extends extern false False final finally float fn for from func function global go " +
  "if impl implements import in int interface is lambda let local long loop match mod module mut namespace new nil None " +
  "nonlocal not null or package pass private protected pub public raise return self short static struct super switch " +
  "template then this throw trait true True try type typeof undefined union unsafe until use using var void while with yield";
const SQL =
  "add all alter and as asc between by case count create delete desc distinct drop else end exists from full group having " +
  "in index inner insert into is join key left like limit not null on or order outer primary right select set table then " +
  "union unique update values view when where with";

const STRING = /"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|`(?:\\.|[^`\\])*`?/;
const HASH = /#[^\n]*/;
const SLASHES = /\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)/;
const DASHES = /--[^\n]*/;
const TRIPLE = /"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)/;
const MARKUP = /<!--[\s\S]*?(?:-->|$)/;

const FAMILIES = [
  { names: ["py", "python", "python3"], comment: HASH, string: [TRIPLE, STRING], words: WORDS },
  { names: ["sh", "bash", "shell", "zsh", "console", "yaml", "yml", "toml", "ruby", "rb", "r", "perl", "make", "dockerfile"],
    comment: HASH, string: [STRING], words: WORDS + " echo fi done esac unless require" },
  { names: ["sql"], comment: DASHES, string: [STRING], words: SQL, anyCase: true },
  { names: ["lua", "haskell", "hs", "ada"], comment: DASHES, string: [STRING], words: WORDS },
  { names: ["html", "xml", "svg"], comment: MARKUP, string: [/"[^"\n]*"|'[^'\n]*'/], words: "" },
  { names: ["text", "txt", "plain", "markdown", "md", "diff"], plain: true },
];
const COMMON = { comment: SLASHES, string: [STRING], words: WORDS };

/** Pieces {text, kind} that make up the code; kind is "" for what has no colour. */
export function paint(code, language) {
  const family = FAMILIES.find((f) => f.names.includes(language.toLowerCase())) ?? COMMON;
  if (family.plain) return [{ text: code, kind: "" }];
  const words = new Set(family.words.split(" "));
  const strings = family.string.map((s) => s.source).join("|");
  const parts = new RegExp(
    `(?<comment>${family.comment.source})|(?<string>${strings})|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_]\\w*)`,
    "g",
  );
  const found = [];
  let end = 0;
  for (const match of code.matchAll(parts)) {
    let kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    if (kind === "word" && !words.has(family.anyCase ? match[0].toLowerCase() : match[0])) kind = "";
    if (!kind) continue;
    if (match.index > end) found.push({ text: code.slice(end, match.index), kind: "" });
    found.push({ text: match[0], kind });
    end = match.index + match[0].length;
  }
  if (end < code.length) found.push({ text: code.slice(end), kind: "" });
  return found;
}
