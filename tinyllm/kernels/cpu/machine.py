"""From a module of LLVM to machine code for the target that ``simd`` names, and into memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm

from ... import system
from . import emit


@lru_cache(1)
def target_machine() -> Any:
    """LLVM's writer of machine code for this processor; the options are numba's."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=emit.cpu_name(),
        features=emit.features_text(),
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
    )


def machine_code(ir_text: str) -> bytes:
    """Optimised machine code of a module: an object file."""
    code: bytes = target_machine().emit_object(optimised(ir_text))
    return code


def assembly(ir_text: str) -> str:
    """Optimised machine code of a module as assembly, to read."""
    text: str = target_machine().emit_assembly(optimised(ir_text))
    return text


def optimised(ir_text: str) -> Any:
    """A module after LLVM's passes, which vectorise loops but not straight lines."""
    module = llvm.parse_assembly(ir_text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization, options.slp_vectorization = True, False
    passes = llvm.create_pass_builder(target_machine(), options)
    passes.getModulePassManager().run(module, passes)
    return module


@lru_cache(1)
def _engine() -> Any:
    for name, address in system.native_symbols().items():
        llvm.add_symbol(name, address)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())


def load(name: str, code: bytes) -> int:
    """Load an object file into memory, and return the address of one of its functions."""
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address: int = engine.get_function_address(name)
    return address
