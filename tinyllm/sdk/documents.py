"""Chat sessions that quote documents: ``GPT4All.chat_session(localdocs=...)``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .answering import room_for_prompt

if TYPE_CHECKING:
    from ..localdocs import LocalDocs
    from ..localdocs.answering import Quoting
    from .llmodel import LLModel


@contextmanager
def quoting(given: str | LocalDocs | None) -> Iterator[Quoting | None]:
    """What a session may quote: a store, or a collection of the user's own store; None: nothing."""
    if given is None:
        yield None
        return
    from ..localdocs import LocalDocs
    from ..localdocs.answering import Quoting

    if isinstance(given, LocalDocs):
        yield Quoting(given)
        return
    if not isinstance(given, str):
        raise ArgumentError(
            f"localdocs={given!r:.60}; expected a LocalDocs, or a collection's name"
        )
    with LocalDocs() as docs:
        docs.collection(given)
        yield Quoting(docs, [given])


def with_documents(
    prompt: str, given: Quoting, model: LLModel, n_predict: int
) -> tuple[str, list[dict[str, Any]]]:
    """A user's message behind the excerpts that fit into the context, and their references."""
    from ..localdocs.answering import Fence, message

    hits, fence = given.find(prompt), Fence(model._open())
    room = room_for_prompt(model.n_ctx) - max(n_predict, 0)
    while hits:
        text: str = message(prompt, hits, fence, None)["content"]
        if model.count_prompt_tokens(text) <= room:
            return text, [hit.reference() for hit in hits]
        hits.pop()
    return prompt, []
