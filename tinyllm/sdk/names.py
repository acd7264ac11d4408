"""Names that programs import from ``gpt4all._pyllmodel``, besides `LLModel`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypedDict

ResponseCallbackType = Callable[[int, str], bool]
RawResponseCallbackType = Callable[[int, bytes], bool]
EmbCancelCallbackType = Callable[[list[int], str], bool]
PromptCallback = Callable[[int], bool]
ResponseCallback = RawResponseCallbackType
EmbCancelCallback = EmbCancelCallbackType

MODEL_LIB_PATH = Path(__file__).parent  # GPT4All keeps shared libraries there; we have none
MAX_BATCH = 128  # GPT4All reduces a larger n_batch to this
cuda_found = False  # GPT4All's own CUDA packages; ours come with the extras
llmodel = None


def _load_cuda(rtver: str, blasver: str) -> None:
    """Do nothing: the CUDA extras bring their own libraries."""


def load_llmodel_library() -> None:
    """Do nothing: there is no library to load."""


class Sentinel(Enum):
    TERMINATING_SYMBOL = 0


class EmbedResult(TypedDict):
    """What ``embed(return_dict=True)`` returns."""

    embeddings: list[Any]
    n_prompt_tokens: int


class CancellationError(Exception):
    """The embedding was cancelled by its callback."""


@dataclass
class LLModelPromptContext:
    """The last prompt's settings, and how many tokens the context holds."""

    tokens_size: int = 0
    n_past: int = 0
    n_ctx: int = 0
    n_predict: int = 0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    temp: float = 0.0
    n_batch: int = 0
    repeat_penalty: float = 0.0
    repeat_last_n: int = 0
    context_erase: float = 0.75


@dataclass(frozen=True)
class LLModelGPUDevice:
    """A GPU as GPT4All lists it."""

    backend: str
    index: int
    type: int
    heapSize: int
    name: str
    vendor: str


# What prompt_model takes by position after the callback.
PROMPT_OPTIONS = (
    *("n_predict", "top_k", "top_p", "min_p", "temp", "n_batch", "repeat_penalty"),
    *("repeat_last_n", "context_erase", "reset_context", "special"),
)


def empty_response_callback(token_id: int, response: str) -> bool:
    """Let the answer go on."""
    return True
