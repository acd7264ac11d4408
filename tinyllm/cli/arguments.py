"""What the commands share: the parser, the options of loading a model, and its loading."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ArgumentError, TinyLLMError
from ..files import read_text
from .terminal import has_terminal, show

if TYPE_CHECKING:
    from ..gguf import GGUFFile
    from ..model import Model

Arguments = argparse.Namespace
USAGE_ERROR = 2  # exit code
MODEL_HELP = (
    "a .gguf file, hf:owner/repo/file.gguf, or a name of GPT4All's list; default: the bundled model"
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        hint = self.hint(message)
        self.exit(USAGE_ERROR, f"{self.prog}: {message}{hint}; see {self.prog} --help\n")

    def hint(self, message: str) -> str:
        """The option or choice that was probably meant by the one that a complaint names."""
        if found := re.match(r"unrecognized arguments: (--?[^\s=]+)", message):
            return did_you_mean(found[1], self._option_string_actions)
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            return did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
        return ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question to end an error message with; empty where no known word is near."""
    by_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_case, 1)
    return f"; did you mean {by_case[near[0]]!r}?" if near else ""


@dataclass(frozen=True)
class Command:
    """One command: ``arguments`` declares what it takes, ``run`` does it."""

    summary: str
    example: str
    arguments: Callable[[Parser], None]
    run: Callable[[Arguments], None]

    def parser(self, name: str) -> Parser:
        parser = Parser(
            prog=f"tinyllm {name}",
            description=self.summary,
            epilog=f"example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.arguments(parser)
        return parser


def model_argument(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)


def load_options(p: Parser) -> None:
    devices = "cpu (default), auto, reference, cuda[:i], opencl[:i]; several: cuda:0,cuda:1"
    p.add_argument("--device", help=devices)
    p.add_argument("-t", "--n-threads", type=int, metavar="N", help="default: the physical cores")
    p.add_argument("-c", "--n-ctx", type=int, metavar="N", help="tokens of context")
    gpu_layers = "the last N layers on the GPU, the others on the CPU; default: all on the GPU"
    p.add_argument("--n-gpu-layers", type=int, metavar="N", help=gpu_layers)
    p.add_argument("--kv-type", default="f16", choices=("f16", "f32", "q8_0"), help="of the cache")
    numbers = "exact: floats for quantised weights, too; bf16: bfloat16 for those stored as floats"
    p.add_argument("--compute", default="f32", choices=("f32", "bf16", "exact"), help=numbers)
    beside_options(p)
    p.add_argument("--check-weights", action="store_true", help="look for NaN and infinity first")


def beside_options(p: Parser) -> None:
    """What a model is loaded with beside its file, and whether all of the file must be understood."""
    p.add_argument("--lora", action="append", default=[], metavar="FILE[=SCALE]",
                   help="an adapter: a .gguf file or a folder of PEFT's; may be repeated")  # fmt: skip
    p.add_argument("--control", action="append", default=[], metavar="FILE[=SCALE]",
                   help="a control vector: a .gguf file, of `tinyllm control`; may be repeated")  # fmt: skip
    p.add_argument("--control-layers", nargs=2, type=int, metavar=("FIRST", "LAST"),
                   help="behind which layers it is added; default: all that it has")  # fmt: skip
    p.add_argument("--no-strict", action="store_true", help="warn of what is not understood")


def sampling_defaults() -> dict[str, float]:
    """The numbers of SamplingParams that are options, with their defaults."""
    from ..sampling import SamplingParams

    return {f.name: f.default for f in fields(SamplingParams) if isinstance(f.default, int | float)}


def sampling_options(p: Parser) -> None:
    for name, default in sampling_defaults().items():
        flag, kind = f"--{name.replace('_', '-')}", type(default)
        p.add_argument(flag, type=kind, default=default, metavar="X", help="default %(default)s")
    p.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", type=unescaped,
                   help=r"ends the text; \n and the like are understood; may be repeated")  # fmt: skip


def sampling_of(args: Arguments) -> dict[str, Any]:
    """The sampling options as ``generate`` takes them, checked before a large file is read."""
    from ..sampling import SamplingParams

    found = {name: getattr(args, name) for name in [*sampling_defaults(), "seed"]}
    SamplingParams(**found)
    return found


