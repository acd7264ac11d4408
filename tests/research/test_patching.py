"""Caches, patches and steering of a real model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError
from tinyllm.research import Patch

TEXT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load(device="cpu") as m:
        yield m


@pytest.fixture
def ids(model: tinyllm.Model) -> list[int]:
    return model.prompt_ids(TEXT)


def test_a_cache_holds_what_taps_see(model: tinyllm.Model, ids: list[int]) -> None:
    seen: dict[str, np.ndarray] = {}
    logits = model.logits(ids, tap=lambda name, x: seen.update({name: x}))
    cache = model.run_with_cache(TEXT)
    assert np.array_equal(cache.logits, logits)
    assert cache.ids == ids
    for name in ("embd", "blk.0.q", "blk.1.k", "blk.1.v", "blk.2.attn_out", "blk.2.out"):
        assert np.array_equal(cache[name], seen[name])
    assert np.array_equal(cache["blocks.1.hook_resid_pre"], seen["blk.0.out"])
    assert np.array_equal(cache["resid_post", 1], seen["blk.1.out"])
    assert cache.heads("blk.0.k").shape == (len(ids), model.config.n_head_kv[0], 64)
    assert "blk.0.attn_probs" not in cache
    with pytest.raises(KeyError, match="add it to names"):
        cache["blk.0.attn_probs"]


def test_a_batch_and_chunks_give_the_bits_of_one_pass(
    model: tinyllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [TEXT, "The cat", "Tom had a red ball, and Lily had a blue one."]
    every = [p.name for p in model.points()]
    batch = model.run_with_cache(texts, names=every)
    alone = [model.run_with_cache(t, names=every) for t in texts]
    monkeypatch.setattr(model.network, "n_batch", 5)
    monkeypatch.setattr(model.network, "pace", lambda *_: None)
    chunks = [model.run_with_cache(t, names=every) for t in texts]
    for a, b, c in zip(batch, alone, chunks, strict=True):
        assert np.array_equal(a.logits, b.logits)
        assert np.array_equal(c.logits, b.logits)
        for name in every:
            if "attn_scores" in name or "attn_probs" in name:  # NumPy's products: not to the bit
                np.testing.assert_allclose(a[name], b[name], atol=1e-5)
                np.testing.assert_allclose(c[name], b[name], atol=1e-5)
            else:
                assert np.array_equal(a[name], b[name]), name
                assert np.array_equal(c[name], b[name]), name


def test_positions_and_float16_keep_less(model: tinyllm.Model, ids: list[int]) -> None:
    whole = model.run_with_cache(TEXT, names=["out", "attn_probs"])
    some = model.run_with_cache(TEXT, ["out", "attn_probs"], positions=[2, -1], dtype="float16")
    assert some.positions.tolist() == [2, len(ids) - 1]
    want = whole["blk.1.out"][[2, -1]].astype(np.float16)
    assert np.array_equal(some["blk.1.out"], want)
    assert some["blk.1.attn_probs"].shape == (model.config.n_head[0], 2, len(ids))
    assert some["blk.1.attn_probs"].dtype == np.float16
    turned = list(range(len(ids)))[::-1]
    some = model.run_with_cache(TEXT, "out", positions=turned)
    assert np.array_equal(some["blk.1.out"], whole["blk.1.out"][turned])
    none = model.run_with_cache(TEXT, "out", positions=slice(5, 5))
    assert none["blk.1.out"].shape == (0, model.config.n_embd)
    with pytest.raises(ArgumentError, match="the sequence has"):
        model.run_with_cache(TEXT, positions=99)
    with pytest.raises(ArgumentError, match="float64"):
        model.run_with_cache(TEXT, dtype="float64")


def test_memory_comes_back_when_nobody_looks_at_it(
    model: tinyllm.Model, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllm.research.cache.SPARE", (1, 1 << 29))
    cache = model.run_with_cache(TEXT, "out")
    want, part = np.array(cache["blk.1.out"]), cache["blk.1.out"][3:]
    del cache
    assert np.array_equal(model.run_with_cache(ids[::-1], "out").ids, ids[::-1])
    assert np.array_equal(part, want[3:])  # nobody else was given it
    place = part.ctypes.data
    del part
    again = model.run_with_cache(TEXT, "out")["blk.1.out"]
    assert again[3:].ctypes.data == place
    assert np.array_equal(again, want)
    with tinyllm.load(device="cpu") as other:
        net, kept = other.network, other.run_with_cache(TEXT, "out")
    del kept
    assert not net.spare  # a closed model keeps nothing


def test_a_pass_stops_at_a_layer(model: tinyllm.Model) -> None:
    whole = model.run_with_cache(TEXT, names="out")
    for stop in (2, 2 - model.config.n_layer):
        some = model.run_with_cache(TEXT, names="out", stop_at_layer=stop)
        assert list(some) == ["blk.0.out", "blk.1.out"]
        assert some.logits is None
        assert np.array_equal(some["blk.1.out"], whole["blk.1.out"])
    with pytest.raises(ArgumentError, match="no such point comes before"):
        model.run_with_cache(TEXT, names="logits", stop_at_layer=1)
    with pytest.raises(ArgumentError, match="stop_at_layer=99"):
        model.run_with_cache(TEXT, stop_at_layer=99)


def test_patches_do_what_a_tap_does(model: tinyllm.Model, ids: list[int]) -> None:
    other = model.run_with_cache("The dog ran to the big red house and sat down there.", "out")
    rows = other["blk.0.out"][: len(ids)]

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name == "blk.0.out":
            x[3] = rows[3]
        if name == "blk.1.attn_heads":
            x[:, 64:128] = 0
        if name == "blk.2.ffn_out":
            x[-1] *= 2
        return x

    patches = [
        Patch("blocks.0.hook_resid_post", rows, positions=3),
        Patch(("attn_heads", 1), 0, heads=1),
        Patch("blk.2.ffn_out", lambda part: part * 2, positions=-1),
    ]
    want = model.logits(ids, tap=tap)
    with model.patched(patches):
        assert np.array_equal(model.logits(ids), want)
    with model.patched(patches[0]), model.patched(patches[1:]):
        assert np.array_equal(model.logits(ids), want)
    neurons = [3, 5]
    with model.patched("blk.1.ffn_act", 0.0, channels=neurons):
        cache = model.run_with_cache(ids, "ffn_act")
    assert not cache["blk.1.ffn_act"][:, neurons].any()
    assert cache["blk.1.ffn_act"].any()


def test_attention_is_patched_head_by_head(model: tinyllm.Model, ids: list[int]) -> None:
    n = len(ids)
    uniform = np.tril(np.ones((n, n), np.float32))
    uniform /= uniform.sum(1, keepdims=True)
    with model.patched("blk.1.attn_probs", uniform, heads=2):
        cache = model.run_with_cache(ids, ["attn_probs", "attn_heads", "v"])
    plain = model.run_with_cache(ids, ["attn_probs", "attn_heads", "v"])
    assert np.array_equal(cache["blk.1.attn_probs"][2], uniform)
    assert np.array_equal(cache["blk.1.attn_probs"][3], plain["blk.1.attn_probs"][3])
    values = plain.heads("blk.1.v")[:, 2 * model.config.n_head_kv[1] // model.config.n_head[1]]
    want = uniform @ values
    np.testing.assert_allclose(cache.heads("blk.1.attn_heads")[:, 2], want, atol=2e-3)  # f16 cache
    results = model.run_with_cache(ids, ["attn_result", "attn_out"])
    np.testing.assert_allclose(
        results["blk.0.attn_result"].sum(1), results["blk.0.attn_out"], atol=1e-5
    )
    with model.patched("blk.0.attn_result", 0, heads=[0, 1]):
        without = model.run_with_cache(ids, "attn_out")["blk.0.attn_out"]
    want = results["blk.0.attn_result"][:, 2:].sum(1)
    np.testing.assert_allclose(without, want, atol=1e-5)


def test_the_norm_scale_is_what_rows_are_divided_by(model: tinyllm.Model, ids: list[int]) -> None:
    plain = model.run_with_cache(ids, ["attn_norm", "attn_norm_scale"])
    with model.patched("blk.1.attn_norm_scale", lambda s: s * 2):
        halved = model.run_with_cache(ids, "attn_norm")
    np.testing.assert_allclose(halved["blk.1.attn_norm"], plain["blk.1.attn_norm"] / 2, rtol=1e-5)


def test_the_router_is_patched(data: Any) -> None:
    with tinyllm.load(data / "golden/models/llama-mixtral.gguf") as m:
        ids = list(range(5, 15))
        plain = m.run_with_cache(ids, ["router_probs", "router_logits"])
        probs = plain["blk.0.router_probs"]
        n = probs.shape[1]
        assert ((probs > 0).sum(1) == 2).all()
        np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
        one = np.eye(n, dtype=np.float32)[[1]]
        with m.patched("blk.0.router_probs", one):
            assert np.array_equal(m.run_with_cache(ids, "router_probs")["blk.0.router_probs"],
                                  np.repeat(one, len(ids), 0))  # fmt: skip
        with (
            m.patched("blk.0.router_probs", np.ones(n)),
            pytest.raises(ArgumentError, match="4 experts"),
        ):
            m.logits(ids)


@pytest.mark.parametrize("name", ["mamba", "rwkv7"])
def test_a_recurrent_state_is_patched(name: str, data: Any) -> None:
    """A state put into another sequence's place makes it go on as that one does, layer by layer."""
    with tinyllm.load(data / "golden" / "models" / f"{name}.gguf") as m:
        first, second = [5, 6, 7, 8], [9, 10, 11, 8]
        want = m.run_with_cache(first, "state")
        state = m.new_state(32)
        with m.patched([Patch(n, x[None]) for n, x in want.items()]):
            m.logits(second, state)
        arrays = state.cache.export(4)
        key = "ssm" if name == "mamba" else "wkv"
        for n, x in want.items():
            assert np.array_equal(arrays[f"{n.split('.')[1]}.{key}"], x)


