"""Real trained models through the public surface, on OpenCL."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.cli.commands import main
from tinyllm.errors import DeviceError
from tinyllm.sdk import GPT4All
from tinyllm.sdk.devices import gpus

pytestmark = pytest.mark.device
LILY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)


def load(path: Path, **options: Any) -> tinyllm.Model:
    try:
        return tinyllm.load(path, device="opencl", **options)
    except DeviceError as e:
        return pytest.skip(str(e))


@pytest.fixture(scope="module")
def stories(stories260k: Path) -> Iterator[tinyllm.Model]:
    with load(stories260k) as m:
        yield m


def test_greedy_text_is_the_known_one(stories: tinyllm.Model) -> None:
    done = stories.generate("Once upon a time", max_tokens=60, temperature=0, repeat_penalty=1.0)
    assert done.text.startswith(LILY)
    assert stories.device.startswith("opencl:")


def test_logits_are_the_references(stories: tinyllm.Model, stories260k: Path) -> None:
    ids = stories.tokenizer.encode(
        "Once upon a time there was a dog who liked to play in the garden."
    )
    with tinyllm.load(stories260k, device="reference") as m:
        want = m.logits(ids)
    assert np.abs(stories.logits(ids) - want).max() <= 1e-3 * want.std()


def test_a_list_of_prompts_gives_what_each_gives_alone(stories: tinyllm.Model) -> None:
    prompts = ["Once upon a time", "The dog", "Lily was happy because"]
    alone = [stories.generate(p, max_tokens=20, temperature=0).text for p in prompts]
    together = stories.generate(prompts, max_tokens=20, temperature=0)
    assert [done.text for done in together] == alone


@pytest.mark.slow
def test_a_full_context_shifts_as_recorded(stories260k: Path, data: Path) -> None:
    recorded = json.loads((data / "gpt4all-2.8.2.json").read_text())["generate"]
    with load(stories260k, n_ctx=256) as m:
        done = m.generate("Once upon a time", max_tokens=400, temperature=0, overflow="shift")
    assert done.text == recorded["context_shift"]["text"]


def test_two_threads_on_one_model_do_not_mix(stories: tinyllm.Model) -> None:
    prompts = ["Once upon a time", "The dog"]
    want = [stories.generate(p, max_tokens=20, seed=1).text for p in prompts]
    got = [""] * len(prompts)

    def work(i: int) -> None:
        got[i] = stories.generate(prompts[i], max_tokens=20, seed=1).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == want


def test_embeddings_equal_hugging_face(data: Path) -> None:
    texts = json.loads((data / "models" / "all-MiniLM-L6-v2.json").read_text())["texts"][:6]
    want = np.load(data / "models" / "all-MiniLM-L6-v2.npz")["emb"][:6]
    with load(data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf") as m:
        got = m.embed(texts)
    assert ((got * want).sum(-1) >= 0.9999).all()


# ---- some of the layers on the CPU


def test_the_sdk_and_the_command_line_take_a_number_of_gpu_layers(
    stories: tinyllm.Model, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = stories.generate("Once upon a time", max_tokens=12, temperature=0).text
    where = {"model_path": data / "models", "allow_download": False}
    named = gpus()[0].full_name  # "kompute" would pass over PoCL, which is a processor
    with GPT4All("stories260K", device=named, ngl=2, **where) as llm:
        got = llm.generate("Once upon a time", max_tokens=12, temp=0, repeat_penalty=1.0)
        assert [len(s.layers) for s in llm.model.model.network.stages] == [3, 2]
        assert llm.backend == "kompute"
    assert got == want
    model = str(data / "models" / "stories260K.gguf")
    where = ["--device", "opencl", "--n-gpu-layers", "2", "--no-echo"]
    assert main(["run", model, "Once upon a time", "-n12", "--temperature", "0", *where]) == 0
    assert capsys.readouterr().out.strip("\n") == want
    assert main(["run", model, "Once", "--n-gpu-layers", "2"]) != 0
    assert "n_gpu_layers=2, but the device is 'cpu'" in capsys.readouterr().err


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def test_fifty_loads_and_closes_leave_no_memory_behind(stories260k: Path) -> None:
    def once() -> None:
        with load(stories260k) as m:
            m.generate("Once", max_tokens=2, temperature=0)

    try:
        for _ in range(10):
            once()
        before = resident()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    for _ in range(40):
        once()
    assert resident() - before < 8 << 20  # forty times the weights are 40 MiB
