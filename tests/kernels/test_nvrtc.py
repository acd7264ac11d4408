"""Every kernel becomes CUDA machine code for every architecture, without warnings and without spills."""

from __future__ import annotations

import pytest

from tinyllm.errors import DeviceError
from tinyllm.kernels.gpu import nvrtc

pytest.importorskip("cupy_backends.cuda.libs", reason="needs CuPy")
PROGRAMS = nvrtc.programs()
ALL = [(name, arch) for name in PROGRAMS for arch in nvrtc.ARCHITECTURES]
FIRST = [  # each program once, the architectures in turn
    (name, nvrtc.ARCHITECTURES[i % len(nvrtc.ARCHITECTURES)]) for i, name in enumerate(PROGRAMS)
]


def check(name: str, arch: str) -> None:
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


@pytest.mark.parametrize(("name", "arch"), FIRST)
def test_every_program_compiles_without_spills(name: str, arch: str) -> None:
    check(name, arch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), sorted(set(ALL) - set(FIRST)))
def test_every_program_compiles_for_every_architecture(name: str, arch: str) -> None:
    check(name, arch)


def test_what_does_not_compile_is_an_error_with_the_reason() -> None:
    program = ("unit.h",), (("UNROLL", "nonsense"),)
    with pytest.raises(DeviceError, match="does not compile for sm_90"):
        nvrtc.compile_program(program, "sm_90")