def test_steering_adds_a_vector_where_it_is_told(model: tinyllm.Model, ids: list[int]) -> None:
    vector = np.random.default_rng(0).standard_normal(model.config.n_embd).astype(np.float32)

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        return x + vector * np.float32(0.5) if name == "blk.2.out" else x

    plain = model.generate(ids, max_tokens=8, temperature=0)
    with model.steered({2: vector}, scale=0.5):
        steered = model.generate(ids, max_tokens=8, temperature=0)
        logits = model.logits(ids)
    assert np.array_equal(logits, model.logits(ids, tap=tap))
    assert steered.ids == model.generate(ids, max_tokens=8, temperature=0, tap=tap).ids
    assert model.generate(ids, max_tokens=8, temperature=0).ids == plain.ids
    with model.steered({2: vector}, positions=-1):
        cache = model.run_with_cache(ids, "out")
    own = model.run_with_cache(ids, "out")["blk.2.out"]
    assert np.array_equal(cache["blk.2.out"][:-1], own[:-1])
    assert np.array_equal(cache["blk.2.out"][-1], own[-1] + vector)
    with pytest.raises(ArgumentError, match="expected"):
        model.steered({2: vector[:-1]})


def test_a_context_ends_with_an_error_too(model: tinyllm.Model, ids: list[int]) -> None:
    plain = model.logits(ids)

    def broken(x: np.ndarray) -> np.ndarray:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), model.patched("blk.1.out", broken):
        model.logits(ids)
    assert np.array_equal(model.logits(ids), plain)
    with model.patched("blk.1.out", np.zeros(3)), pytest.raises(ArgumentError, match="shape"):
        model.logits(ids)
    assert np.array_equal(model.logits(ids), plain)


