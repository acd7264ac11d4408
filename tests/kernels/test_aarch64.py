"""The kernels of ARM processors: what the system tells of one, and NEON's code, run by an emulator.

The emulator is what ``scripts/aarch64`` makes; where it is absent, its tests are skipped.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bits import digests
from llvmlite import ir
from test_cpu import assembly

from tinyllm import system
from tinyllm.kernels.cpu import emit

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".aarch64" / "python"
PROCESSORS = {"max": "neon and i8mm", "neoverse-n1": "neon"}  # as QEMU and as we call them

emulated = pytest.mark.skipif(not PYTHON.exists(), reason="no emulated aarch64: scripts/aarch64")
compares = pytest.mark.skipif(
    emit.instruction_set() == "generic", reason="needs FMA to compare with"
)


def on_arm(processor: str, *command: str) -> str:
    """What a Python command prints on an emulated processor."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_CPU")}
    env |= {"QEMU_CPU": processor, "PYTHONWARNINGS": "default"}
    run = subprocess.run(
        [PYTHON, *command], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout


def same_bits(processor: str, folder: Path, names: list[str]) -> None:
    """Compare the logits of models, as hashes, with this processor's."""
    script = str(Path(__file__).parent / "bits.py")
    first, *lines = on_arm(processor, script, str(folder), *names).splitlines()
    assert first == PROCESSORS[processor]
    assert lines == list(digests(folder, names))


@emulated
@compares
def test_models_have_the_same_bits_on_neon(data: Path) -> None:
    same_bits("max", data / "golden" / "quants", ["llama-h256-Q4_0", "qwen2-h256-Q6_K"])


@pytest.mark.slow
@emulated
@compares
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_models_of_every_format_have_the_same_bits_on_neon(
    model: str, processor: str, data: Path
) -> None:
    folder = data / "golden" / "quants"
    same_bits(processor, folder, sorted(p.stem for p in folder.glob(f"{model}-h256-*.gguf")))


@pytest.mark.slow
@emulated
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_contract_holds_on_neon(processor: str) -> None:
    passed = on_arm(processor, "-m", "pytest", "-q", "tests/kernels/test_ops.py", "-k", "cpu")
    assert " passed" in passed


# ---- what a processor has


def features(monkeypatch: pytest.MonkeyPatch, platform: str, **functions: Any) -> set[str] | None:
    """``system.arm_features`` on a system with these functions."""
    monkeypatch.setattr(system.sys, "platform", platform)
    monkeypatch.setattr(system, "_native", lambda name, library=None: functions.get(name))
    return system.arm_features()


def auxiliary(**vector: int) -> Callable[[int], int]:
    """Linux's getauxval of a process with this vector."""
    return lambda number: vector.get({16: "hwcap", 26: "hwcap2"}[number], 0)


@pytest.mark.parametrize(
    ("vector", "found"),
    [
        ({"hwcap": 0x8FB}, set()),  # Cortex-A53's
        ({"hwcap": 0x119FFB}, {"dotprod"}),  # Neoverse N1's
        ({"hwcap": 0x119FFB, "hwcap2": 1 << 13}, {"dotprod", "i8mm"}),
    ],
)
def test_linux_tells_features(
    vector: dict[str, int], found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert features(monkeypatch, "linux", getauxval=auxiliary(**vector)) == found


def test_macos_tells_features(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {b"hw.optional.arm.FEAT_DotProd": 1, b"hw.optional.arm.FEAT_I8MM": 0}

    def sysctlbyname(name: bytes, value: Any, size: Any, new: Any, new_size: Any) -> int:
        if name not in there:
            return -1
        ctypes.memmove(value, there[name].to_bytes(4, "little"), 4)
        size._obj.value = 4
        return 0

    assert features(monkeypatch, "darwin", sysctlbyname=sysctlbyname) == {"dotprod"}
    there.clear()
    assert features(monkeypatch, "darwin", sysctlbyname=sysctlbyname) is None


def test_windows_tells_the_dot_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, found in ((True, {"dotprod"}), (False, set())):
        told = features(monkeypatch, "win32", IsProcessorFeaturePresent=lambda n, has=has: has)
        assert told == found
    assert features(monkeypatch, "freebsd14") is None


@pytest.mark.parametrize(
    ("told", "name", "text"),
    [
        (
            {"dotprod", "i8mm"},
            "generic",
            "-sve,+dotprod,+i8mm",
        ),  # the system knows better than LLVM
        (set(), "apple-m1", "-sve"),
        (None, "apple-m1", "-sve,+dotprod"),  # the system does not tell: the name does
        (None, "neoverse-v2", "-sve,+dotprod,+i8mm"),
        (None, "cortex-a53", "-sve"),
    ],
)
def test_the_system_is_asked_before_the_name(
    told: set[str] | None, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emit, "is_arm", lambda: True)
    monkeypatch.setattr(emit, "arm_features", lambda: told)
    monkeypatch.setattr(emit, "cpu_name", lambda: name)
    known = type("Features", (), {"flatten": lambda self: "-sve"})
    monkeypatch.setattr(emit.llvm, "get_host_cpu_features", known)
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    assert emit.features_text.__wrapped__() == text


def test_two_tokens_take_the_matrix_instruction() -> None:
    ty = ir.VectorType(emit.I32, 4)

    def multiply(e: emit.Emit, total: Any, codes: Any, x: Any) -> None:
        e.store(e.dot_2x2(e.load(total, ty), e.load(codes, ty), e.load(x, ty)), total)

    assert "smmla" in assembly("aarch64-linux-gnu", "+neon,+i8mm", multiply)
