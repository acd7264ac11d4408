"""The simulation of many nodes: what can be reckoned by hand, and what must hold for any load."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scale() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import scale

        return scale


def test_a_lone_conversation_takes_what_its_tokens_take(scale: Any) -> None:
    load, costs = scale.Load(conversations=1, turns=3), scale.Costs()
    (talk,) = load.talks(1, seed=0)
    found = scale.simulate(load, costs, 1, prefixes=True, seed=0)
    expected = [asked * costs.read_s + n * costs.step_s for asked, n in talk.turns]
    assert found.latencies == pytest.approx(expected)
    assert found.cached == sum(sum(map(sum, talk.turns[:i])) for i in range(3))


def test_messages_take_their_time(scale: Any) -> None:
    load, costs = scale.Load(conversations=1, turns=200), scale.Costs(message_s=0.5)
    found = scale.simulate(load, costs, 1, prefixes=True)
    plain = scale.simulate(load, scale.Costs(), 1, prefixes=True)
    more = [a - b for a, b in zip(found.latencies, plain.latencies, strict=True)]
    assert min(more) > 0
    assert sum(more) / 200 == pytest.approx(1.0, rel=0.2)  # there and back
    assert scale.simulate(load, costs, 1, True, messages=1).latencies != found.latencies
    assert found.cached == plain.cached


def test_the_largest_difference_is_named(scale: Any) -> None:
    played = {"tokens_per_s": 100.0, "mean_s": 1.0, "p50_s": 1.0, "p95_s": 2.0}
    one = {"nodes": 1, "prefixes": True, "ray": {**played, "mean_s": 1.02}, "played": played}
    two = {"nodes": 2, "prefixes": False, "ray": {**played, "p95_s": 1.9}, "played": played}
    told = scale.furthest([one, two])
    assert told == "largest difference: 5.0 %, p95_s, 2 nodes, random"


def test_texts_that_are_written_together_share_steps(scale: Any) -> None:
    load = scale.Load(conversations=2, turns=1, over_s=0.0)
    costs = scale.Costs(read_s=0.0, step_s=0.5, row_s=0.25)
    shorter, longer = sorted(talk.turns[0][1] for talk in load.talks(1, seed=3))
    found = scale.simulate(load, costs, 1, prefixes=True, seed=3)
    # the second comes at once, but behind the first step of the first
    assert max(found.latencies) == pytest.approx(shorter * 0.75 + (longer - shorter) * 0.5, abs=0.5)


@pytest.mark.parametrize("prefixes", [True, False])
@pytest.mark.parametrize("failures", [0.0, 60.0])
def test_every_turn_is_answered_once_whatever_fails(
    scale: Any, prefixes: bool, failures: float
) -> None:
    load = scale.Load(conversations=10, turns=4, over_s=20.0, failures_per_hour=failures)
    found = scale.simulate(load, scale.Costs(), 4, prefixes, seed=1)
    assert found.turns == 10 * 4 * 4
    assert found.written == sum(n for t in load.talks(4, 1) for _, n in t.turns)
    assert found.cached <= found.prompts


def test_failures_cost_time_and_what_was_computed(scale: Any) -> None:
    calm = scale.Load(turns=4, over_s=20.0)
    rough = scale.Load(turns=4, over_s=20.0, failures_per_hour=60.0)
    one, other = (scale.simulate(x, scale.Costs(), 4, True).summary() for x in (calm, rough))
    assert other["cached"] < one["cached"]
    assert other["mean_s"] > one["mean_s"]


def test_prefixes_find_twice_what_chance_finds_with_8_replicas(scale: Any) -> None:
    load = scale.Load(conversations=10)
    prefixes, chance = (scale.simulate(load, scale.Costs(), 8, p).cached for p in (True, False))
    assert prefixes >= 2 * chance > 0


def test_what_is_held_has_a_limit(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = scale.Load(conversations=30, turns=3)
    ample = scale.simulate(load, scale.Costs(), 1, True).cached
    monkeypatch.setattr(scale, "HELD", 1000)
    assert scale.simulate(load, scale.Costs(), 1, True).cached < ample


def test_a_plan_repeats(scale: Any) -> None:
    load = scale.Load(conversations=5, failures_per_hour=30.0)
    seed = random.Random(2).randint(0, 99)
    first, again = (scale.simulate(load, scale.Costs(), 3, False, seed) for _ in range(2))
    assert first == again


def test_the_command_writes_what_it_played(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--nodes", "1", "3"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "s.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    assert [(p["nodes"], p["prefixes"]) for p in report["played"]] == [
        (1, True), (1, False), (3, True), (3, False),
    ]  # fmt: skip
    assert report["costs"]["read_s"] > 0
    assert len(done.stdout.splitlines()) == 6


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--nodes", "0"], "--nodes, --check and --rounds take numbers from 1"),
        (["--check", "-1"], "--nodes, --check and --rounds take numbers from 1"),
        (["--costs", "none.json"], "--costs none.json: no report of this program"),
        (["--costs", str(ROOT / "benchmarks" / "results" / "tables.json")], "no report of this"),
    ],
)
def test_a_wrong_command_is_told(
    scale: Any, argv: list[str], told: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["scale.py", *argv])
    with pytest.raises(SystemExit):
        scale.main()
    assert told in capsys.readouterr().err
