"""How a ``tokenizer.json`` splits text before merging, and which of our pre-tokenizers does the same.

Files do not name their pre-tokenizer; they hold a small program of expressions. We run it on sample texts
and look for the recipe that splits them alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import regex

from ...errors import UnsupportedModel
from ...tokenizers.pretokenizers import TABLE

Cut = Callable[[str], list[str]]

GPT2 = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Letters with a case are ASCII: recipes know no case of others, as llama.cpp's do not.
SAMPLES = (
    "Hello world, it's I'll WE'VE they'RE don'T we'D 'S 'sun o'clock",
    "1 22 333 4444 55555 666666 7777777 88888888 123456789 0 1.5 x2y 3rd v12 a1b22c333",
    "camelCase HTTPServer iPhone XMLParser aB AbC ABc abcDEFghi A1b B2C",
    "tabs\t\tand  spaces   and    more     \n\n lines\r\n\r\nwith\n \n ends \n  ",
    "  two leading,trailing   ",
    "\n\n\n",
    "   ",
    " \n \n  x",
    "\t",
    "a\n",
    "a \n b",
    "\r",
    "x\xa0y \u3000z",
    "foo.bar(baz)[0]!=='q' && *p++ ; // ~/path/to/file.txt #tag @user $5 50%",
    "^_^ `code` <b>",
    "!!! ??? ... --- === *** ``` ''' \"\"\" ,.;: a.b .a !a ?b /n //n ./a \\n",
    "wait...what?no!yes … — “quoted” «» £€¥ ° ± → ∞ ≠",
    "世界你好 日本語とカタカナ abc中文def 123中文456 。，！",
    "한국어 문장 입니다 ภาษาไทย שלום مرحبا",
    "١٢٣٤ १२३ Ⅷ ½ ² x² ①",
    "🦙🦙 ✅ok no✅",
    "1,234,567.89 $1,000 12:34:56 2024-01-02 +1-555-0100 1e10 0x1F 3'4 5's",
    "_private __dunder__ snake_case kebab-case a_1 -x +y -1 +2 (a) [b] {c}",
    "(1) [2] a'b b's' ' s",
    "a/b c//d e\n/f g/\n\nh .\n\ni ;\r\nj !\n \nk",
    "x  \n\ny",
    "a      b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa                               ",
    "b",
    "IMGIMGABZ <sentinel:12> text",
)
# words with marks: some recipes cut before them, as llama.cpp does, where the original does not
MARKED = (
    "អាច！ हिन्दी",
    "été à ño",
    "🚀😶\u200d🌫️",
)


def recognise(tokenizer: Mapping[str, Any], wanted: tuple[str, ...] = ()) -> str:
    """The name of the recipe that splits as a byte-level BPE tokenizer does.

    Parameters
    ----------
    tokenizer : Mapping
        The content of ``tokenizer.json``.
    wanted : tuple of str
        Names to prefer among recipes that do the same.

    Raises
    ------
    UnsupportedModel
        No recipe does; the message shows what was found.
    """
    program = tokenizer.get("pre_tokenizer")
    cut = _cut(program)
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    composed = "NFC" in json.dumps(tokenizer.get("normalizer"))
    rest = [n for n, r in TABLE.items() if r.ignore_merges == ignore_merges]
    fitting: list[str] = []
    for samples in (SAMPLES + MARKED, SAMPLES):
        expected = [cut(text) for text in samples]
        fitting = fitting or [n for n in rest if [*map(TABLE[n].split, samples)] == expected]
    if not fitting:
        raise UnsupportedModel(
            f"the pre-tokenizer is none that we know: {_shown(program)}, ignore_merges={ignore_merges}; "
            f"splitting text otherwise would give wrong tokens. Known: {', '.join(sorted(TABLE))}"
        )
    fitting.sort(key=lambda name: TABLE[name].composed != composed)
    return next((name for name in wanted if name in fitting), fitting[0])


def _shown(program: Any) -> str:
    found = json.dumps(program, ensure_ascii=False)
    return found if len(found) <= 400 else found[:400] + "..."


def _cut(program: Any) -> Cut:
    """A function that splits text as the program of a ``tokenizer.json`` says."""
    if program is None:
        return lambda text: [text] if text else []
    kind = program.get("type")
    if kind == "Sequence":
        return _sequence([_cut(step) for step in program["pretokenizers"]])
    if kind == "Split":
        pattern = program["pattern"]
        expression = pattern.get("Regex") or regex.escape(pattern["String"])
        return _by_matches(expression, program["behavior"], bool(program.get("invert")))
    if kind == "ByteLevel":
        cut = _by_matches(GPT2, "Isolated") if program.get("use_regex", True) else _cut(None)
        return (lambda text: cut(" " + text)) if program.get("add_prefix_space") else cut
    if kind == "Digits":
        each = r"\p{N}" if program.get("individual_digits") else r"\p{N}+"
        return _by_matches(each, "Isolated")
    if kind == "Punctuation":
        return _by_matches(r"[\p{P}$+<=>^`|~]", program.get("behavior", "Isolated"))
    if kind == "WhitespaceSplit":
        return _by_matches(r"\s", "Removed")
    raise UnsupportedModel(
        f"a pre-tokenizer of type {kind!r:.40} is none that we know: {_shown(program)}"
    )


def _sequence(steps: list[Cut]) -> Cut:
    def cut(text: str) -> list[str]:
        words = [text]
        for step in steps:
            words = [part for word in words for part in step(word)]
        return words

    return cut


def _by_matches(expression: str, behaviour: str, invert: bool = False) -> Cut:
    """Split at the matches of an expression; ``behaviour`` says where they go."""
    find = regex.compile(
        expression, regex.V1
    ).finditer  # with sets within sets, as the originals have

    def cut(text: str) -> list[str]:
        parts = [(part, match != invert) for part, match in _parts(find(text), text)]
        return [part for part in _joined(parts, behaviour) if part]

    return cut


def _parts(matches: Iterator[Any], text: str) -> Iterator[tuple[str, bool]]:
    """What matches, and what lies between, in order."""
    at = 0
    for match in matches:
        if match.start() > at:
            yield text[at : match.start()], False
        if match.end() > match.start():
            yield match[0], True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def _joined(parts: list[tuple[str, bool]], behaviour: str) -> list[str]:
    if behaviour == "Isolated":
        return [part for part, _ in parts]
    if behaviour == "Removed":
        return [part for part, match in parts if not match]
    joins: dict[str, Callable[[bool, bool], bool]] = {
        "Contiguous": lambda a, b: a and b,
        "MergedWithPrevious": lambda a, b: b and not a,
        "MergedWithNext": lambda a, b: a and not b,
    }
    if behaviour not in joins:
        raise UnsupportedModel(f"a split with behaviour {behaviour!r:.40} is none that we know")
    if not parts:
        return []
    words = [parts[0][0]]
    for (_, before), (part, match) in pairwise(parts):
        if joins[behaviour](before, match):
            words[-1] += part
        else:
            words.append(part)
    return words
