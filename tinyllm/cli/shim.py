"""``tinyllm shim``: whether programs that import gpt4all find tinyllm."""

from __future__ import annotations

from .arguments import Arguments, Parser
from .terminal import show


def shim_arguments(p: Parser) -> None:
    p.add_argument(
        "what",
        metavar="on|off|status",
        choices=("on", "off", "status"),
        help="on: programs of this Python environment that import gpt4all find tinyllm, in child processes too",
    )


def shim(args: Arguments) -> None:
    from ..sdk.shim import environment

    do = {"on": environment.turn_on, "off": environment.turn_off, "status": environment.status}
    show(do[args.what]() + "\n")
