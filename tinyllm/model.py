"""Model: what ``load`` returns. Text, ids, logits and embeddings of one GGUF file on its devices."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NoReturn, overload

import numpy as np

from . import gguf
from .chatting import Chatting
from .engine.completion import (
    SMALLEST_CONTEXT,
    Completion,
    GenerateOptions,
    Options,
    Pieces,
    Prompt,
    asked_of,
    begin,
    check_given,
    check_n_ctx,
    complete,
    divided,
    ids_behind,
    listed,
    or_beginning,
    room_for,
    split_prompts,
    without_end,
)
from .engine.constraint import Grammar, Schema, compile_grammar
from .engine.deciding import beginning_of, read_common
from .engine.embedding import BeforeStep, check_ranks, embed, no_matter, rank
from .engine.generate import Overflow, check_fits
from .engine.prefixes import WORTH_WAITING, Prefixes
from .errors import ArgumentError, ContextOverflow, TinyLLMError, UnsupportedModel
from .kernels.backend import Device
from .models.memory import cache_bytes
from .models.network import Network
from .models.stages import gpus_first
from .models.state import State, ids_of
from .models.step import Tap
from .sampling import LogitsProcessor
from .studied import Studied
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .models.config import Config


class Model(Chatting, Studied):
    """One loaded model; made by ``tinyllm.load``. Safe to use from several threads."""

    def __init__(
        self,
        file: gguf.GGUFFile,
        network: Network,
        n_ctx: int,
        tokenizer: Tokenizer | None,
        prefix_bytes: int | None = None,
    ) -> None:
        self.path, self.metadata = file.path, file.metadata
        self._file, self._network, self.n_ctx = file, network, n_ctx
        self._tokenizer = tokenizer
        self.prefixes = Prefixes(network, prefix_bytes)

    # ---- what it is

    @property
    def network(self) -> Network:
        """The weights and their mathematics."""
        if self._network is None:
            raise TinyLLMError("the model is closed")
        return self._network

    @property
    def config(self) -> Config:
        """Sizes and scales of the model, such as ``config.n_embd``."""
        return self.network.config

    @property
    def arch(self) -> str:
        """The architecture's name, as in the file."""
        return self.network.arch.name

    @property
    def device(self) -> str:
        """What really runs: "cpu", "reference", "cuda:0 NVIDIA H200"; of several, with the layers of each."""
        stages = gpus_first(self.network.stages)
        if len(stages) == 1:
            return stages[0].be.name
        return " + ".join(f"{s.be.name} ({s.label})" for s in stages)

    @property
    def devices(self) -> list[Device]:
        """The devices that compute the model's layers, GPUs first."""
        return [s.be.where for s in gpus_first(self.network.stages)]

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back, as the file's vocabulary has it."""
        if self._tokenizer is None:
            raise UnsupportedModel(f"{self.path} has no vocabulary; give token ids, not text")
        return self._tokenizer

    @property
    def prefix_bytes(self) -> int:
        """Bytes of keys and values that are kept of texts at most, for prompts that begin like them.

        It may be changed at any time; 0 forgets all.
        """
        return self.prefixes.max_bytes

    @prefix_bytes.setter
    def prefix_bytes(self, most: int) -> None:
        self.prefixes.max_bytes = most

    # ---- numbers

    @property
    def adapters(self) -> dict[str, float]:
        """The scale of each adapter that was loaded, by name."""
        adapters = self.network.adapters
        return dict(zip(adapters.names, adapters.scales, strict=True))

    def new_state(
        self,
        n_ctx: int | None = None,
        lora: Mapping[str, float] | None = None,
        source: Prompt | None = None,
    ) -> State:
        """An empty conversation with room for ``n_ctx`` tokens (default: the model's).

        Its steps use the adapters that ``lora`` names, each with its scale; None: as the model was loaded.
        ``source`` is the text, or the ids, that a model with an encoder of its own (T5) reads before it writes.
        """
        scales = self.network.adapters.chosen(lora)
        read = self.prompt_ids(source) if isinstance(source, str) else source
        read = None if read is None else ids_of(read)
        return self.prefixes.new_state(check_n_ctx(n_ctx) or self.n_ctx, scales, read)

    def logits(
        self, ids: Sequence[int], state: State | None = None, tap: Tap | None = None
    ) -> np.ndarray:
        """Logits after each of ``ids`` in one causal pass -> float32 [len(ids), n_vocab].

        With a ``state``, the ids continue it and stay in it, also where a ``tap`` raises.

        Raises
        ------
        ArgumentError
            The model is an encoder, or an id is not in the vocabulary.
        ContextOverflow
            The state has no room for so many.
        StateError
            Another text goes on with the state.
        """
        self._check_writes()
        ids = ids_of(ids)
        check_given(state, tap)
        if not ids:
            return np.empty((0, self.network.n_vocab), np.float32)
        state = state or self.new_state(max(len(ids), SMALLEST_CONTEXT))
        if len(state.ids) + len(ids) > state.n_ctx:
            raise ContextOverflow(f"{len(ids)} ids after {len(state.ids)}; room for {state.n_ctx}")
        self.network.check_ids([ids])
        with state.taken():
            start = len(state.ids)
            state.ids.extend(ids)
            return self._pending_logits(state, tap)[-(len(state.ids) - start) :]

    def _pending_logits(self, state: State, tap: Tap | None) -> np.ndarray:
        """Logits of all rows not yet stored, in chunks of the network's batch."""
        net, rows = self.network, []
        while n := min(net.n_batch, len(state.ids) - state.n_past):
            with net.lock:
                rows.append(np.array(net.forward([(state, n, "all")], tap)[0]))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def embed_ids(
        self, ids: Sequence[int], pooling: str | None = None, normalize: bool = True
    ) -> np.ndarray:
        """The embedding of one sequence -> float32 [n_embd], or [len(ids), n_embd] with pooling "none"."""
        return self.embed_batch([ids_of(ids)], pooling, normalize)[0]

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
        ids = [self.tokenizer.encode(t) for t in listed(texts, "texts")]
        if not ids:
            return np.empty((0, self.config.n_embd), np.float32)
        return np.stack(self.embed_batch(ids, pooling, normalize))

    def rank(
        self, query: str, documents: Sequence[str], before_step: BeforeStep = no_matter
    ) -> np.ndarray:
        """How well each document answers the query, by a reranker -> float32 [n]; more is better.

        Parameters
        ----------
        query : str
            What is asked.
        documents : sequence of str
            Each is read together with the query, as the vocabulary joins a pair.
        before_step : callable
            Called before each step; what it raises ends the work.

        Raises
        ------
        UnsupportedModel
            The model has no ranking head, or one with several labels.
        ContextOverflow
            A query and a document together have more tokens than the model was trained for.
        """
        check_ranks(self.network)
        pairs = [self.tokenizer.encode_pair(query, d) for d in listed(documents, "documents")]
        return rank(self.network, pairs, before_step)

    def embed_batch(
        self,
        ids: Sequence[Sequence[int]],
        pooling: str | None = None,
        normalize: bool = True,
        before_step: BeforeStep = no_matter,
    ) -> list[np.ndarray]:
        """Embed many sequences of ids; each embedding is as ``embed_ids`` returns it.

        Sequences of similar lengths are computed together, so that nothing is padded. ``before_step`` is called
        before each step; what it raises ends the work.
        """
        return embed(self.network, ids, pooling, normalize, before_step)

    # ---- text

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str: it comes first
        self,
        prompt: Prompt,
        max_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[GenerateOptions],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = ...,
        *,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Pieces: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        max_tokens: int = ...,
        *,
        stream: bool,
        **options: Unpack[GenerateOptions],
    ) -> Completion | Pieces: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        max_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
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
        logits_processor: LogitsProcessor | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = (),
        logprobs: int | None = None,
        echo: bool = False,
        state: State | None = None,
        tap: Tap | None = None,
        overflow: Overflow = "error",
        stream: bool = False,
        json_schema: Schema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        speculate: Literal["lookup"] | Model | None = None,
        lora: Mapping[str, float] | None = None,
        whole: bool = True,
    ) -> Completion | list[Completion] | Pieces:
        """Continue a prompt.

        Parameters
        ----------
        prompt : str, sequence of int, or a list of either
            Text (special tokens in it are parsed), or ids. A list of prompts is continued side by side. A model
            with an encoder of its own (T5) reads the whole prompt first, and writes a text of its own about it.
        max_tokens : int
            At most so many tokens; -1: until the context is full.
        temperature, top_k, top_p, min_p, typical_p, repeat_penalty, repeat_last_n, \
presence_penalty, frequency_penalty, logit_bias, logits_processor, seed
            How a token is chosen; ``tinyllm.sampling.SamplingParams`` explains each. Each prompt of a list
            draws from random numbers of its own, all from this ``seed``.
        stop : str or sequence of str
            Strings that end the text; they are not part of it. They add to the model's own end tokens. A text
            that is held to a schema, an expression or a grammar ends there too, without its form.
        logprobs : int, optional
            Report each token's log-probability and those of this many likeliest alternatives.
        echo : bool
            With ``logprobs``: report the prompt's tokens too.
        state : State, optional
            Continue this conversation; the prompt is added to it. A text behind its tokens has no
            beginning-of-text token. A call that fails leaves it as it was.
        tap : callable, optional
            ``tap(name, array)`` sees, and may replace, the activations of every step. With the attribute
            ``attn_probs = True`` it is also shown attention probabilities [heads, rows, positions].
        overflow : {"error", "shift", "truncate"}
            When the context is full: a prompt that is too long raises ("error"), loses its beginning
            ("truncate"), or old tokens make room again and again ("shift").
        stream : bool
            Return an iterator of pieces of text. Closing it stops the work; its ``completion`` has the
            ``finish_reason``, ids and timings once it has ended.
        json_schema : mapping or str, optional
            Write JSON that this schema accepts, in the form of Python's ``json.dumps``; ``{}`` accepts any.
            This and the two that follow need the extra ``[json]``; docs/structured.md says more.
        regex : str, optional
            Write a text that this regular expression matches as a whole.
        grammar : str, optional
            Write a text of this grammar: in GBNF, or in Lark with its ``start`` rule.
        speculate : {"lookup"} or Model, optional
            Compute several guessed tokens in a step where that pays: guessed from what stands in the prompt and
            text already, or by a smaller model of the same vocabulary. Text and log-probabilities stay as
            they are without.
        lora : mapping of str to float, optional
            The scale of each adapter of ``adapters``, by name; those not named are off. Default: as the model
            was loaded. A ``state`` has its own, from ``new_state``.
        whole : bool
            Bring a text that is held to a schema, an expression or a grammar to its end before ``max_tokens``
            or the context cuts it: near there, only tokens are taken that leave room for an ending. The
            ``finish_reason`` is "length" or "context" all the same. False lets it be cut.

        Returns
        -------
        Completion, list of Completion, or Pieces (an iterator of str)

        Raises
        ------
        ContextOverflow, ArgumentError, NumericError
        StateError
            Another text goes on with the state.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> len(m.generate("Once upon a time", max_tokens=5, temperature=0).ids)
        5
        """
        self._check_writes()
        check_given(state, tap)
        options = {
            "stop": stop,
            "logprobs": logprobs,
            "echo": echo,
            "overflow": overflow,
            "json_schema": json_schema,
            "regex": regex,
            "grammar": grammar,
            "speculate": speculate,
            "lora": lora,
            "whole": whole,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "repeat_penalty": repeat_penalty,
            "repeat_last_n": repeat_last_n,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": logit_bias,
            "logits_processor": logits_processor,
            "seed": seed,
        }
        prompts, many = split_prompts(prompt)
        if (stream or state is not None) and many:
            raise ArgumentError("stream and state take a single prompt, not a list")
        asked = asked_of(self, max_tokens, state, options)
        ids = [ids_behind(self, p, state) for p in prompts]
        written = self._write(ids, asked, state, tap, stream)
        return written if many or isinstance(written, Pieces) else written[0]

    def _write(
        self,
        prompts: Sequence[list[int]],
        asked: Options,
        state: State | None,
        tap: Tap | None,
        stream: bool,
        kept: int | None = None,
    ) -> list[Completion] | Pieces:
        """Continue prompts; with a ``state`` there is one, behind the first ``kept`` of its tokens, or all."""
        if asked.drafting is not None and tap is not None:
            raise ArgumentError("tap would see rows of guessed tokens; leave speculate out")
        self.network.check_ids(prompts)
        if state is not None:
            self.network.check_own(state)
        jobs, tree = [], None if state or tap else self.prefixes
        finds = tree is not None and not asked.reads_all
        n, seconds = self._read_common(prompts, asked) if finds else (0, 0.0)
        for ids in prompts:
            source, first = divided(self.network, ids, state, self.n_ctx)
            room = room_for(first, asked, self.n_ctx)
            known = self.prefixes.find(first, room, asked.scales) if finds else None
            home = state or known or self.prefixes.new_state(room, asked.scales, source)
            n_read = 0 if known is None else known.n_past
            given = state is not None
            jobs.append(
                begin(self.tokenizer, self.network, home, first, asked, n_read, kept, given)
            )
            jobs[-1].keep_in(tree)
        if n:
            jobs[0].run.timings.add_read(n, seconds)
        return Pieces(self.network, jobs[0], tap) if stream else complete(self.network, jobs, tap)

    def _read_common(self, prompts: Sequence[list[int]], asked: Options) -> tuple[int, float]:
        """Read what several prompts begin with, so that each finds it; how many tokens, and the seconds."""
        net = self.network
        common = beginning_of([ids[:-1] for ids in prompts]) if len(prompts) > 1 else []
        if len(common) < WORTH_WAITING or net.reader is not None:
            return 0, 0.0
        if cache_bytes(net.decoder.caches, len(common), net.kv_type) > self.prefix_bytes:
            return 0, 0.0
        room = max(room_for(ids, asked, self.n_ctx) for ids in prompts)
        check_fits(len(common), room, asked.overflow)
        begun, behind = time.perf_counter(), prompts[0][len(common)]
        _, n_known = read_common(net, common, behind, room, self.prefixes, asked.scales)
        return len(common) - n_known, time.perf_counter() - begun

    def _check_writes(self) -> None:
        """ArgumentError unless the model continues texts."""
        if not self.config.causal:
            raise ArgumentError(f"{self.arch} reads texts and writes none; use embed")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a model cannot be pickled: it holds memory and threads; load {self.path} where it is needed"
        )

    def grammar(
        self,
        json_schema: Schema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Grammar | None:
        """What these arguments of ``generate`` hold a text to; None for none of them."""
        return compile_grammar(self._tokenizer, self.network.n_vocab, json_schema, regex, grammar)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens that ``generate`` reads for a prompt; an empty one is the beginning-of-text token."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if self.network.reader is None:  # the text goes on behind the prompt
                ids = without_end(self.tokenizer, ids)
        else:
            ids = ids_of(prompt, "prompt", "one text, or the ids of its tokens")
        return or_beginning(self.tokenizer, ids)

    def close(self) -> None:
        """Free the weights at once; using the model afterwards raises TinyLLMError."""
        if self._network is not None:
            self.prefixes.trim(-1)
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
