"""The cycles that each kernel's hot block takes on processors that need not be here, by llvm-mca.

    python benchmarks/cpu_cycles.py                       # what has changed since the kept report
    python benchmarks/cpu_cycles.py --mca llvm-mca-19     # LLVM 16 or later knows all of these processors

llvm-mca simulates the block again and again with every load from the first-level cache: it knows nothing of
memory. A pass is of 16 rows with AVX-512; with AVX2 and AVX-VNNI of 16 for one token of a quantised format,
else of 8; with NEON of 4. The numbers say what a change does to a processor's arithmetic, not to a model.
The report holds a hash of each kernel's LLVM IR, so that only kernels that have changed are simulated again,
and the tests notice a report that is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = Path(__file__).resolve().parent / "results" / "cpu-cycles.json"
COLUMNS = ["instructions", "cycles", "stack references"]  # each counts a pass through the block
ITERATIONS = 100
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AVX2 = "+avx2,+fma,+f16c"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx512vbmi"
PROCESSORS = {  # by LLVM's names: the triple, and the features that kernels choose by
    "znver4": (X86, AVX512),
    "sapphirerapids": (X86, AVX512),
    "alderlake": (X86, f"{AVX2},+avxvnni"),
    "haswell": (X86, AVX2),
    "neoverse-n1": (ARM, "+neon,+dotprod"),
    "apple-m1": (ARM, "+neon,+dotprod"),
}
FORMATS = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_XS", "MXFP4"]
FLOATS = ["F16", "BF16", "F32"]
EXACT = ["Q4_0", "Q8_0", "Q4_K"]  # multiplied with activations that keep what float32 has


# ---- in a process for each processor


def modules() -> dict[str, str]:
    """LLVM IR of each kernel, by name, for the processor that this process compiles for."""
    from tinyllm.kernels.cpu import floats, formats, jit, matmul, micro, readers, records

    bodies: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name in FORMATS:
        for n in (1, 8):
            slots = 1 if n == 1 else records.SLOTS
            multiply = micro.multiplier(formats.FORMATS[name], n, slots)
            bodies[f"{name} {n}"] = matmul.matvec, {"multiply": multiply}
    for name in FLOATS:
        reader = readers.reader(name)
        group = floats.multiplier(reader, floats.GROUP)
        names = {"multiply": group, "multiply_group": group}
        bodies[f"{name} 1"] = floats.matvec_float, names
        names = {"multiply": floats.few_multiplier(reader, 6), "store_row": floats.row_storer(None)}
        bodies[f"{name} 6"] = floats.matmul_float_few, names
    for name in EXACT:
        multiply = matmul.row_multiplier(formats.FORMATS[name], records.EXACT_DIGITS, "parts")
        bodies[f"exact {name}"] = matmul.matvec, {"multiply": multiply}
    return {
        name: jit.module_text(body, "kernel", names, jit.parameters(body))
        for name, (body, names) in bodies.items()
    }


def hot_block(assembly: str) -> list[str]:
    """The instructions of the longest loop without branches within: the innermost, unrolled one."""
    _, *parts = re.split(r"^([.\w$]+):", assembly, flags=re.MULTILINE)
    loops = []
    for label, text in zip(parts[::2], parts[1::2], strict=True):
        lines = [line for line in text.splitlines() if re.match(r"\t[a-z]", line)]
        back = [i for i, line in enumerate(lines) if line.split()[-1] == label]
        loops += [lines[: i + 1] for i in back[:1]]
    return max(loops, key=len)


def simulated(block: list[str], cpu: str, triple: str, mca: str) -> list[int]:
    """The numbers of COLUMNS."""
    command = [mca, f"-mtriple={triple}", f"-mcpu={cpu}", f"-iterations={ITERATIONS}"]
    text = "\n".join(block) + "\n"
    out = subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout
    found = re.search(r"Total Cycles:\s+(\d+)", out)
    if not found:
        raise RuntimeError(
            f"{' '.join(command)} gave no cycles; expected LLVM's llvm-mca, 16 or later"
        )
    stack = sum("(%rsp" in line or "[sp" in line for line in block)
    return [len(block), round(int(found[1]) / ITERATIONS), stack]


def as_processor(cpu: str, mca: str | None, known: dict[str, Any]) -> dict[str, Any]:
    """Each kernel's hash and numbers; without ``mca``, only hashes."""
    import llvmlite.binding as llvm

    triple = PROCESSORS[cpu][0]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: triple
    from tinyllm.kernels.cpu import machine

    rows = {}
    for name, text in modules().items():
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        row = known.get(name, {})
        if mca is None:
            row = {"source": digest}
        elif row.get("source") != digest:
            block = hot_block(machine.assembly(text))
            row = {"source": digest, "numbers": simulated(block, cpu, triple, mca)}
        rows[name] = row
    return rows


# ---- the report


def rows_of(cpu: str, mca: str | None = None) -> dict[str, Any]:
    """``as_processor`` in a process that compiles for it."""
    features = PROCESSORS[cpu][1]
    env = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, "--as", cpu, *(["--mca", mca] if mca else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cpu}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def read(path: Path) -> dict[str, Any]:
    """The report by processor and kernel; empty where there is none."""
    found: dict[str, Any] = (
        json.loads(path.read_text("utf-8"))["processors"] if path.exists() else {}
    )
    return found


def write(path: Path, processors: dict[str, Any]) -> None:
    """Write a line for each processor and kernel."""
    parts = []
    for cpu, rows in processors.items():
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        parts.append(f'"{cpu}": {{\n{lines}\n}}')
    body = ",\n".join(parts)
    path.write_text(
        f'{{"columns": {json.dumps(COLUMNS)}, "processors": {{\n{body}\n}}}}\n', "utf-8"
    )


def show(processors: dict[str, Any], before: dict[str, Any]) -> None:
    """Print cycles of a pass by kernel and processor, and what they were."""
    names = list(next(iter(processors.values())))
    print(f"{'cycles':10}", *(f"{cpu:>20}" for cpu in processors))
    for name in names:
        cells = []
        for cpu, rows in processors.items():
            now, old = rows[name]["numbers"][1], before.get(cpu, {}).get(name, {}).get("numbers")
            changed = f" (was {old[1]})" if old and old[1] != now else ""
            cells.append(f"{now}{changed}")
        print(f"{name:10}", *(f"{cell:>20}" for cell in cells))


def main() -> None:
    """Bring the report up to date, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mca", help="the program; default: llvm-mca")
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--as", dest="cpu", choices=PROCESSORS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu:
        known = read(options.report).get(options.cpu, {})
        print(json.dumps(as_processor(options.cpu, options.mca, known)))
        return
    before = read(options.report)
    report = {cpu: rows_of(cpu, options.mca or "llvm-mca") for cpu in PROCESSORS}
    write(options.report, report)
    show(report, before)


if __name__ == "__main__":
    main()
