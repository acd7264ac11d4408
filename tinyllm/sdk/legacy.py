"""Names of GPT4All 2 that programs use, though they were never documented."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .session import ChatSession
from .templates import MessageType, template_of


class LegacyNames:
    """The session as GPT4All 2 kept it: a history and a format string."""

    if TYPE_CHECKING:
        _local: threading.local
        _chat_session: ChatSession | None

    @property
    def _history(self) -> list[MessageType] | None:
        return None if self._chat_session is None else self._chat_session.history

    @_history.setter
    def _history(self, history: list[MessageType] | None) -> None:
        """Assigning a list begins a session, None ends it."""
        if history is None:
            self._chat_session = None
        else:
            self._chat_session = ChatSession(template_of(self._current_prompt_template), history)

    @property
    def _current_prompt_template(self) -> str:
        session = self._chat_session
        default = getattr(self._local, "prompt_template", "{0}")
        return default if session is None else session.template.source

    @_current_prompt_template.setter
    def _current_prompt_template(self, source: str) -> None:
        self._local.prompt_template = source
        if self._chat_session is not None:
            self._chat_session.template = template_of(source)

    def _format_chat_prompt_template(
        self,
        messages: list[MessageType],
        default_prompt_header: str = "",
        default_prompt_footer: str = "",
    ) -> str:
        """Messages as one text, by the current format string; deprecated since GPT4All 2.3."""
        parts = [default_prompt_header + "\n\n"] if default_prompt_header else []
        for message in messages:
            if message["role"] == "user":
                parts.append(self._current_prompt_template.format(message["content"]))
            elif message["role"] == "assistant":
                parts.append(message["content"] + "\n")
        if default_prompt_footer:
            parts.append("\n\n" + default_prompt_footer)
        return "".join(parts)
