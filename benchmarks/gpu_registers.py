"""What every GPU kernel takes on every CUDA architecture: registers, stack, spills, shared memory.

    python benchmarks/gpu_registers.py                    # what has changed since the kept report
    python benchmarks/gpu_registers.py --archs sm_90,sm_120

No GPU is needed: NVRTC compiles each program for each architecture, some seconds each; warnings are errors.
The report holds a hash of each program's text. So only programs that have changed are compiled again, a run
that was cut short goes on where it was, and the tests notice a report that is out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.errors import DeviceError
from tinyllm.kernels.gpu import nvrtc

REPORT = Path(__file__).resolve().parent / "results" / "gpu-registers.json"
COLUMNS = ["registers", "stack", "spills", "shared"]


def read(path: Path) -> dict[str, Any]:
    """The report by program: its source's hash, and each architecture's kernels; empty where there is none."""
    return json.loads(path.read_text())["programs"] if path.exists() else {}


def write(path: Path, programs: dict[str, Any]) -> None:
    """A line for each program."""
    lines = (f"{json.dumps(name)}: {json.dumps(programs[name])}" for name in sorted(programs))
    head = f'{{"columns": {json.dumps(COLUMNS)}, "programs": {{\n'
    part = path.with_suffix(".part")
    part.write_text(head + ",\n".join(lines) + "\n}}\n")
    part.replace(path)


def usage(name: str, arch: str) -> dict[str, list[int]]:
    """Each kernel of a program: the numbers of COLUMNS."""
    kernels = nvrtc.compile_program(nvrtc.programs()[name], arch)[1]
    return {k.kernel: [getattr(k, column) for column in COLUMNS] for k in kernels}


def update(path: Path, archs: list[str], jobs: int) -> None:
    """Compile what the report lacks, and drop programs that there are no more."""
    known = read(path)
    hashes = {name: nvrtc.text_hash(program) for name, program in nvrtc.programs().items()}
    report = {n: known[n] for n in hashes if n in known and known[n]["source"] == hashes[n]}
    rows = {name: report.setdefault(name, {"source": digest}) for name, digest in hashes.items()}
    todo = [(name, arch) for arch in archs for name in hashes if arch not in rows[name]]
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(usage, [name for name, _ in todo], [arch for _, arch in todo])
        for i, ((name, arch), kernels) in enumerate(zip(todo, found, strict=True), 1):
            rows[name][arch] = kernels
            if i % 50 == 0:
                write(path, report)
                print(f"{i} of {len(todo)}", flush=True)
    write(path, report)


def show(path: Path) -> None:
    """What does not stay in registers, and the kernels that take the most."""
    rows = [
        (kernel, *numbers, name, arch)
        for name, archs in read(path).items()
        for arch, kernels in archs.items()
        if arch != "source"
        for kernel, numbers in kernels.items()
    ]
    bad = [row for row in rows if row[2] or row[3]]
    print(f"{len(rows)} kernels, {len(bad)} with stack or spills")
    for row in bad or sorted(rows, key=lambda row: -row[1])[:10]:
        print(*row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--archs", type=lambda s: s.split(","), default=list(nvrtc.ARCHITECTURES), help="sm_90,..."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    try:
        update(options.report, options.archs, options.jobs)
    except DeviceError as e:
        sys.exit(str(e))
    show(options.report)


if __name__ == "__main__":
    main()
