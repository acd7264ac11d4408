"""What the commands read and write: arguments, files, pipes, and streams that are not there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.cli.arguments import is_model, unescaped
from tinyllm.cli.commands import COMMANDS, main
from tinyllm.errors import ArgumentError
from tinyllm.files import lines_of, read_text, replacing
from tinyllm.loading import BUNDLED

GREEDY = ["--device", "reference", "--temperature", "0", "-n", "4"]
STORY = "Once upon a time"


def run(*argv: str | Path, text: bytes = b"", **more: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tinyllm", *map(str, argv)]
    return subprocess.run(command, input=text, capture_output=True, check=False, **more)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch):
    """Standard input with these bytes."""

    def fill(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "cp1252"))

    return fill


# ---- texts


def test_a_text_is_utf8_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfh\xc3\xa9llo\r\n")
    assert read_text(path) == "héllo\r\n"


@pytest.mark.parametrize("data", [b"h\xe9llo", "hello".encode("utf-16"), b"\xff\xfe"])
def test_another_encoding_is_told(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ArgumentError, match=r"a\.txt: expected a text in UTF-8"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb", ["a", "b"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\x0cb\u2028c\x85d\x1ce\rf\n", ["a\x0cb\u2028c\x85d\x1ce\rf"]),
        ("", []),
        ("\n\n", ["", ""]),
    ],
)
def test_only_line_feeds_end_lines(text: str, lines: list[str]) -> None:
    assert lines_of(text) == lines


@pytest.mark.parametrize(
    ("typed", "text"),
    [(r"\n", "\n"), (r"a\tb\\n", "a\tb\\n"), (r"\x41é", "Aé"), (r"\d\q", r"\d\q")],
)
def test_escapes_are_understood(typed: str, text: str) -> None:
    assert unescaped(typed) == text


@pytest.mark.parametrize(
    ("word", "model"),
    [
        (str(BUNDLED), True), ("model.gguf", True), ("hf:a/b/c.gguf", True), ("", False),
        ("A text", False), ("Explain the file model.gguf", False), ("Once", False), (".", False),
    ],
)  # fmt: skip
def test_a_model_is_a_file_a_gguf_name_or_a_hub_name(word: str, model: bool) -> None:
    assert is_model(word) is model


# ---- commands that read them


def test_run_reads_a_pipe_without_being_told(pipe, capsys) -> None:
    pipe(STORY.encode() + b"\n")
    assert main(["run", *GREEDY]) == 0
    piped = capsys.readouterr().out
    assert main(["run", STORY, *GREEDY]) == 0
    assert piped == capsys.readouterr().out


def test_run_reads_a_model_and_a_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "t").write_text(STORY, "utf-8")
    assert main(["run", str(BUNDLED), "-f", str(tmp_path / "t"), *GREEDY]) == 0
    assert capsys.readouterr().out.startswith(STORY)


def test_a_sentence_about_a_model_is_a_text(capsys) -> None:
    assert main(["run", "Explain the file model.gguf", *GREEDY]) == 0
    assert capsys.readouterr().out.startswith("Explain the file model.gguf")


def test_embed_takes_texts_alone(data: Path, pipe, capsys) -> None:
    model = str(data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf")
    pipe("one\x0ctwo\nthrée\n".encode())
    assert main(["embed", model, "--device", "reference"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["embed", model, "one\x0ctwo", "thrée", "--device", "reference"]) == 0
    assert found == [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_piped_text_is_utf8_whatever_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("Zoë saw a fée. " * 40, "utf-8")
    args = ["perplexity", BUNDLED, "--window", "64", "--device", "reference"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    piped = run(*args, "-", text=(tmp_path / "t").read_bytes(), env=environment)
    assert piped.stdout == run(*args, tmp_path / "t").stdout
    assert "±" in piped.stdout.decode("utf-8")


def test_run_answers_in_the_chat_template(capsys) -> None:
    assert main(["run", "--system", "Be kind.", "Hello", *GREEDY]) == 0
    shown = capsys.readouterr().out
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    with tinyllm.load(device="reference") as model:
        assert shown == model.chat(messages, max_tokens=4, temperature=0).text + "\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["run", STORY, *GREEDY], ["run", "--chat", "Hi", *GREEDY], ["info"], ["tokenize", "a b"],
        ["devices"], ["perplexity", str(BUNDLED.parent.parent / "loading.py"), "--n-windows", "1",
                      "--device", "reference"],
    ],
)  # fmt: skip
def test_json_is_one_line(argv: list[str], capsys) -> None:
    assert main([*argv, "--json"]) == 0
    line, end = capsys.readouterr().out.split("\n")
    assert json.loads(line)
    assert end == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--n-windows", "-1"], "n_windows=-1"), (["--window", "4", "--n-windows", "1"], "one token")],
)
def test_perplexity_of_nothing_is_told(options: list[str], complaint: str, capsys) -> None:
    source = str(BUNDLED.parent.parent / "loading.py")
    assert main(["perplexity", source, *options, "--device", "reference"]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["info", "-c", "-1"], "n_ctx=-1"),
        (["info", "-c", "99999999999999"], "n_ctx=99999999999999"),
        (["info", "--json", "--keys"], "not allowed with"),
        (["info", "--tensors", "--keys"], "not allowed with"),
        (["info", ""], "no name of a file"),
        (["run", "", "hi"], "no name of a file"),
        (["run", "hi", "-t", "0", "--device", "reference"], "n_threads=0"),
    ],
)
def test_what_was_ignored_is_told(argv: list[str], complaint: str, capsys) -> None:
    try:
        code = main(argv)
    except SystemExit as e:  # argparse
        code = e.code
    assert code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " \n", "\ufeff", "Hello"])
def test_a_template_of_a_file_that_shows_nothing_is_told(
    text: str, tmp_path: Path, pipe, capsys
) -> None:
    (tmp_path / "t").write_text(text, "utf-8")
    pipe(b"Hello\n")
    assert main(["chat", "--template", str(tmp_path / "t"), "--device", "reference"]) == 1
    assert "shows no message" in capsys.readouterr().err


def test_a_full_context_is_told(capsys) -> None:
    assert main(["run", STORY, "--device", "reference", "-c", "12", "--seed", "1"]) == 0
    assert "the context of 12 tokens is full" in capsys.readouterr().err


# ---- files


@pytest.mark.skipif(sys.platform == "win32", reason="links and modes")
def test_a_file_is_replaced_through_its_link_and_keeps_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    with replacing(link) as file:
        file.write(b"new")
    assert (link.is_symlink(), real.read_bytes(), real.stat().st_mode & 0o777) == (
        True,
        b"new",
        0o640,
    )
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", [".", "pipe", "none/file"])
def test_a_place_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    with pytest.raises((ArgumentError, OSError), match=str(tmp_path / name)) as caught:
        with replacing(tmp_path / name):
            pass
    assert ".part" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_quantize_writes_through_a_link(tmp_path: Path, capsys, stories260k: Path) -> None:
    real, link = tmp_path / "real.gguf", tmp_path / "link.gguf"
    real.write_bytes(b"")
    link.symlink_to(real)
    assert main(["quantize", str(stories260k), str(link), "q8_0"]) == 0
    assert link.is_symlink()
    with gguf.open(real) as file:
        assert file.tensors


# ---- standard streams


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_missing_stream_ends_nothing(closed: str) -> None:
    command = f"{sys.executable} -m tinyllm run Once -n 3 --device reference {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "tinyllm", "devices"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1


# ---- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_command_and_option(shell: str, capsys) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "kv-type" in script
    assert "q8_0" in script


def test_bash_completes(capsys) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for words, expected in [(["tinyllm", "tok"], "tokenize"), (["tinyllm", "run", "--kv-type", "q"], "q8_0"),
                            (["tinyllm", "run", "--syst"], "--system")]:  # fmt: skip
        line = " ".join(words)
        setting = (
            f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _tinyllm; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(
            ["bash", "-c", script + setting], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == expected
