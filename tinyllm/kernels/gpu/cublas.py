"""cuBLAS's matrix product, called directly.

CuPy's binding refuses to run while a stream is captured into a graph. cuBLAS itself allows that as long as it
has a workspace of its own (cuBLAS's documentation, "CUDA graphs support").
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_void_p
from typing import Any

from ... import system
from ...errors import DeviceError

WORKSPACE = 32 << 20  # bytes, as NVIDIA recommends for Hopper; older devices are asked for less
OP_N, OP_T, GEMM_DEFAULT, COMPUTE_32F = 0, 1, -1, 68
TYPES = {"F32": 0, "F16": 2, "BF16": 14}  # cudaDataType
SIGNATURES = {
    "cublasCreate_v2": [c_void_p],
    "cublasDestroy_v2": [c_void_p],
    "cublasSetStream_v2": [c_void_p, c_void_p],
    "cublasSetWorkspace_v2": [c_void_p, c_void_p, c_size_t],
    "cublasGemmEx": [
        *(c_void_p, c_int, c_int, c_int, c_int, c_int),  # handle, operations, m, n, k
        *(c_void_p, c_void_p, c_int, c_int),  # alpha, A, its type and leading dimension
        *(c_void_p, c_int, c_int),  # B
        *(c_void_p, c_void_p, c_int, c_int),  # beta, C
        *(c_int, c_int),  # type of the arithmetic, algorithm
    ],
}


def library(cuda_major: int) -> Any:
    """The library that CuPy has loaded, its functions with argument types; None where it is not installed."""
    try:
        from cupy_backends.cuda.libs import cublas  # noqa: F401 (finds and loads the library)

        lib = ctypes.CDLL(system.library_file("cublas", cuda_major))
    except (ImportError, OSError):
        return None
    for function, types in SIGNATURES.items():
        getattr(lib, function).argtypes = types
    return lib


class Products:
    """A handle of cuBLAS, bound to a stream, a workspace, and the device that is current when it is made."""

    def __init__(self, lib: Any, stream: int, workspace: int, nbytes: int) -> None:
        self._lib, self._handle = lib, c_void_p()
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._do("cublasCreate_v2", byref(self._handle))
        self._do("cublasSetStream_v2", self._handle, stream)  # resets the workspace: it comes next
        self._do("cublasSetWorkspace_v2", self._handle, workspace, nbytes)

    def add_product(
        self,
        kind: str,
        shape: tuple[int, int, int],
        w: tuple[int, int],
        x: tuple[int, int],
        y: tuple[int, int],
        keep: bool,
    ) -> None:
        """y [n, m] = x [n, k] times w [m, k] transposed, plus what was there with ``keep``.

        ``shape`` is m, n, k; w, x and y are addresses and row lengths; w and x are of ``kind``, y is float32.
        cuBLAS counts columns first, and so computes y^T = (w^T)^T x^T.
        """
        beta = self._one if keep else self._zero
        self._do(
            "cublasGemmEx",
            *(self._handle, OP_T, OP_N, *shape),
            *(byref(self._one), w[0], TYPES[kind], w[1]),
            *(x[0], TYPES[kind], x[1]),
            *(byref(beta), y[0], TYPES["F32"], y[1]),
            *(COMPUTE_32F, GEMM_DEFAULT),
        )

    def close(self) -> None:
        self._do("cublasDestroy_v2", self._handle)

    def _do(self, name: str, *args: Any) -> None:
        status = getattr(self._lib, name)(*args)
        if status:
            raise DeviceError(f"{name} failed with status {status}")
