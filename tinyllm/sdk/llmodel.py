"""One loaded model, with the methods and messages of GPT4All's ``LLModel``."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..engine.completion import SMALLEST_CONTEXT
from ..engine.generate import ERASED
from ..errors import GGUFError, TinyLLMError, UnsupportedModel
from ..sampling import SamplingParams
from . import devices, embedding
from .answering import Answer, Request, pieces
from .devices import BackendName
from .names import (
    MAX_BATCH,
    MODEL_LIB_PATH,
    PROMPT_OPTIONS,
    CancellationError,
    EmbCancelCallback,
    EmbCancelCallbackType,
    EmbedResult,
    LLModelGPUDevice,
    LLModelPromptContext,
    PromptCallback,
    RawResponseCallbackType,
    ResponseCallback,
    ResponseCallbackType,
    Sentinel,
    _load_cuda,
    cuda_found,
    empty_response_callback,
    llmodel,
    load_llmodel_library,
)

if TYPE_CHECKING:
    from ..kernels.backend import Compute
    from ..model import Model
    from ..models.state import State

__all__ = [
    "MODEL_LIB_PATH",
    "CancellationError",
    "EmbCancelCallback",
    "EmbCancelCallbackType",
    "EmbedResult",
    "LLModel",
    "LLModelGPUDevice",
    "LLModelPromptContext",
    "PromptCallback",
    "RawResponseCallbackType",
    "ResponseCallback",
    "ResponseCallbackType",
    "Sentinel",
    "_load_cuda",
    "cuda_found",
    "empty_response_callback",
    "llmodel",
    "load_llmodel_library",
]


class LLModel:
    """A model file on a device.

    Parameters
    ----------
    model_path : str
        The GGUF file.
    n_ctx : int
        Tokens of context of each conversation.
    ngl : int
        Layers to put on the GPU.
    backend : {"cpu", "kompute", "cuda", "metal", "auto"}
        Where ``init_gpu`` looks.
    n_threads : int, optional
        CPU threads; default: as many as are good for this machine.
    compute : {"f32", "bf16"}
        As for `tinyllm.load`.

    Raises
    ------
    RuntimeError
        The file is no GGUF file.
    ValueError
        ``n_ctx`` is not positive.
    """

    def __init__(
        self,
        model_path: str,
        n_ctx: int,
        ngl: int,
        backend: str,
        n_threads: int | None = None,
        *,
        compute: Compute = "f32",
    ) -> None:
        if n_ctx <= 0:
            raise ValueError(f"n_ctx must be positive, got {n_ctx}")
        self.model_path = model_path.encode()
        self.n_ctx, self.ngl = n_ctx, ngl
        self.context: LLModelPromptContext | None = None
        self.buffer = bytearray()
        self.buff_expecting_cont_bytes = 0
        self.model: Model | None = None
        self._path, self._wanted_backend = model_path, backend
        self._gpu: devices.GPU | None = None
        self._n_threads, self._compute = n_threads, compute
        self._closed = False
        self._idle: list[State] = []  # of the last call: the next may begin alike
        self._idle_lock = threading.Lock()
        self._check_file()

    def _check_file(self) -> None:
        with open(self._path, "rb") as f:
            magic = f.read(4)
        if magic not in (b"GGUF", b"FUGG"):
            raise RuntimeError("Unable to instantiate model: Unsupported file format")

    def __del__(self) -> None:
        if not sys.is_finalizing() and getattr(self, "model", None) is not None:
            self.close()

    def close(self) -> None:
        """Free the model. What is being generated ends with an error; closing again does nothing."""
        model, self._closed = self.model, True
        if model is None:
            return
        with model.network.lock:
            self.model = None
            self._idle.clear()
            model.close()

    def _raise_closed(self) -> NoReturn:
        if not self._closed:
            raise Exception("Model not loaded")  # GPT4All's own words and class
        raise ValueError("Attempted operation on a closed LLModel")

    def _open(self) -> Model:
        if self.model is None:
            self._raise_closed()
        return self.model

    # the device

    @property
    def backend(self) -> BackendName:
        """The kind of device in use: "cpu", "cuda", or "kompute" for OpenCL."""
        kind = self._open().device.split(":")[0].split(" ")[0]
        names: dict[str, BackendName] = {"cuda": "cuda", "opencl": "kompute"}
        return names.get(kind, "cpu")

    @property
    def device(self) -> str | None:
        """The GPU's name, or None on the CPU."""
        name = self._open().device
        return None if self.backend == "cpu" else name.partition(" ")[2] or name

    @staticmethod
    def list_gpus(mem_required: int = 0) -> list[str]:
        """Names of the GPUs with this much memory, such as "cuda:NVIDIA H200"."""
        return devices.list_gpus(mem_required)

    def init_gpu(self, device: str) -> None:
        """Choose the GPU that ``load_model`` will use: "gpu", a vendor, or a name of ``list_gpus``."""
        size = Path(self._path).stat().st_size
        self._gpu = devices.choose(self._wanted_backend, device, size)

    # loading

    def load_model(self) -> bool:
        """Load the weights.

        Raises
        ------
        RuntimeError
            The file is malformed, or its architecture is not one we run.
        """
        import tinyllm

        engine = "cpu" if self._gpu is None else self._gpu.engine
        n_ctx = max(self.n_ctx, SMALLEST_CONTEXT)
        try:
            self.model = tinyllm.load(
                self._path,
                engine,
                n_ctx,
                n_threads=self._n_threads,
                n_gpu_layers=self._layers(),
                compute=self._compute,
            )
        except GGUFError as error:
            raise RuntimeError("Unable to instantiate model: Unsupported file format") from error
        except UnsupportedModel as error:
            raise RuntimeError(
                f"Unable to instantiate model: {_unsupported(self._path, error)}"
            ) from error
        self._closed = False
        self._warn_about_context()
        return True

    def _layers(self) -> int | None:
        return None if self._gpu is None or self.ngl >= 100 else self.ngl

    def _warn_about_context(self) -> None:
        trained = int(self._open().config.n_ctx_train)
        if self.n_ctx < SMALLEST_CONTEXT:
            _say(f"warning: minimum context size is {SMALLEST_CONTEXT}, using minimum size.")
        if self.n_ctx > trained and self._open().config.causal:
            _say(
                f"warning: model was trained on only {trained} context tokens ({self.n_ctx} specified)"
            )

    def set_thread_count(self, n_threads: int) -> None:
        """Use so many threads; more than there are cores are remembered and not used."""
        if n_threads < 1:
            raise ValueError(f"n_threads must be positive, got {n_threads}")
        network = self._open().network
        self._n_threads = n_threads
        with network.lock:
            for be in self._processors():
                be.set_threads(n_threads)

    def thread_count(self) -> int:
        """The number of threads asked for, or in use by default."""
        in_use = [int(be.n_threads) for be in self._processors()]
        return self._n_threads or (in_use[0] if in_use else 1)

    def _processors(self) -> list[Any]:
        """The backends that compute with threads: a GPU has none."""
        stages = self._open().network.stages
        return [s.be for s in stages if hasattr(s.be, "set_threads")]

    # tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Texts of the special tokens: ``bos_token`` and ``eos_token``, where the vocabulary has them."""
        tokenizer = self._open().tokenizer
        ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        return {name: tokenizer.token_text(i) for name, i in ids.items() if i is not None}

    def count_prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt takes, the one at its beginning included."""
        return len(self._encode(prompt))

    def check_length(self, prompt: str) -> None:
        """Raise ValueError for a message that leaves no room to answer it."""
        n, limit = self.count_prompt_tokens(prompt), self.n_ctx - 4
        if n > limit:
            raise ValueError(
                f"Your message was too long and could not be processed ({n} > {limit})."
            )

    def _encode(self, prompt: str, special: bool = True) -> list[int]:
        """A prompt's tokens: special tokens read unless told otherwise, the beginning token once."""
        from ..chat.render import encode_chat

        prompt.encode()  # GPT4All's errors: AttributeError for what is no text, UnicodeEncodeError
        tokenizer = self._open().tokenizer
        first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        if special:
            ids = encode_chat(tokenizer, prompt, tokenizer.bos)
        else:
            ids = tokenizer.encode(prompt, add_special=True, parse_special=False)
        return ids or ([] if first is None else [first])

    def new_state(self) -> State:
        """An empty conversation."""
        return self._open().new_state()

    def _take_state(self) -> State:
        """A state that no other call uses."""
        model = self._open()
        with self._idle_lock:
            if self._idle:
                return self._idle.pop()
        return model.new_state()

    def _give_back(self, state: State) -> None:
        with self._idle_lock:
            if self.model is not None and not self._idle:
                self._idle.append(state)

    # prompts

    def prompt_model(
        self,
        prompt: str,
        callback: ResponseCallbackType | str = empty_response_callback,
        *args: Any,
        **options: Any,
    ) -> None:
        """Answer a prompt, piece by piece, through ``callback(token_id, text)`` until it returns false.

        Parameters
        ----------
        prompt : str
            The whole text.
        callback : callable
            Receives each token; GPT4All 2.8's template may stand before it.
        *args, **options
            As `start` has them.
        """
        for _ in self.prompt_model_streaming(prompt, callback, *args, **options):
            pass

    def prompt_model_streaming(
        self,
        prompt: str,
        callback: ResponseCallbackType | str = empty_response_callback,
        *args: Any,
        **options: Any,
    ) -> Iterator[str]:
        """As `prompt_model`, yielding the pieces for which the callback returned true.

        Nothing is computed ahead: closing the iterator ends the work.
        """
        prompt, callback, options = _with_template(prompt, callback, args, options)
        stream = self.pieces(prompt, **options)
        try:
            for token_id, text in stream:
                if not callback(token_id, text):
                    break
                yield text
        finally:
            stream.close()

    def pieces(self, prompt: str, **options: Any) -> Any:
        """Generator of (token id, text) of the answer; ``options`` as `start` has them."""
        answer = self.start(prompt, **options)
        yield from self.pieces_of(answer)

    def pieces_of(self, answer: Answer) -> Any:
        """Generator of (token id, text) of an answer that was started."""
        try:
            yield from pieces(answer, self._check_open, self._prompt_callback)
        finally:
            if self.context is not None:
                self.context.n_past = self.context.tokens_size = answer.state.n_past
            if answer.borrowed:
                self._give_back(answer.state)

    def _check_open(self) -> None:
        if self.model is None:
            self._raise_closed()

    def start(
        self,
        prompt: str,
        *,
        n_predict: int = 4096,
        top_k: int = 40,
        top_p: float = 0.9,
        min_p: float = 0.0,
        temp: float = 0.1,
        n_batch: int = 8,
        repeat_penalty: float = 1.2,
        repeat_last_n: int = 10,
        context_erase: float = 0.75,
        reset_context: bool = True,
        special: bool = True,
        state: State | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
    ) -> Answer:
        """An answer, not yet begun.

        ``state`` is the conversation to continue, one of this call alone when not given; what it has in
        common with the prompt is not computed again. ``seed``, ``stop`` and ``logprobs`` are those of
        ``tinyllm``'s models, the others GPT4All's, of which ``context_erase`` and ``reset_context`` have
        one value only. The engine reads prompts in batches of its own choice, whatever ``n_batch`` says.

        Raises
        ------
        RuntimeError
            The model only embeds.
        ValueError
            An argument is out of range, or the model is closed.
        """
        model = self._open()
        if n_batch < 1:
            raise ValueError(f"n_batch must be positive, got {n_batch}")
        if context_erase != ERASED or not reset_context:
            raise ValueError(
                f"context_erase is {ERASED}; to continue a conversation, pass its state"
            )
        if not model.config.causal:
            raise RuntimeError("prompt error: this model does not support text or chat completion.")
        params = SamplingParams(
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
        )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self.context = LLModelPromptContext(
            0, 0, self.n_ctx, n_predict, top_k, top_p, min_p, temp, min(n_batch, MAX_BATCH),
            repeat_penalty, repeat_last_n, context_erase,
        )  # fmt: skip
        request = Request(params, operator.index(n_predict), stops, logprobs)
        ids = self._encode(prompt, special)
        if state is None:
            return Answer(model, self._take_state(), ids, request, borrowed=True)
        return Answer(model, state, ids, request)

    @staticmethod
    def _prompt_callback(token_id: int) -> bool:
        """Called with each of the prompt's tokens once it is read; return false to stop reading."""
        return True

    # embeddings

    def generate_embeddings(
        self,
        text: str | list[str],
        prefix: str | None,
        dimensionality: int,
        do_mean: bool,
        atlas: bool,
        cancel_cb: EmbCancelCallbackType | None,
    ) -> EmbedResult:
        """Embed a text, or a list of texts; see ``Embed4All.embed``."""
        if not text:
            raise ValueError("text must not be None or empty")
        model = self._open()
        texts = [text] if isinstance(text, str) else list(text)
        for t in (*texts, prefix or ""):
            t.encode()
        request = embedding.Request(texts, prefix, dimensionality, do_mean, atlas, cancel_cb)
        try:
            vectors, n_tokens = embedding.embed(
                model, request, max(self.n_ctx, SMALLEST_CONTEXT), self.backend
            )
        except embedding.Canceled as error:
            raise CancellationError(str(error)) from None
        except (ValueError, TinyLLMError) as error:
            if self.model is None:
                self._raise_closed()
            raise RuntimeError(f"Failed to generate embeddings: {error}") from error
        rows = vectors.tolist()
        return {
            "embeddings": rows[0] if isinstance(text, str) else rows,
            "n_prompt_tokens": n_tokens,
        }


def _with_template(
    prompt: str,
    callback: ResponseCallbackType | str,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[str, ResponseCallbackType, dict[str, Any]]:
    """Prompt, callback and options, of (prompt, callback, ...) or 2.8's (prompt, template, callback, ...)."""
    template = options.pop("prompt_template", None)
    if isinstance(callback, str):
        template, callback, args = callback, args[0] if args else empty_response_callback, args[1:]
    if len(args) > len(PROMPT_OPTIONS):
        raise TypeError(f"{len(args)} options by position; expected at most {len(PROMPT_OPTIONS)}")
    chosen: ResponseCallbackType = options.pop("callback", callback)
    if isinstance(template, str):
        prompt = template.replace("%1", prompt, 1).partition("%2")[0]
    return prompt, chosen, {**dict(zip(PROMPT_OPTIONS, args, strict=False)), **options}


def _unsupported(path: str, error: UnsupportedModel) -> str:
    """GPT4All's words for an architecture that is not known, ours for everything else."""
    from .. import gguf
    from ..models.archs import ARCHS

    with gguf.open(path) as file:
        name = file.metadata.get("general.architecture")
    return str(error) if name in ARCHS else f"Unsupported model architecture: {name}"


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201
