"""``tinyllm chat``: a conversation in a terminal, or one message per line through a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.generate import Timings
from ..errors import ArgumentError, ContextOverflow, TinyLLMError
from ..files import read_text
from .arguments import (
    Arguments,
    load_decoder,
    sampling_of,
)
from .conversation import Conversation, load, save
from .terminal import has_terminal, show, visible

if TYPE_CHECKING:
    from ..model import Model

QUOTES = '"""'
PROMPT, MORE = "> ", ". "
WHAT_LEAVES = "(Ctrl-C again, Ctrl-D or /exit leaves)"


# ---- what the user sees


@dataclass
class Screen:
    """Answers go to standard output, everything else to standard error."""

    interactive: bool

    def note(self, text: str) -> None:
        dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        sys.stderr.write(f"\x1b[2m{visible(text)}\x1b[0m\n" if dim else f"{text}\n")
        sys.stderr.flush()

    def show(self, piece: str) -> None:
        show(piece)

    def ask(self, prompt: str) -> str:
        """A line of input without its end; EOFError after the last."""
        try:
            if self.interactive:
                return input(prompt)
            line = "" if sys.stdin is None else sys.stdin.readline()
        except UnicodeDecodeError as e:
            raise TinyLLMError(f"the input is not a text in {e.encoding} ({e})") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n")


def read_message(ask: Callable[[str], str]) -> tuple[str, bool]:
    r"""One message, and whether it may be a command.

    A line that ends with ``\`` goes on in the next; what stands between three quotes and three quotes is one
    message, on one line or on many.
    """
    line = ask(PROMPT)
    if line.strip().startswith(QUOTES):
        return read_block(ask, line.strip().removeprefix(QUOTES)), False
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = ask(MORE)
    return "\n".join([*lines, line]).strip(), True


def read_block(ask: Callable[[str], str], first: str) -> str:
    """A message up to the three quotes that end it; ``first`` follows those that began it."""
    lines = [first] if first else []
    try:
        while not (lines and lines[-1].rstrip().endswith(QUOTES)):
            lines.append(ask(MORE))
    except EOFError:
        raise TinyLLMError(f"the message has no end; expected {QUOTES}") from None
    last = lines.pop().rstrip().removesuffix(QUOTES)
    return "\n".join([*lines, last] if last else lines)


# ---- commands


@dataclass
class Repl:
    """Reads messages and commands until there are no more."""

    chat: Conversation
    screen: Screen

    def run(self) -> None:
        """Read and obey until the input ends; on a terminal errors are told, in a pipe they end the loop."""
        interrupted = False
        while True:
            try:
                text, plain = read_message(self.screen.ask)
                interrupted = False
                if not self.obey(text, plain):
                    return
            except EOFError:
                if self.screen.interactive:
                    self.screen.note("")
                return
            except KeyboardInterrupt:
                if not self.screen.interactive:
                    raise
                if interrupted:
                    self.screen.note("")
                    return
                interrupted = True
                self.screen.note(f"\n{WHAT_LEAVES}")
            except (TinyLLMError, OSError) as e:
                if not self.screen.interactive:
                    raise
                self.screen.note(" ".join(str(e).split()))

    def obey(self, text: str, plain: bool) -> bool:
        """Do what a message asks; False to leave.

        Only the names of commands are commands: some models take words such as "/think". Two slashes send one.
        """
        name, _, rest = text.partition(" ")
        if not plain or name not in COMMANDS:
            text = text[1:] if plain and text.startswith("//") else text
            if self.screen.interactive and plain and text == name and name.startswith("/"):
                self.screen.note(f"({name} is no command and goes to the model; /help lists them)")
            if text.strip():
                self.say(text)
            return True
        _, takes, command = COMMANDS[name]
        if rest.strip() and not takes:
            raise ArgumentError(f"{name} takes nothing after it; found {rest.strip()!r:.40}")
        command(self, rest.strip())
        return name != "/exit"

    def say(self, text: str) -> None:
        self.chat.messages.append({"role": "user", "content": text})
        try:
            dropped, needed = self.chat.fit(), self.chat.n_tokens()
        finally:
            self.chat.messages.pop()
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self.screen.note(f"(the context is full: the oldest {turns} dropped)")
        if needed >= self.chat.state.n_ctx:
            raise ContextOverflow(
                f"the message makes a prompt of {needed} tokens; the context has "
                f"{self.chat.state.n_ctx}: shorten it, or give a larger --n-ctx"
            )
        n_answers = len(self.chat.timings)
        finished = self.chat.say(text, self.screen.show)
        self.screen.show("\n")
        if not finished and not self.screen.interactive:
            raise KeyboardInterrupt
        self.conclude(finished, len(self.chat.timings) > n_answers)

    def conclude(self, finished: bool, answered: bool) -> None:
        """Note after an answer whether it was cut, and how fast it was."""
        if finished and self.chat.full:
            self.screen.note("(the context is full: the answer was cut)")
        if self.screen.interactive:
            notes = [] if finished else ["stopped"]
            if answered:
                t = self.chat.timings[-1]
                notes.append(f"{counted(t.n_generated, 'token')}, {t.generated_per_s:.1f} tokens/s")
            self.screen.note(f"({'; '.join(notes)})")

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.screen.note("(a new conversation)")

    def system(self, text: str) -> None:
        if text:
            self.chat.system = text
        self.screen.note(f"(system: {self.chat.system or 'none'})")

    def save(self, name: str) -> None:
        path = file_argument("/save", name)
        save(self.chat.messages, path)
        self.screen.note(f"({counted(len(self.chat.messages), 'message')} saved in {path})")

    def load(self, name: str) -> None:
        path = file_argument("/load", name)
        self.chat.messages = load(path)
        self.screen.note(f"({counted(len(self.chat.messages), 'message')} read from {path})")

    def regen(self, _: str) -> None:
        self.chat.again(self.say)

    def stats(self, _: str) -> None:
        state, t = self.chat.state, self.chat.timings[-1] if self.chat.timings else Timings()
        messages = counted(len(self.chat.messages), "message")
        self.screen.note(
            f"{Path(self.chat.model.path).name} on {self.chat.model.device}\n"
            f"context: {len(state.ids)} of {state.n_ctx} tokens, {messages}\n"
            f"last prompt: {counted(t.n_prompt, 'token')} read, {t.n_reused} known before, "
            f"{t.prompt_s:.2f} s to the first word\n"
            f"last answer: {counted(t.n_generated, 'token')}, {t.generated_per_s:.1f} tokens/s"
        )

    def help(self, _: str) -> None:
        lines = [
            f"{name + ' ' + takes:<14} {about}" for name, (about, takes, _) in COMMANDS.items()
        ]
        self.screen.note("\n".join([*lines, MULTILINE]))

    def exit(self, _: str) -> None:
        """Do nothing: the loop leaves after this command."""


