"""Calls of tools, spelled as a row of forms says: what a model would write."""

from __future__ import annotations

import json
from typing import Any

from tinyllm.chat.forms import Form


def call(form: Form, name: str, arguments: dict[str, Any], first: bool = True) -> str:
    """One call, behind what begins the first one or what parts it from the one before."""
    text = json.dumps(arguments)
    if form.pair:
        pairs = [
            form.pair.replace("$key", k).replace("$string", str(isinstance(v, str)).lower())
            .replace("$value", f"{form.quote}{v}{form.quote}" if isinstance(v, str) else json.dumps(v))
            for k, v in arguments.items()
        ]  # fmt: skip
        text = form.join.join(pairs)
    made = form.call.replace("$name", name).replace("$id", "abcdefgh9").replace("$args", text)
    return (form.first if first else form.between) + made


def written(form: Form, name: str, arguments: dict[str, Any]) -> str:
    """One call and what ends the calls."""
    return call(form, name, arguments) + form.last
