"""Two real models, SmolLM2 and gemma 3, beside transformers' float32 logits of their dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tinyllm

SEQUENCES = range(5)
STRICT = 1e-4  # largest difference of a logit, in standard deviations of the logits
KL = 7e-3  # on cpu, as llama.cpp's own within 1.3 x


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest, data: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A model's file and its reference."""
    path = request.getfixturevalue(request.param)
    return path, dict(np.load(data / "real" / f"{request.param}.npz"))


@pytest.fixture(scope="module")
def chat_model(smollm2: Path) -> Iterator[tinyllm.Model]:
    with tinyllm.load(smollm2) as model:
        yield model


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    most = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - most).sum(axis=1, dtype=np.float64)) + most[:, 0]


def perplexities(logits: np.ndarray, z: dict[str, np.ndarray], i: int) -> tuple[float, float]:
    """Ours and the reference's, of the tokens that the reference stored a logit of."""
    tokens, ids, top = z[f"tokens_{i}"], z[f"top_ids_{i}"], z[f"top_logits_{i}"]
    rows, columns = np.nonzero(ids[:-1] == tokens[1:, None])
    theirs = z[f"logsumexp_{i}"][rows] - top[rows, columns]
    ours = log_sum_exp(logits)[rows] - logits[rows, tokens[rows + 1]]
    assert len(rows) > len(tokens) / 2
    return float(np.exp(ours.mean())), float(np.exp(theirs.mean()))


def difference(logits: np.ndarray, z: dict[str, np.ndarray], i: int) -> np.ndarray:
    """How far the stored logits differ, in standard deviations of the reference's logits."""
    ours = np.take_along_axis(logits, z[f"top_ids_{i}"], axis=1)
    found: np.ndarray = np.abs(ours - z[f"top_logits_{i}"]) / z[f"std_{i}"]
    return found


@pytest.mark.slow
def test_reference_is_transformers(real: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, z = real
    with tinyllm.load(path, "reference", kv_type="f32") as model:
        for i in SEQUENCES:
            logits = model.logits(z[f"tokens_{i}"])
            assert difference(logits, z, i).max() <= STRICT
            ours, theirs = perplexities(logits, z, i)
            assert ours == pytest.approx(theirs, rel=0.002)


def test_exact_products_are_transformers(real: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, z = real
    with tinyllm.load(path, kv_type="f32", compute="exact") as model:
        for i in SEQUENCES:
            assert difference(model.logits(z[f"tokens_{i}"]), z, i).max() <= STRICT


def test_cpu_is_as_near_as_eight_bits_are(real: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, z = real
    with tinyllm.load(path) as model:
        found, pairs = [], []
        for i in SEQUENCES:
            logits = model.logits(z[f"tokens_{i}"])
            top = z[f"top_logits_{i}"] - z[f"logsumexp_{i}"][:, None]
            ours = (
                np.take_along_axis(logits, z[f"top_ids_{i}"], axis=1) - log_sum_exp(logits)[:, None]
            )
            found.append((np.exp(top) * (top - ours)).sum(axis=1))
            pairs.append(perplexities(logits, z, i))
        assert np.concatenate(found).mean() <= KL
        ours, theirs = pairs[-1]  # the last text is the long one
        assert ours == pytest.approx(theirs, rel=0.01)


def test_the_same_bits_alone_and_in_a_batch_with_any_threads(
    real: tuple[Path, dict[str, np.ndarray]],
) -> None:
    path, z = real
    prompts = [z[f"tokens_{i}"][:24].tolist() for i in SEQUENCES if len(z[f"tokens_{i}"]) >= 24]
    with tinyllm.load(path, n_threads=2) as model, tinyllm.load(path, n_threads=1) as single:
        batch = model.generate(prompts, max_tokens=12, seed=3)
        assert isinstance(batch, list)
        for prompt, found in zip(prompts, batch, strict=True):
            alone = single.generate(prompt, max_tokens=12, seed=3)
            assert alone.ids == found.ids


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Name the planet that we live on.", "Earth"),
        ("What is 2 + 2?", "4"),
        ("Who wrote Hamlet?", "Shakespeare"),
        ("Which animal says meow?", "cat"),
    ],
)
def test_a_chat_model_answers_in_its_template(
    chat_model: tinyllm.Model, question: str, word: str
) -> None:
    answer = chat_model.chat([{"role": "user", "content": question}], max_tokens=40, temperature=0)
    assert word in answer.text
    assert "<|im_" not in answer.text


def test_a_chat_model_remembers(chat_model: tinyllm.Model) -> None:
    messages = [
        {"role": "user", "content": "Hi, I am Tom and I like apples."},
        {"role": "assistant", "content": "Hi Tom! Apples are great."},
        {"role": "user", "content": "What fruit do I like?"},
    ]
    assert "Apples" in chat_model.chat(messages, max_tokens=30, temperature=0).text