def test_other_threads_and_models_are_left_alone(model: tinyllm.Model, ids: list[int]) -> None:
    plain, found = model.logits(ids), []
    with model.patched("blk.0.out", 0), tinyllm.load(device="cpu") as other:
        assert not np.array_equal(model.logits(ids), plain)
        thread = threading.Thread(target=lambda: found.append(model.logits(ids)))
        thread.start()
        thread.join()
        assert np.array_equal(other.logits(ids), plain)
    assert np.array_equal(found[0], plain)


def test_an_engine_does_not_take_requests_within_a_patch(model: tinyllm.Model) -> None:
    with tinyllm.Engine(model) as engine, model.patched("blk.0.out", 0):
        with pytest.raises(ArgumentError, match=r"Model\.generate"):
            engine.submit("Once", max_tokens=2)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (lambda: Patch("blk.0.out", 0, heads=1), "has no heads"),
        (lambda: Patch("blk.0.q", 0, heads=99), "there are"),
        (lambda: Patch("blk.0.out", 0, channels=-999), "there are"),
        (lambda: Patch("blk.0.attn_probs", 0, channels=1), "use a function"),
        (lambda: Patch("blk.99.out", 0), "is no point"),
        (lambda: Patch("blk.0.out", 0, positions=1.5), "whole numbers"),
        (lambda: Patch("blk.0.out", np.zeros((2, 256)), positions=5), "position 5 is asked for"),
    ],
    ids=["no heads", "head", "channel", "square", "name", "positions", "rows"],
)
def test_wrong_patches_are_told(model: tinyllm.Model, patch: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message), model.patched(patch()):
        model.logits(list(range(5, 15)))


