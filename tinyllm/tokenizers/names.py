"""Which tokens end a generation, and other roles that only a token's spelling tells.

Files often name their end-of-turn tokens nowhere but in the vocabulary. The spellings below are those
llama.cpp knows; what it finds by spelling it treats as a control token, and so do we.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .vocab import Vocab

# The types of tokens, numbered as in the file.
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)

# A role that no key assigns goes to the first of these spellings that the vocabulary has.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "eot": (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

# Tokens that end a generation wherever they exist, beside those with a role in ENDING_ROLES.
ENDINGS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
ENDING_ROLES = ("fim_pad", "fim_rep", "fim_sep", "eos", "eot", "eom")

# These mark the channels of an answer (gpt-oss) and are part of its visible text.
ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def assign(vocab: Vocab) -> frozenset[int]:
    """Complete the roles and types of `vocab` by spelling; return the ids that end a generation."""
    for role, spellings in SPELLINGS.items():
        if role not in vocab.special and (ids := _found(vocab, spellings)):
            vocab.special[role] = ids[0]
            vocab.types[ids[0]] = CONTROL
    endings = _found(vocab, ENDINGS)
    for i in endings:
        vocab.types[i] = CONTROL
    for i in _found(vocab, ALWAYS_SHOWN):
        vocab.types[i] = USER_DEFINED
    eog = {*endings, *(vocab.special[r] for r in ENDING_ROLES if r in vocab.special)}
    _drop_exceptions(vocab, eog)
    return frozenset(eog)


def _found(vocab: Vocab, spellings: tuple[str, ...]) -> list[int]:
    return [vocab.ids[s] for s in spellings if s in vocab.ids]


def _drop_exceptions(vocab: Vocab, eog: set[int]) -> None:
    has = {vocab.tokens[i] for i in eog}
    if "<|end|>" in has and {"<|call|>", "<|calls|>"} & has and {"<|return|>", "<|flush|>"} & has:
        _drop(vocab, eog, "<|end|>", USER_DEFINED)  # it ends a channel there, not the answer
    if "</s>" in has and {"<|tool_response>", "<|plamo:eos|>"} & has:
        _drop(vocab, eog, "</s>", NORMAL)


def _drop(vocab: Vocab, eog: set[int], spelling: str, type_: int) -> None:
    i = vocab.ids[spelling]
    eog.discard(i)
    vocab.types[i] = type_
    if vocab.special.get("eot") == i:
        del vocab.special["eot"]
