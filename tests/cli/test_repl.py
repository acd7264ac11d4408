"""``tinyllm chat``: messages, commands, files, pipes and a terminal."""

from __future__ import annotations

import io
import json
import os
import select
import shlex
import subprocess
import sys
import time

import pytest

import tinyllm
from tinyllm.cli.commands import COMMANDS as COMMAND_LINES
from tinyllm.cli.commands import main
from tinyllm.cli.conversation import Conversation, load, save
from tinyllm.cli.repl import COMMANDS, Repl, Screen, read_message
from tinyllm.errors import ContextOverflow, TinyLLMError

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "héllo\nyou"},
    {"role": "assistant", "content": "Hi."},
]


@pytest.fixture(scope="module")
def model():
    with tinyllm.load(device="reference") as m:
        yield m


@pytest.fixture
def chat(model) -> Conversation:
    return Conversation(model, PLAIN, max_tokens=6, options={"temperature": 0})


class Typed(Screen):
    """A terminal with a typist: exceptions among the lines are raised, as Ctrl-C is."""

    def __init__(self, *lines: str | BaseException, interactive: bool = True) -> None:
        super().__init__(interactive)
        self.lines, self.notes, self.shown = list(lines), [], ""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, piece: str) -> None:
        self.shown += piece

    def ask(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def typed(chat: Conversation, *lines: str | BaseException) -> Typed:
    screen = Typed(*lines)
    Repl(chat, screen).run()
    return screen


def said(chat: Conversation) -> list[str]:
    return [m["content"] for m in chat.messages if m["role"] == "user"]


# ---- reading


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["  hello "], ("hello", True)),
        (["one \\", "two\\", "three"], ("one \ntwo\nthree", True)),
        (['"""', "/exit", "", " x\\", '"""'], ("/exit\n\n x\\", False)),
        (["/reset"], ("/reset", True)),
        (['"""one line"""'], ("one line", False)),
        (['"""one', 'two"""'], ("one\ntwo", False)),
        (['""""""'], ("", False)),
    ],
)
def test_a_message_may_have_several_lines(lines, message):
    assert read_message(Typed(*lines).ask) == message


def test_a_block_without_an_end_is_told():
    with pytest.raises(TinyLLMError, match='expected """'):
        read_message(Typed('"""', "x").ask)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/think about cats", "/think about cats"),
        ("/no_think", "/no_think"),
        ("/tmp/a.txt", "/tmp/a.txt"),
        ("//reset", "/reset"),
        ("/", "/"),
    ],
)
def test_only_known_names_are_commands(chat, line, message):
    typed(chat, line)
    assert said(chat) == [message]


# ---- talking


def test_one_token_is_one(model):
    chat = Conversation(model, PLAIN, max_tokens=1, options={"temperature": 0})
    notes = typed(chat, "Hello", "/stats").notes
    assert any(n.startswith("(1 token, ") for n in notes)
    assert any("last answer: 1 token, " in n for n in notes)


def test_each_turn_continues_the_conversation(chat, model):
    screen = typed(chat, "Hello", "", "Who are you?")
    first = model.chat(
        [{"role": "user", "content": "Hello"}], PLAIN, max_tokens=6, temperature=0
    ).text
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == first
    again = model.chat(chat.messages[:3], PLAIN, max_tokens=6, temperature=0).text
    assert chat.messages[3]["content"] == again
    assert screen.shown == f"{first}\n{again}\n"
    assert chat.timings[1].n_reused > 5  # the first turn was not read again
    assert sum("tokens/s)" in n for n in screen.notes) == 2


def test_the_oldest_turns_make_room_and_the_system_message_stays(model):
    chat = Conversation(model, PLAIN, 4, options={"temperature": 0})
    chat.state = model.new_state(64)
    chat.system = "Be kind."
    words = [f"message {i} of a few" for i in range(6)]
    screen = typed(chat, *words)
    assert chat.system == "Be kind."
    assert said(chat) == words[-len(said(chat)) :]
    assert 0 < len(said(chat)) < 6
    assert any("the oldest turn was dropped" in n for n in screen.notes)
    assert all(t.n_prompt + t.n_reused <= 60 for t in chat.timings)  # 4 are the answer's


def test_a_message_longer_than_the_context_is_refused_and_forgotten(model):
    chat = Conversation(model, PLAIN, 4)
    chat.state = model.new_state(32)
    with pytest.raises(ContextOverflow, match="the context has 32: shorten it"):
        Repl(chat, Typed("word " * 80, interactive=False)).run()
    assert chat.messages == []


