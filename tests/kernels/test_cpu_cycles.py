"""The kept report of cycles is of these kernels: a change for one processor is seen on the others.

It is made by benchmarks/cpu_cycles.py, which needs llvm-mca; to compare hashes needs nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import cpu_cycles

KEPT = cpu_cycles.read(cpu_cycles.REPORT)


@pytest.mark.parametrize("cpu", cpu_cycles.PROCESSORS)
def test_the_report_of_cycles_is_of_these_kernels(cpu: str) -> None:
    now = {name: row["source"] for name, row in cpu_cycles.rows_of(cpu).items()}
    kept = {name: row["source"] for name, row in KEPT[cpu].items()}
    assert now == kept, "python benchmarks/cpu_cycles.py brings the report up to date"


@pytest.mark.parametrize("cpu", ["znver4", "sapphirerapids"])
def test_registers_hold_a_block_of_one_tokens_product(cpu: str) -> None:
    """Processors with 32 registers of 16 lanes keep nothing on the stack."""
    for name, row in KEPT[cpu].items():
        instructions, cycles, stack = row["numbers"]
        assert 0 < cycles < 2 * instructions, name
        assert stack == 0 or not name.endswith(" 1"), name
