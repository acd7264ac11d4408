"""``tinyllm compare``: two files on the same tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import read_text as read
from .arguments import Arguments, Command, Parser, json_option, load_decoder, load_options
from .terminal import show

if TYPE_CHECKING:
    from ..research.compare import Comparison


def compare_arguments(p: Parser) -> None:
    p.add_argument("a", metavar="A", help="a file, by which the other is measured")
    p.add_argument("b", metavar="B", help="another file of the same vocabulary")
    p.add_argument("text", metavar="TEXT", help="what both read; @FILE reads a file")
    load_options(p)
    p.add_argument("--tensors", action="store_true", help="which tensors of B cost most")
    p.add_argument("--layers", action="store_true", help="which layers of B cost most")
    p.add_argument("-n", "--n-greedy", type=int, default=64, metavar="N",
                   help="tokens that both write, to see where they part; default %(default)s")  # fmt: skip
    p.add_argument("--plot", metavar="FILE", help="draw layers and tensors: .png, .svg or .pdf")
    json_option(p)


def compare(args: Arguments) -> None:
    from tqdm import tqdm

    from .. import plots
    from ..research.compare import compare as compared

    if args.plot:
        plots.check(args.plot)
    text = read(args.text[1:]) if args.text.startswith("@") else args.text
    which: bool | str = "layers" if args.layers else bool(args.tensors)
    ours, theirs = (
        argparse.Namespace(**{**vars(args), "model": name}) for name in (args.a, args.b)
    )
    with load_decoder(ours) as a, load_decoder(theirs) as b:
        found = compared(a, b, text, which, args.n_greedy,
                         lambda names, n: tqdm(names, "tensors", n, leave=False, disable=None))  # fmt: skip
    names = Path(args.a).name, Path(args.b).name
    if args.plot:
        title = f"{names[1]} beside {names[0]}: KL {found.kl[0]:.4g}"
        plots.comparison(args.plot, title, found.layers, found.tensors)
    if args.json:
        show(json.dumps(asdict(found), ensure_ascii=False) + "\n")
    else:
        show("\n".join(lines(found, *names)) + "\n")


def lines(found: Comparison, a: str, b: str) -> Iterator[str]:
    """A comparison in words and a table."""
    yield f"{found.n_tokens} tokens"
    yield f"perplexity   {found.perplexity_a[0]:.4f} ± {found.perplexity_a[1]:.4f}  {a}"
    yield f"             {found.perplexity_b[0]:.4f} ± {found.perplexity_b[1]:.4f}  {b}"
    yield f"KL           {found.kl[0]:.5f} ± {found.kl[1]:.5f}"
    yield f"agreement    {found.agreement:.1%} of the likeliest next tokens"
    if (p := found.parting) is not None:
        yield (
            f"they part at token {p.position}: {p.ours!r} ({p.p_a[0]:.3f}, in B {p.p_b[0]:.3f}) "
            f"or {p.theirs!r} ({p.p_a[1]:.3f}, in B {p.p_b[1]:.3f})"
        )
    yield "error after each layer   " + " ".join(f"{x:.3f}" for x in found.layers)
    if found.tensors:
        yield "by so much the KL falls with A's in its place; with those above it, too: predicted, measured"
    for name in found.worst(20):
        both = (column.get(name) for column in (found.predicted, found.together))
        shown = "".join(" " * 12 if x is None else f"{x:12.6f}" for x in both)
        yield f"{found.tensors[name]:10.6f}{shown}  {name}"


COMMANDS = {
    "compare": Command(
        "Say how two files differ on a text: KL, perplexity, where they part, and which tensors cost it.",
        "tinyllm compare model-Q8_0.gguf model-Q4_K.gguf @text.txt --tensors",
        compare_arguments, compare,
    ),
}  # fmt: skip
