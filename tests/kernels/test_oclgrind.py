"""The OpenCL kernels under Oclgrind, a simulator that reports races and accesses that are not allowed.

Debian has it: apt-get install oclgrind. Its reports of uninitialised values are not asked for: version 21.10
notes the wrong bytes where the host writes to an offset of a buffer, so that every weight's scale counts as
such. What kernels leave unwritten shows in the interpreter of PTX, whose fresh memory is all NaNs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path("/usr/lib/oclgrind/liboclgrind-rt-icd.so")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.device,
    pytest.mark.skipif(not LIBRARY.exists(), reason="no Oclgrind: apt-get install oclgrind"),
]
ROOT = Path(__file__).parent.parent.parent
OFTEN = (
    "Q4_0 or Q6_K or IQ2_S or F16"  # formats whose products are tried with several numbers of rows
)
SMALL = f"opencl and not 70 and not (matmul_equals and not ({OFTEN}))"

WRONG = """
import numpy as np
import pyopencl as cl

context = cl.Context([cl.get_platforms()[0].get_devices()[0]])
queue = cl.CommandQueue(context)
program = cl.Program(context, '''
__kernel void race(__global int* y) {{
    __local int shared[8];
    const int i = get_local_id(0);
    shared[i] = i;
    {barrier}
    y[i] = shared[7 - i];
}}
__kernel void beyond(__global int* y) {{ y[get_global_id(0) + {beyond}] = 1; }}
''').build(["-cl-opt-disable"])
y = cl.Buffer(context, cl.mem_flags.READ_WRITE, 32)
for name in ("race", "beyond"):
    getattr(program, name)(queue, (8,), (8,), y)
queue.finish()
"""


def reports(folder: Path, *command: str) -> tuple[str, str]:
    """What a Python command prints, and what Oclgrind reports of its kernels."""
    (folder / "oclgrind.icd").write_text(f"{LIBRARY}\n")
    log = folder / "log"
    env = {
        **os.environ,
        "OCL_ICD_VENDORS": str(folder),
        "OCLGRIND_DATA_RACES": "1",
        "OCLGRIND_LOG": str(log),
        "PYOPENCL_NO_CACHE": "1",
    }
    run = subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout, log.read_text()


def test_races_and_wrong_addresses_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    right = WRONG.format(barrier="barrier(CLK_LOCAL_MEM_FENCE);", beyond=0)
    assert reports(tmp_path, "-W", "ignore", "-c", right)[1] == ""
    found = reports(tmp_path, "-W", "ignore", "-c", WRONG.format(barrier="", beyond=1))[1]
    assert "race" in found
    assert "Invalid write" in found


def test_the_contract_has_no_races_and_no_wrong_addresses(tmp_path: Path) -> None:
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    command = ["-m", "pytest", "-q", "-x", "tests/kernels/test_ops.py", "-k", SMALL]
    printed, found = reports(tmp_path, *command)
    assert " passed" in printed
    assert " skipped" not in printed
    assert found == ""
