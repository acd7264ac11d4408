"""`GPT4All` and `Embed4All`: the classes of the GPT4All Python SDK, on this engine."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, overload

from ..engine.completion import Completion
from ..errors import ArgumentError
from ..hub import catalogue
from ..hub.catalogue import ConfigType, append_extension_if_missing
from ..hub.download import _fsync
from .answering import AnswerOptions, Request, complete_all
from .arguments import whole
from .closing import Closing
from .devices import BackendName, split_device
from .documents import quoting, with_documents
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
from .session import ChatSession, Sessions, Turn, alone
from .templates import (
    DEFAULT_PROMPT_TEMPLATE,
    FormattingMethod,
    MessageType,
    Template,
    default_template,
    is_wrapped_twice,
    template_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ..kernels.backend import Compute, KVType
    from ..localdocs import LocalDocs

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
    model_name : str or path
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
    compute : {"f32", "bf16", "exact"}
        "exact" multiplies quantised weights with activations as float32 has them; "bf16" multiplies F32, F16
        and BF16 weights faster and less exactly. As in `tinyllm.load`.
    kv_type : {"f16", "f32", "q8_0"}
        How keys and values are kept, as in `tinyllm.load`; "q8_0" takes half the memory of "f16".
    private_sessions : bool
        A chat session is seen only by the thread or asyncio task that opens it, and by what carries its
        context on, as `asyncio.to_thread` does. By default a thread that opened none is in the model's.

    Raises
    ------
    FileNotFoundError
        The file or the directory does not exist.
    RuntimeError
        The file is no model that we run.
    ValueError
        An argument is wrong, there is no such device, or the download failed.
    requests.exceptions.ConnectionError
        The file has to be downloaded, and there is no network.
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str],
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
        kv_type: KVType = "f16",
        private_sessions: bool = False,
    ) -> None:
        n_ctx = whole("n_ctx", n_ctx, 1)
        if n_threads is not None:
            n_threads = whole("n_threads", n_threads, 1)
        ngl = whole("ngl", ngl)
        if device is not None and not isinstance(device, str):
            raise ArgumentError(f"device={device!r:.80}; expected a text such as 'gpu', or None")
        self.model_type = model_type
        self._sessions = Sessions(private_sessions)
        backend, gpu = split_device(device)
        self.config: ConfigType = self.retrieve_model(
            model_name, model_path=model_path, allow_download=allow_download, verbose=verbose
        )
        self.config.setdefault("filename", os.path.basename(self.config["path"]))
        self.model = LLModel(
            self.config["path"], n_ctx, ngl, backend, n_threads, compute=compute, kv_type=kv_type
        )
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
        self, prompt: str, *, streaming: Literal[False] = ..., logprobs: None = ...,
        **options: Unpack[AnswerOptions],
    ) -> str: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: str, *, streaming: Literal[True], logprobs: None = ...,
        **options: Unpack[AnswerOptions],
    ) -> Generator[str, None, None]: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: str, *, streaming: bool, logprobs: None = ..., **options: Unpack[AnswerOptions],
    ) -> str | Generator[str, None, None]: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: str, *, streaming: Literal[False] = ..., logprobs: int,
        **options: Unpack[AnswerOptions],
    ) -> Completion: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: list[str], *, streaming: Literal[False] = ..., logprobs: None = ...,
        **options: Unpack[AnswerOptions],
    ) -> list[str]: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: list[str], *, streaming: Literal[False] = ..., logprobs: int,
        **options: Unpack[AnswerOptions],
    ) -> list[Completion]: ...  # fmt: skip
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
        stop: str | Sequence[str] | None = (),
        logprobs: int | None = None,
    ) -> str | Generator[str, None, None] | Completion | list[str] | list[Completion]:
        """Answer a prompt: in a chat session the user's next message, else a text to continue.

        Parameters
        ----------
        prompt : str, or list of str
            A list, outside of chat sessions, is answered side by side.
        max_tokens, n_predict : int
            At most so many tokens; the second wins.
        temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n
            How a token is chosen; ``tinyllm.sampling.SamplingParams`` explains each (``temp`` is its
            ``temperature``).
        n_batch : int
            Checked and otherwise ignored: prompts are read at the engine's best speed.
        streaming : bool
            Return an iterator of pieces; closing it ends the work.
        callback : callable
            ``callback(token_id, text)`` ends the answer by returning something false.
        seed : int, optional
            Where the random numbers start; the same seed gives the same answer again.
        stop : str or sequence of str, optional
            Strings that end the answer and are not part of it.
        logprobs : int, optional
            Return a ``tinyllm.Completion`` that holds each token's log-probability and those of so many
            alternatives.

        Returns
        -------
        str, or iterator of str, or tinyllm.Completion; a list for a list

        Raises
        ------
        ValueError
            The message is longer than the context, an argument is out of range, or the model is closed.
        """
        n_predict = whole("max_tokens", max_tokens) if n_predict is None else n_predict
        options: dict[str, Any] = {
            "temp": temp, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repeat_penalty": repeat_penalty, "repeat_last_n": repeat_last_n, "n_batch": n_batch,
            "n_predict": n_predict, "seed": seed, "stop": stop, "logprobs": logprobs,
        }  # fmt: skip
        if not callable(callback):
            raise ArgumentError(
                f"callback={callback!r:.80}; expected callback(token_id, text), or leave it out"
            )
        Request(**options)  # a wrong option is an error now, not when a stream is first read
        session = self._sessions.current
        if streaming and logprobs is not None:
            raise ValueError("logprobs come with the whole answer; do not ask for streaming too")
        if not isinstance(prompt, list):
            if session is not None and session.documents is not None:
                prompt, session.references = with_documents(
                    prompt, session.documents, self.model, n_predict
                )
            answer = self._stream if streaming else self._answer
            return answer(session, prompt, callback, options)
        if streaming or session is not None or callback is not empty_response_callback:
            raise ValueError("a list of prompts takes no streaming, callback or chat session")
        return self._answer_list(prompt, options)

    def _answer(
        self,
        session: ChatSession | None,
        prompt: str,
        callback: ResponseCallbackType,
        options: dict[str, Any],
    ) -> str | Completion:
        turn_of = alone(prompt, self.model) if session is None else session.turn(prompt, self.model)
        with turn_of as turn:
            note = turn.noting(callback)
            if options["logprobs"] is None:
                self.model.prompt_model(turn.text, note, state=turn.state, **options)
                return "".join(turn.parts)
            answer = self.model.start(turn.text, state=turn.state, **options)
            with closing(iter(answer)) as pieces:
                all(note(token_id, text) for token_id, text in pieces)
            return answer.job.completion()

    def _stream(
        self,
        session: ChatSession | None,
        prompt: str,
        callback: ResponseCallbackType,
        options: dict[str, Any],
    ) -> Generator[str, None, None]:
        def write(turn: Turn) -> Generator[str, None, None]:
            return self.model.prompt_model_streaming(
                turn.text, turn.noting(callback), state=turn.state, **options
            )

        if session is not None:
            session.check(prompt, self.model)
            return session.stream(prompt, self.model, write)
        with alone(prompt, self.model) as turn:
            return write(turn)

    def _answer_list(
        self, prompts: list[str], options: dict[str, Any]
    ) -> list[str] | list[Completion]:
        for prompt in prompts:
            self.model.check_length(prompt)
        done = complete_all([self.model.start(p, **options) for p in prompts], self.model._open)
        return [c.text for c in done] if options["logprobs"] is None else done

    # ---- chat sessions

    @contextmanager
    def chat_session(
        self,
        system_message: str | Literal[False] | None = None,
        chat_template: str | None = None,
        *,
        system_prompt: str | None = None,
        prompt_template: str | None = None,
        localdocs: str | LocalDocs | None = None,
    ) -> Iterator[Self]:
        """Hold a conversation: inside, `generate` sends the user's next message.

        The session is the model's, and seen from every thread, until it ends here. Threads and asyncio tasks
        that open sessions of their own are each in their own. A stream that was begun inside may be read to
        its end outside.

        Parameters
        ----------
        system_message : str or False, optional
            What the model is told first; None: the model's default, False: nothing.
        chat_template : str, optional
            A Jinja template, or a format string with ``{0}`` (the message) and ``{1}`` (the answer).
            Default: the model's, of GPT4All's list or of the file.
        system_prompt, prompt_template : str, optional
            ``system_message`` and ``chat_template`` under GPT4All 2's names.
        localdocs : str or LocalDocs, optional
            Documents that are quoted before each message, where they are near to it: a store, or a collection
            of the user's own. `references` has what the last answer rests on.

        Raises
        ------
        ValueError
            The model has no template, or a malformed one.
        """
        system = system_prompt if system_message is None else system_message
        if system is not None and system is not False and not isinstance(system, str):
            raise ArgumentError(f"system_message={system!r:.80}; expected a text, False or None")
        if system is None:
            system = self.config.get("systemMessage", False)
        template = self._template(prompt_template if chat_template is None else chat_template)
        if system and is_wrapped_twice(template, system):
            warnings.warn(
                f"the system message {system!r:.60} is not plain text, and the chat template adds its own"
                " markup around it. Give the message alone, or a prompt_template with {0} for the user's",
                stacklevel=3,
            )
        history = [] if system is False else [{"role": "system", "content": str(system)}]
        with quoting(localdocs) as documents:
            number = self._sessions.begin(ChatSession(template, history, documents))
            try:
                yield self
            finally:
                self._sessions.end(number)

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
            return default_template(self.config, self.model._open().metadata)
        return template_of(source)

    @property
    def current_chat_session(self) -> list[MessageType] | None:
        """The messages of the session that the running code is in, a list that may be changed, or None.

        Messages that were changed are read again; what comes before them is not.
        """
        session = self._sessions.current
        return None if session is None else session.history

    @current_chat_session.setter
    def current_chat_session(self, history: list[MessageType]) -> None:
        session = self._sessions.current
        if session is None:
            raise ValueError(
                "current_chat_session may only be set when there is an active chat session"
            )
        whole = isinstance(history, Sequence) and not isinstance(history, str)
        if not whole or not all(isinstance(message, Mapping) for message in history):
            raise ArgumentError(
                f"current_chat_session={history!r:.80}; expected a list of messages, each a dict"
            )
        session.history[:] = history

    @property
    def references(self) -> list[dict[str, Any]]:
        """What the session's last answer rests on: see `chat_session`, ``localdocs``; [] where it has none.

        Each has "file", "title", "author", "date", "text", "page", "from", "to" (lines).
        """
        session = self._sessions.current
        return [] if session is None else list(session.references)

    def save_session(self, path: str | os.PathLike[str]) -> None:
        """Write the current session to a file: its messages, and the model's state after reading them."""
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
        session = self._sessions.current
        if session is None:
            raise ValueError("there is no active chat session; open one with chat_session()")
        return session


def _remove_prefix(s: str, prefix: str) -> str:
    return s.removeprefix(prefix)


def __getattr__(name: str) -> Any:
    """Import a module that GPT4All's own imports: programs, and tests that replace it, look for it here."""
    if name in ("hashlib", "platform", "re", "requests", "time", "tqdm"):
        return import_module(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
