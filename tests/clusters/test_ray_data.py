"""Tasks as classes for Ray Data: in this process, and on clusters of this machine whose parts are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tinyllm
from tinyllm.cli.commands import main
from tinyllm.errors import ArgumentError, TinyLLMError
from tinyllm.ray import Decide, Embed, Generate, Score, data, per_node

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray[data]")
TEXTS = ["Once upon a time", "The cat", "Lily went to the park. " * 5]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which Ray is installed and not running."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(data, "ray", lambda: SimpleNamespace(is_initialized=lambda: False))


def table(**columns: list) -> object:
    return pytest.importorskip("pyarrow").table(columns)


@pytest.mark.parametrize("missing", ["ray", "pyarrow"])
def test_without_the_extra_one_line_names_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if find_spec("pyarrow") is None:
        missing = "pyarrow"
    elif find_spec("ray") is None:
        missing = "ray"
    with pytest.raises(ArgumentError, match=rf"need {missing}: pip install 'tinyllm\[ray\]'"):
        Embed()
    assert main(["map", "embed", "in.jsonl", "out.jsonl", "--ray", "auto"]) == 2
    told = capsys.readouterr().err
    assert f"many machines need {missing}: pip install 'tinyllm[ray]'" in told
    assert told.count("\n") == 1


@pytest.mark.usefixtures("apart")
def test_a_batch_keeps_its_columns_and_gets_the_results() -> None:
    batch = table(key=[3, 1, 2], text=TEXTS)
    found = Embed()(batch)
    with tinyllm.load() as model:
        expected = model.embed(TEXTS)
    assert found.column_names == ["key", "text", "embedding", "error"]
    assert found.column("key").to_pylist() == [3, 1, 2]
    assert (np.float32(found.column("embedding").to_pylist()) == expected).all()


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("kind", "options", "column"),
    [
        (Generate, {"max_tokens": 5}, "completion"),
        (Score, {}, "logprob"),
        (Decide, {"questions": [{"type": "predicate", "instructions": "Sad."}]}, "answers"),
    ],
)
def test_each_class_does_what_the_task_of_its_name_does(
    kind: type, options: dict, column: str
) -> None:
    found = kind(text="body", load={"n_threads": 1}, **options)(table(body=TEXTS))
    with tinyllm.load() as model:
        expected = dict(kind.task(model, **options).run(enumerate(TEXTS)))
    assert found.column(column).to_pylist() == [expected[i][column] for i in range(3)]


@pytest.mark.usefixtures("apart")
def test_a_row_with_an_error_has_no_result_beside_it() -> None:
    found = Embed()(table(text=["cat " * 9000, "The cat"])).to_pylist()
    assert found[0]["embedding"] is None
    assert "tokens" in found[0]["error"]
    assert len(found[1]["embedding"]) > 1


@pytest.mark.usefixtures("apart")
def test_a_batch_that_does_not_fit_is_refused() -> None:
    embed = Embed()
    with pytest.raises(ArgumentError, match="a batch is a dict; give map_batches batch_format="):
        embed({"text": np.array(TEXTS)})
    with pytest.raises(ArgumentError, match="no column 'text' but 'body'; give text="):
        embed(table(body=TEXTS))
    with pytest.raises(ArgumentError, match="row 1 of a batch has None in its column 'text'"):
        embed(table(text=["a", None]))
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(ArgumentError, match="a batch has 2 columns 'text'; rename all but one"):
        embed(pa.table([["a"], ["b"]], names=["text", "text"]))
    with pytest.raises(ArgumentError, match="has a column 'error' already; rename it"):
        embed(table(text=TEXTS, error=TEXTS))


def cluster(monkeypatch: pytest.MonkeyPatch, *cpus: float, alive: bool = True) -> None:
    """Nodes with so many CPUs."""
    nodes = [{"Alive": alive, "Resources": {"CPU": n} if n else {}} for n in cpus]
    nodes.append({"Alive": False, "Resources": {"CPU": 64}})
    strategy = SimpleNamespace(ActorPoolStrategy=lambda size: size)
    running = SimpleNamespace(nodes=lambda: nodes, data=strategy, is_initialized=lambda: True)
    monkeypatch.setattr(data, "ray", lambda: running)


def test_each_node_gets_one_actor_with_all_of_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, 8, 4, 0)
    assert per_node(leave=0)["num_cpus"] == 4
    assert per_node(leave=0)["compute"] == 3  # two of them on the larger node
    assert per_node(8)["compute"] == 1
    assert per_node()["num_cpus"] == 3  # a CPU of each is left
    assert per_node()["compute"] == 3
    assert per_node(4)["compute"] == 2
    cluster(monkeypatch, 2, 1)
    assert per_node(1)["compute"] == 2
    assert per_node()["num_cpus"] == 1
    cluster(monkeypatch, 8, 4, 0)
    for cpus in (9, 0):
        with pytest.raises(ArgumentError, match=f"cpus={cpus}; the cluster's nodes have 8, 4, 0"):
            per_node(cpus)
    cluster(monkeypatch, 0)
    with pytest.raises(ArgumentError, match="nodes have 0 CPUs"):
        per_node()


@pytest.mark.usefixtures("apart")
def test_without_a_running_ray_its_nodes_cannot_be_asked() -> None:
    with pytest.raises(ArgumentError, match=r"call ray.init\(\) before per_node\(\)"):
        per_node()


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("task", "options", "told"),
    [
        ("generate", {"max_tokens": -5}, "max_tokens=-5"),
        ("generate", {"temperature": -1}, "temperature=-1"),
        ("embed", {"pooling": "most"}, "pooling='most'"),
    ],
)
def test_options_are_checked_before_a_worker_starts(task: str, options: dict, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        next(data.map_rows("nowhere", task, [(0, "a")], None, {}, options))


def test_an_error_on_a_node_is_tinyllms_own_not_what_ray_advises() -> None:
    printed = """The actor died because of an error raised in its creation task, ray::MapWorker.__init__()
  File "data.py", line 1, in __init__
