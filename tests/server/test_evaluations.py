"""lm-eval asks the server about tasks made of the test data's text, and gets what the model says itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.server import create_app

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not here")
N = 4  # questions
TASKS: dict[str, dict[str, Any]] = {
    "ends": {
        "output_type": "multiple_choice", "doc_to_text": "{{begins}}", "doc_to_target": 0,
        "doc_to_choice": "{{ends}}", "metric_list": [{"metric": "acc"}],
    },
    "reads": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{begins}} {{ends[0]}}", "metric_list": [{"metric": "byte_perplexity"}],
    },
    "writes": {
        "output_type": "generate_until", "doc_to_text": "{{begins}}", "doc_to_target": "{{ends[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks and their questions: which of two ends does a text have?"""
    found = tmp_path_factory.mktemp("tasks")
    words = (data / "text" / "tinystories.txt").read_text("utf-8").split()
    with (found / "questions.jsonl").open("w") as file:
        for i in range(N):
            begins, end = words[50 * i : 50 * i + 25], words[50 * i + 25 : 50 * i + 32]
            ends = [" ".join(end), " ".join(reversed(end))]
            file.write(json.dumps({"begins": " ".join(begins), "ends": ends}) + "\n")
    where = {"data_files": {"test": str(found / "questions.jsonl")}}
    for name, task in TASKS.items():
        told = {"task": name, "dataset_path": "json", "dataset_kwargs": where, "test_split": "test"}
        (found / f"{name}.yaml").write_text(json.dumps({**told, **task}), "utf-8")
    return found


@pytest.fixture(scope="module")
def url(model: tinyllm.Model, serve: Callable[[Any], str]) -> str:
    return serve(create_app({"tales": model})) + "/v1"


def evaluate(folder: Path, kind: str, where: str, tasks: str, *more: str) -> dict[str, list[Any]]:
    """What lm-eval was answered, by the task's name."""
    out = folder / kind
    command = [
        sys.executable, "-W", "ignore", "-m", "lm_eval", "run", "--model", kind, "--tasks", tasks,
        "--include_path", str(folder), "--model_args", f"model=tales,base_url={where}",
        "--output_path", str(out), "--log_samples", *more,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name in tasks.split(","):
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert len(found[name]) == N
    return found


def score(model: tinyllm.Model, begins: str, end: str) -> float:
    """The logarithm of the probability of an end; lm-eval's texts have no special tokens."""
    encode = partial(model.tokenizer.encode, add_special=False)
    ids = encode(begins + end)
    told = model.generate(ids, max_tokens=1, temperature=0, logprobs=0, echo=True).prompt_logprobs
    assert told is not None
    n = len(ids) - len(encode(begins))
    return sum(t.logprob for t in told[-n:] if t.logprob is not None)


def test_scores_and_texts_are_the_models_own(folder: Path, url: str, model: tinyllm.Model) -> None:
    backend = ("--gen_kwargs", "temperature=0")
    where = f"{url}/completions,tokenizer_backend=remote"
    found = evaluate(folder, "local-completions", where, ",".join(TASKS), *backend)
    for sample in found["ends"]:
        doc = sample["doc"]
        for end, ((value, _),) in zip(doc["ends"], sample["resps"], strict=True):
            assert float(value) == pytest.approx(score(model, doc["begins"], " " + end), abs=1e-4)
    for sample in found["reads"]:
        assert float(sample["resps"][0][0]) < 0
    for sample in found["writes"]:
        begins = sample["doc"]["begins"]
        ids = model.tokenizer.encode(begins, add_special=False)
        expected = model.generate(ids, max_tokens=8, temperature=0, stop=".").text
        assert sample["resps"][0][0] == expected


@pytest.mark.slow
def test_chats_are_the_models_own(folder: Path, url: str, model: tinyllm.Model) -> None:
    where = f"{url}/chat/completions"
    found = evaluate(folder, "local-chat-completions", where, "writes", "--apply_chat_template")
    for sample in found["writes"]:
        asked = [{"role": "user", "content": sample["doc"]["begins"]}]
        expected = model.chat(asked, max_tokens=8, temperature=0, stop=".").text
        assert sample["resps"][0][0] == expected


def test_the_template_that_is_told_is_whole(url: str, model: tinyllm.Model) -> None:
    from lm_eval.utils import RemoteTokenizer

    asked = [{"role": "user", "content": "Tell me a story."}]
    t = RemoteTokenizer(url.removesuffix("/v1"))
    assert t.encode(t.apply_chat_template(asked)) == model.chat(asked, max_tokens=1).prompt_ids
