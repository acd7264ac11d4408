"""`GPT4All` and `Embed4All`: the classes of the GPT4All Python SDK, on this engine."""

from __future__ import annotations

import os
import sys  # programs import it from here
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

from ..engine.completion import Completion
from ..hub import catalogue
from ..hub.catalogue import ConfigType, append_extension_if_missing
from ..hub.download import _fsync
from . import answering
from .closing import Closing
from .devices import BackendName, split_device
from .embed4all import Embed4All
from .legacy import LegacyNames
from .llmodel import (
    CancellationError,
    EmbCancelCallbackType,
    EmbedResult,
    LLModel,
    ResponseCallbackType,
    empty_response_callback,
)
from .retrieval import ModelFiles
from .session import ChatSession
from .templates import (
    DEFAULT_PROMPT_TEMPLATE,
    FormattingMethod,
    MessageType,
    Template,
    default_source,
    template_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..kernels.backend import Compute

__all__ = [
    "DEFAULT_MODEL_DIRECTORY",
    "DEFAULT_PROMPT_TEMPLATE",
    "CancellationError",
    "ConfigType",
    "EmbCancelCallbackType",
    "Embed4All",
    "EmbedResult",
    "GPT4All",
    "LLModel",
    "MessageType",
    "ResponseCallbackType",
    "_fsync",
    "append_extension_if_missing",
    "empty_response_callback",
    "sys",
]

DEFAULT_MODEL_DIRECTORY = catalogue.DEFAULT_MODEL_DIRECTORY
"""Where models are kept; read at each call, so assigning it moves them."""


class GPT4All(ModelFiles, LegacyNames, Closing):
    """A language model, and conversations with it.

    Parameters
    ----------
    model_name : str
        A file name of GPT4All's list (".gguf" is added if missing), a path, or "hf:owner/repo/file.gguf".
    model_path : path, optional
        The directory that holds the file, or is to hold it; default ``~/.cache/gpt4all``.
    model_type : str, optional
        Kept as a description.
    allow_download : bool
        Download the file if it is not there. If it is, the network is never asked.
    n_threads : int, optional
        CPU threads; default: as many as are good for this machine.
    device : str, optional
        "cpu", "gpu", "cuda", "kompute" (OpenCL), "amd", "nvidia", "intel", or a name of `list_gpus`.
    n_ctx : int
        Tokens of context.
    ngl : int
        Layers to put on the GPU.
    verbose : bool
        Say on stderr which file is used.
    compute : {"f32", "bf16"}
        As for `tinyllm.load`: "bf16" multiplies F32, F16 and BF16 weights faster and less exactly.

    Raises
    ------
    FileNotFoundError
        The file or the directory does not exist.
    RuntimeError
        The file is no model that we run.
    ValueError
        There is no such device, or the download failed.
    requests.exceptions.ConnectionError
        The file has to be downloaded, and there is no network.
    """

    def __init__(
        self,
        model_name: str,
        *,
        model_path: str | os.PathLike[str] | None = None,
        model_type: str | None = None,
        allow_download: bool = True,
        n_threads: int | None = None,
        device: str | None = None,
        n_ctx: int = 2048,
        ngl: int = 100,
        verbose: bool = False,
        compute: Compute = "f32",
    ) -> None:
        self.model_type = model_type
        self._local = threading.local()
        backend, gpu = split_device(device)
        self.config: ConfigType = self.retrieve_model(
            model_name, model_path=model_path, allow_download=allow_download, verbose=verbose
        )
        self.config.setdefault("filename", os.path.basename(self.config["path"]))
        self.model = LLModel(self.config["path"], n_ctx, ngl, backend, n_threads, compute=compute)
        if gpu is not None:
            self.model.init_gpu(gpu)
        self.model.load_model()

    def close(self) -> None:
        """Free the model at once."""
        self.model.close()

    @property
    def backend(self) -> BackendName:
        """The kind of device in use: "cpu", "cuda", or "kompute" for OpenCL."""
        return self.model.backend

    @property
    def device(self) -> str | None:
        """The GPU's name, or None on the CPU."""
        return self.model.device

    @staticmethod
    def list_gpus() -> list[str]:
        """The names of the GPUs, such as "cuda:NVIDIA H200".

        Raises
        ------
        ValueError
            There is none.
        """
        return LLModel.list_gpus()

    # ---- answers

    @overload
    def generate(
        self, prompt: str, *, max_tokens: int = ..., temp: float = ..., top_k: int = ..., top_p: float = ...,
        min_p: float = ..., repeat_penalty: float = ..., repeat_last_n: int = ..., n_batch: int = ...,
        n_predict: int | None = ..., streaming: Literal[False] = ..., callback: ResponseCallbackType = ...,
        seed: int | None = ..., stop: str | Sequence[str] = ..., logprobs: None = ...,
    ) -> str: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: str, *, max_tokens: int = ..., temp: float = ..., top_k: int = ..., top_p: float = ...,
        min_p: float = ..., repeat_penalty: float = ..., repeat_last_n: int = ..., n_batch: int = ...,
        n_predict: int | None = ..., streaming: Literal[True], callback: ResponseCallbackType = ...,
        seed: int | None = ..., stop: str | Sequence[str] = ..., logprobs: None = ...,
    ) -> Generator[str, None, None]: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: str | list[str], *, max_tokens: int = ..., temp: float = ..., top_k: int = ...,
        top_p: float = ..., min_p: float = ..., repeat_penalty: float = ..., repeat_last_n: int = ...,
        n_batch: int = ..., n_predict: int | None = ..., streaming: bool = ...,
        callback: ResponseCallbackType = ..., seed: int | None = ..., stop: str | Sequence[str] = ...,
        logprobs: int | None = ...,
    ) -> Any: ...  # fmt: skip
    def generate(
        self,
        prompt: str | list[str],
        *,
        max_tokens: int = 200,
        temp: float = 0.7,
        top_k: int = 40,
        top_p: float = 0.4,
        min_p: float = 0.0,
        repeat_penalty: float = 1.18,
        repeat_last_n: int = 64,
        n_batch: int = 8,
        n_predict: int | None = None,
        streaming: bool = False,
        callback: ResponseCallbackType = empty_response_callback,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
    ) -> Any:
        """Answer a prompt: in a chat session the user's next message, else a text to continue.

        Parameters
        ----------
        prompt : str, or list of str
            A list, outside of chat sessions, is answered side by side.
        max_tokens, n_predict : int
            At most so many tokens; the second wins.
        temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n
            See ``tinyllm.sampling.SamplingParams``.
        n_batch : int
            Accepted; prompts are read at the engine's best speed in any case.
        streaming : bool
            Return an iterator of pieces; closing it ends the work.
        callback : callable
            ``callback(token_id, text)`` ends the answer by returning something false.
        seed : int, optional
            Of the random numbers; with it the answer can be repeated.
        stop : str or sequence of str
            Strings that end the answer and are not part of it.
        logprobs : int, optional
            Return a ``tinyllm.Completion`` that holds each token's log-probability and those of so many
            alternatives.

        Returns
        -------
        str, or iterator of str, or ``tinyllm.Completion``; a list for a list

        Raises
        ------
        ValueError
            The message is longer than the context, an argument is out of range, or the model is closed.
        """
        options: dict[str, Any] = {
            "temp": temp, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repeat_penalty": repeat_penalty, "repeat_last_n": repeat_last_n, "n_batch": n_batch,
            "n_predict": max_tokens if n_predict is None else n_predict, "seed": seed, "stop": stop,
        }  # fmt: skip
        if logprobs is not None:
            options["logprobs"] = logprobs
            if streaming:
                raise ValueError(
                    "logprobs come with the whole answer; do not ask for streaming too"
                )
        session = self._chat_session
        if isinstance(prompt, list):
            if streaming or session is not None or callback is not empty_response_callback:
                raise ValueError("a list of prompts takes no streaming, callback or chat session")
            return self._answer_list(prompt, options)
        if session is None:
            self.model.check_length(prompt)
        else:
            prompt = session.begin(prompt, self.model)
            options["state"] = session.state
        if logprobs is not None:
            return self._completion(session, prompt, callback, options)
        if not streaming:
            return self._answer(session, prompt, callback, options)
        stream = self._stream(session, prompt, callback, options)
        if session is not None:
            session.stream = stream
        return stream

    def _answer(
        self,
        session: ChatSession | None,
        prompt: str,
        callback: ResponseCallbackType,
        options: dict[str, Any],
    ) -> str:
        parts: list[str] = []
        with _turn(session, parts):
            self.model.prompt_model(prompt, _collecting(parts, callback), **options)
        return "".join(parts)

    def _stream(
        self,
        session: ChatSession | None,
        prompt: str,
        callback: ResponseCallbackType,
        options: dict[str, Any],
    ) -> Generator[str, None, None]:
        parts: list[str] = []
        with _turn(session, parts):
            yield from self.model.prompt_model_streaming(
                prompt, _collecting(parts, callback), **options
            )

    def _completion(
        self,
        session: ChatSession | None,
        prompt: str,
        callback: ResponseCallbackType,
        options: dict[str, Any],
    ) -> Completion:
        parts: list[str] = []
        collect = _collecting(parts, callback)
        with _turn(session, parts):
            answer = self.model.start(prompt, **options)
            for token_id, text in self.model.pieces_of(answer):
                if not collect(token_id, text):
                    break
        return answer.completion()

    def _answer_list(
        self, prompts: list[str], options: dict[str, Any]
    ) -> list[str] | list[Completion]:
        for prompt in prompts:
            self.model.check_length(prompt)
        answers = [self.model.start(prompt, **options) for prompt in prompts]
        done = answering.complete(answers, self.model._check_open)
        return done if "logprobs" in options else [completion.text for completion in done]

    # ---- chat sessions

    @contextmanager
    def chat_session(
        self,
        system_message: str | Literal[False] | None = None,
        chat_template: str | None = None,
        *,
        system_prompt: str | None = None,
        prompt_template: str | None = None,
    ) -> Iterator[Self]:
        """Hold a conversation: inside, `generate` sends the user's next message.

        The session belongs to the thread that opens it.

        Parameters
        ----------
        system_message : str or False, optional
            What the model is told first; None: the model's default, False: nothing.
        chat_template : str, optional
            A Jinja template, or a format string with ``{0}`` (the message) and ``{1}`` (the answer).
            Default: the model's, of GPT4All's list or of the file.
        system_prompt, prompt_template : str, optional
            The same, under GPT4All 2's names.

        Raises
        ------
        ValueError
            The model has no template, or a malformed one.
        """
        system = system_prompt if system_message is None else system_message
        if system is None:
            system = self.config.get("systemMessage", False)
        source = prompt_template if chat_template is None else chat_template
        template = self._template(source)
        history = [] if system is False else [{"role": "system", "content": str(system)}]
        outer = self._chat_session
        self._chat_session = ChatSession(template, history)
        try:
            yield self
        finally:
            session, self._chat_session = self._chat_session, outer
            if session is not None:
                session.end_stream()

    def _template(self, source: str | None) -> Template:
        method = type(self)._format_chat_prompt_template
        if method is not GPT4All._format_chat_prompt_template:
            warnings.warn(
                "_format_chat_prompt_template is deprecated. Please use a chat session with a prompt template.",
                DeprecationWarning,
                stacklevel=4,
            )
            return FormattingMethod(self._format_chat_prompt_template)
        if source is None:
            source = default_source(self.config, self.model._open().metadata)
        return template_of(source)

    @property
    def current_chat_session(self) -> list[MessageType] | None:
        """The messages of this thread's session, a list that may be changed; None outside of one.

        Messages that were changed are read again; what comes before them is not.
        """
        return None if self._chat_session is None else self._chat_session.history

    @current_chat_session.setter
    def current_chat_session(self, history: list[MessageType]) -> None:
        if self._chat_session is None:
            raise ValueError(
                "current_chat_session may only be set when there is an active chat session"
            )
        self._chat_session.history[:] = history

    def save_session(self, path: str | os.PathLike[str]) -> None:
        """Write the current session, and what the model has read of it, to a file."""
        self._session().save(path)

    def load_session(self, path: str | os.PathLike[str]) -> None:
        """Go on with a saved session, in the current one; its messages need not be read again.

        Raises
        ------
        StateError
            The file is damaged, or of another model.
        """
        self._session().load(path, self.model)

    def _session(self) -> ChatSession:
        if self._chat_session is None:
            raise ValueError("there is no active chat session; open one with chat_session()")
        return self._chat_session

    @property
    def _chat_session(self) -> ChatSession | None:
        return getattr(self._local, "session", None)

    @_chat_session.setter
    def _chat_session(self, session: ChatSession | None) -> None:
        self._local.session = session


def _remove_prefix(s: str, prefix: str) -> str:
    return s.removeprefix(prefix)


def _collecting(parts: list[str], callback: ResponseCallbackType) -> ResponseCallbackType:
    """The callback, after noting what was generated."""

    def collect(token_id: int, response: str) -> bool:
        parts.append(response)
        return callback(token_id, response)

    return collect


def _turn(session: ChatSession | None, parts: list[str]) -> AbstractContextManager[None]:
    return nullcontext() if session is None else session.turn(parts)