def beside_of(args: Arguments) -> dict[str, Any]:
    """What ``beside_options`` says, as ``tinyllm.load`` takes it."""
    return {
        "strict": not args.no_strict,
        "lora": [adapter(text) for text in args.lora],
        "control": [adapter(text) for text in args.control],
        "control_layers": tuple(args.control_layers) if args.control_layers else None,
    }


def loading_of(args: Arguments) -> dict[str, Any]:
    """What ``load_options`` says, as ``tinyllm.load`` takes it."""
    names = (
        "device", "n_ctx", "n_threads", "n_gpu_layers", "kv_type", "check_weights", "compute",
    )  # fmt: skip
    return {**{name: getattr(args, name) for name in names}, **beside_of(args)}


def load_model(args: Arguments) -> Model:
    import tinyllm

    model = tinyllm.load(locate(args.model), **loading_of(args))
    note_if_longer(model, args.n_ctx or 0)
    return model


def note_if_longer(model: Model, n: int) -> None:
    """Tell the user where so many tokens are more than the model was trained for."""
    trained = model.config.n_ctx_train
    if n > trained:
        note(f"the model was trained for {trained} tokens; beyond them its text gets worse")


def adapter(text: str) -> tuple[str, float]:
    """A file and its scale out of ``FILE=SCALE``; without a number, the scale is 1."""
    path, _, scale = text.rpartition("=")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def note(text: str) -> None:
    """Tell the user something beside the output."""
    show(f"({text})\n", sys.stderr)


def load_decoder(args: Arguments) -> Model:
    """A model that continues text."""
    model = load_model(args)
    if not model.config.causal:
        with model:
            raise ArgumentError(f"{model.arch} is an encoder and writes no text; use tinyllm embed")
    return model


def locate(name: str | None) -> Path:
    """The model's file, downloaded if need be; an error on the way has a message of one line."""
    from ..loading import locate as locate_model

    try:
        return locate_model(name)
    except (TinyLLMError, OSError):
        raise
    except (ValueError, RuntimeError) as e:  # a server that refused, a file not the expected one
        raise TinyLLMError(f"{name}: {e}") from e


def open_file(name: str | None) -> GGUFFile:
    """Open a model's file; its weights are not read."""
    from .. import gguf

    return gguf.open(locate(name))


def is_model(word: str) -> bool:
    """Whether a word of the command line names a model: a file, ``*.gguf`` or ``hf:...``, not a sentence."""
    named = word.startswith("hf:") or word.lower().endswith(".gguf")
    return (named and not re.search(r"\s", word)) or (bool(word) and Path(word).is_file())


def text_arguments(p: Parser, what: str) -> None:
    p.add_argument("words", metavar="[MODEL] TEXT", nargs="*",
                   help=f"{what}, behind {MODEL_HELP}; - or nothing: standard input")  # fmt: skip
    p.add_argument("-f", "--file", metavar="FILE", help="read the text from a file in UTF-8")


def model_and_text(command: str, args: Arguments) -> str:
    """The one text of a command, from an argument, a file or a pipe; ``args.model`` is set beside it.

    Raises
    ------
    ArgumentError
        There is no text, or more than one.
    """
    words, from_file = list(args.words), args.file is not None
    lonely = len(words) == 1 and (is_model(words[0]) or from_file)
    args.model = words.pop(0) if lonely or len(words) == 2 else None
    if len(words) + from_file > 1:
        shown = " ".join(args.words)
        raise ArgumentError(
            f"expected one text, found {shown!r:.80}{' and --file' * from_file}; put the text between quotes"
        )
    if words:
        return without_end(read_text("-")) if words[0] == "-" else words[0]
    if from_file:
        return read_text(args.file)
    piped = "" if sys.stdin is None or has_terminal(sys.stdin) else read_text("-")
    if not piped:
        place = f"{args.model} " if args.model else ""
        raise ArgumentError(
            f'there is no text; expected one: tinyllm {command} {place}"Once upon a time"'
        )
    return without_end(piped)


def without_end(text: str) -> str:
    """A piped text without the line end that ``echo`` adds."""
    return text.removesuffix("\n").removesuffix("\r")


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""A text in which ``\n``, ``\t``, ``\r``, ``\\``, ``\xhh`` and ``\uhhhh`` stand for the characters."""
    return re.sub(
        r"\\(?:([ntr\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))",
        lambda m: ESCAPES[m[1]] if m[1] else chr(int(m[2] or m[3], 16)),
        text,
    )


def json_option(p: argparse._ActionsContainer) -> None:
    p.add_argument("--json", action="store_true", help="one line of JSON")
