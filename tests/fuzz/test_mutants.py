"""A short run of the fuzzer, and what it found before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def mutate(*args, folder):
    command = [sys.executable, "-m", "tests.fuzz.mutate", *map(str, args)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("count", "targets"),
    [(2000, ["gguf"]), (300, ["tokenizer", "template", "model", "state"])],
    ids=["reader", "the rest"],
)
def test_mutants_raise_only_our_errors(tmp_path, count, targets):
    done = mutate("--count", count, "--targets", *targets, folder=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    for target in targets:
        assert f"{target} refused" in done.stdout  # damage is noticed
        assert f"{target} accepted" in done.stdout  # and not everything is taken for damage
    assert "failed" not in done.stdout


def test_a_finding_is_reported(tmp_path):
    code = (
        "import sys; from tests.fuzz import mutate, targets\n"
        "def feed(raw):\n"
        "    if raw != b'good': raise KeyError('found')\n"
        "mutate.TARGETS['gguf'] = lambda: targets.Target('gguf', [b'good'], feed)\n"
        "sys.argv = ['mutate', '--count', '20', '--targets', 'gguf']\n"
        "sys.exit(mutate.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "KeyError: 'found'" in done.stderr
    assert "gguf failed" in done.stdout
    assert list((tmp_path / "fuzz-findings").iterdir())
