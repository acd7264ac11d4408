"""Texts that tell tokenizers apart, and a vocabulary whose ids show where words begin."""

from __future__ import annotations

import random

import regex

from tinyllm.tokenizers.bpe import TO_ALPHABET

# llama.cpp drops spacing vowel signs, keeps the first letter of a Korean syllable only, and takes these control
# characters for spaces; the model's own tokenizer, Hugging Face's, does not
UNLIKE_WORDPIECE = regex.compile(r"[\p{Mc}\p{Me}\uac00-\ud7a3\x0b\x0c\x1c-\x1f\x85]")

HAND_MADE = [
    "", " ", "  ", "\n", "a b", "Hello, world! It's 12:30.", "I'm HE'S we'LL they'd ''s 'S's ſ 'ſ",
    "1 12 123 1234 12345 123456 1234567", "x12345y 9999z", "½123 ٣٤٥٦٧ 1٢3", "   123  45",
    "abc123  \n\n  def", "\r\n\r\n a \r b", "HelloWorld helloWORLD McDonald iPhone ABCdef",
    "ÉCOLEécole ÑandúÑ", "IMGIMGABCZ <sentinel:12> IMGIMGABCDEZ", "!abc #def (ghi) ${x} ~tilde `tick",
    "a/b//c\n///\n", "- - -- --- ----", "foo\t\tbar\t baz", "trailing   ", "trailing\n", "\n\n\nlead",
    "a  b   c    d", " \u3000\u3000 x\u3000,\u3000", "中文abc中文123中文 中文", "漢字𠀀𪜀x",
    "hello 世界 안녕 สวัสดี", "e\u0301a\u0300 \u0301x", "a\u0903b\u0903", "don't can't I'VE Y'ALL'D",
    "1.000,50 $5 5% -3 +4 3.14e10", "https://a.b/c?d=e&f=g#h", "__init__ snake_case camelCase",
    "x=y+z;a||b&&c", "\u200dab\u200d", "ａｂ ＣＤ １２３", "\xa0\xa0a\xa0", "a\x85b", "\x1c\x1da", "'", "''",
    "' s", "'re're", "9" * 17, "A" * 30, "aA" * 15, " " * 33, "\t" * 9, "\n" * 7, "\r\n" * 5, " \n" * 6,
    "。、，！", "«quoted» „x“", "ABC'S DON'T'", "ʰello ªb ǅx", "x²y³ H₂O ½cup", "﷽ ﷺ", "‒–—‣…", "ㄅㄆ ㄱㄲ",
    "ー゛゜ｱｲ", "👨\u200d👩\u200d👧 🇩🇪 ❤\ufe0f", "naïve café – coöperate", "Ελληνικά ΣΊΣΥΦΟΣ", "İstanbul ı ẞ ß",
    "<s> </s> [CLS] <unk> <|endoftext|>", "a\u0000b",
]  # fmt: skip

_POOLS = [
    "abcdefgXYZ", "ABCDE", "0123456789", " ", " \t", "\n\r", "\r\n \t", "'’`", "stdmrevllSTDMREVL",
    ".,;:!?-_/\\()[]{}<>@#$%^&*+=|~\"", "éàüßøŁłİıΣςσΩωЖжЁё", "中文字符龥鿿㐀䶿豈〇々",
    "ひらがなカタカナーｱｲｳ゛",
    "한국어ᄀᆞᅵㄱㆎ가힣", "สวัสดีກຂကខ꧁", "नमस्तेকিঁ", "שלוםׇמرحباًٌّ۔،؟", "²³½¼Ⅷ①٣۴०९𝟘𝟙",
    "\u0300\u0301\u20d0\u0903\ufe0f\u200d\u200b\u200c\u2060\xad",
    "\xa0\u3000\u2003\u2028\u2029\x85\u1680\u202f\x0b\x0c\x1c\x1f", "😀👨👩👧🏽🇩🇪❤",
    "𝐀𝑏𝒄ＡＢａｂ！？：；，、。…“”‘’—‣︰﹏ㄅㄯ",
    # assigned by no version of Unicode up to 15.1, or by some that are newer
    "\u05c8\u0558\u058b\u088f\u0c5c\u1c89\u1acf\u2427\U00010d40\U0001c000\U00031350\u2ffc\u31ef\ufffd\uffff",
    "\U0010ffff\ue000", "™©→∞∑€£¥°§¶", "ǅǈʰˠªºⅰ", "\x01\x7f", "𠀀𪛟𫜀𬺰𮯠丽", "ΐΰἀὗⰀꙀꭰᏸ𐐀𐓘𞤀",
]  # fmt: skip


def random_texts(n: int, seed: int) -> list[str]:
    """`n` short mixtures of scripts, spaces and digits, the same for the same seed."""
    choose = random.Random(seed)
    return [_mixture(choose) for _ in range(n)]


def _mixture(choose: random.Random) -> str:
    pools = choose.sample(_POOLS, choose.randint(1, 6))
    out = ""
    for _ in range(choose.randint(1, 14)):
        if choose.random() < 0.7:
            out += "".join(choose.choice(choose.choice(pools)) for _ in range(choose.randint(1, 4)))
        else:
            out += choose.choice(pools)[0] * choose.randint(1, 5)
        out += " " if choose.random() < 0.3 else ""
    return out


def pair_vocabulary(pre: str) -> dict[str, object]:
    """All bytes and all pairs of bytes, merged in order.

    Pairs merge wherever they can, so one boundary more or less shifts the pairs of the word after it.
    """
    letters = [chr(TO_ALPHABET.get(b, b)) for b in range(256)]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": letters + [a + b for a in letters for b in letters],
        "tokenizer.ggml.merges": [f"{a} {b}" for a in letters for b in letters],
    }
