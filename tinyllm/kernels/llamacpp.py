"""Products by llama.cpp, to rank kernels beside: by the ggml libraries that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..gguf.types import TYPES
from .backend import Source

P, Z = ctypes.c_void_p, ctypes.c_size_t
ROOM = 1 << 20  # bytes for what describes tensors and graphs
SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "ggml_new_tensor_2d": (P, P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_new_graph": (P, P),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_free": (None, P),
    "ggml_backend_cpu_init": (P,),
    "ggml_backend_cpu_set_n_threads": (None, P, ctypes.c_int),
    "ggml_backend_cpu_reg": (P,),
    "ggml_backend_cpu_buffer_type": (P,),
    "ggml_backend_reg_dev_get": (P, P, Z),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, P, P),
    "ggml_backend_reg_get_proc_address": (P, P, ctypes.c_char_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, P, P),
    "ggml_backend_tensor_set": (None, P, P, Z, Z),
    "ggml_backend_tensor_get": (None, P, P, Z, Z),
    "ggml_backend_graph_compute": (ctypes.c_int, P, P),
    "ggml_backend_buffer_free": (None, P),
}


class _Parameters(ctypes.Structure):
    """ggml_init_params: room for descriptions, no room for numbers."""

    _fields_ = [("mem_size", Z), ("mem_buffer", P), ("no_alloc", ctypes.c_bool)]


def folder() -> Path | None:
    """Where the libraries are; None where llama-cpp-python is not installed."""
    spec = find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / "lib" if places else None


class Products:
    """ggml's products on the CPU.

    Raises
    ------
    OSError, AttributeError
        The libraries in the folder do not load, or are of a version without these functions.
    """

    def __init__(self, where: Path, n_threads: int) -> None:
        self._libraries = []
        for name in ("ggml-base", "ggml-cpu"):
            (path,) = [p for p in where.glob(f"*{name}.*") if p.suffix in (".so", ".dylib", ".dll")]
            self._libraries.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
        for name, (result, *arguments) in SIGNATURES.items():
            function = self._find(name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._init = self._find("ggml_init")
        self._init.restype, self._init.argtypes = P, [_Parameters]
        call: Any = self
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, P)(lambda *told: None)
        self._find("ggml_log_set")(self._silent, None)
        self._registry = call.backend_cpu_reg()
        self._device = call.backend_reg_dev_get(self._registry, 0)
        self._backend = call.backend_cpu_init()
        call.backend_cpu_set_n_threads(self._backend, n_threads)

    def _find(self, name: str) -> Any:
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise AttributeError(f"ggml has no {name}")

    def multiply(
        self, source: Source, x: np.ndarray, seconds: float = 0.0
    ) -> tuple[np.ndarray, float]:
        """x w^T as llama.cpp computes it, float32 [T, n_out], and the seconds of the fastest run."""
        call: Any = self
        raw = np.ascontiguousarray(source.read_rows(0, source.shape[0]))
        x = np.ascontiguousarray(x, np.float32)
        for kind in [*self._repacking(), call.backend_cpu_buffer_type()]:
            graph = _Graph(call, self._init, source, len(x), kind)
            if call.backend_dev_supports_op(self._device, graph.y):
                break
            graph.free()  # it has no kernels for this format in that layout
        call.backend_tensor_set(graph.w, raw.ctypes.data, 0, raw.nbytes)
        call.backend_tensor_set(graph.x, x.ctypes.data, 0, x.nbytes)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call.backend_graph_compute(self._backend, graph.graph)
            times.append(time.perf_counter() - start)
        out = np.empty((len(x), source.shape[0]), np.float32)
        call.backend_tensor_get(graph.y, out.ctypes.data, 0, out.nbytes)
        graph.free()
        return out, min(times)

    def _repacking(self) -> list[int]:
        """Layouts of weights that llama.cpp has besides the file's, in the order in which it tries them."""
        call: Any = self
        name = b"ggml_backend_dev_get_extra_bufts"
        address = call.backend_reg_get_proc_address(self._registry, name)
        found: list[int] = []
        if address:
            kinds = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(address)(self._device)
            while kinds and kinds[len(found)]:
                found.append(kinds[len(found)])
        return found


class _Graph:
    """One product: weights in a layout, activations and results beside them."""

    def __init__(self, call: Any, init: Any, source: Source, n_tokens: int, kind: int) -> None:
        self._call = call
        n_out, n_in = source.shape
        self._contexts = [init(_Parameters(ROOM, None, True)) for _ in range(2)]
        weights, values = self._contexts
        self.w = call.new_tensor_2d(weights, TYPES[source.type].id, n_in, n_out)
        self.x = call.new_tensor_2d(values, TYPES["F32"].id, n_in, n_tokens)
        self.y = call.mul_mat(values, self.w, self.x)
        self.graph = call.new_graph(values)
        call.build_forward_expand(self.graph, self.y)
        place = call.backend_alloc_ctx_tensors_from_buft
        self._buffers = [place(weights, kind), place(values, call.backend_cpu_buffer_type())]

    def free(self) -> None:
        for buffer in self._buffers:
            self._call.backend_buffer_free(buffer)
        for context in self._contexts:
            self._call.free(context)
