"""The command line: what each command prints, and how it fails."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.cli import bench, info, perplexity
from tinyllm.cli import commands as cli
from tinyllm.cli.commands import main
from tinyllm.kernels.cpu import emit

REFERENCE = ["--device", "reference"]


@pytest.fixture
def tiny(stories260k) -> str:
    return str(stories260k)


@pytest.fixture
def out(capsys):
    """Run a command that works; what it printed."""

    def run(*argv: str) -> str:
        assert main(argv) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


# ---- help and errors


def test_help_lists_every_command(out):
    shown = out("--help")
    assert all(re.search(rf"^  {name} ", shown, re.M) for name in [*cli.COMMANDS, "chat"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"\nexample:\n  tinyllm {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_parses(name):
    words = re.findall(r'"[^"]*"|\S+', cli.COMMANDS[name].example)
    args = [w.strip('"') for w in words[2:]]
    cli.COMMANDS[name].parser(name).parse_intermixed_args(args)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ([], "expected one of run, embed"),
        (["rnu", "x"], "did you mean 'run'?"),
        (["zzz"], "expected one of run, embed"),
        (["run"], 'there is no text; expected one: tinyllm run "Once upon a time"'),
        (
            ["run", "x", "--temprature=1"],
            "unrecognized arguments: --temprature=1; did you mean '--temperature'?",
        ),
        (["run", "Once", "upon", "a"], "found 'Once upon a'; put the text between quotes"),
        (["run", "a.gguf", "x", "-f", "y"], "found 'a.gguf x' and --file"),
        (["explain", "lama"], "did you mean 'llama'?"),
        (["help", "rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["quantize", "a", "b", "q4_km"], "did you mean 'Q4_K_M'?"),
        (["completion", "bsh"], "did you mean 'bash'?"),
        (["run", "x", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (["run", "x", "--top-p", "3"], "top_p=3.0; expected a number from 0 to 1"),
        (["run", "x", "--seed", "-1"], "seed=-1; expected an integer >= 0"),
        (["embed"], 'tinyllm embed "A text"'),
        (["run", "model.gguf"], 'tinyllm run model.gguf "Once upon a time"'),
        (["tokenize", "model.gguf"], 'tinyllm tokenize model.gguf "Once upon a time"'),
        (["bench", "--kv-type", "q9"], "invalid choice: 'q9'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(argv, hint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert hint in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("command", [["run", "/none.gguf", "x"], ["info", "/none.gguf"]])
def test_a_missing_file_is_one_line_and_code_1(command, capsys):
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "/none.gguf" in printed.err


def test_bytes_that_are_no_text_are_one_line_and_code_2(tiny, capsys):
    assert main(["perplexity", tiny, tiny, *REFERENCE]) == 2
    assert capsys.readouterr().err.startswith(f"tinyllm: {tiny}: expected a text in UTF-8 (")


def test_a_malformed_file_is_one_line_and_code_1(tmp_path, capsys):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    assert main(["info", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"tinyllm: {path}, byte ")


# ---- run


def test_run_continues_the_prompt(out, tiny):
    shown = out("run", tiny, "Once upon a time", "-n", "12", "--temperature", "0", *REFERENCE)
    assert shown == "Once upon a time, there was a little girl named Lily. She\n"


def test_run_takes_options_between_its_arguments(out, tiny):
    shown = out("run", tiny, "-n", "3", *REFERENCE, "--no-echo", "--temperature", "0", "Once upon")
    assert shown == " a time,\n"


def test_run_reads_standard_input(out, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
    shown = out("run", tiny, "-", "-n", "2", "--temperature", "0", *REFERENCE)
    assert shown == "Once upon a time, there\n"


def test_run_stops_at_a_stop_string(out, tiny):
    shown = out("run", tiny, "Once upon a time", "--stop", "girl", "--temperature", "0", *REFERENCE)
    assert shown == "Once upon a time, there was a little \n"


def test_run_with_a_seed_repeats_itself(out, tiny):
    argv = ["run", tiny, "Once", "-n", "20", "--seed", "5", *REFERENCE]
    assert out(*argv) == out(*argv)


# ---- the others


def test_embed_prints_a_unit_vector_per_text(out, tiny):
    lines = out("embed", tiny, "a girl", "a dog", *REFERENCE).splitlines()
    vectors = np.array([json.loads(line) for line in lines])
    assert vectors.shape == (2, 64)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_embed_reads_lines(out, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a girl\na dog\n"))
    lines = out("embed", tiny, "-", *REFERENCE).splitlines()
    assert lines == out("embed", tiny, "a girl", "a dog", *REFERENCE).splitlines()


def test_tokenize_prints_ids_and_pieces(out, tiny):
    shown = out("tokenize", tiny, "Once")
    ids = [int(line.split()[0]) for line in shown.splitlines()]
    assert ids == [int(i) for i in out("tokenize", tiny, "Once", "--ids").split()]
    assert ids[0] == 1
    assert "'<s>'" in shown.splitlines()[0]
    assert out("tokenize", tiny, "Once", "--ids", "--no-special").split() == [
        str(i) for i in ids[1:]
    ]


def test_info_describes_a_model(out, tiny):
    shown = out("info", tiny, "-c", "100")
    assert re.search(r"^architecture +llama \(arXiv:2302.13971\)$", shown, re.M)
    assert re.search(r"^runs +yes$", shown, re.M)
    assert re.search(r"^parameters +260,032 in .*: 32.00 bits per weight$", shown, re.M)
    assert re.search(r"^formats +F32 +47 tensors .* cpu: float32 products$", shown, re.M)
    assert "for each conversation of 100 tokens (f16)" in shown
    assert re.search(r"^tokenizer +spm, 512 tokens, bos 1 <s>, eos 2 </s>", shown, re.M)


def test_info_lists_keys_and_tensors(out, tiny):
    assert "llama.embedding_length = 64" in out("info", tiny, "--keys").splitlines()
    with gguf.open(tiny) as file:
        assert len(out("info", tiny, "--tensors").splitlines()) == len(file.tensors)


def test_info_shows_a_template_whole_and_makes_control_characters_visible(out, tmp_path):
    template = "{% for m in messages %}\n\x1b[31m{{ m.content }}{% endfor %}"
    path = tmp_path / "x.gguf"
    metadata = {"general.architecture": "nonesuch", "tokenizer.chat_template": template}
    gguf.write(path, metadata, {"x": np.zeros((2, 4), np.float32)})
    shown = out("info", str(path))
    assert shown.endswith(template.replace("\x1b", "\\x1b") + "\n")
    assert "runs           no: architecture 'nonesuch' is not supported" in shown


def test_devices_begin_with_the_cpu(out):
    first, *_, last = out("devices").splitlines()
    assert last == f"kernels of the cpu: {emit.instructions()}"
    assert re.fullmatch(r"cpu +\d+\.\d GB  \S.*", first)


def test_bench_prints_a_table_and_json(out, tiny):
    argv = ["bench", tiny, "-p", "8", "-n", "4", "-r", "2", "-d", "3", *REFERENCE]
    rows = out(*argv).splitlines()
    assert [row.split("|")[6].strip() for row in rows] == [
        "test",
        "-" * 14 + ":",
        "pp8 @ d3",
        "tg4 @ d3",
    ]
    found = json.loads(out(*argv, "--json"))
    assert found["n_params"] == 260032
    assert found["tg4"]["depth"] == 3
    assert len(found["pp8"]["samples"]) == 2
    assert found["pp8"]["tokens_per_s"] == pytest.approx(np.mean(found["pp8"]["samples"]))


@pytest.mark.parametrize("argv", [["run", "x"], ["bench"], ["perplexity", __file__]])
def test_an_encoder_is_told_to_embed(argv, data, capsys):
    path = data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf"
    assert main([argv[0], str(path), *argv[1:], *REFERENCE]) == 2
    assert "bert is an encoder and writes no text; use tinyllm embed" in capsys.readouterr().err


def test_decode_reads_all_weights_but_the_embedding_and_idle_experts():
    class Matrix:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes

    tensors = {"token_embd.weight": Matrix(100), "blk.0.ffn_up_exps.weight": Matrix(80)}
    assert bench.bytes_per_token(tensors, 8, 2) == 120  # tied: the embedding is the head
    assert bench.bytes_per_token(tensors | {"output.weight": Matrix(1)}, 8, 2) == 21


def test_perplexity_of_a_file(out, tiny, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time, there was a little girl named Lily. " * 6)
    argv = ["perplexity", tiny, str(path), "--window", "32", "--n-windows", "2", *REFERENCE]
    found = re.fullmatch(r"perplexity (\S+) ± \S+ \(30 tokens of 2 windows of 32\)\n", out(*argv))
    assert found
    assert 1 < float(found[1]) < 512


def test_quantize_writes_a_smaller_file_that_runs(out, tiny, tmp_path):
    small = str(tmp_path / "small.gguf")
    lines = out("quantize", tiny, small, "q8_0").splitlines()
    assert lines[0].split() == ["Q8_0", "31", "tensors"]
    assert re.search(r"small\.gguf: 0\.3 MB, 10\.\d\d bits per weight$", lines[-1])
    shown = out("run", small, "Once upon a time", "-n", "4", "--temperature", "0", *REFERENCE)
    assert shown == "Once upon a time, there was a\n"


def test_a_split_file_is_described_beside_what_earlier_runs_left(out, tiny, tmp_path):
    named = str(tmp_path / "q[1].gguf")
    out("quantize", tiny, named, "q8_0", "--split", "100K")
    out("quantize", tiny, named, "q8_0")
    parts = len(list(tmp_path.glob("*-of-*.gguf")))
    assert f"{parts} parts" not in out("quantize", tiny, named, "q8_0", "--split", "1M")
    again = out("quantize", tiny, named, "q8_0", "--split", "100K").splitlines()[-1]
    assert again.startswith(str(tmp_path / f"q[1]-00001-of-{parts:05}.gguf"))
    assert f"{parts} parts" in again


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["Q9_9"], "invalid choice: 'Q9_9'"),
        (["q4_0", "-t", "0"], "n_threads=0; expected at least 1"),
        (["q4_0", "--split", "0"], "'0' is no size; expected a number such as 500M or 4G"),
    ],
)
def test_quantize_refuses_what_it_cannot_do(options, complaint, tiny, tmp_path, capsys):
    try:
        code = main(["quantize", tiny, str(tmp_path / "x.gguf"), *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_perplexity_needs_a_whole_window(tiny, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("Once")
    assert main(["perplexity", tiny, str(path), *REFERENCE]) == 2
    assert "a window of 512 needs as many" in capsys.readouterr().err


def test_losses_are_negative_log_probabilities():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32)) + 7
    found = perplexity.losses_of(logits, np.array([0, 1]))
    assert found == pytest.approx([-np.log(0.5), -np.log(0.1)], abs=1e-5)


def test_brief_values_say_how_long_they_are():
    assert info.brief(np.arange(9)) == "[0, 1, 2, 3, ...] (9 values)"
    assert info.brief("x" * 300).endswith("(302 characters)")


# ---- processes


HEARS_CTRL_C = (  # which the background job of a shell does not
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "runpy.run_module('tinyllm', run_name='__main__')"
)


def command(*argv: str) -> list[str]:
    return [sys.executable, "-c", HEARS_CTRL_C, *argv, *REFERENCE]


def test_ctrl_c_ends_quietly_with_130(tiny):
    endless = command("run", tiny, "Once", "-n", "-1", "--overflow", "shift")
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(12)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")


def test_a_reader_that_leaves_is_no_error(tiny):
    endless = command("run", tiny, "Once", "-n", "-1", "--overflow", "shift")
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(12)
        process.stdout.close()
        assert process.wait(timeout=20) == 1
        assert process.stderr.read() == b""