def test_an_answer_that_fills_the_context_is_cut_and_that_is_told(model):
    chat = Conversation(
        model, PLAIN, options={"logit_bias": dict.fromkeys(model.tokenizer.eog, -1000000000.0)}
    )
    chat.state = model.new_state(24)
    assert "(the context is full: the answer was cut)" in typed(chat, "Hello").notes
    assert chat.messages[1]["content"]


# ---- Ctrl-C


def stop_at(n: int):
    """Takes pieces, and Ctrl-C comes with the n-th."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == n:
            raise KeyboardInterrupt

    return pieces, show


def test_ctrl_c_keeps_what_was_shown(chat, model):
    pieces, show = stop_at(2)
    assert chat.say("Hello", show) is False
    assert chat.messages[1]["content"] == "".join(pieces)
    assert chat.say("And now?", lambda piece: None) is True
    expected = model.chat(chat.messages[:3], PLAIN, max_tokens=6, temperature=0).text
    assert chat.messages[3]["content"] == expected


def test_ctrl_c_does_not_confuse_a_recurrent_model(data):
    with tinyllm.load(data / "golden" / "models" / "mamba.gguf", device="reference") as mamba:
        chat = Conversation(mamba, PLAIN, 6, options={"temperature": 0})
        assert chat.say("Hello", stop_at(2)[1]) is False
        assert chat.say("And now?", lambda piece: None) is True
        expected = mamba.chat(chat.messages[:3], PLAIN, max_tokens=6, temperature=0).text
    assert chat.messages[3]["content"] == expected


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not(chat):
    screen = Typed(KeyboardInterrupt(), "/stats", KeyboardInterrupt(), KeyboardInterrupt(), "x")
    Repl(chat, screen).run()
    assert screen.lines == ["x"]
    screen = Typed(KeyboardInterrupt(), "x", interactive=False)
    with pytest.raises(KeyboardInterrupt):
        Repl(chat, screen).run()


# ---- commands


def test_exit_leaves(chat):
    assert typed(chat, "/exit", "x").lines == ["x"]


def test_reset_keeps_the_system_message(chat):
    typed(chat, "/system Be kind.", "Hello", "/reset")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    assert typed(chat, "/system", "/system Be brief.").notes[0] == "(system: Be kind.)"
    assert chat.system == "Be brief."


def test_regen_writes_another_answer_with_the_next_seed(model):
    chat = Conversation(model, PLAIN, 8, seed=1, options={"temperature": 2.0, "top_k": 0})
    typed(chat, "Hello")
    before = list(chat.messages)
    typed(chat, "/regen")
    assert chat.messages[0] == before[0]
    assert len(chat.messages) == 2
    assert chat.messages[1] != before[1]
    same = Conversation(model, PLAIN, 8, seed=1, options={"temperature": 2.0, "top_k": 0})
    typed(same, "Hello", "/regen")
    assert same.messages == chat.messages


def test_regen_without_a_new_answer_keeps_the_old(chat):
    typed(chat, "Hello")
    before = list(chat.messages)

    def fails(text: str) -> None:
        assert text == "Hello"
        assert chat.messages == []
        raise ContextOverflow("no room")

    with pytest.raises(ContextOverflow):
        chat.again(fails)
    assert chat.messages == before


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("/regen", "no answer yet"),
        ("/reset all", "takes nothing after it"),
        ("/save", "/save chat.json"),
        ("/load", "/load chat.json"),
        ("/load nowhere.json", "nowhere.json"),
    ],
)
def test_a_wrong_command_is_told_and_the_next_line_read(chat, line, note):
    notes = typed(chat, line, "/system x").notes
    assert note in notes[0]
    assert "\n" not in notes[0]
    assert chat.system == "x"


def test_help_and_stats_tell_what_there_is(chat):
    shown = "\n".join(typed(chat, "Hello", "/help", "/stats").notes)
    assert all(name in shown for name in COMMANDS)
    assert f"of {chat.state.n_ctx} tokens, 2 messages" in shown


def test_a_path_is_a_message(chat):
    typed(chat, "/usr/bin holds what?")
    assert said(chat) == ["/usr/bin holds what?"]


# ---- files


def test_a_saved_conversation_is_loaded(chat, tmp_path):
    chat.messages = list(TURNS)
    typed(chat, f"/save {tmp_path / 'a b.json'}", "/reset", f"/load {tmp_path / 'a b.json'}")
    assert chat.messages == TURNS


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no json", "in JSON"),
        ("[" * 100_000, "in JSON"),
        ("{}", "dict; expected a list"),
        ('["x"]', "message 1 is not"),
        (json.dumps([*TURNS, {"role": "user"}]), "message 4 is not"),
        (json.dumps([{"role": "user", "content": 1}]), "a content that is not a text"),
        (r'[{"role": "user", "content": "\ud800"}]', "a content that is not a text"),
        (json.dumps([{"role": [], "content": ""}]), "the role []; expected one of"),
        (json.dumps(TURNS[:2]), "user and assistant in turns"),
        (json.dumps([TURNS[1], TURNS[2], TURNS[0]]), "user and assistant in turns"),
    ],
)
def test_a_wrong_file_is_one_line(text, complaint, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(TinyLLMError) as e:
        load(path)
    assert complaint in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300


def test_save_writes_text_that_people_can_read(tmp_path):
    save(TURNS, tmp_path / "c.json")
    assert "héllo" in (tmp_path / "c.json").read_text("utf-8")


# ---- the command line


def piped(monkeypatch, capsys, text: str, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    rc = main(["chat", "--device", "reference", *argv])
    return rc, *capsys.readouterr()


def test_a_pipe_gets_the_answers_and_nothing_else(monkeypatch, capsys, model):
    greedy = ["--temperature", "0", "-n", "5"]
    rc, out, err = piped(monkeypatch, capsys, "/system Be kind.\nHello\n", *greedy)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert (rc, err) == (0, "(system: Be kind.)\n")
    assert out == model.chat(messages, max_tokens=5, temperature=0).text + "\n"


def test_an_error_ends_a_pipe(monkeypatch, capsys):
    rc, out, err = piped(monkeypatch, capsys, "/reset all\nHello\n")
    assert (rc, out) == (2, "")
    assert err == "tinyllm: /reset takes nothing after it; found 'all'\n"


def test_bytes_that_are_no_text_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bad \xff\n"), "utf-8"))
    assert main(["chat", "--device", "reference"]) == 1
    assert capsys.readouterr().err.startswith("tinyllm: the input is not a text in utf-8")


def test_help_ends_with_an_example_that_parses(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    chat = COMMAND_LINES["chat"]
    assert capsys.readouterr().out.rstrip().endswith(f"example:\n  {chat.example}")
    chat.parser("chat").parse_args(shlex.split(chat.example)[2:])


def test_a_model_without_a_template_asks_for_one(monkeypatch, capsys, stories260k, tmp_path):
    rc, out, err = piped(monkeypatch, capsys, "Hello\n", "-m", str(stories260k))
    assert (rc, out) == (2, "")
    assert "give one with --template FILE" in err
    assert err.count("\n") == 1
    (tmp_path / "t.jinja").write_text(PLAIN)
    argv = ["-m", str(stories260k), "--template", str(tmp_path / "t.jinja"), "-n", "5"]
    rc, out, err = piped(monkeypatch, capsys, "Hello\n", *argv)
    assert (rc, err) == (0, "")
    assert out.strip()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["a.gguf", "-m", "b.gguf"], "two models"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["-n", "-2"], "max_tokens=-2"),
        (["--template", "nowhere.jinja"], "nowhere.jinja"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, argv, complaint):
    rc, out, err = piped(monkeypatch, capsys, "Hello\n", *argv)
    assert rc in (1, 2)
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_program(stories260k, tmp_path):
    (tmp_path / "t.jinja").write_text(PLAIN)
    argv = ["-m", str(stories260k), "--template", str(tmp_path / "t.jinja"), "--n-ctx", "100000"]
    terminal = Terminal(["chat", *argv, "-d", "reference"])
    try:
        terminal.wait_for("> ")
        terminal.send("Once upon a time\n")
        terminal.wait_for("\n")  # the echo; the answer follows
        terminal.wait_for(" ")
        terminal.send("\x03")
        assert "tokens/s)" in terminal.wait_for("stopped; ", "tokens/s)")
        terminal.send("/exit\n")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()


TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGINT, signal.SIG_DFL);"  # a shell's background job ignores it
    "os.execv(sys.executable, [sys.executable, '-m', 'tinyllm', *sys.argv[1:]])"
)


class Terminal:
    """The program on a pseudo-terminal of its own, which turns Ctrl-C into a signal."""

    def __init__(self, argv: list[str]) -> None:
        self.fd, inside = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *argv],
            stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
        )  # fmt: skip
        os.close(inside)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, *texts: str, seconds: float = 60) -> str:
        """What is printed until all of ``texts`` were."""
        seen, end = "", time.monotonic() + seconds
        while not all(t in seen for t in texts):
            ready, _, _ = select.select([self.fd], [], [], max(end - time.monotonic(), 0))
            assert ready, f"waited for {texts}; saw {seen[-500:]!r}"
            seen += os.read(self.fd, 4096).decode("utf-8", "replace")
        return seen

    def exit_code(self) -> int:
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
