"""Probes and sparse autoencoders, each against its formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError, GGUFError, UnsupportedModel
from tinyllm.gguf.convert.safetensors import read_header
from tinyllm.research import SAE, Probe
from tinyllm.research.probes import ridge

RNG = np.random.default_rng(4)

# ---- probes


def test_ridge_solves_the_normal_equations() -> None:
    x, y = RNG.normal(size=(30, 12)) + 3, RNG.normal(size=30) + 1
    weights, biases = ridge(x, y, [0.1, 10.0])
    for penalty, w, b in zip([0.1, 10.0], weights, biases, strict=True):
        residual = x @ w + b - y
        assert np.abs(x.T @ residual + penalty * w).max() < 1e-10
        assert abs(residual.sum()) < 1e-10


def test_more_values_than_examples() -> None:
    x = RNG.normal(size=(10, 50))
    weights, _ = ridge(x, x[:, 0], [1e-9])
    assert np.abs(x @ weights[0] - x[:, 0]).max() < 1.0


def test_the_score_is_of_what_was_left_out() -> None:
    x = RNG.normal(size=(60, 40))
    noise = Probe.fit(x, RNG.normal(size=60))
    assert noise.score < 0.3  # a fit of the examples themselves would be nearly 1
    y = x[:, 3] * 2 + 5
    probe = Probe.fit(x, y, penalties=(0.01, 1.0), n_folds=4)
    want = np.empty(60)
    for fold in range(4):
        out = np.arange(60) % 4 == fold
        w, b = ridge(x[~out], y[~out], [probe.penalty])
        want[out] = x[out] @ w[0] + b[0]
    assert probe.score == pytest.approx(1 - ((want - y) ** 2).mean() / y.var())
    assert probe.score == max(probe.scores)
    assert probe.predict(x[:3]) == pytest.approx(y[:3], abs=0.5)
    assert probe.predict(x[0]).shape == ()


def test_groups_are_left_out_together() -> None:
    """A twin in the training part would give its answer away."""
    base = np.repeat(RNG.normal(size=(30, 60)), 2, axis=0)
    y = np.repeat(RNG.normal(size=30) > 0, 2)
    apart = Probe.fit(base, y, n_folds=7)
    together = Probe.fit(base, y, n_folds=7, groups=[i // 2 for i in range(60)])
    assert apart.score > 0.9
    assert together.score < 0.8


def test_a_probe_reads_what_the_model_has_seen() -> None:
    with tinyllm.load() as m:
        texts = [f"{name} {verb} the {thing}" for name in ("Lily", "Tom") for verb in
                 ("saw", "took", "had", "wanted", "found") for thing in ("ball", "dog", "cake")]  # fmt: skip
        caches = m.run_with_cache(texts, "blk.1.out", positions=-1)
        x = np.stack([c["blk.1.out"][0] for c in caches])
        probe = Probe.fit(x, np.array([t.startswith("Lily") for t in texts]))
        assert probe.score > 0.8


WRONG: list[dict[str, Any]] = [
    {"x": [1.0], "y": [1.0]},
    {"x": np.ones((3, 2)), "y": [1.0, 2.0]},
    {"x": np.full((3, 2), np.nan), "y": [1.0, 2.0, 3.0], "n_folds": 2},
    {"x": np.ones((3, 2)), "y": [1.0, 2.0, 3.0], "n_folds": 5},
    {"x": np.ones((3, 2)), "y": [1.0, 2.0, 3.0], "n_folds": 2, "penalties": [0.0]},
    {"x": np.ones((3, 2)), "y": [1.0, 2.0, 3.0], "n_folds": 2, "groups": [1, 2]},
]


@pytest.mark.parametrize("how", WRONG)
def test_what_no_probe_can_be_made_of_is_told(how: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Probe.fit(**how)


def test_a_probe_has_rows_of_one_size() -> None:
    with pytest.raises(ArgumentError, match="rows of 3"):
        Probe.fit(RNG.normal(size=(9, 3)), RNG.normal(size=9)).predict(np.ones(4))


# ---- sparse autoencoders

N_IN, N = 6, 10


def weights(*more: str) -> dict[str, np.ndarray]:
    found = {
        "W_enc": RNG.normal(size=(N_IN, N)),
        "W_dec": RNG.normal(size=(N, N_IN)),
        "b_dec": RNG.normal(size=N_IN),
    }
    found |= {name: RNG.uniform(0.1, 0.5, size=N) for name in more}
    return {n: x.astype(np.float32) for n, x in found.items()}


def stored(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    """A folder as SAELens writes it."""
    header, data = {}, b""
    for name, x in tensors.items():
        raw = x.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": x.shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "sae_weights.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "cfg.json").write_text(json.dumps(config), "utf-8")
    assert set(read_header(folder / "sae_weights.safetensors")) == set(tensors)
    return folder


def test_each_kind_encodes_by_its_formula(tmp_path: Path) -> None:
    x = RNG.normal(size=(7, N_IN)).astype(np.float32)
    w = weights("b_enc", "threshold")
    inner = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    plain = SAE.read(stored(tmp_path, w, {"metadata": {"hook_name": "blocks.1.hook_resid_post"}}))
    assert plain.kind == "standard"
    assert plain.point == "blocks.1.hook_resid_post"
    assert plain.encode(x) == pytest.approx(np.maximum(inner, 0), abs=1e-5)
    assert plain.decode(inner) == pytest.approx(inner @ w["W_dec"] + w["b_dec"], abs=1e-4)
    assert np.array_equal(plain.direction(3), w["W_dec"][3])

    jump = SAE(w, {"architecture": "jumprelu", "apply_b_dec_to_input": False})
    inner = x @ w["W_enc"] + w["b_enc"]
    assert jump.encode(x) == pytest.approx(np.where(inner > w["threshold"], inner, 0), abs=1e-5)

    top = SAE(w, {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True})
    found = top.encode(x)
    inner = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * np.linalg.norm(w["W_dec"], axis=1)
    for row, all_values in zip(found, inner, strict=True):
        best = np.argsort(-all_values)[:3]
        want = np.zeros(N)
        want[best] = np.maximum(all_values[best], 0)
        assert row == pytest.approx(want, abs=1e-4)
    unit = w["W_dec"] / np.linalg.norm(w["W_dec"], axis=1, keepdims=True)
    assert top.decode(found) == pytest.approx(found @ unit + w["b_dec"], abs=1e-4)

    w = weights("b_gate", "b_mag", "r_mag")
    gated = SAE(w, {"architecture": "gated"})
    inner = (x - w["b_dec"]) @ w["W_enc"]
    size = np.maximum(inner * np.exp(w["r_mag"]) + w["b_mag"], 0)
    assert gated.encode(x) == pytest.approx(np.where(inner + w["b_gate"] > 0, size, 0), abs=1e-4)


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_rows_of_one_size_come_back_to_theirs(how: str) -> None:
    eye = np.concatenate([np.eye(N_IN), -np.eye(N_IN)], 1).astype(
        np.float32
    )  # x = relu(x) - relu(-x)
    w = {"W_enc": eye, "W_dec": eye.T, "b_enc": np.zeros(2 * N_IN), "b_dec": np.zeros(N_IN)}
    sae = SAE(w, {"normalize_activations": how})
    x = RNG.normal(size=(4, N_IN)) * 30 + 2
    features = sae.encode(x)
    assert np.abs(features).max() < 4
    assert sae.decode(features, like=x) == pytest.approx(x, rel=1e-3)
    with pytest.raises(ArgumentError, match="like="):
        sae.decode(features)


def test_at_a_point_of_a_model() -> None:
    with tinyllm.load() as m:
        n = m.config.n_embd
        w = {"W_enc": np.eye(n), "W_dec": np.eye(n), "b_enc": np.zeros(n), "b_dec": np.zeros(n)}
        sae = SAE(w, {"metadata": {"hook_name": "blocks.1.hook_resid_post"}})
        cache = m.run_with_cache("Once upon a time", sae.point)
        assert np.array_equal(sae.encode(cache[sae.point]), np.maximum(cache["blk.1.out"], 0))


def test_what_is_no_autoencoder_is_told(tmp_path: Path) -> None:
    w = weights("b_enc", "threshold")
    with pytest.raises(ArgumentError, match=r"cfg\.json"):
        SAE.read(tmp_path)
    for config, error in (
        ({"architecture": "temporal"}, UnsupportedModel),
        ({"normalize_activations": "expected_average_only_in"}, UnsupportedModel),
        ({"activation_fn": "tanh-relu"}, UnsupportedModel),
        ({"architecture": "gated"}, ArgumentError),
        ({"architecture": "topk"}, ArgumentError),
    ):
        with pytest.raises(error):
            SAE(w, config)
    for name, shape in (("W_enc", (3, 3)), ("b_enc", (3,)), ("b_dec", (3,))):
        with pytest.raises(ArgumentError, match=name):
            SAE({**w, name: np.ones(shape)})
    with pytest.raises(ArgumentError, match="NaN"):
        SAE({**w, "b_enc": np.full(N, np.nan)})
    folder = stored(tmp_path / "x", w, {})
    sae = SAE.read(folder)
    with pytest.raises(ArgumentError, match="rows of 6"):
        sae.encode(np.ones(5))
    with pytest.raises(ArgumentError, match="rows of 10"):
        sae.decode(np.ones(5))
    (folder / "cfg.json").write_text("[", "utf-8")
    with pytest.raises(GGUFError):
        SAE.read(folder)


def test_penalties_may_be_an_array_and_must_be_numbers() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    given = Probe.fit(x, x[:, 0] > 0, np.array([1.0, 2.0]))
    assert given.penalties == (1.0, 2.0)
    for penalties in ([float("nan"), 1.0], [np.inf], [], 1.0, ["a"], [[1.0]]):
        with pytest.raises(ArgumentError, match="penalties"):
            Probe.fit(x, x[:, 0], penalties)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="every y is 1"):
        Probe.fit(x, np.ones(20))


def test_weights_and_settings_that_an_autoencoder_does_not_know_are_told() -> None:
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    w = {"W_enc": eye, "W_dec": eye, "b_enc": zero, "b_dec": zero}
    for name in ("scaling_factor", "W_skip"):
        with pytest.raises(UnsupportedModel, match=name):
            SAE({**w, name: np.full(4, 3.0)})
    SAE({**w, "scaling_factor": np.ones(4)})  # it changes nothing
    for k in ("x", [1], True, 1.5, 5):
        with pytest.raises(ArgumentError, match="k="):
            SAE(w, {"architecture": "topk", "k": k})
    for feature in (99, -1, 4, 1.0, True):
        with pytest.raises(ArgumentError, match="feature"):
            SAE(w).direction(feature)  # type: ignore[arg-type]
    assert SAE(w).direction(np.int64(3)).tolist() == [0, 0, 0, 1]  # type: ignore[arg-type]


def test_a_feature_that_adds_nothing_makes_no_nan() -> None:
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    dead = np.diag([1.0, 1.0, 1.0, 0.0])
    how = {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}
    sae = SAE({"W_enc": eye, "W_dec": dead, "b_enc": zero, "b_dec": zero}, how)
    assert sae.decode(sae.encode([1, 2, 3, 4.0])).tolist() == [0, 0, 3, 0]
