"""A folder's vocabulary as metadata of a GGUF file.

It is read from ``tokenizer.json``, from a SentencePiece model, or from the files of older tokenizers.
"""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ArgumentError, UnsupportedModel
from ...tokenizers.names import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from .sentencepiece import BPE, UNIGRAM, Pieces, read_pieces
from .special import special_keys
from .splitting import recognise

Json = dict[str, Any]
Token = tuple[str, float, int]  # text, score, type
PREFIX = "tokenizer.ggml."
PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")
SPACE = "\u2581"
PARSED = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip
ADDED = -1000.0  # the score of tokens that were added to a SentencePiece model
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def read_json(path: Path) -> Json:
    """The object in a JSON file, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise ArgumentError(f"{path} is no JSON: {e}") from None
    if not isinstance(found, dict):
        raise ArgumentError(f"{path} holds {type(found).__name__}; expected an object")
    return found


def read_vocabulary(
    folder: Path,
    n_vocab: int | None,
    prefer: tuple[str, ...] = (),
    surround: tuple[str, ...] = (),
    model: str = "",
) -> Json:
    """All ``tokenizer.*`` keys that a folder's files tell; {} with a warning if it has no vocabulary.

    Parameters
    ----------
    folder : Path
        Where the files are looked for.
    n_vocab : int or None
        Rows of the embedding; the vocabulary is filled up to so many tokens.
    prefer : tuple of str
        Pre-tokenizers that models of this architecture are known with.
    surround : tuple of str
        Roles of tokens that stand around a text, unless the files say otherwise.
    model : str
        ``tokenizer.ggml.model``, where the files do not tell it.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    if tokenizer and not isinstance(tokenizer.get("model"), dict):
        raise ArgumentError(f"{folder / 'tokenizer.json'} has no model")
    pieces = next((folder / name for name in PIECES if (folder / name).is_file()), None)
    if model and tokenizer:
        keys = _plain_bpe(model, tokenizer, n_vocab)
    elif model and pieces is not None:
        raise ArgumentError(
            f"{folder} has {pieces.name} and no tokenizer.json, from which {model}'s vocabulary is read"
        )
    elif pieces is not None:
        keys = _from_pieces(read_pieces(pieces), folder, tokenizer, config, n_vocab)
    elif tokenizer:
        keys = _from_json(tokenizer, config, n_vocab, prefer)
    elif (folder / "vocab.json").is_file():
        tokenizer = _old_bpe(folder, config)
        keys = _from_json(tokenizer, config, n_vocab, ("gpt-2",))
    elif (folder / "vocab.txt").is_file():
        tokenizer = _old_wordpiece(folder, config)
        keys = _from_json(tokenizer, config, n_vocab, prefer)
    else:
        warnings.warn(
            f"{folder} has no vocabulary (no tokenizer.json, tokenizer.model, vocab.json or vocab.txt): "
            "the file will take token ids only, not text",
            stacklevel=3,
        )
        return {}
    return {**keys, **special_keys(folder, tokenizer, config, keys[PREFIX + "tokens"], surround)}


def _keys(model: str, pre: str, tokens: list[Token], scores: bool) -> Json:
    found: Json = {
        PREFIX + "model": model,
        PREFIX + "pre": pre,
        PREFIX + "tokens": [text for text, _, _ in tokens],
    }
    if scores:
        found[PREFIX + "scores"] = np.array([score for _, score, _ in tokens], np.float32)
    found[PREFIX + "token_type"] = np.array([kind for _, _, kind in tokens], np.int32)
    return found


