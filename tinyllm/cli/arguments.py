"""What the commands share: the parser, the options of loading a model, and its loading."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ArgumentError, TinyLLMError

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
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


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
    numbers = "of products with F32, F16 and BF16 weights; bf16: faster and less exact"
    p.add_argument("--compute", default="f32", choices=("f32", "bf16"), help=numbers)
    p.add_argument("--no-strict", action="store_true", help="warn of what is not understood")
    p.add_argument("--check-weights", action="store_true", help="look for NaN and infinity first")


def sampling_defaults() -> dict[str, float]:
    """The numbers of SamplingParams that are options, with their defaults."""
    from ..sampling import SamplingParams

    return {f.name: f.default for f in fields(SamplingParams) if isinstance(f.default, int | float)}


def sampling_options(p: Parser) -> None:
    for name, default in sampling_defaults().items():
        flag, kind = f"--{name.replace('_', '-')}", type(default)
        p.add_argument(flag, type=kind, default=default, metavar="X", help="default %(default)s")
    p.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be repeated")


def sampling_of(args: Arguments) -> dict[str, Any]:
    """What ``generate`` takes; a wrong value is told before a large file is read."""
    from ..sampling import SamplingParams

    found = {name: getattr(args, name) for name in [*sampling_defaults(), "seed"]}
    SamplingParams(**found)
    return found


def load_model(args: Arguments) -> Model:
    import tinyllm

    return tinyllm.load(
        locate(args.model),
        device=args.device,
        n_ctx=args.n_ctx,
        n_threads=args.n_threads,
        n_gpu_layers=args.n_gpu_layers,
        kv_type=args.kv_type,
        strict=not args.no_strict,
        check_weights=args.check_weights,
        compute=args.compute,
    )


def load_decoder(args: Arguments) -> Model:
    """A model that continues text."""
    model = load_model(args)
    if not model.config.causal:
        with model:
            raise ArgumentError(f"{model.arch} is an encoder and writes no text; use tinyllm embed")
    return model


def locate(name: str | None) -> Path:
    """The model's file, perhaps downloaded; what goes wrong on the way is one line."""
    from ..loading import locate as locate_model

    try:
        return locate_model(name)
    except (TinyLLMError, OSError):
        raise
    except (ValueError, RuntimeError) as e:  # a server that refused, a file not the expected one
        raise TinyLLMError(f"{name}: {e}") from e


def open_file(name: str | None) -> GGUFFile:
    """A model's metadata and tensors, weights unread."""
    from .. import gguf

    return gguf.open(locate(name))


def text_argument(text: str) -> str:
    """The text itself, or all of standard input for "-"."""
    return read_text("-") if text == "-" else text


def read_text(name: str) -> str:
    """All of a text file, or of standard input for "-"."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ArgumentError(f"{name}: expected a text in {e.encoding} ({e})") from None


def refuse_lonely_model(command: str, model: str | None, text: str) -> None:
    """A single argument is the text; if it looks like a model, the text was forgotten."""
    if model is None and text.endswith(".gguf"):
        raise ArgumentError(
            f'after the model comes a text: tinyllm {command} {text} "Once upon a time"'
        )
