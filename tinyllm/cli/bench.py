"""Tokens per second of a model, measured as llama-bench does: bare forward passes, random ids, no sampling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import __version__, gguf
from ..errors import ArgumentError
from ..model import Model
from ..models.network import Network
from ..models.state import State


@dataclass(frozen=True)
class Result:
    """One test's repetitions; ``first_s`` is the warm-up before them, compilation included."""

    name: str  # "pp512": a prompt of 512 tokens; "tg64": 64 tokens, one by one
    n_tokens: int
    depth: int  # tokens already in the context
    seconds: list[float]
    first_s: float

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.n_tokens / s for s in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def spread(self) -> float:
        """Standard deviation of the rates; 0 if there is only one."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0


def measure(model: Model, n_prompt: int, n_gen: int, depth: int, n_repeat: int) -> list[Result]:
    """Time a prompt of ``n_prompt`` tokens and ``n_gen`` single ones; either may be 0 to leave it out.

    Raises
    ------
    ArgumentError
        Both are 0, or one is negative.
    """
    if min(n_prompt, n_gen, depth, n_repeat - 1) < 0 or n_prompt + n_gen == 0:
        raise ArgumentError("expected -p or -n of at least 1, -d >= 0 and -r >= 1")
    tests = {f"pp{n_prompt}": (read_prompt, n_prompt), f"tg{n_gen}": (write_tokens, n_gen)}
    return [repeat(model, name, work, n, depth, n_repeat) for name, (work, n) in tests.items() if n]


Work = Callable[[Network, State, list[int]], None]


def repeat(model: Model, name: str, work: Work, n: int, depth: int, n_repeat: int) -> Result:
    """Time ``work`` on n random ids after ``depth`` others, once to warm up and then ``n_repeat`` times."""
    net = model.network
    ids = np.random.default_rng(0).integers(0, net.n_vocab, depth + n).tolist()
    state, seconds = model.new_state(depth + n), []
    for _ in range(n_repeat + 1):
        if state.can_truncate:
            state.truncate(min(depth, state.n_past))
        else:
            state = model.new_state(depth + n)
        read_prompt(net, state, ids[len(state.ids) : depth])
        start = time.perf_counter()
        work(net, state, ids[depth:])
        seconds.append(time.perf_counter() - start)
    return Result(name, n, depth, seconds[1:], seconds[0])


def read_prompt(net: Network, state: State, ids: list[int]) -> None:
    """Compute ids in steps as large as may be, with the logits of the last id only."""
    state.append(ids)
    while left := len(state.ids) - state.n_past:
        n = min(left, net.n_batch)
        net.forward([(state, n, "last" if n == left else "none")])


def write_tokens(net: Network, state: State, ids: list[int]) -> None:
    """Compute ids one by one, each with its logits, or with the largest where the device picks tokens."""
    best = int(1 in net.be.picks)
    for i in ids:
        state.append([i])
        net.forward([(state, 1, "last")], best=best)


def bytes_per_token(tensors: Mapping[str, gguf.Tensor], n_expert: int, n_expert_used: int) -> int:
    """Bytes of weights that one decoded token reads: not the embedding table, and only the chosen experts."""
    total = 0
    for name, tensor in tensors.items():
        if name == "token_embd.weight" and "output.weight" in tensors:
            continue
        share = n_expert_used / n_expert if "_exps." in name and n_expert else 1
        total += round(tensor.nbytes * share)
    return total


def describe(model: Model) -> dict[str, Any]:
    """What was measured: the columns of llama-bench's table that do not change between tests."""
    with gguf.open(model.path) as file:
        tensors = file.tensors
        types = [t.type for t in tensors.values() for _ in range(len(t.shape) - 1)]
        config = model.config
        return {
            "model": f"{model.arch} {statistics.mode(types)}",
            "size": sum(t.nbytes for t in tensors.values()),
            "n_params": sum(t.n_elements for t in tensors.values()),
            "bytes_per_token": bytes_per_token(tensors, config.n_expert, config.n_expert_used),
            "device": model.device,
            "n_threads": getattr(model.network.be, "n_threads", None),  # only "cpu" has threads
            "tinyllm": __version__,
        }


def as_json(about: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """What was measured and every test's figures under its name, ready for JSON."""
    out = dict(about)
    for r in results:
        out[r.name] = {
            "tokens_per_s": r.mean,
            "stddev": r.spread,
            "samples": r.rates,
            "depth": r.depth,
            "first_s": r.first_s,
        }
        if r.name.startswith("tg"):
            out[r.name]["gb_per_s"] = r.mean * about["bytes_per_token"] / 1e9
    return out


def as_table(about: dict[str, Any], results: list[Result]) -> str:
    """The results as a Markdown table, laid out as llama-bench's."""
    threads = about["n_threads"] or "-"
    lines = [
        f"| {'model':<30} | {'size':>10} | {'params':>10} | {'backend':<10} | {'threads':>7} "
        f"| {'test':>15} | {'t/s':>20} |",
        f"| {'-' * 30} | {'-' * 9}: | {'-' * 9}: | {'-' * 10} | {'-' * 6}: | {'-' * 14}: | {'-' * 19}: |",
    ]
    for r in results:
        test = r.name + (f" @ d{r.depth}" if r.depth else "")
        rate = f"{r.mean:.2f} ± {r.spread:.2f}"
        lines.append(
            f"| {about['model']:<30} | {mib(about['size']):>10} | {millions(about['n_params']):>10} "
            f"| {about['device']:<10} | {threads:>7} | {test:>15} | {rate:>20} |"
        )
    return "\n".join(lines)


def mib(n: int) -> str:
    """A number of bytes as llama-bench writes it, in MiB or GiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def millions(n: int) -> str:
    """A number of parameters as llama-bench writes it, in millions or billions."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
