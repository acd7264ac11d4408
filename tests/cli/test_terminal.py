"""What a model writes reaches a terminal as text, and a pipe as it is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm import gguf
from tinyllm.cli import commands as cli
from tinyllm.cli import terminal
from tinyllm.cli.repl import Screen
from tinyllm.loading import BUNDLED

ATTACK = "\x1b]0;title\x07\x1b[2J\r\x9b31m\x7fdone\n\tso"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    shown = terminal.visible(text)
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        control = ord(before) < 0x20 or 0x7F <= ord(before) < 0xA0
        assert (after != before) == (control and before not in "\n\t")
        assert after in "\n\t" or after.isprintable() or not control


@pytest.mark.parametrize("say", [lambda text: terminal.show(text), Screen(False).show])
def test_a_pipe_gets_the_text_itself(say, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((io.StringIO(), ATTACK), (Terminal(), terminal.visible(ATTACK))):
        monkeypatch.setattr(sys, "stdout", stream)
        say(ATTACK)
        assert stream.getvalue() == expected


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """The bundled model with a vocabulary of escape sequences."""
    path, t = tmp_path / "hostile.gguf", "tokenizer.ggml."
    with gguf.open(BUNDLED) as file:
        n = len(file.metadata[t + "tokens"])
        metadata = {k: v for k, v in file.exact_metadata.items() if not k.startswith("tokenizer.")}
        metadata[t + "model"] = "llama"
        metadata[t + "tokens"] = ["<unk>", "<s>", *(f"\x1b[{i}m" for i in range(2, n))]
        metadata[t + "token_type"] = np.array([2, 3] + [1] * (n - 2), np.int32)
        metadata[t + "scores"] = np.zeros(n, np.float32)
        metadata |= {t + "bos_token_id": 1, t + "unknown_token_id": 0}
        gguf.write(path, metadata, file.tensors)
    return path


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_hostile_model_does_not_drive_the_terminal(hostile: Path) -> None:
    ours, theirs = os.openpty()
    command = [
        sys.executable,
        "-m",
        "tinyllm",
        "run",
        hostile,
        "",
        "-n",
        "8",
        "--seed",
        "1",
        "--device",
        "reference",
    ]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        printed = b""
        try:
            while piece := os.read(ours, 4096):
                printed += piece
        except OSError:  # the other end was closed
            pass
        assert process.wait() == 0, process.stderr.read()
    os.close(ours)
    assert "␛[" in printed.decode()
    assert b"\x1b" not in printed


def test_an_error_message_does_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["info", "no such\x1b[2Jfile"]) != 0
    assert "\x1b" not in stream.getvalue()
    assert "no such" in stream.getvalue()
