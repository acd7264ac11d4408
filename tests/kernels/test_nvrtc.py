"""Every kernel becomes CUDA machine code for every architecture, without warnings and without spills.

The whole matrix takes a core forty minutes. The kept report (made by benchmarks/gpu_registers.py) has what it
gave, with a hash of each program's text. So here each third program is compiled for one architecture in turn,
and for all of them whatever the report does not have, or has of another text.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllm.errors import DeviceError
from tinyllm.kernels.gpu import elementwise, nvrtc

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gpu-registers.json"
REGISTERS, SHARED = 65536, 48 << 10  # a multiprocessor has; bytes that every group may have
PROGRAMS = nvrtc.programs()
ALL = [(name, arch) for name in PROGRAMS for arch in nvrtc.ARCHITECTURES]


def kept() -> dict[tuple[str, str], dict[str, list[int]]]:
    """Each kernel's numbers by program and architecture, as far as the report is of these sources."""
    rows = json.loads(REPORT.read_text("utf-8"))["programs"]
    hashes = {name: nvrtc.text_hash(program) for name, program in PROGRAMS.items()}
    same = [name for name in rows if rows[name]["source"] == hashes.get(name)]
    return {(n, arch): rows[n][arch] for n in same for arch in rows[n] if arch != "source"}


KEPT = kept()
N = len(nvrtc.ARCHITECTURES)
HERE = [  # each third program for one architecture in turn, and what was not kept
    (name, arch)
    for i, (name, arch) in enumerate(ALL)
    if (i // N % 3 == 0 and i % N == i // (3 * N) % N) or (name, arch) not in KEPT
]


def check(name: str, arch: str) -> None:
    pytest.importorskip("cupy_backends.cuda.libs", reason="needs CuPy")
    try:
        code, kernels = nvrtc.compile_program(PROGRAMS[name], arch)
    except DeviceError as e:
        if "NVRTC is missing" in str(e):
            pytest.skip(str(e))
        raise
    assert code[:4] == b"\x7fELF"
    assert kernels
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel} spills on {arch}"
        assert kernel.stack == 0, f"{kernel} keeps arrays in memory on {arch}"


@pytest.mark.parametrize(("name", "arch"), HERE)
def test_programs_compile_without_spills(name: str, arch: str) -> None:
    check(name, arch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), sorted(set(ALL) - set(HERE)))
def test_every_program_compiles_for_every_architecture(name: str, arch: str) -> None:
    check(name, arch)


@pytest.mark.parametrize(("name", "arch"), KEPT)
def test_what_was_kept_fits_a_multiprocessor(name: str, arch: str) -> None:
    for kernel, (registers, stack, spills, shared) in KEPT[name, arch].items():
        assert (stack, spills) == (0, 0), kernel
        threads = elementwise.MOST_THREADS if kernel.startswith("norm_r") else 256  # at most
        assert registers * threads <= REGISTERS, kernel
        assert shared <= SHARED, kernel


def test_what_does_not_compile_is_an_error_with_the_reason() -> None:
    pytest.importorskip("cupy_backends.cuda.libs", reason="needs CuPy")
    program = ("unit.h",), (("UNROLL", "nonsense"),)
    with pytest.raises(DeviceError, match="does not compile for sm_90"):
        nvrtc.compile_program(program, "sm_90")
