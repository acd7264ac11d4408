"""A profile: the same bits, every kernel, and what each had to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.errors import DeviceError
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.profile import Launch, attention_work
from tinyllm.kernels.reference import ReferenceBackend
from tinyllm.models.build import build
from tinyllm.models.network import Network

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "tinyllm" / "data" / "bundled.gguf"
MODELS = ROOT / "tests" / "data" / "models"
PARTS = 40, 1, 1, 3, 1


def network(path: Path, be: Any) -> Network:
    with gguf.open(path) as f:
        return build(f.metadata, f.tensors, be, "f16")


def logits(net: Network) -> list[np.ndarray]:
    """Read a sequence in parts; the last row of each."""
    state, found = net.new_state(64), []
    state.append([(7 * i + 3) % 60 for i in range(sum(PARTS))])
    for n in PARTS:
        found.append(np.array(net.forward([(state, n, "last")])[0]))
    return found


def macs(launches: list[Launch], numbers: str) -> int:
    return sum(x.work.macs for x in launches if x.work.numbers == numbers)


@pytest.mark.parametrize(
    "path", [BUNDLED, MODELS / "hunyuan-moe.gguf", MODELS / "mamba2.gguf"], ids=lambda p: p.stem
)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_profile_does_not_change_bits(path: Path, n_threads: int) -> None:
    net = network(path, CPUBackend(n_threads))
    want = logits(net)
    with net.be.profiled() as profile:
        found = logits(net)
        launches = profile.take()
    again = logits(net)
    assert all(np.array_equal(a, b) for a, b in zip(want, found, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(want, again, strict=True))
    assert all(x.seconds >= 0 for x in launches)
    assert sum(x.seconds for x in launches) > 0
    assert profile.take() == []


def test_a_token_reads_each_weight_once() -> None:
    net = network(BUNDLED, CPUBackend(1))
    logits(net)
    with net.be.profiled() as profile:
        state = net.new_state(64)
        state.append([5, 7, 9])
        net.forward([(state, 2, "none")])
        profile.take()
        net.forward([(state, 1, "last")])
        launches = profile.take()
    with gguf.open(BUNDLED) as f:
        matrices = {k: t for k, t in f.tensors.items() if len(t.shape) == 2}
        if "output.weight" in matrices:
            del matrices["token_embd.weight"]
        stored = sum(t.nbytes for t in matrices.values())
        weights = sum(t.n_elements for t in matrices.values())
    products = [x for x in launches if x.work.numbers == "int8"]
    assert all(x.kernel.startswith("matvec_Q8_0") for x in products)
    assert sum(x.work.stored for x in products) == stored
    assert macs(launches, "int8") == weights


def test_a_recorded_step_is_seen_each_time_with_the_past_of_the_moment() -> None:
    net = network(BUNDLED, CPUBackend(1))
    seen = []
    with net.be.profiled() as profile:
        state = net.new_state(64)
        state.append([5] * 4)
        for _ in range(4):
            net.forward([(state, 1, "last")])
            seen.append(profile.take())
    assert len({tuple(x.kernel for x in step) for step in seen}) == 1
    pairs = [macs(step, "float") for step in seen]
    assert np.diff(pairs).tolist() == [pairs[0]] * 3  # one more position each time


def test_attention_counts_the_pairs_that_it_sees() -> None:
    for causal, window in ((True, 0), (True, 3), (False, 0)):
        tokens, past = [4, 1], [0, 6] if causal else [0, 0]
        pairs = 0
        for n, p in zip(tokens, past, strict=True):
            for i in range(p, p + n):
                seen = [j for j in range(p + n) if not causal or j <= i]
                pairs += len([j for j in seen if not window or i - j < window])
        work = attention_work(tokens, past, causal, window, (6, 2), (8, 4), 2.0)
        assert work.macs == pairs * 6 * 12
    assert attention_work([1], [9], True, 0, (6, 2), (8, 4), 2.0).stored == 10 * 2 * 12 * 2


def test_a_backend_without_kernels_says_so() -> None:
    with pytest.raises(DeviceError, match="reference runs no kernels of its own"):
        ReferenceBackend().profiled()
    with pytest.raises(DeviceError, match="reference runs no kernels of its own"):
        ReferenceBackend().limits(0.1)


def test_a_cpu_has_limits() -> None:
    limits = CPUBackend(1).limits(0.01)
    assert list(limits) == ["read GB/s", "dot GMAC/s", "float GMAC/s"]
    assert min(limits.values()) > 0


def check_gpu(be: Any, path: Path) -> None:
    """A profile changes no logits, and counts the products that the CPU counts."""
    net = network(path, be)
    want = logits(net)
    with be.profiled() as profile:
        found = logits(net)
        launches = profile.take()
    again = logits(net)
    assert all(np.array_equal(a, b) for a, b in zip(want, found, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(want, again, strict=True))
    assert min(x.seconds for x in launches) >= 0
    cpu = network(path, CPUBackend(1))
    with cpu.be.profiled() as profile:
        logits(cpu)
        expected = profile.take()
    for numbers in ("int8", "float"):
        assert macs(launches, numbers) == macs(expected, numbers)


@pytest.mark.device
def test_opencl_counts_what_the_cpu_counts(opencl: Any) -> None:
    check_gpu(opencl, BUNDLED)


@pytest.mark.device
@pytest.mark.parametrize("name", ["gptj", "hunyuan-moe"])
def test_cuda_counts_what_the_cpu_counts(name: str) -> None:
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    from emulator.simulated_cuda import Driver
    from emulator.simulated_cuda import backend as opened

    be = opened(Driver())
    check_gpu(be, MODELS / f"{name}.gguf")
    be.close()


@pytest.mark.device
def test_an_opencl_device_has_limits(opencl: Any) -> None:
    limits = opencl.limits(0.01)
    assert list(limits) == ["read GB/s", "dot GMAC/s", "float GMAC/s"]
    assert min(limits.values()) > 0