tinyllm.errors.GGUFError: m.gguf, byte 0: not a GGUF file
Set RAY_ADVICE=1 to be advised."""
    assert data.reason(RuntimeError(printed)) == "m.gguf, byte 0: not a GGUF file"
    assert data.reason(RuntimeError("one\ntwo\n")) == "two"


def test_an_actor_has_the_threads_that_ray_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 3.0})
    running = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setattr(data, "ray", lambda: running)
    assert data.threads() == 3
    context.get_assigned_resources = dict
    assert data.threads() is None


def test_rows_are_sent_in_batches_of_about_as_many_characters() -> None:
    rows = [(i, "x" * n) for i, n in enumerate([10, data.CHARACTERS, 10, 10, 10, 10])]
    assert [[n for n, _ in part] for part in data.parts(rows, 2)] == [[0, 1], [2, 3, 4], [5]]
    assert [len(p) for p in data.parts([(0, "")] * 1000, 2)] == [256, 256, 256, 232]
    assert list(data.parts([], 4)) == []


# ---- on clusters


def write(path: Path, n: int) -> Path:
    texts = [f"Once upon a time there were {i} cats. " * (i % 5 + 1) for i in range(n)]
    lines = (json.dumps({"id": f"k{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    path.write_text("".join(lines), "utf-8")
    return path


def tinyllm_map(*argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tinyllm", "map", *map(str, argv)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@needs_ray
def test_a_cluster_finds_what_one_machine_finds(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 40)
    assert main(["map", "embed", str(source), str(tmp_path / "one.jsonl")]) == 0
    there = tinyllm_map("embed", source, tmp_path / "many.jsonl", "--ray", "local", "-t", 1)
    told = there.communicate()[1]
    assert there.returncode == 0, told
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@needs_ray
def test_a_cluster_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a cluster of this machine is looked for
    with pytest.raises(TinyLLMError, match="no Ray cluster at auto: Could not find any running"):
        next(data.map_rows("auto", "embed", [(0, "a")], None, {}, {}))


@needs_ray
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{closed}", "Connection refused"),
        ("[::1]:{closed}", "Connection refused|Cannot assign|not supported"),
        ("no..host:{closed}", "label"),
        ("here", "expected auto, local or host:port"),
        ("127.0.0.1:65536", "expected auto, local or host:port"),
        ("", "expected auto, local or host:port"),
    ],
)
def test_an_address_where_nobody_listens_is_one_line_at_once(address: str, why: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = address.format(closed=taken.getsockname()[1])
        with pytest.raises(
            TinyLLMError, match=f"no Ray cluster at {re.escape(address)}: .*({why})"
        ):
            next(data.map_rows(address, "embed", [(0, "a")], None, {}, {}))


class Nodes:
    """Ray's processes on this machine: a head with one CPU, and nodes with one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        size = {"num_cpus": 1, "object_store_memory": 200_000_000}
        self.cluster = Cluster(True, head_node_args={**size, "include_dashboard": False})
        self.node = self.cluster.add_node(**size)
        self.cluster.wait_for_nodes(600)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def kill_node(self) -> None:
        self.cluster.remove_node(self.node, allow_graceful=False)


def workers() -> list[int]:
    """The processes of actors that map batches."""
    found = subprocess.run(["pgrep", "-f", "^ray::MapWorker"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "n", "options"), [("embed", 10_000, []), ("generate", 500, ["--max-tokens", "48"])]
)
def test_a_killed_worker_and_a_killed_node_change_nothing(
    tmp_path: Path, task: str, n: int, options: list[str]
) -> None:
    source, target = write(tmp_path / "in.jsonl", n), tmp_path / "many.jsonl"
    journal = Path(f"{target}.job")
    assert main(["map", task, str(source), str(tmp_path / "one.jsonl"), *options]) == 0
    nodes = Nodes()
    try:
        process = tinyllm_map(task, source, target, "--ray", nodes.address, *options)

        def wait(rows: int) -> None:
            while not journal.exists() or journal.read_bytes().count(b"\n") <= rows:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.05)

        wait(n // 4)
        os.kill(workers()[0], signal.SIGKILL)
        wait(n // 2)
        nodes.kill_node()
        told = process.communicate()[1]
        assert process.returncode == 0, told
    finally:
        nodes.cluster.shutdown()
    assert target.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
