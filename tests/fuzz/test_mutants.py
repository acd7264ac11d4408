"""A short run of the fuzzer, and what it found before."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tinyllm
from tinyllm.errors import StateError

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


def test_a_saved_state_with_an_entry_that_is_no_array(tmp_path):
    """Found by the fuzzer: NumPy gives the bytes of such an entry."""
    path = tmp_path / "state.npz"
    with tinyllm.load(device="reference") as model:
        state = model.new_state(32)
        model.logits([1, 2, 3], state)
        state.save(path)
        with zipfile.ZipFile(path) as archive:
            entries = {i.filename: archive.read(i) for i in archive.infolist()}
        for name in entries:
            with zipfile.ZipFile(path, "w") as archive:
                for n, raw in entries.items():
                    archive.writestr(n, raw[1:] if n == name else raw)
            with pytest.raises(StateError, match=r"state\.npz: not a saved state"):
                state.restore(path)


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
