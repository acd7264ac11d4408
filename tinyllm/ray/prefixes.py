"""Which replica a request goes to: the one that has read what its prompt begins with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

FIRST = 1024  # characters of a prompt that decide, about four pages of tokens


def prefix_of(body: bytes) -> bytes | None:
    """A digest of what a request's prompt begins with; None for a request without one.

    Of a conversation that is everything up to its first message by a user, so that it keeps its replica from
    turn to turn; of a text, or of the first of a list, its first ``FIRST`` characters, or tokens where it is
    given as ids.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    given = next((asked[n] for n in ("messages", "prompt", "input") if n in asked), None)
    if isinstance(given, list) and given and isinstance(given[0], dict):
        before = [asked.get("system"), asked.get("instructions"), asked.get("tools")]
        beginning: Any = [before, up_to_user(given)]
    elif isinstance(given, str | list) and given:
        first = given[0] if isinstance(given[0], str | list) else given  # several prompts
        beginning = (given if isinstance(given, str) else first)[:FIRST]
    else:
        return None
    model_and_text = json.dumps([asked.get("model"), beginning], sort_keys=True)
    return hashlib.blake2b(model_and_text.encode(), digest_size=16).digest()


def up_to_user(messages: Sequence[Any]) -> Sequence[Any]:
    """The messages to the first one of a user."""
    for n, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[:n]
    return messages


def ranked(prefix: bytes, replicas: Sequence[str]) -> list[int]:
    """Replicas by preference, as indices: the order of their hashes with the prefix (rendezvous hashing).

    Where a replica comes or goes, only the prefixes that prefer it change their replica.
    """
    digests = [hashlib.blake2b(prefix + r.encode(), digest_size=8).digest() for r in replicas]
    return sorted(range(len(replicas)), key=digests.__getitem__)
