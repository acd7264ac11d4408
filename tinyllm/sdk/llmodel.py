"""One loaded model, with the methods and messages of GPT4All's ``LLModel``."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..chat.render import encode_chat
from ..engine.completion import SMALLEST_CONTEXT, or_beginning, without_end
from ..errors import ArgumentError, GGUFError, UnsupportedModel
from . import devices, embedding
from .answering import Answer, Request, room_for_prompt
from .arguments import whole
from .closing import NotPickled
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
    from ..kernels.backend import Compute, KVType
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


class LLModel(NotPickled):
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
    compute : {"f32", "bf16", "exact"}
        In what numbers matrices are multiplied, as in `tinyllm.load`.
    kv_type : {"f16", "f32", "q8_0"}
        How keys and values are kept, as in `tinyllm.load`.

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
        kv_type: KVType = "f16",
    ) -> None:
        self.model_path = model_path.encode()
        self.n_ctx, self.ngl = whole("n_ctx", n_ctx, 1), ngl
        self.context: LLModelPromptContext | None = None
        self.buffer = bytearray()
        self.buff_expecting_cont_bytes = 0
        self.model: Model | None = None
        self._path, self._wanted_backend = model_path, backend
        self._gpu: devices.GPU | None = None
        self._n_threads, self._compute, self._kv_type = n_threads, compute, kv_type
        self._closed = False
        self._check_file()

    def _check_file(self) -> None:
        if Path(self._path).is_dir():
            raise IsADirectoryError(
                f"Model file is a directory: {self._path!r}; give the path of a GGUF file in it"
            )
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
            model.close()

    def _raise_closed(self) -> NoReturn:
        if not self._closed:
            raise Exception("Model not loaded")  # GPT4All's own words and class
        raise ValueError("Attempted operation on a closed LLModel")

    def _open(self) -> Model:
        if self.model is None:
            self._raise_closed()
        return self.model

    # ---- the device

    @property
    def backend(self) -> BackendName:
        """The kind of device in use: "cpu", "cuda", or "kompute" for OpenCL."""
        return devices.backend_of(self._open().devices[0])

    @property
    def device(self) -> str | None:
        """The GPU's name, or None on the CPU."""
        return devices.gpu_name(self._open().devices[0])

    @staticmethod
    def list_gpus(mem_required: int = 0) -> list[str]:
        """Names of the GPUs with this much memory, such as "cuda:NVIDIA H200"."""
        return devices.list_gpus(mem_required)

    def init_gpu(self, device: str) -> None:
        """Choose the GPU that ``load_model`` will use: "gpu", a vendor, or a name of ``list_gpus``."""
        size = Path(self._path).stat().st_size
        self._gpu = devices.choose(self._wanted_backend, device, size)

    # ---- loading

    def load_model(self) -> bool:
        """Load the weights.

        Raises
        ------
        RuntimeError
            The file is malformed, or its architecture is not one we run.
        """
        import tinyllm

        engine = "cpu" if self._gpu is None else self._gpu.device.id
        n_ctx = max(self.n_ctx, SMALLEST_CONTEXT)
        try:
            self.model = tinyllm.load(
                self._path,
                engine,
                n_ctx,
                n_threads=self._n_threads,
                n_gpu_layers=self._layers(),
                compute=self._compute,
                kv_type=self._kv_type,
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
        n_threads = whole("n_threads", n_threads, 1)
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

    # ---- tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Texts of the special tokens: ``bos_token`` and ``eos_token``, where the vocabulary has them."""
        tokenizer = self._open().tokenizer
        ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        return {name: tokenizer.token_text(i) for name, i in ids.items() if i is not None}

    def prompt_ids(self, prompt: str, special: bool = True) -> list[int]:
        """A prompt's tokens, the one at its beginning once; ``special`` tokens in the text are read."""
        prompt.encode()  # GPT4All's errors: AttributeError for what is no text, UnicodeEncodeError
        tokenizer = self._open().tokenizer
        if special:
            ids = encode_chat(tokenizer, prompt, tokenizer.bos)
        else:
            ids = tokenizer.encode(prompt, add_special=True, parse_special=False)
        return or_beginning(tokenizer, without_end(tokenizer, ids))

    def count_prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt takes, the one at its beginning included."""
        return len(self.prompt_ids(prompt))

    def check_length(self, prompt: str) -> None:
        """Raise ValueError for a message that leaves no room to answer it."""
        n, limit = self.count_prompt_tokens(prompt), room_for_prompt(self.n_ctx)
        if n > limit:
            raise ValueError(
                f"Your message was too long and could not be processed ({n} > {limit})."
            )

    # ---- prompts

    def new_state(self) -> State:
        """An empty conversation."""
        return self._open().new_state()

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
            The fields of `answering.Request`, and those of `start`.
        """
        for _ in self.prompt_model_streaming(prompt, callback, *args, **options):
            pass

    def prompt_model_streaming(
        self,
        prompt: str,
        callback: ResponseCallbackType | str = empty_response_callback,
        *args: Any,
        **options: Any,
    ) -> Generator[str, None, None]:
        """Answer as `prompt_model` does, yielding the pieces for which the callback returned true.

        Nothing is computed ahead: closing the iterator ends the work.
        """
        prompt, callback, options = _with_template(prompt, callback, args, options)
        state = options.pop("state", None)
        answer = self.start(prompt, state=state, **options)
        try:
            with closing(iter(answer)) as pieces:
                for token_id, text in pieces:
                    if not callback(token_id, text):
                        break
                    yield text
        finally:
            if self.context is not None:
                self.context.n_past = self.context.tokens_size = answer.state.n_past

    def start(
        self, prompt: str, *, state: State | None = None, special: bool = True, **options: Any
    ) -> Answer:
        """An answer, not yet begun; iterating computes it.

        Parameters
        ----------
        prompt : str
            The whole text.
        state : State, optional
            The conversation to continue; what it has in common with the prompt is not computed again. Without
            one, nothing is that the model has kept of another text.
        special : bool
            Read special tokens in the prompt.
        **options
            The fields of `answering.Request`.

        Raises
        ------
        RuntimeError
            The model only embeds.
        ValueError
            An argument is out of range, or the model is closed.
        """
        model, request = self._open(), Request(**options)
        if not model.config.causal:
            raise RuntimeError("prompt error: this model does not support text or chat completion.")
        self.context = LLModelPromptContext(
            0, 0, self.n_ctx, request.n_predict, request.top_k, request.top_p, request.min_p, request.temp,
            min(request.n_batch, MAX_BATCH), request.repeat_penalty, request.repeat_last_n,
        )  # fmt: skip
        ids = self.prompt_ids(prompt, special)
        return Answer(model, state, ids, request, self._open, self._prompt_callback)

    @staticmethod
    def _prompt_callback(token_id: int) -> bool:
        """Called with each of the prompt's tokens once it is read; return false to stop reading."""
        return True

    # ---- embeddings

    def generate_embeddings(
        self,
        text: str | list[str],
        prefix: str | None,
        dimensionality: int,
        do_mean: bool,
        atlas: bool,
        cancel_cb: EmbCancelCallbackType | None,
    ) -> EmbedResult:
        """Embed a text, or a list of texts, with the arguments of ``Embed4All.embed``."""
        if not text:
            raise ValueError("text must not be None or empty")
        if not isinstance(text, Iterable):
            raise ArgumentError(f"text={text!r:.80}; expected a text or a list of texts")
        model, n_ctx = self._open(), max(self.n_ctx, SMALLEST_CONTEXT)
        texts = [text] if isinstance(text, str) else list(text)
        request = embedding.Request(texts, prefix, dimensionality, do_mean, atlas, cancel_cb)
        try:
            rows, n_tokens = embedding.answer(model, request, n_ctx, self.backend)
        except RuntimeError:
            self._open()  # if the model was closed meanwhile, that is the error to report
            raise
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
