"""What a researcher gives by mistake is told in one line, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError
from tinyllm.research import ControlVector, Patch, Probe

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
    "a position before the first": (lambda m: m.attribute(PAIR[0], 5, position=-8), "position=-8"),
    "half a position": (lambda m: m.attribute(PAIR[0], 5, position=0.5), "position=0.5; expected a whole"),
    "a slice of no steps": (lambda m: m.run_with_cache("a", positions=slice(0, 2, 0)), "or a slice"),
    "several kinds": (lambda m: m.patch_grid(*PAIR, (1, 2), "*.attn_*"), "several points of a layer"),
    "a number as a text": (lambda m: m.patched("blk.0.out", ["1", "2"]), "expected numbers"),
    "nothing among numbers": (lambda m: m.lens([None]), "expected numbers"),
    "texts for one": (lambda m: m.attribute(["a", "b"], 5), "expected one text, or the ids"),
    "no text": (lambda m: m.attribute(None, 5), "expected one text, or the ids"),
    "bytes": (lambda m: m.attribute(b"ab", 5), "expected one text, or the ids"),
    "a mapping for ids": (lambda m: tinyllm.record(m).generate({5: 6}), "expected one text, or the ids"),
    "half an id": (lambda m: m.attribute([1.5], 5), "expected one text, or the ids"),
    "a truth for a run": (lambda m: tinyllm.record(m).branch(True, 0), "run=True; expected a whole"),
    "scores of other texts": (lambda m: m.means(["a", "a b c"], "attn_probs"), "equally many tokens"),
    "scores of a shorter text": (lambda m: in_patch(m, probs(m, "a b"), "a b c d e"), "positions; "),
    "probes of one class": (lambda m: Probe.fit(np.eye(6), [True] * 6), "every y is True"),
    "half a fold": (lambda m: Probe.fit(np.eye(6), np.arange(6), n_folds=2.5), "n_folds=2.5"),  # type: ignore[arg-type]
    "a direction that files lack": (lambda m: ControlVector({0: [1], 1: [1]}).write("no.gguf"), "layer 0"),
    "a mapping for vectors": (lambda m: tinyllm.load(control={1: [1.0]}), "expected a list of files"),  # type: ignore[arg-type]
    "a steered model": (lambda m: steered(m, lambda: tinyllm.compare(m, m, "a b")), "is around"),
}  # fmt: skip


def steered(m: tinyllm.Model, call: Callable[[], Any]) -> Any:
    with m.steered({1: np.ones(m.config.n_embd)}):
        return call()


def probs(m: tinyllm.Model, text: str) -> Any:
    return m.run_with_cache(text, "blk.0.attn_probs")["blk.0.attn_probs"]


def in_patch(m: tinyllm.Model, value: Any, text: str, **part: Any) -> np.ndarray:
    """Attention's probabilities in layer 0 while some are replaced."""
    with m.patched("blk.0.attn_probs", value, **part):
        return np.asarray(probs(m, text))


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
    assert list(model.run_with_cache("a", ("resid_post", 1))) == ["blk.1.out"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("resid_post", "out"), ("hook_resid_post", "out"), ("z", "attn_heads"), ("hook_q", "q_proj"), ("q", "q")],
)  # fmt: skip
def test_kinds_have_their_names_in_transformer_lens(
    model: tinyllm.Model, theirs: str, ours: str
) -> None:
    cache = model.run_with_cache(PAIR[0], theirs)
    assert list(cache) == list(model.run_with_cache(PAIR[0], ours))
    assert np.array_equal(cache.stack(theirs), cache.stack(ours))
    grids = [model.patch_grid(*PAIR, (5, 6), name).values for name in (theirs, ours)]
    assert np.array_equal(*grids)


def test_the_stream_before_layers_is_a_kind(model: tinyllm.Model) -> None:
    cache = model.run_with_cache(PAIR[0], ["resid_pre", "out"])
    before, behind = cache.stack("resid_pre"), cache.stack("out")
    assert np.array_equal(before[1:], behind[:-1])
    assert np.array_equal(before[0], cache["embd"])


def test_probabilities_of_a_whole_text_are_put_in_by_heads_and_positions(
    model: tinyllm.Model,
) -> None:
    own, other = probs(model, PAIR[0]), probs(model, PAIR[1])
    heads, rows = [1, -1], [-1, 2]
    mixed = own.copy()
    mixed[np.ix_(heads, rows)] = other[np.ix_(heads, rows)]
    assert np.array_equal(in_patch(model, other, PAIR[0], heads=heads, positions=rows), mixed)
    assert np.array_equal(in_patch(model, other, PAIR[0]), other)
    cache = model.run_with_cache(PAIR[0], "attn_probs")
    assert np.array_equal(cache.heads(("attn_probs", 0)), own.transpose(1, 0, 2))
    mean = model.means(PAIR, "blk.0.attn_probs")["blk.0.attn_probs"]
    np.testing.assert_allclose(mean, (own + other) / 2, rtol=1e-6)


@pytest.mark.parametrize("over", ["heads", "positions"])
def test_grids_of_probabilities_are_the_single_runs(model: tinyllm.Model, over: Any) -> None:
    grid = model.patch_grid(*PAIR, (5, 6), "attn_probs", over)
    clean = model.run_with_cache(PAIR[0], "attn_probs")
    part = {"heads": 1} if over == "heads" else {"positions": 1}
    with model.patched(("attn_probs", 2), clean["attn_probs", 2], **part):  # type: ignore[arg-type]
        last = model.logits(model.prompt_ids(PAIR[1]))[-1]
    assert grid.values[2, 1] == pytest.approx(float(last[5]) - float(last[6]), abs=1e-5)


def test_a_function_may_change_what_it_is_given(model: tinyllm.Model) -> None:
    def double(x: np.ndarray) -> None:
        x *= 2

    found = []
    for function in (double, lambda x: x * 2):
        with model.patched("blk.1.out", function, positions=1):
            found.append(model.run_with_cache(PAIR[0], "blk.1.out")["blk.1.out"])
    assert np.array_equal(*found)
    assert not np.array_equal(found[0], model.run_with_cache(PAIR[0], "blk.1.out")["blk.1.out"])


def test_a_vector_in_memory_is_as_its_file(model: tinyllm.Model, tmp_path: Path) -> None:
    vector = ControlVector({1: np.full(model.config.n_embd, 0.5)}, model.arch)
    vector.write(tmp_path / "v.gguf")
    found = []
    given: list[Any] = [vector, [(vector, 1)], tmp_path / "v.gguf", (str(tmp_path / "v.gguf"), 1.0)]
    for control in given:
        with tinyllm.load(device="cpu", control=control) as m:
            found.append(m.logits([1, 2, 3]))
    assert all(np.array_equal(x, found[0]) for x in found)
    assert not np.array_equal(found[0], model.logits([1, 2, 3]))


def test_truths_of_a_table_are_truths() -> None:
    x = np.random.default_rng(0).normal(size=(20, 4))
    y = x[:, 1] > 0
    assert Probe.fit(x, y.astype(object)).scores == Probe.fit(x, y).scores


def test_paths_take_what_caches_and_contexts_take(model: tinyllm.Model) -> None:
    sender = Patch("blk.0.attn_heads", 0, heads=1)
    some = model.path_patch(*PAIR, sender, "blk.2.q", "attn_out")
    assert np.array_equal(some, model.path_patch(*PAIR, [sender], ["blk.2.q"], ["attn_out"]))
