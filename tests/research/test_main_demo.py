"""TransformerLens' main demo on SmolLM2: each step is what its own PyTorch model of the weights gives."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import tinyllm

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TransformerLens' imports warn
def test_each_step_is_that_of_torch(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch", "transformers", "transformer_lens"):
            pytest.importorskip(name)
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    demo: Any = importlib.import_module("main_demo")
    with tinyllm.load(smollm2, compute="exact", kv_type="f32") as m:
        found = demo.compared(importlib.import_module("torch"), m)
    assert list(found) == [step.__name__ for step in demo.STEPS]
    assert len(found["a_cache"]["differences"]) >= 15  # logits, and kinds of hooks
    for step, row in found.items():
        assert row["differences"], step
        for name, value in row["differences"].items():
            assert value <= demo.BOUND, (step, name)
