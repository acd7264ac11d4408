"""How byte-level BPE vocabularies split text before merging: one table, name -> recipe.

A recipe's steps refine each other: every piece is cut where the next step's expression matches, the
matches and what lies between them becoming pieces. Names are the values of `tokenizer.ggml.pre`, and the
splits are llama.cpp's, letter for letter, including where it simplifies the original tokenizer: it
knows no upper and lower case beyond ASCII in "tekken" and "gpt-4o" or at all in "tiny_aya" and "youtu",
no marks in "kimi-k2", and cuts digits by threes only to the right of the first group in "afmoe".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import regex

from ..errors import UnsupportedModel
from .unassigned import hide_new

Step = str | Callable[[str], list[str]]

# Shared parts of expressions. `\s` is Unicode white space.
_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_ANY_CASE = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_HAN = (
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef"
    r"\U0002f800-\U0002fa1f"
)

# deepseek-llm's letters: the scripts that have upper and lower case, as of Unicode 11.
_LETTERS_WITH_CASE = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
    r"\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-"
    r"\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    r"\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00"
    r"-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    r"\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-"
    r"\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
    r"\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    r"\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    r"\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13"
    r"-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    r"\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    r"\U0001e900-\U0001e943"
)

_GPT2 = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_NO_CONTRACTION = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_QWEN2_NO_CONTRACTION}"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_TAIL}"
_FAR_EASTERN = r"(?:(?!\s)[\u0800-\u9fa5\uac00-\ud7ff])+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_LINES = r"[^\n]+|\n+"


def _two_cases(letter: str, numbers: str, contraction: str = "") -> str:
    """An expression for words whose capitals come first; only ASCII letters have a case."""
    upper, lower = rf"(?:(?![a-z]){letter})", rf"(?:(?![A-Z]){letter})"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}|{numbers}|"
        rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


def _maybe(pattern: str) -> str:
    return f"(?:{pattern})?"


_NUMBERS = regex.compile(r"\p{N}+")
_DIGITS = regex.compile(r"[0-9]+")


def _cut(text: str, at: list[int]) -> list[str]:
    bounds = [0, *at, len(text)]
    return [text[a:b] for a, b in pairwise(bounds) if a < b]


def digits_after_text(text: str) -> list[str]:
    """Cut numbers in threes counted from their end; the first group stays with the text before it."""
    runs = (m.span() for m in _NUMBERS.finditer(hide_new(text)))
    return _cut(text, [i for a, b in runs for i in range(a + ((b - a) % 3 or 3), b + 1, 3)])


def digits_by_threes(text: str) -> list[str]:
    """Cut before every three digits counted from the end of a number."""
    runs = (m.span() for m in _DIGITS.finditer(text))
    return _cut(text, [i for a, b in runs for i in range(a + (b - a) % 3, b, 3)])


@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes the words of a BPE vocabulary.

    Attributes
    ----------
    steps : tuple of str or callable
        Expressions, or functions from a piece to its parts, applied one after the other.
    ignore_merges : bool
        A word that is a token becomes that token, whatever the merges say.
    byte_level : bool
        Whether words are spelled byte by byte in GPT-2's alphabet, or as plain text.
    escape_spaces : bool
        Spaces are spelled ``▁``.
    newline_runs : bool
        A word of newlines that is a token becomes that token.
    marked_words : bool
        Every ``▁`` begins a word, and so does the text between newlines, which gets one before it if it has
        none.
    add_bos, force_bos, add_sep : bool
        What surrounds the text when the file does not say, and (force) even if it denies it.
    has_default_bos : bool
        False: without a key there is no beginning token.
    drop_spaces : bool
        White space only separates; it gets no token.
    composed : bool
        Text is brought to Unicode's form NFC first: an e and an accent become é.
    """

    steps: tuple[Step, ...]
    ignore_merges: bool = False
    byte_level: bool = True
    escape_spaces: bool = False
    newline_runs: bool = False
    marked_words: bool = False
    add_bos: bool = False
    force_bos: bool = False
    add_sep: bool = False
    has_default_bos: bool = True
    drop_spaces: bool = False
    composed: bool = False

    def split(self, text: str) -> list[str]:
        """The words of `text`; joined they are `text` again."""
        words = [text]
        for step in self.steps:
            cut = _splitter(step) if isinstance(step, str) else step
            words = [part for word in words for part in cut(word)]
        return words


@cache
def _splitter(expression: str) -> Callable[[str], list[str]]:
    """A function that cuts a text into what the expression matches and what lies between."""
    find = regex.compile(expression).findall
    split = regex.compile(f"({expression})").split

    def cut(text: str) -> list[str]:
        parts: list[str] = find(text)
        if sum(map(len, parts)) == len(text):  # nearly always: the expression covers everything
            return parts
        return [part for part in split(text) if part]

    return _seeing_old_unicode(cut) if r"\p{" in expression else cut


