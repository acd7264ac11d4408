"""`Embed4All`: texts to vectors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

from ..errors import ArgumentError
from .arguments import whole
from .closing import Closing

if TYPE_CHECKING:
    from .llmodel import EmbCancelCallbackType, EmbedResult


class Embed4All(Closing):
    """A model that turns texts into vectors.

    Parameters
    ----------
    model_name : str, optional
        A model as `GPT4All` names it; default ``all-MiniLM-L6-v2.gguf2.f16.gguf``.
    n_threads, device, **kwargs
        Arguments of `GPT4All`; ``compute="bf16"`` embeds faster and less exactly on a CPU that has it.
    """

    MIN_DIMENSIONALITY = 64

    def __init__(
        self,
        model_name: str | None = None,
        *,
        n_threads: int | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if model_name is None:
            model_name = "all-MiniLM-L6-v2.gguf2.f16.gguf"
        from .gpt4all import GPT4All

        self.gpt4all = GPT4All(model_name, n_threads=n_threads, device=device, **kwargs)

    def close(self) -> None:
        """Free the model at once."""
        self.gpt4all.close()

    @overload
    def embed(
        self, text: str, *, prefix: str | None = ..., dimensionality: int | None = ...,
        long_text_mode: str = ..., return_dict: Literal[False] = ..., atlas: bool = ...,
        cancel_cb: EmbCancelCallbackType | None = ...,
    ) -> list[float]: ...  # fmt: skip
    @overload
    def embed(
        self, text: list[str], *, prefix: str | None = ..., dimensionality: int | None = ...,
        long_text_mode: str = ..., return_dict: Literal[False] = ..., atlas: bool = ...,
        cancel_cb: EmbCancelCallbackType | None = ...,
    ) -> list[list[float]]: ...  # fmt: skip
    @overload
    def embed(
        self, text: str | list[str], *, prefix: str | None = ..., dimensionality: int | None = ...,
        long_text_mode: str = ..., return_dict: Literal[True], atlas: bool = ...,
        cancel_cb: EmbCancelCallbackType | None = ...,
    ) -> EmbedResult: ...  # fmt: skip
    @overload
    def embed(
        self, text: str | list[str], *, prefix: str | None = ..., dimensionality: int | None = ...,
        long_text_mode: str = ..., return_dict: bool = ..., atlas: bool = ...,
        cancel_cb: EmbCancelCallbackType | None = ...,
    ) -> Any: ...  # fmt: skip
    def embed(
        self,
        text: str | list[str],
        *,
        prefix: str | None = None,
        dimensionality: int | None = None,
        long_text_mode: str = "mean",
        return_dict: bool = False,
        atlas: bool = False,
        cancel_cb: EmbCancelCallbackType | None = None,
    ) -> Any:
        """Embed a text or a list of texts.

        Parameters
        ----------
        text : str, or list of str
            What to embed.
        prefix : str, optional
            The task, as the model was trained for, without the colon: for Nomic Embed ``search_query``,
            ``search_document``, ``classification`` or ``clustering``. Default: the model's for documents.
        dimensionality : int, optional
            For Matryoshka models: how many dimensions to keep.
        long_text_mode : {"mean", "truncate"}
            Texts longer than the model takes are embedded in overlapping parts, or cut.
        return_dict : bool
            Return the number of tokens too.
        atlas : bool
            Behave as the Atlas API: texts of more than 8192 tokens are an error in mode "mean".
        cancel_cb : callable, optional
            ``cancel_cb(batch_sizes, backend_name)``, called before the work; return true to cancel it.

        Returns
        -------
        list of float, list of lists, or a dict with "embeddings" and "n_prompt_tokens"

        Raises
        ------
        ValueError
            The text is empty, or an argument out of range.
        RuntimeError
            The model does not fit what was asked for.
        CancellationError
            ``cancel_cb`` returned true.
        """
        if dimensionality is not None and whole("dimensionality", dimensionality) <= 0:
            raise ValueError(
                f"Dimensionality must be None or a positive integer, got {dimensionality}"
            )
        if dimensionality is not None and dimensionality < self.MIN_DIMENSIONALITY:
            warnings.warn(
                f"Dimensionality {dimensionality} is less than the suggested minimum of"
                f" {self.MIN_DIMENSIONALITY}. Performance may be degraded.",
                stacklevel=2,
            )
        if cancel_cb is not None and not callable(cancel_cb):
            raise ArgumentError(
                f"cancel_cb={cancel_cb!r:.80}; expected cancel_cb(batch_sizes, backend), or None"
            )
        if long_text_mode not in ("mean", "truncate"):
            raise ValueError(
                f"Long text mode must be one of 'mean' or 'truncate', got {long_text_mode!r}"
            )
        result = self.gpt4all.model.generate_embeddings(
            text,
            prefix,
            -1 if dimensionality is None else dimensionality,
            long_text_mode == "mean",
            atlas,
            cancel_cb,
        )
        return result if return_dict else result["embeddings"]
