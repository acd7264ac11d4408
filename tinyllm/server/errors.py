"""Errors as answers: a status and a reason, in the form of the protocol that was spoken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import (
    ArgumentError,
    ContextOverflow,
    DeviceError,
    QueueFull,
    TemplateError,
    TinyLLMError,
    UnsupportedModel,
)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's names; OpenAI's are the like."""
OPENAI_TYPES = {404: "invalid_request_error", 413: "invalid_request_error", 503: "server_error"}


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self, path: str) -> bytes:
        """The answer's JSON, for the protocol of a path."""
        return json.dumps(self.shown(path), ensure_ascii=False).encode("utf-8", "replace")

    def shown(self, path: str) -> dict[str, Any]:
        """The answer, for the protocol of a path."""
        kind = TYPES.get(self.status, "api_error")
        if speaks_anthropic(path):
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = OPENAI_TYPES.get(self.status, "server_error" if self.status >= 500 else kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def speaks_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's protocol."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ContextOverflow):
        return Refusal(400, message, code="context_length_exceeded")
    if isinstance(error, UnsupportedModel):  # as OpenAI answers for a model of another kind
        return Refusal(404, message, code="model_not_supported")
    if isinstance(error, (ArgumentError, TemplateError)):
        return Refusal(400, message)
    if isinstance(error, QueueFull):
        return busy(message)
    if isinstance(error, (DeviceError, MemoryError)):
        return Refusal(503, message, headers={"Retry-After": "5"})
    if isinstance(error, TinyLLMError):
        return Refusal(500, message)
    return Refusal(500, "the server failed; its log says how")


def busy(message: str, seconds: int = 1) -> Refusal:
    """Told to a client that should come again."""
    return Refusal(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