def _looks_special(text: str) -> bool:
    """Whether a token that was added as plain text ought to be a control token all the same."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _added(text: str, special: bool) -> tuple[str, int]:
    """Spelling and type of an added token."""
    if special or _looks_special(text):
        return text, CONTROL
    return text.replace(SPACE, " "), USER_DEFINED


# ---- tokenizer.json


def _from_json(tokenizer: Json, config: Json, n_vocab: int | None, prefer: tuple[str, ...]) -> Json:
    model = tokenizer["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind == "BPE" and model.get("byte_fallback"):
        return _ranked(tokenizer, n_vocab)
    if kind == "BPE":
        return _byte_level(tokenizer, n_vocab, prefer)
    if kind == "WordPiece":
        tokens = [(_phantom(t, k), s, k) for t, s, k in _tokens(tokenizer, n_vocab)]
        return _keys("bert", "default", tokens, scores=False)
    if kind == "Unigram":
        return _unigram(tokenizer, config, n_vocab)
    raise UnsupportedModel(
        f"tokenizer.json: a model of type {kind!r:.40}; we know BPE, WordPiece, Unigram"
    )


def _tokens(tokenizer: Json, n_vocab: int | None) -> list[Token]:
    """All tokens of a ``tokenizer.json`` by their ids; ids without a token are named and unused."""
    vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
    added = {int(t["id"]): t for t in tokenizer.get("added_tokens") or ()}
    texts = {i: text for text, i in vocab.items()} | {i: t["content"] for i, t in added.items()}
    n = n_vocab or max(texts, default=-1) + 1
    beyond = sorted(i for i in texts if i >= n)
    if any(i not in added for i in beyond):
        raise ArgumentError(f"the vocabulary has a token {max(texts)}; the embedding has {n} rows")
    if beyond:
        warnings.warn(
            f"{len(beyond)} added tokens, such as {texts[beyond[0]]!r:.40}, are left out: the embedding has "
            f"{n} rows",
            stacklevel=6,
        )
    out = []
    for i in range(n):
        if i not in texts:
            out.append((f"[PAD{i}]", 0.0, UNUSED))
        elif i in added:
            text, kind = _added(texts[i], bool(added[i].get("special")))
            out.append((text, 0.0, kind))
        else:
            out.append((texts[i], 0.0, NORMAL))
    return out


def _merges(tokenizer: Json) -> list[str]:
    """Merges as two parts with a space between; spaces within a part are spelled as bytes are."""
    return [
        m if isinstance(m, str) else " ".join(p.replace(" ", "\u0120") for p in m)
        for m in tokenizer["model"].get("merges") or ()
    ]


def _byte_level(tokenizer: Json, n_vocab: int | None, prefer: tuple[str, ...]) -> Json:
    pre = recognise(tokenizer, prefer)
    keys = _keys("gpt2", pre, _tokens(tokenizer, n_vocab), scores=False)
    merges = _merges(tokenizer)
    if merges:
        keys[PREFIX + "merges"] = merges
    return keys


def _ranked(tokenizer: Json, n_vocab: int | None) -> Json:
    """A SentencePiece BPE model as ``tokenizer.json`` has it: a token's score is the rank of its merge."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(tokenizer["model"].get("merges") or ()):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(first + second, -float(rank))
    unknown = tokenizer["model"].get("unk_token")
    last = -float(len(scores))
    tokens = []
    for text, _, kind in _tokens(tokenizer, n_vocab):
        if _BYTE.fullmatch(text):
            tokens.append((text, 0.0, BYTE))
        elif text == unknown:
            tokens.append((text, 0.0, UNKNOWN))
        else:
            tokens.append((text, scores.get(text, last if kind == NORMAL else ADDED), kind))
    keys = _keys("llama", "default", tokens, scores=True)
    keys[PREFIX + "add_space_prefix"] = _adds_prefix(tokenizer)
    return keys


def _plain_bpe(model: str, tokenizer: Json, n_vocab: int | None) -> Json:
    """Byte-pair encoding of plain text; tokens that a chat's parser reads are kept in the text."""
    if tokenizer["model"].get("type", "BPE") != "BPE" or "merges" not in tokenizer["model"]:
        raise ArgumentError(
            f"tokenizer.json: a model of type {tokenizer['model'].get('type')!r:.40}; {model} has BPE"
        )
    tokens = []
    for text, _, kind in _tokens(tokenizer, n_vocab):
        kind = BYTE if _BYTE.fullmatch(text) else USER_DEFINED if text in PARSED else kind
        tokens.append((text, ADDED, kind))
    keys = _keys(model, "", tokens, scores=True)
    del keys[PREFIX + "pre"]
    return {**keys, PREFIX + "merges": _merges(tokenizer), PREFIX + "add_space_prefix": False}


def _adds_prefix(tokenizer: Json) -> bool:
    """Whether a space is put before a text, by normaliser or pre-tokenizer."""
    steps = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return bool(re.search(r'"Prepend"|"prepend_scheme": "(?:always|first)"', steps))


def _phantom(text: str, kind: int) -> str:
    """A WordPiece token as GGUF spells it: what begins a word is marked, not what continues one."""
    if kind == CONTROL:
        return text
    return text[2:] if text.startswith("##") else SPACE + text


