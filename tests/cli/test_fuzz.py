"""Random command lines of the commands' own grammar: each ends with a code, and an error is one line."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable

import pytest

from tinyllm.cli.commands import COMMANDS, main

NEVER = {"serve", "warmup", "bench", "lab", "shim"}  # they run long, or change the machine
WORDS = [
    "",
    "-",
    "Once",
    "a b",
    "-1",
    "0",
    "3",
    "1e9",
    "nan",
    "inf",
    "x" * 300,
    "é\u202e",
    "\udcff",
    "\x00",
    "%s",
    "@x",
]
STREAMS: list[Callable[[], object]] = [
    lambda: io.StringIO(""),
    lambda: io.StringIO("Once upon a time\nA dog\n"),
    lambda: io.TextIOWrapper(io.BytesIO(b"\xff\xfe bad"), "utf-8"),
    lambda: None,
]


def command_line(draw: random.Random, files: list[str]) -> list[str]:
    """A command and some of its options, with values that fit and values that do not."""
    if draw.random() < 0.03:
        return draw.choices(WORDS, k=draw.randrange(3))
    name = draw.choice([n for n in COMMANDS if n not in NEVER])
    argv = [name]
    actions = COMMANDS[name].parser(name)._actions
    for action in draw.sample(actions, min(len(actions), draw.randrange(5))):
        if action.option_strings:
            argv.append(draw.choice(action.option_strings))
        if action.nargs != 0:
            choices = [str(c) for c in action.choices or ()]
            argv.append(
                draw.choice(choices)
                if choices and draw.random() < 0.7
                else draw.choice(WORDS + files)
            )
    argv += draw.choices(WORDS + files * 2, k=draw.randrange(3))
    quick = [["--device", "reference"], ["-n", "2"]] if draw.random() < 0.9 else []
    known = {o for a in actions for o in a.option_strings}
    return argv + [word for pair in quick if pair[0] in known for word in pair]


def check(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    try:
        code: object = main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert code in (0, 1, 2), argv
    assert "Traceback" not in said, argv
    if code:
        errors = [line for line in said.splitlines() if line.startswith("tinyllm")]
        assert len(errors) == 1, (argv, said)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "batch", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_no_command_line_ends_in_a_traceback(batch, tmp_path, stories260k, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("text.txt", b"Once upon a time. " * 99),
        ("bad.gguf", b"GGUF\x03"),
        ("latin1", b"h\xe9"),
    ):
        (tmp_path / name).write_bytes(content)
    files = [str(stories260k), "text.txt", "bad.gguf", "latin1", "none.gguf", ".", "out.gguf"]
    draw = random.Random(batch)
    for _ in range(200):
        monkeypatch.setattr(sys, "stdin", draw.choice(STREAMS)())
        check(command_line(draw, files), monkeypatch)