def test_the_lens_is_the_models_own_end(model: tinyllm.Model) -> None:
    cache = model.run_with_cache(TEXT, names="out")
    layers = cache.stack("out")
    logits = model.lens(layers)
    assert logits.shape == (*layers.shape[:2], model.network.n_vocab)
    assert np.array_equal(logits[-1], cache.logits)
    with pytest.raises(ArgumentError, match="rows of"):
        model.lens(layers[..., :-1])


def test_behind_the_layers_patches_find_the_rows_that_are_left(
    model: tinyllm.Model, ids: list[int]
) -> None:
    """A step of ``generate`` has rows of logits only where a token is chosen."""
    texts, last = [TEXT, "The cat"], len(ids) - 1

    def written() -> list[list[int]]:
        return [c.ids for c in model.generate(texts, max_tokens=4, temperature=0)]

    plain = written()
    for name in ("output_norm", "logits", "output_norm_scale"):
        with model.patched(name, lambda x: x * 2):  # no other token becomes the largest
            assert written() == plain
        with model.patched(name, 0.5, positions=0):  # no token is chosen behind the first one
            assert written() == plain
    ban = np.zeros(model.network.n_vocab, np.float32)
    ban[plain[0][0]] = -1e9
    with model.patched("logits", lambda x: x + ban, positions=last):
        banned = written()
    assert banned[0][0] != plain[0][0]
    assert banned[1] == plain[1]


def test_speculation_waits_while_a_context_changes_activations(model: tinyllm.Model) -> None:
    prompt = f"{TEXT} {TEXT} Once upon"
    vector = 3 * np.random.default_rng(0).normal(size=model.config.n_embd)
    with model.steered({2: vector}, positions=-1):
        plain, guessed = (
            model.generate(prompt, max_tokens=24, temperature=0, speculate=s).ids
            for s in (None, "lookup")
        )
    assert guessed == plain


def test_of_one_row_for_all_positions_the_part_is_taken(
    model: tinyllm.Model, ids: list[int]
) -> None:
    mean = model.means([TEXT, "The cat"], ["attn_heads", "ffn_act"])
    row = model.run_with_cache(TEXT, "attn_heads", positions=-1)["blk.0.attn_heads"]
    for value in (mean["blk.0.attn_heads"], row):
        with model.patched("blk.0.attn_heads", value, heads=1):
            found = model.run_with_cache(ids, "attn_heads").heads("blk.0.attn_heads")
        assert (found[:, 1] == value.reshape(-1, 64)[1]).all()
    value = mean["blk.1.ffn_act"]
    with model.patched("blk.1.ffn_act", value, channels=[3, 5], positions=[1, 4]):
        found = model.run_with_cache(ids, "ffn_act")["blk.1.ffn_act"]
    assert (found[[1, 4]][:, [3, 5]] == value[[3, 5]]).all()
    assert (found[2, [3, 5]] != value[[3, 5]]).any()


def test_nothing_to_measure_is_said(model: tinyllm.Model) -> None:
    with pytest.raises(ArgumentError, match="prompts is empty"):
        model.means([], "out")
    one = model.means("The cat", "out")
    assert np.array_equal(one["blk.0.out"], model.means(["The cat"], "out")["blk.0.out"])
    with pytest.raises(ArgumentError, match="positions"):
        model.patch_grid([5, 7], [6, 7], (1, 2), "attn_heads", "heads", slice(0, 0))
    with pytest.raises(ArgumentError, match="no point that layers have"):
        model.patch_grid([5, 7], [6, 7], (1, 2), "logits")
    assert model.lens(np.empty((0, model.config.n_embd))).shape == (0, model.network.n_vocab)