COMMANDS: dict[str, tuple[str, str, Callable[[Repl, str], None]]] = {
    "/reset": ("forget the conversation; the system message stays", "", Repl.reset),
    "/system": ("set the system message; alone: show it", "TEXT", Repl.system),
    "/save": ("write the conversation as JSON", "FILE", Repl.save),
    "/load": ("go on with a saved conversation", "FILE", Repl.load),
    "/regen": ("answer the last message again", "", Repl.regen),
    "/stats": ("tokens and times", "", Repl.stats),
    "/help": ("this list", "", Repl.help),
    "/exit": ("leave; Ctrl-D too", "", Repl.exit),
}
MULTILINE = f"""Ctrl-C stops an answer.
A line that ends with \\ goes on in the next; so do all lines between {QUOTES} and {QUOTES}.
Two slashes begin a message with one."""


def file_argument(command: str, name: str) -> Path:
    if not name:
        raise ArgumentError(f"{command} takes the name of a file: {command} chat.json")
    return Path(name).expanduser()


# ---- the command line


def talk(args: Arguments) -> None:
    from ..engine.completion import check_max_tokens

    if args.file and args.model:
        raise ArgumentError(f"two models: {args.file} and {args.model}; expected one")
    args.model = args.file or args.model
    sampling = sampling_of(args)
    max_tokens, template = check_max_tokens(args.max_tokens), read_template(args.template)
    with load_decoder(args) as model:
        chosen = own_template(model) if template is None else template
        seed = sampling.pop("seed")
        chat = Conversation(model, chosen, max_tokens, seed, {**sampling, "stop": args.stop})
        chat.system = args.system
        Repl(chat, open_screen(model)).run()


def read_template(name: str | None) -> str | None:
    from ..chat.render import check, given_template

    if name is None:
        return None
    text = given_template(read_text(name))
    check(text)
    return text


def own_template(model: Model) -> str:
    from ..chat.render import pick_template

    template = pick_template(model.metadata)
    if template is None:
        raise ArgumentError(f"{model.path} has no chat template; give one with --template FILE")
    return template


def open_screen(model: Model) -> Screen:
    screen = Screen(has_terminal(sys.stdin) and has_terminal(sys.stdout))
    if screen.interactive:
        try:
            import readline  # noqa: F401 (input() then edits lines and remembers them)
        except ImportError:  # Windows: the console does that itself
            pass
        screen.note(
            f"{Path(model.path).name} on {model.device}, {model.n_ctx} tokens of context; "
            "/help lists the commands"
        )
    return screen


def counted(n: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "token"), counted(2, "token")
    ('1 token', '2 tokens')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
