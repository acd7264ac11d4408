"""Which special tokens a folder names, what surrounds a text, and its chat template."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PREFIX = "tokenizer.ggml."
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
KEYS = {
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
}  # "seperator" is the format's spelling
HELD = ("NFC", "Prepend", "Replace")  # the pre-tokenizer's name says the first; spaces become marks


def special_keys(
    folder: Path,
    tokenizer: Json,
    config: Json,
    tokens: Sequence[str],
    surround: Sequence[str] = (),
) -> Json:
    """The keys of special ids, of what is added to a text, of normalisation, and of templates."""
    names = _names(config)
    adds = _surrounding(tokenizer, names, bool(config))
    for role in ROLES:
        value = config.get(f"add_{role}_token")
        if isinstance(value, bool):
            adds.setdefault(role, value)
    for role in surround:
        adds.setdefault(role, True)
    if (tokenizer.get("model") or {}).get("type") == "BPE" and "merges" in tokenizer["model"]:
        adds.setdefault("bos", False)  # a reader's default depends on the pre-tokenizer
    found: Json = {}
    ids = _ids(folder, tokenizer, names, tokens)
    for role, i in ids.items():
        if role == "cls":  # the beginning token's, too
            continue
        found[f"{PREFIX}{KEYS.get(role, role)}_token_id"] = i
    for role in ("bos", "eos", "sep"):
        if role in adds:
            found[f"{PREFIX}add_{role}_token"] = adds[role]
    found.update(_templates(folder, config))
    found.update(_normalisation(tokenizer.get("normalizer")))
    _tell_what_is_lost(tokenizer)
    return found


def _tell_what_is_lost(tokenizer: Json) -> None:
    """Warn of steps before a byte-pair encoding that GGUF files do not hold: texts get other tokens."""
    if (tokenizer.get("model") or {}).get("type") != "BPE":
        return
    kinds = [str(step.get("type")) for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    if lost := [kind for kind in kinds if kind not in HELD]:
        warnings.warn(
            f"tokenizer.json changes texts by {', '.join(lost)} before it splits them, which a GGUF file of "
            "byte pairs does not hold: texts that this changes get other tokens",
            stacklevel=5,
        )


def _names(config: Json) -> dict[str, str]:
    """Role -> the token that ``tokenizer_config.json`` gives it."""
    names = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            names[role] = text
    if "cls" in names:
        names.setdefault("bos", names["cls"])
    if "sep" in names:
        names.setdefault("eos", names["sep"])
    return names


def _surrounding(tokenizer: Json, names: dict[str, str], named: bool) -> dict[str, bool]:
    """What the post-processor adds to a text, by role; the names it uses are noted."""
    adds: dict[str, bool] = {}
    for step in _steps(tokenizer.get("post_processor"), "processors"):
        kind = step.get("type")
        if kind == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif kind in ("RobertaProcessing", "BertProcessing"):
            adds.update(bos=True, eos=True, sep=True)
            names.setdefault("cls", step["cls"][0])
            names.setdefault("sep", step["sep"][0])
            names.setdefault("bos", names["cls"])
            names.setdefault("eos", names["sep"])
        elif kind == "TemplateProcessing":
            _template_processing(step, names, adds)
    return adds


def _template_processing(step: Json, names: dict[str, str], adds: dict[str, bool]) -> None:
    single, pair = step.get("single") or [], step.get("pair") or []
    first = last = None
    if len(single) > 1:
        first, last = (_special(single[i]) for i in (0, -1))
    lost = [t for t in map(_special, single[1:-1]) if t is not None]
    if lost:
        warnings.warn(
            f"tokenizer.json puts {', '.join(lost)} beside a text, too; a GGUF file holds one token before a "
            "text and one behind it",
            stacklevel=6,
        )
    if first:
        names.setdefault("bos", first)
        if first not in (names["bos"], names.get("cls")):
            names.setdefault("cls", first)
        adds["bos"] = first in (names["bos"], names.get("cls"))
    if last:
        if names.get("eos", last) != last:
            names["eot"] = names["eos"]
        names["eos"] = last
        adds["eos"] = True
    if pair:
        begin = 1 if first and _special(pair[0]) == first else 0
        end = len(pair) - 1 if last and _special(pair[-1]) == last else len(pair)
        between = [_special(p) for p in pair[begin:end][1:-1]]
        known = (names.get("sep"), names.get("eos"))
        if between:
            adds["sep"] = bool(
                (between[0] in known and not last) or (len(between) == 2 and between[1] in known)
            )


def _special(part: Json) -> str | None:
    token = part.get("SpecialToken")
    return token.get("id") if isinstance(token, dict) else None


def _steps(node: Any, inside: str) -> Iterator[Json]:
    """The steps of a sequence, or the one step that stands alone."""
    if isinstance(node, dict):
        if isinstance(node.get(inside), list):
            for step in node[inside]:
                yield from _steps(step, inside)
        else:
            yield node


def _ids(
    folder: Path, tokenizer: Json, names: dict[str, str], tokens: Sequence[str]
) -> dict[str, int]:
    """Role -> id, by the tokens' names, else by the numbers in the model's configuration."""
    added = {t["content"]: int(t["id"]) for t in tokenizer.get("added_tokens") or ()}
    by_text = {text: i for i, text in enumerate(tokens)}
    ids = {}
    for role, text in names.items():
        i = added.get(text, by_text.get(text))
        if i is not None:
            ids[role] = i
    for file in ("config.json", "generation_config.json"):
        path = folder / file
        numbers = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        for source in (numbers, numbers.get("text_config") or {}):
            for role in ROLES:
                i = source.get(f"{role}_token_id")
                if isinstance(i, list) and i:
                    i = i[0]
                if isinstance(i, int) and 0 <= i < len(tokens):
                    ids.setdefault(role, i)
    return ids


def _templates(folder: Path, config: Json) -> Json:
    """The chat template, and others by their names."""
    found: Any = config.get("chat_template")
    file = folder / "chat_template.jinja"
    if found is None and file.is_file():
        found = file.read_text("utf-8")
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if others:
            rest = [{"name": p.stem, "template": p.read_text("utf-8")} for p in others]
            found = [{"name": "default", "template": found}, *rest]
    elif found is None and (folder / "chat_template.json").is_file():
        found = json.loads((folder / "chat_template.json").read_text("utf-8")).get("chat_template")
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}
    keys: Json = {}
    names = []
    for choice in found or ():
        name, text = str(choice["name"]), str(choice["template"])
        if name == "default":
            keys["tokenizer.chat_template"] = text
        else:
            name = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
            keys[f"tokenizer.chat_template.{name}"] = text
            names.append(name)
    if names:
        keys["tokenizer.chat_templates"] = names
    return keys


def _normalisation(normaliser: Any) -> Json:
    """Whether letters are made small and accents taken off."""
    found: Json = {}
    for step in _steps(normaliser, "normalizers"):
        kind = step.get("type")
        if kind == "Lowercase":
            found[PREFIX + "normalizer.lowercase"] = True
        elif kind == "StripAccents":
            found[PREFIX + "normalizer.strip_accents"] = True
        elif kind == "BertNormalizer":
            for name in ("lowercase", "strip_accents"):
                if isinstance(step.get(name), bool):
                    found[f"{PREFIX}normalizer.{name}"] = step[name]
    return found