def _unigram(tokenizer: Json, config: Json, n_vocab: int | None) -> Json:
    model = tokenizer["model"]
    added = {int(t["id"]): t for t in tokenizer.get("added_tokens") or ()}
    vocab = model["vocab"]
    tokens: list[Token] = []
    for i in range(max(n_vocab or 0, len(vocab), max(added, default=-1) + 1)):
        text, score = vocab[i] if i < len(vocab) else (f"[PAD{i}]", -10000.0)
        kind = NORMAL if i < len(vocab) else UNUSED
        if i == model.get("unk_id"):
            kind = UNKNOWN
        elif i in added:
            text = added[i]["content"]
            kind = CONTROL if added[i].get("special") else USER_DEFINED
        tokens.append((text, float(score), kind))
    keys = _keys("t5", "default", tokens, scores=True)
    steps = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    charsmap = re.search(r'"precompiled_charsmap": "([^"]+)"', steps)
    keys[PREFIX + "add_space_prefix"] = '"Metaspace"' in steps
    keys[PREFIX + "remove_extra_whitespaces"] = bool(
        config.get("clean_up_tokenization_spaces", True)
    )
    if charsmap:
        keys[PREFIX + "precompiled_charsmap"] = np.frombuffer(
            base64.b64decode(charsmap[1]), np.uint8
        )
    return keys


# ---- SentencePiece


def _from_pieces(
    pieces: Pieces, folder: Path, tokenizer: Json, config: Json, n_vocab: int | None
) -> Json:
    n = n_vocab or len(pieces.pieces)
    tokens: list[Token] = [(f"[PAD{i}]", -10000.0, UNUSED) for i in range(n)]
    tokens[: len(pieces.pieces)] = pieces.pieces[:n]
    added = {i: (text, False) for text, i in read_json(folder / "added_tokens.json").items()}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        added[int(i)] = token["content"], bool(token.get("special"))
    for token in tokenizer.get("added_tokens") or ():
        added.setdefault(int(token["id"]), (token["content"], bool(token.get("special"))))
    for i, (text, special) in added.items():
        if i < n:
            text, kind = _added(text, special)
            tokens[i] = text, ADDED, kind
    model = "t5" if pieces.model_type == UNIGRAM and _is_t5(tokenizer, config) else "llama"
    if pieces.model_type not in (UNIGRAM, BPE):
        raise UnsupportedModel(
            f"the SentencePiece model is of type {pieces.model_type}; we know unigram (1) and BPE (2)"
        )
    keys = _keys(model, "default", tokens, scores=True)
    if (prefix := config.get("add_prefix_space")) is not None:
        keys[PREFIX + "add_space_prefix"] = bool(prefix)
    elif not pieces.add_prefix or model == "t5":
        keys[PREFIX + "add_space_prefix"] = pieces.add_prefix
    if model == "t5":
        keys[PREFIX + "remove_extra_whitespaces"] = pieces.remove_spaces
        if pieces.charsmap:
            keys[PREFIX + "precompiled_charsmap"] = np.frombuffer(pieces.charsmap, np.uint8)
    elif pieces.charsmap:
        warnings.warn(
            "tokenizer.model replaces characters before it splits texts (its charsmap), which a GGUF file of "
            "this kind does not hold: texts that this changes get other tokens",
            stacklevel=6,
        )
    return keys


def _is_t5(tokenizer: Json, config: Json) -> bool:
    """Whether a unigram model is read as one: Llama's family merges by score instead."""
    names = f"{config.get('tokenizer_class')} {(tokenizer.get('model') or {}).get('type')}"
    return "T5" in names or "Unigram" in names or "Roberta" in names


# ---- the files of older tokenizers


def _old_bpe(folder: Path, config: Json) -> Json:
    """GPT-2's ``vocab.json`` and ``merges.txt`` as a ``tokenizer.json`` would have them."""
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    decoder = config.get("added_tokens_decoder") or {}
    added = [{"id": int(i), **token} for i, token in decoder.items()]
    vocab = read_json(folder / "vocab.json")
    for name in ("bos_token", "eos_token", "unk_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text in vocab and not added:
            added.append({"id": vocab[text], "content": text, "special": True})
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
        "added_tokens": list({t["id"]: t for t in added}.values()),
    }


def _old_wordpiece(folder: Path, config: Json) -> Json:
    """BERT's ``vocab.txt`` as a ``tokenizer.json`` would have it."""
    lines = (folder / "vocab.txt").read_text("utf-8").split("\n")
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line}
    special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
    return {
        "model": {"type": "WordPiece", "vocab": vocab},
        "normalizer": {"type": "BertNormalizer", "lowercase": config.get("do_lower_case", True)},
        "added_tokens": [{"id": vocab[t], "content": t, "special": True} for t in special],
    }
