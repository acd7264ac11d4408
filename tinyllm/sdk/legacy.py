"""Names of GPT4All 2 that programs use, though they were never documented."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .session import ChatSession, Sessions
from .templates import FormatTemplate, MessageType, template_of


class LegacyNames:
    """Attributes of `GPT4All` under which GPT4All 2 kept its session: a history and a format string."""

    if TYPE_CHECKING:
        _sessions: Sessions

    _default_prompt_template = "{0}"

    @property
    def _history(self) -> list[MessageType] | None:
        session = self._sessions.current
        return None if session is None else session.history

    @_history.setter
    def _history(self, history: list[MessageType] | None) -> None:
        """Assigning a list changes the session's, or begins a session; None ends it."""
        number, session = self._sessions.current_number, self._sessions.current
        if history is None:
            if number is not None:
                self._sessions.end(number)
        elif session is None:
            template = template_of(self._current_prompt_template)
            self._sessions.begin(ChatSession(template, history))
        else:
            session.history = history

    @property
    def _current_prompt_template(self) -> str:
        session = self._sessions.current
        return self._default_prompt_template if session is None else session.template.source

    @_current_prompt_template.setter
    def _current_prompt_template(self, source: str) -> None:
        self._default_prompt_template = source
        if (session := self._sessions.current) is not None:
            session.template = template_of(source)

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
                parts.append(FormatTemplate(self._current_prompt_template).render([message], {}))
            elif message["role"] == "assistant":
                parts.append(message["content"] + "\n")
        if default_prompt_footer:
            parts.append("\n\n" + default_prompt_footer)
        return "".join(parts)
