"""Model: what ``load`` returns. Text, ids, logits and embeddings of one GGUF file on one device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from . import gguf, tokenizers
from .engine.completion import (
    SMALLEST_CONTEXT,
    Options,
    Pieces,
    begin,
    check_max_tokens,
    complete,
    or_beginning,
    split_prompts,
    strings,
)
from .engine.generate import Overflow
from .errors import (
    ArgumentError,
    ContextOverflow,
    GGUFError,
    TemplateError,
    TinyLLMError,
    UnsupportedModel,
)
from .gguf.finite import check_finite
from .gguf.tensor import Tensor
from .kernels import devices
from .kernels.backend import Compute, KVType, open_backend
from .models.network import Network, build, cache_bytes
from .models.pooling import pool, unit
from .models.stages import Place, Stage, divide
from .models.state import State
from .models.step import Tap
from .sampling import SamplingParams
from .tokenizers import Tokenizer

FLOATS = ("F32", "F16", "BF16")
BUNDLED = Path(__file__).parent / "data" / "bundled.gguf"


class Model:
    """One loaded model; made by ``tinyllm.load``. Safe to use from several threads."""

    def __init__(
        self, file: gguf.GGUFFile, network: Network, n_ctx: int, tokenizer: Tokenizer | None
    ) -> None:
        self.path, self.metadata = file.path, file.metadata
        self._file, self._network, self.n_ctx = file, network, n_ctx
        self._tokenizer = tokenizer

    # ---- what it is

    @property
    def network(self) -> Network:
        """The weights and their mathematics."""
        if self._network is None:
            raise TinyLLMError("the model is closed")
        return self._network

    @property
    def config(self) -> Any:
        """Sizes and scales of the model; see ``tinyllm.models.config.Config``."""
        return self.network.config

    @property
    def arch(self) -> str:
        """The architecture's name, as in the file."""
        return str(self.network.arch.name)

    @property
    def device(self) -> str:
        """What really runs: "cpu", "reference", "cuda:0 NVIDIA H200"; of several, with the layers of each."""
        stages = self.network.stages
        if len(stages) == 1:
            return stages[0].be.name
        gpus_first = sorted(stages, key=lambda s: s.be.name == "cpu")
        return " + ".join(f"{s.be.name} ({s.said})" for s in gpus_first)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back, as the file's vocabulary has it."""
        if self._tokenizer is None:
            raise UnsupportedModel(f"{self.path} has no vocabulary; give token ids, not text")
        return self._tokenizer

    # ---- numbers

    def new_state(self, n_ctx: int | None = None) -> State:
        """An empty conversation with room for ``n_ctx`` tokens (default: the model's)."""
        return self.network.new_state(check_n_ctx(n_ctx) or self.n_ctx)

    def logits(
        self, ids: Sequence[int], state: State | None = None, tap: Tap | None = None
    ) -> np.ndarray:
        """Logits after each of ``ids`` in one causal pass -> float32 [len(ids), n_vocab].

        With a ``state``, the ids continue it and stay in it.
        """
        ids = [int(i) for i in ids]
        if not ids:
            return np.empty((0, self.network.n_vocab), np.float32)
        state = state or self.new_state(max(len(ids), SMALLEST_CONTEXT))
        if len(state.ids) + len(ids) > state.n_ctx:
            raise ContextOverflow(f"{len(ids)} ids after {len(state.ids)}; room for {state.n_ctx}")
        start = len(state.ids)
        state.append(ids)
        return self._pending_logits(state, tap)[-(len(state.ids) - start) :]

    def _pending_logits(self, state: State, tap: Tap | None) -> np.ndarray:
        """Logits of all rows not yet stored, in chunks of the network's batch."""
        net, rows = self.network, []
        while n := min(net.n_batch, len(state.ids) - state.n_past):
            with net.lock:
                rows.append(np.array(net.forward([(state, n, "all")], tap)[0]))
        return np.concatenate(rows)

    def embed_ids(
        self, ids: Sequence[int], pooling: str | None = None, normalize: bool = True
    ) -> np.ndarray:
        """The embedding of one sequence -> float32 [n_embd], or [len(ids), n_embd] with pooling "none"."""
        return self.embed_batch([[int(i) for i in ids]], pooling, normalize)[0]

    def embed(
        self, texts: str | Sequence[str], pooling: str | None = None, normalize: bool = True
    ) -> np.ndarray:
        """One embedding per text -> float32 [n, n_embd] ([n_embd] for a single string).

        Parameters
        ----------
        texts : str or sequence of str
            Special tokens are added as the vocabulary asks.
        pooling : {"mean", "cls", "last"}, optional
            How rows become one vector; default: as the file says, else mean.
        normalize : bool
            Scale each to length 1.

        Raises
        ------
        ContextOverflow
            A text has more tokens than the model was trained for.
        """
        if isinstance(texts, str):
            return self.embed_ids(self.tokenizer.encode(texts), pooling, normalize)
        if pooling == "none":
            raise ArgumentError(
                "pooling='none' gives one row per token; use embed_ids text by text"
            )
        ids = [self.tokenizer.encode(t) for t in texts]
        if not ids:
            return np.empty((0, self.config.n_embd), np.float32)
        return np.stack(self.embed_batch(ids, pooling, normalize))

    def rank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """How well each document answers the query, by a reranker -> float32 [n]; more is better.

        Parameters
        ----------
        query : str
            What is asked.
        documents : sequence of str
            Each is read together with the query, as the vocabulary joins a pair.

        Raises
        ------
        UnsupportedModel
            The model has no ranking head, or one with several labels.
        ContextOverflow
            A query and a document together have more tokens than the model was trained for.
        """
        net, head = self.network, self.network.decoder.rank
        if head is None or head.n_label != 1:
            what = "no ranking head" if head is None else f"a head of {head.n_label} labels"
            raise UnsupportedModel(f"the model has {what}; load a reranker, or compare embeddings")
        if isinstance(documents, str):
            raise ArgumentError("documents is a single string; expected a list of them")
        pairs = [encode_pair(self.tokenizer, query, text) for text in documents]
        lengths = [len(ids) for ids, _ in pairs]
        self._check_lengths(lengths)
        scores = np.empty(len(pairs), np.float32)
        for part in pack(lengths, net.n_batch):
            ids, types = zip(*(pairs[i] for i in part), strict=True)
            for i, rows in zip(part, net.hidden(ids, types=types), strict=True):
                scores[i] = head(rows)[0]
        return scores

    def _check_lengths(self, lengths: Iterable[int]) -> None:
        for n in lengths:
            if not 0 < n <= self.config.n_ctx_train:
                raise ContextOverflow(
                    f"a text has {n} tokens; the model takes 1 to {self.config.n_ctx_train}"
                )

    def embed_batch(
        self,
        ids: Sequence[Sequence[int]],
        pooling: str | None = None,
        normalize: bool = True,
    ) -> list[np.ndarray]:
        """The embedding of each of many sequences of ids, as ``embed_ids`` gives it.

        They are sorted by length and packed into steps, so that nothing is padded.
        """
        net, kind = self.network, pooling or self.config.pooling or "mean"
        self._check_lengths(len(sequence) for sequence in ids)
        out: list[np.ndarray] = [np.empty(0)] * len(ids)
        for part in pack([len(i) for i in ids], net.n_batch):
            for i, rows in zip(part, net.hidden([ids[i] for i in part]), strict=True):
                x = net.decoder.pooled(pool(rows, kind))
                out[i] = unit(x) if normalize else x
        return out

    # ---- text

    def generate(
        self,
        prompt: str | Sequence[Any],
        max_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: Callable[[list[int], np.ndarray], np.ndarray | None] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        echo: bool = False,
        state: State | None = None,
        tap: Tap | None = None,
        overflow: Overflow = "error",
        stream: bool = False,
    ) -> Any:
        """Continue a prompt.

        Parameters
        ----------
        prompt : str, sequence of int, or a list of either
            Text (special tokens in it are parsed), or ids. A list of prompts is continued side by side.
        max_tokens : int
            At most so many tokens; -1: until the context is full.
        temperature, top_k, top_p, min_p, typical_p, repeat_penalty, repeat_last_n, \
presence_penalty, frequency_penalty, logit_bias, logits_processor, seed
            See ``tinyllm.sampling.SamplingParams``. Each prompt of a list has its own generator of ``seed``.
        stop : str or sequence of str
            Strings that end the text; they are not part of it. They add to the model's own end tokens.
        logprobs : int, optional
            Report each token's log-probability and those of this many likeliest alternatives.
        echo : bool
            With ``logprobs``: report the prompt's tokens too.
        state : State, optional
            Continue this conversation; the prompt is added to it.
        tap : callable, optional
            ``tap(name, array)`` sees, and may replace, the activations of every step. With the attribute
            ``attn_probs = True`` it is also shown attention probabilities [heads, rows, positions].
        overflow : {"error", "shift", "truncate"}
            When the context is full: a prompt that is too long raises ("error"), loses its beginning
            ("truncate"), or old tokens make room again and again ("shift").
        stream : bool
            Return an iterator of pieces of text. Closing it stops the work; its ``completion`` has the
            ``finish_reason``, ids and timings once it has ended.

        Returns
        -------
        Completion, list of Completion, or Pieces (an iterator of str)

        Raises
        ------
        ContextOverflow, ArgumentError, NumericError

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> len(m.generate("Once upon a time", max_tokens=5, temperature=0).ids)
        5
        """
        if not self.config.causal:
            raise ArgumentError(f"{self.arch} reads texts and writes none; use embed")
        params = SamplingParams(
            temperature, top_k, top_p, min_p, typical_p, repeat_penalty, repeat_last_n,
            presence_penalty, frequency_penalty, logit_bias, logits_processor, seed,
        )  # fmt: skip
        options = Options(
            params, check_max_tokens(max_tokens), strings(stop), logprobs, echo, overflow
        )
        prompts, many = split_prompts(prompt)
        if (stream or state is not None) and many:
            raise ArgumentError("stream and state take a single prompt, not a list")
        jobs = [begin(self, ids, options, state) for ids in map(self._ids, prompts)]
        if stream:
            return Pieces(self.network, jobs[0], tap)
        completions = complete(self.network, jobs, tap)
        return completions if many else completions[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> Any:
        """Answer a conversation, in the form that the file's own chat template gives it.

        Parameters
        ----------
        messages : sequence of mapping
            ``{"role": "user" | "assistant" | "system" | ..., "content": str}``, oldest first.
        template : str, optional
            A Jinja template to use instead of the file's.
        tools : sequence, optional
            Handed to the template.
        **options
            As ``generate``. With ``state=``, what the state holds already is not read again.

        Returns
        -------
        Completion, or Pieces (an iterator of str) with ``stream=True``

        Raises
        ------
        TemplateError
            The file has no template, or it refuses these messages.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> answer = m.chat([{"role": "user", "content": "Hello!"}], max_tokens=8, seed=1)
        """
        from .chat.render import chat_ids, pick_template

        chosen = template or pick_template(self.metadata)
        if chosen is None:
            raise TemplateError("the file has no chat template; give one with template=")
        t = self.tokenizer
        ids = chat_ids(t, chosen, messages, bos_id=t.bos, eos_id=t.eos, tools=tools)
        state = options.get("state")
        if state is not None:
            kept = state.reuse(ids)
            state.truncate(kept)
            ids = ids[kept:]
        return self.generate(ids, **options)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens; an empty one is the beginning-of-text token."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        return or_beginning(self.tokenizer, ids)

    def close(self) -> None:
        """Free the weights at once; using the model afterwards raises TinyLLMError."""
        if self._network is not None:
            self._network.close()
            self._file.close()
            self._network = None  # type: ignore[assignment]

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"on {self.device}" if self._network else "closed"
        return f"<tinyllm.Model {Path(self.path).name} {where}>"


def check_n_ctx(n: int | None) -> int | None:
    if n is None:
        return None
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n < 1 << 31:
        raise ArgumentError(f"n_ctx={n!r}; expected a whole number of at least 1, or None")
    return max(int(n), SMALLEST_CONTEXT)


def encode_pair(t: Tokenizer, first: str, second: str) -> tuple[list[int], list[int]]:
    """Two texts as one sequence, and each token's segment: [CLS] first [SEP] second [SEP].

    Vocabularies that end a text with ``</s>`` (RoBERTa's) put two of them between.
    """
    head, tail = t.encode(first), t.encode(second)[int(t.add_bos) :]
    end = t.eos if t.eos is not None else t.sep
    if end is not None and t.token_text(end) == "</s>":
        tail = [end, *tail]
    return head + tail, [0] * len(head) + [1] * len(tail)


def pack(lengths: Sequence[int], n_rows: int) -> Iterator[list[int]]:
    """Indices in groups of at most ``n_rows`` rows (a longer sequence alone), like lengths together."""
    part: list[int] = []
    filled = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and filled + lengths[i] > n_rows:
            yield part
            part, filled = [], 0
        part.append(i)
        filled += lengths[i]
    if part:
        yield part


def load(
    path: str | Path | None = None,
    device: str | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    kv_type: KVType = "f16",
    strict: bool = True,
    check_weights: bool = False,
    compute: Compute = "f32",
) -> Model:
    """Load a GGUF file.

    Parameters
    ----------
    path : str or Path, optional
        A file; the first shard of a split one; "hf:owner/repo/file.gguf"; a name of GPT4All's list. None is
        the small model that comes with the package.
    device : str, optional
        "cpu" (default), "auto", "gpu", "reference", "cuda[:i]", "opencl[:i]", a maker ("nvidia", "amd",
        "intel") or a part of a device's name. Several, as "cuda:0,cuda:1", share the layers in proportion to
        their free memory.
    n_ctx : int, optional
        Tokens of a conversation; default: the trained length, or what half of the free memory holds.
    n_threads : int, optional
        Default: the physical cores.
    n_gpu_layers : int, optional
        The last so many layers, and the head, go to the GPU, the layers before them to the CPU; 0: all to
        the CPU. Default, or -1: all to the GPU.
    kv_type : {"f16", "f32", "q8_0"}
        How keys and values are stored.
    strict : bool
        Refuse files with keys or tensors that we do not understand (True), or warn (False).
    check_weights : bool
        Look for NaN and infinity in all weights and scales first, and refuse the file that has any. Reads the
        file twice; without it, they are refused once they reach the logits.
    compute : {"f32", "bf16"}
        In what numbers matrices stored as F32, F16 or BF16 are multiplied with several tokens. "bf16" is
        faster and rounds weights and activations to 8 binary digits; sums stay float32. It is for a CPU with
        AVX512-BF16; a token by itself, and the matrices of experts, are computed in float32 all the same.

    Raises
    ------
    GGUFError, UnsupportedModel, DeviceError, ArgumentError, FileNotFoundError

    Examples
    --------
    >>> import tinyllm
    >>> tinyllm.load().arch
    'llama'
    """
    if kv_type not in ("f16", "f32", "q8_0"):
        raise ArgumentError(f"kv_type={kv_type!r}; expected 'f16', 'f32' or 'q8_0'")
    if compute not in ("f32", "bf16"):
        raise ArgumentError(f"compute={compute!r}; expected 'f32' or 'bf16'")
    wanted = check_n_ctx(n_ctx)
    file = gguf.open(locate(path))
    try:
        tokenizer = vocabulary(file, strict)
        if check_weights:
            check_finite(file, checking)
        if compute == "bf16":
            check_floats(file)
        place = placing(device, n_threads, n_gpu_layers, compute)
        network = build(file.metadata, file.tensors, place, kv_type, strict, progress)
        file.check_unchanged()
    except GGUFError as e:
        file.close()
        raise file.located(e) from e
    except BaseException:
        file.close()
        raise
    return Model(file, network, wanted or default_n_ctx(network, kv_type), tokenizer)


def check_floats(file: gguf.GGUFFile) -> None:
    """ArgumentError unless a file has matrices of floats."""
    if not any(t.type in FLOATS and len(t.shape) == 2 for t in file.tensors.values()):
        raise ArgumentError(
            f"compute='bf16' is for matrices of {', '.join(FLOATS)}; {file.path} has none; leave it out"
        )


def placing(
    device: str | None, n_threads: int | None, n_gpu_layers: int | None, compute: Compute = "f32"
) -> Place:
    """Where the layers of a model go: the last ``n_gpu_layers`` to the devices named, the others to the CPU."""
    names = devices.resolve_all(device)
    if not any(map(devices.on_gpu, names)):
        if n_gpu_layers and device != "auto":
            raise ArgumentError(
                f"n_gpu_layers={n_gpu_layers}, but the device is {names[0]!r}; give device='gpu', 'cuda:0' "
                "or a name of `tinyllm devices`, or leave n_gpu_layers out"
            )
        n_gpu_layers = None

    def place(n_layer: int) -> list[Stage]:
        wanted = n_layer if n_gpu_layers is None or n_gpu_layers < 0 else n_gpu_layers
        first = max(n_layer - wanted, 0)
        rest = [Stage(open_backend("cpu", n_threads, compute), range(first))] if first else []
        if first == n_layer:
            return rest
        backends = [open_backend(n, n_threads, compute) for n in names]
        return rest + divide(backends, range(first, n_layer))

    return place


def vocabulary(file: gguf.GGUFFile, strict: bool = True) -> Tokenizer | None:
    """The file's tokenizer, if it has one."""
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    return tokenizers.load(file.metadata, strict)


def locate(path: str | Path | None) -> Path:
    """The file of a name; names of the hub or of GPT4All's list may be downloaded."""
    if path is None:
        return BUNDLED
    if Path(path).exists() or isinstance(path, Path):
        return Path(path)
    from .hub.catalogue import find_model

    return Path(find_model(path))


def list_devices() -> list[Any]:
    """The devices that ``load`` can use, each with name, kind and memory."""
    return list(devices.list_devices())


def default_n_ctx(net: Network, kv_type: KVType) -> int:
    """The trained length, or less where a full cache would take more than half of the free memory."""
    fits = net.config.n_ctx_train
    for stage in net.stages:
        each = cache_bytes(stage.own(net.decoder.caches), 1, kv_type)
        fits = min(fits, max(512, stage.be.memory()[0] // 2 // each)) if each else fits
    return fits


def checking(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """The same bar while weights are checked."""
    return bar(tensors, "checking", "tensor")


def progress(layers: Iterable[Any], total: int) -> Iterable[Any]:
    """A bar on a terminal, once loading has taken a second."""
    return bar(layers, "loading", "layer", total)


def bar(items: Iterable[Any], doing: str, unit: str, total: int | None = None) -> Iterable[Any]:
    """The items, counted on a terminal; elsewhere tqdm, which takes long to import, is not needed."""
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, doing, total, leave=False, delay=1.0, unit=unit)
