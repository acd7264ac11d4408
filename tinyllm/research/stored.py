"""A recording's JSON, checked before any of it is used: the file may come from anybody."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, get_args

from ..errors import ArgumentError
from ..kernels.backend import Compute, KVType
from ..sampling import SamplingParams

FORM = 1  # the version of a recording's JSON
PARTS = ("model", "code", "settings", "hardware", "beside")
SAMPLING = tuple(f.name for f in fields(SamplingParams) if f.name != "logits_processor")
OPTIONS = (*SAMPLING, "max_tokens", "stop", "json_schema", "regex", "grammar", "lora", "whole")
LARGEST = 1 << 1000  # a whole number that a float can stand for, with room to spare


def is_count(x: object) -> bool:
    """Whether x is a whole number from 0 on."""
    return type(x) is int and 0 <= x < LARGEST


def is_ids(x: object) -> bool:
    return isinstance(x, list) and all(map(is_count, x))


def is_words(x: object) -> bool:
    return isinstance(x, list) and all(isinstance(word, str) for word in x)


def is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < LARGEST


def is_plain(x: object) -> bool:
    """Whether x is a word, a number or nothing."""
    return x is None or isinstance(x, str | bool) or is_number(x)


SETTINGS = {
    "device": lambda x: isinstance(x, str),
    "n_gpu_layers": lambda x: x is None or is_count(x),
    "kv_type": lambda x: x in get_args(KVType),
    "compute": lambda x: x in get_args(Compute),
    "n_ctx": lambda x: is_count(x) and x > 0,
}
RUN = {
    "prompt_ids": is_ids,
    "options": lambda x: isinstance(x, dict),
    "ids": is_ids,
    "text": lambda x: isinstance(x, str),
    "finish_reason": lambda x: isinstance(x, str),
    "logits": is_words,
    "chosen": lambda x: isinstance(x, list) and all(v is None or is_number(v) for v in x),
    "parent": lambda x: x is None or (is_ids(x) and len(x) == 2),
    "forced": is_ids,
}


def parse(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a recording's JSON says of the model, and its runs; ArgumentError where anything is wrong."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        raise ArgumentError("it is not JSON") from None
    need(isinstance(whole, dict), "an object of JSON")
    need(whole.pop("tinyllm_recording", None) == FORM, f'"tinyllm_recording": {FORM}')
    runs = whole.pop("runs", None)
    need(isinstance(runs, list), "a list of runs")
    need(set(whole) <= set(PARTS), f"no other parts than {', '.join(PARTS)}")
    for part in PARTS:
        values = whole.get(part)
        need(isinstance(values, dict), f"an object {part}")
        for name, x in values.items():
            inner = list(x.values()) if isinstance(x, dict) else [x]
            need(all(map(is_plain, inner)), f"a word or a number for {part} {name:.40}")
    need(isinstance(whole["model"].get("sha256"), str), "a word for model sha256")
    need(isinstance(whole["model"].get("name"), str), "a word for model name")
    check_fields(whole["settings"], SETTINGS, "settings")
    for number, run in enumerate(runs):
        check_run(run, number)
    return whole, runs


def need(fine: bool, what: str) -> None:
    """Raise ArgumentError with what was expected unless it is so."""
    if not fine:
        raise ArgumentError(f"expected {what}")


def check_fields(x: Mapping[str, Any], checks: Mapping[str, Any], where: str) -> None:
    """Raise ArgumentError unless x has these fields and no others, each of its type."""
    need(set(x) == set(checks), f"{where} of {', '.join(checks)}")
    for name, check in checks.items():
        fine = not isinstance(x[name], dict) or name == "options"
        need(fine and check(x[name]), f"another value for {where} {name}")


def check_run(run: Any, number: int) -> None:
    """Raise ArgumentError unless x is a run, the number-th of its file."""
    where = f"run {number}"
    need(isinstance(run, dict), f"an object for {where}")
    check_fields(run, RUN, where)
    need(len(run["chosen"]) == len(run["logits"]), f"as many chosen as logits for {where}")
    need(run["parent"] is None or run["parent"][0] < number, f"an earlier parent for {where}")
    check_options(run["options"])


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ArgumentError for stored options that ``generate`` would not take."""
    check_names(options)
    bias = options.get("logit_bias", {})
    fine = isinstance(bias, Mapping) and all(
        key.isascii() and key.isdigit() and len(key) < 20 and (x == "-inf" or is_number(x))
        for key, x in bias.items()
    )
    need(fine, "logit_bias with a number for each token")
    for name, x in options.items():
        if name in SAMPLING and name != "logit_bias":
            need(is_number(x), f"a number for {name}")
    given = options_of(options)
    SamplingParams(**{name: given[name] for name in SAMPLING if name in given})
    need(type(options.get("max_tokens", 0)) is int, "a whole number for max_tokens")
    stop = options.get("stop", "")
    need(isinstance(stop, str) or is_words(stop), "words for stop")
    for name in ("regex", "grammar"):
        need(isinstance(options.get(name, ""), str), f"a word for {name}")
    need(isinstance(options.get("whole", True), bool), "true or false for whole")
    lora = options.get("lora", {})
    need(isinstance(lora, Mapping) and all(map(is_number, lora.values())), "numbers for lora")


def options_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Options as ``generate`` takes them: JSON has no numbers for keys, and no infinity."""
    bias = stored.get("logit_bias")
    if bias is None:
        return dict(stored)
    return {**stored, "logit_bias": {int(i): float(x) for i, x in bias.items()}}


def stored_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``generate`` as a file holds them; ArgumentError for what it cannot hold."""
    check_names(options)
    found = {k: v for k, v in options.items() if v is not None}
    if "logit_bias" in found:
        SamplingParams(logit_bias=found["logit_bias"])
        found["logit_bias"] = {
            str(int(i)): "-inf" if x == -math.inf else x for i, x in found["logit_bias"].items()
        }
    try:
        again: dict[str, Any] = json.loads(json.dumps(found, default=_number, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as e:
        raise ArgumentError(f"an option is none that JSON holds: {e}") from None
    check_options(again)
    return again


def check_names(options: Mapping[str, Any]) -> None:
    """Raise ArgumentError for an option that a recording does not take."""
    for name in options:
        if name not in OPTIONS:
            raise ArgumentError(
                f"{name:.40}= cannot be recorded; a recording takes {', '.join(sorted(OPTIONS))}"
            )


def _number(x: object) -> int | float:
    """A number of NumPy's as Python's."""
    if isinstance(x, Integral):
        return int(x)
    if isinstance(x, Real):
        return float(x)
    raise TypeError(f"a {type(x).__name__}")
