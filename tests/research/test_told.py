"""What a researcher gives by mistake is told in one line, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError
from tinyllm.research import Patch

PAIR = "Lily had", "Lily saw"
CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a number for names": (lambda m: m.run_with_cache("a", 5), "5 names no point"),
    "a number among names": (lambda m: m.run_with_cache("a", ["out", 3]), "3 names no point"),
    "a number for a name": (lambda m: m.run_with_cache("a", "out")[3], "3 names no point"),
    "a truth for a layer": (lambda m: m.run_with_cache("a", stop_at_layer=True), "stop_at_layer=True"),
    "a text for rows": (lambda m: m.lens("out"), "x is 'out'; expected numbers"),
    "a text for a value": (lambda m: m.patched("blk.0.out", "x"), "blk.0.out is 'x'"),
    "a mapping of patches": (lambda m: m.patched({"blk.0.out": 0}), "'blk.0.out' is no Patch"),
    "a number for patches": (lambda m: m.patched(5), "5 is no Patch"),
    "an array for vectors": (lambda m: m.steered(np.zeros(256)), "ndarray; expected a mapping"),
    "half a layer": (lambda m: m.steered({1.5: np.zeros(256)}), "blk.1.5.out' is no point"),
    "a text for a scale": (lambda m: m.steered({1: np.zeros(256)}, scale="a"), "scale is 'a'"),
    "a vector that is not finite": (lambda m: m.steered({1: np.full(256, np.inf)}), "an infinity"),
    "three tokens": (lambda m: m.patch_grid(*PAIR, (1, 2, 3)), "expected two tokens"),
    "a text for a metric": (lambda m: m.patch_grid(*PAIR, " ball"), "expected two tokens"),
    "half a token": (lambda m: m.patch_grid(*PAIR, (1.5, 2)), "token 1.5"),
    "no number": (lambda m: m.patch_grid(*PAIR, lambda x: x), "expected a number"),
    "no way over": (lambda m: m.patch_grid(*PAIR, (1, 2), "out", "columns"), "over='columns'"),
    "nothing to restore": (lambda m: m.patch_grid("a b", "a b", (1, 2)).restored, "both runs"),
    "a name for a sender": (lambda m: m.path_patch(*PAIR, "blk.0.out", "out"), "'blk.0.out' is no Patch"),
    "a path for a model": (lambda m: tinyllm.compare("a.gguf", m, "a b"), r"tinyllm\.load\('a"),
    "another word for layers": (lambda m: tinyllm.compare(m, m, "a b", "layer"), "tensors='layer'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load(device="cpu") as m:
        yield m


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told(model: tinyllm.Model, case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(ArgumentError, match=message) as told:
        call(model)
    assert "\n" not in str(told.value)


def test_names_may_be_kinds_with_layers(model: tinyllm.Model) -> None:
    assert list(model.run_with_cache("a", [("resid_post", 1), "embd"])) == ["embd", "blk.1.out"]


def test_paths_take_what_caches_and_contexts_take(model: tinyllm.Model) -> None:
    sender = Patch("blk.0.attn_heads", 0, heads=1)
    some = model.path_patch(*PAIR, sender, "blk.2.q", "attn_out")
    assert np.array_equal(some, model.path_patch(*PAIR, [sender], ["blk.2.q"], ["attn_out"]))