def _seeing_old_unicode(cut: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """A function that cuts as `cut` does, but treats characters newer than Unicode 15.1 as unassigned."""

    def cut_shown(text: str) -> list[str]:
        shown = hide_new(text)
        parts = cut(shown)
        return parts if shown == text else _cut(text, list(accumulate(map(len, parts))))

    return cut_shown


_DEFAULT = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT2_LIKE = PreTokenizer((_GPT2,))
_ROBERTA = replace(_GPT2_LIKE, add_sep=True)
_LLAMA3_LIKE = PreTokenizer((_LLAMA3,))
_LLAMA3_BOS = replace(_LLAMA3_LIKE, ignore_merges=True, add_bos=True)
_GLM4 = replace(_LLAMA3_LIKE, has_default_bos=False)
_QWEN2_LIKE = PreTokenizer((_QWEN2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK3_LIKE = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))
_BLOOM_LIKE = PreTokenizer((_BLOOM,))
_VIKING = PreTokenizer((_BLOOM, r"\p{N}"))
_GPT4O = PreTokenizer((_two_cases(r"\p{L}", r"\p{N}{1,3}", _maybe(_CONTRACTION)),))
_BAILING = PreTokenizer(
    (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}|"
        r"\s*[\r\n]|\s+(?!\S)|\s+",
    )
)
_TINY_AYA = PreTokenizer(
    (
        digits_after_text,
        rf"{_ANY_CASE}{_maybe(_CONTRACTION)}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
    )
)
_GEMMA4 = PreTokenizer(
    (_LINES,), byte_level=False, escape_spaces=True, newline_runs=True, force_bos=True
)

TABLE: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    **dict.fromkeys(
        [
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        _LLAMA3_BOS,
    ),
    **dict.fromkeys(["dbrx", "smaug-bpe"], _LLAMA3_LIKE),
    "chatglm-bpe": _GLM4,
    **dict.fromkeys(["glm4", "glm5"], replace(_GLM4, ignore_merges=True)),
    **dict.fromkeys(
        [
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        _GPT2_LIKE,
    ),
    **dict.fromkeys(["jina-v1-en", "jina-v2-code", "roberta-bpe"], _ROBERTA),
    **dict.fromkeys(
        [
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        _SINGLE_DIGITS,
    ),
    **dict.fromkeys(
        [
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        _QWEN2_LIKE,
    ),
    # llama.cpp leaves out the normalisation that the originals' tokenizers begin with
    "qwen2": replace(_QWEN2_LIKE, composed=True),
    "qwen35": PreTokenizer(
        (rf"{_CONTRACTION}|{_ANY_CASE}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}",)
    ),
    "ufakzeka": PreTokenizer((_QWEN2_NO_CONTRACTION,)),
    "laguna": PreTokenizer((_LINES, _QWEN2)),
    "minicpm5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_SYMBOLS}|{_TAIL}",
        ),
        ignore_merges=True,
    ),
    "seed-coder": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|"
            + _TAIL,
        )
    ),
    **dict.fromkeys(["bailingmoe", "bailingmoe2", "llada-moe"], _BAILING),
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|"
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "jais-2": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|"
            r"\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|"
            r"\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s",
        )
    ),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], _GPT4O),
    "granite-embed-multi-97m": PreTokenizer(
        (_two_cases(r"[\p{L}\p{M}]", r"\p{N}{1,3}", _maybe(_CONTRACTION)),), ignore_merges=True
    ),
    "tekken": PreTokenizer((_two_cases(r"\p{L}", r"\p{N}"),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(["tiny_aya", "cohere2moe"], _TINY_AYA),
    "youtu": PreTokenizer(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
            rf"{_ANY_CASE}{_maybe(_CONTRACTION)}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
        ),
        ignore_merges=True,
    ),
    "kimi-k2": PreTokenizer(
        (
            rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?(?:(?![{_HAN}])\p{{L}})+{_maybe(_CONTRACTION)}|"
            rf"\p{{N}}{{1,3}}|{_SYMBOLS}|{_TAIL}",
        )
    ),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"], _DEEPSEEK3_LIKE),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _CJK,
            r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|"
            r"[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "afmoe": PreTokenizer(
        (
            digits_after_text,
            "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
            _DEEPSEEK3,
        )
    ),
    "superbpe": PreTokenizer((r"\p{N}+", digits_by_threes)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_LETTERS_WITH_CASE}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3001\u3002]+",
            r"(?<!\s)\s++\Z",
            _FAR_EASTERN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _FAR_EASTERN, r"\p{N}")),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "chameleon": PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    **dict.fromkeys(["bloom", "gpt3-finnish", "poro-chat"], _BLOOM_LIKE),
    "viking": _VIKING,
    **dict.fromkeys(["gemma4", "granite-embed-multi-311m"], _GEMMA4),
    "mmbert": replace(_GEMMA4, force_bos=False, marked_words=True),
    "sarvam-moe": PreTokenizer((_LINES,), byte_level=False, escape_spaces=True),
    "whitespace": PreTokenizer((r"\S+",), byte_level=False, drop_spaces=True),
}


def pretokenizer(name: str) -> PreTokenizer:
    """The recipe called `name`; the empty name is the default one, as in llama.cpp."""
    found = TABLE.get(name or "default")
    if found is None:
        raise UnsupportedModel(
            f"tokenizer.ggml.pre: unknown pre-tokenizer {name[:60]!r}; splitting text as another "
            f"vocabulary does would give wrong tokens. Known: {', '.join(sorted(TABLE))}"
        )
    return found
