"""The shapes of answers, as OpenAPI tells them; no answer is built or checked by them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .fields import Loose, Strict

Logprob = float | None


class ErrorShape(Strict):
    """An error, by OpenAI's protocol."""

    class Inner(Strict):
        """What went wrong."""

        message: str
        type: str
        param: str | None
        code: str | None

    error: Inner


class AnthropicErrorShape(Strict):
    """An error, by Anthropic's protocol."""

    class Inner(Strict):
        """What went wrong."""

        type: str
        message: str

    type: Literal["error"]
    error: Inner


class UsageShape(Strict):
    """Tokens read and written."""

    class Prompt(Strict):
        """Tokens of the prompt that need not be read again."""

        cached_tokens: int

    class Written(Strict):
        """Tokens of reasoning."""

        reasoning_tokens: int

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Prompt
    completion_tokens_details: Written


class TimingsShape(Strict):
    """How long reading and writing took, by llama-server's names."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class TokenShape(Strict):
    """A token and the logarithm of its probability."""

    token: str
    logprob: Logprob
    bytes: list[int]
    id: int


class ScoredTokenShape(TokenShape):
    """A token, and what it was chosen from."""

    top_logprobs: list[TokenShape]


class CallShape(Strict):
    """A call of a function; its arguments are JSON."""

    class Function(Strict):
        """The function."""

        name: str
        arguments: str

    id: str
    type: Literal["function"]
    function: Function


class ChatShape(Strict):
    """An answer of ``/v1/chat/completions``."""

    class Choice(Strict):
        """One answer."""

        class Message(Loose):
            """The assistant's message."""

            role: Literal["assistant"]
            content: str | None
            refusal: None
            reasoning_content: str | None = None
            tool_calls: list[CallShape] | None = None

        class Logprobs(Strict):
            """Its tokens."""

            content: list[ScoredTokenShape]
            refusal: None

        index: int
        message: Message
        logprobs: Logprobs | None
        finish_reason: Literal["stop", "length", "tool_calls"]
        references: list[dict[str, Any]] | None = None  # GPT4All's, to documents that were quoted

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: UsageShape
    timings: TimingsShape


class CompletionShape(Strict):
    """An answer of ``/v1/completions``."""

    class Choice(Strict):
        """One text."""

        class Logprobs(Strict):
            """Its tokens."""

            tokens: list[str]
            token_logprobs: list[Logprob]
            top_logprobs: list[dict[str, float] | None]
            text_offset: list[int]
            token_ids: list[int]

        index: int
        text: str
        logprobs: Logprobs | None
        finish_reason: Literal["stop", "length"]

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageShape
    timings: TimingsShape


class ReadShape(Strict):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsShape(Strict):
    """An answer of ``/v1/embeddings``."""

    class Embedding(Strict):
        """A vector of length 1: numbers, or float32 in base64."""

        object: Literal["embedding"]
        index: int
        embedding: list[float] | str

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: ReadShape


class RerankShape(Strict):
    """An answer of ``/v1/rerank``, the most relevant first."""

    class Result(Strict):
        """A document's place in the request, and its score from 0 to 1."""

        class Document(Strict):
            """The document."""

            text: str

        index: int
        relevance_score: float
        document: Document | None = None

    object: Literal["list"]
    model: str
    results: list[Result]
    usage: ReadShape


class ModelShape(Strict):
    """A model; ``meta`` has more once it is loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: dict[str, Any]


class ModelsShape(Strict):
    """An answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelShape]


class HealthShape(Strict):
    """Whether the server is ready."""

    status: Literal["ok", "loading", "failed"]


class TokensShape(Strict):
    """An answer of ``/tokenize``."""

    class Piece(Strict):
        """A token and its text, or its bytes where they are no text."""

        id: int
        piece: str | list[int]

    tokens: list[int] | list[Piece]
    count: int | None = None
    max_model_len: int | None = None


class TokenizerShape(Strict):
    """What ``/tokenizer_info`` tells: special tokens as they are spelled, and the chat template."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    add_bos_token: bool
    model_max_length: int
    chat_template: str | None


class TextShape(Strict):
    """An answer of ``/detokenize``: the text, by llama-server's and vLLM's names."""

    content: str
    prompt: str


class PromptShape(Strict):
    """An answer of ``/apply-template``."""

    prompt: str
    tokens: list[int]


class ResponseShape(Strict):
    """An answer of ``/v1/responses``."""

    class Usage(Strict):
        """Tokens read and written."""

        class Read(Strict):
            """Tokens of the prompt that need not be read again, and that were kept."""

            cached_tokens: int
            cache_write_tokens: int

        input_tokens: int
        input_tokens_details: Read
        output_tokens: int
        output_tokens_details: UsageShape.Written
        total_tokens: int

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    top_p: float
    reasoning: dict[str, str | None]
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["auto", "disabled"]
    metadata: dict[str, Any]
    top_logprobs: int
    background: bool
    user: str | None
    usage: Usage


class MessageShape(Strict):
    """An answer of ``/v1/messages``."""

    class Usage(Strict):
        """Tokens read and written."""

        input_tokens: int
        output_tokens: int
        cache_read_input_tokens: int
        cache_creation_input_tokens: int

    class Block(Loose):
        """Text, reasoning or a call."""

        type: Literal["text", "thinking", "tool_use"]

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[Block]
    model: str
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: Usage


class CountShape(Strict):
    """An answer of ``/v1/messages/count_tokens``."""

    input_tokens: int


class DecisionShape(Strict):
    """An answer of ``/v1/decisions``, in the order of the questions."""

    class Answer(Strict):
        """What was found; ``mass``: how likely the model was to name an option at all."""

        class Option(Strict):
            """An option and its probability; a level's value is its number."""

            value: bool | int | str
            label: str | None = None
            probability: float

        type: Literal["predicate", "choice", "score"]
        name: str | None
        mass: float
        probability: float | None = None
        choice: bool | str | None = None
        score: float | None = None
        confidence: float | None = None
        probabilities: list[Option] | None = None

    model: str
    answers: list[Answer]
    usage: ResponseShape.Usage


class SystemOneShape(Strict):
    """An answer of ``/v1/systemone``, by the names of the questions."""

    class Answer(Strict):
        """What was found; ``mass``: how likely the model was to name an option at all."""

        type: Literal["noul", "choice", "score"]
        mass: float
        noul: float | None = None
        choice: str | None = None
        score: float | None = None
        legend: dict[str, str] | None = None
        confidence: float | None = None
        probabilities: dict[str, float] | None = None

    class Usage(Strict):
        """Tokens read, of all questions together."""

        input_tokens: int
        output_tokens: int = Field(0, description="none: nothing is written")

    model: str
    answers: dict[str, Answer]
    usage: Usage


EVENT = {  # as OpenAPI 3.2 tells streams
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def shaped(
    shape: type[Strict], stream: bool = False, example: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a route's decorator takes: the answer's shape, also as a stream of events, and a request to try."""
    told: dict[str, Any] = {"model": shape}
    if stream:
        told["content"] = {"text/event-stream": {"itemSchema": EVENT}}
    found: dict[str, Any] = {"response_model": None, "responses": {200: told}}
    if example is not None:
        body = {"content": {"application/json": {"example": example}}}
        found["openapi_extra"] = {"requestBody": body}
    return found


def errors(shape: type[Strict]) -> dict[int | str, dict[str, Any]]:
    """Errors of all routes."""
    return {
        "4XX": {"model": shape, "description": "The request is wrong, or too much."},
        "5XX": {"model": shape, "description": "The server cannot answer now."},
    }
