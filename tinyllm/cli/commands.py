"""The command line: one function per command, from its parsed arguments to what it prints."""

from __future__ import annotations

import difflib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import ArgumentError, TinyLLMError
from .arguments import (
    MODEL_HELP,
    USAGE_ERROR,
    Arguments,
    Command,
    Parser,
    load_decoder,
    load_model,
    load_options,
    model_argument,
    open_file,
    read_text,
    refuse_lonely_model,
    sampling_of,
    sampling_options,
    text_argument,
)
from .terminal import show

FAILED, INTERRUPTED = 1, 130  # exit codes


# ---- run


def run_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    load_options(p)
    p.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help="-1: no limit")
    sampling_options(p)
    p.add_argument("--overflow", default="error", choices=("error", "shift", "truncate"),
                   help="when the context is full")  # fmt: skip
    p.add_argument("--no-echo", action="store_true", help="do not repeat the prompt")


def run(args: Arguments) -> None:
    refuse_lonely_model("run", args.model, args.prompt)
    prompt, sampling = text_argument(args.prompt), sampling_of(args)
    with load_decoder(args) as model:
        pieces = model.generate(
            prompt, args.max_tokens, **sampling, stop=args.stop, overflow=args.overflow, stream=True
        )
        show("" if args.no_echo else prompt)
        for piece in pieces:
            show(piece)
        print()


# ---- embed


def embed_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("text", metavar="TEXT", nargs="+", help="- reads one text per line")
    load_options(p)
    p.add_argument("--pooling", choices=("mean", "cls", "last"), help="default: as the file says")
    p.add_argument("--no-normalize", action="store_true", help="keep the vectors' lengths")


def embed(args: Arguments) -> None:
    refuse_lonely_model("embed", args.model, args.text[0])
    texts = read_text("-").splitlines() if args.text == ["-"] else args.text
    with load_model(args) as model:
        for vector in model.embed(texts, args.pooling, not args.no_normalize):
            print(json.dumps([float(f"{x:.7g}") for x in vector]))


# ---- info


def info_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("-c", "--n-ctx", type=int, metavar="N", help="context to reckon the memory of")
    p.add_argument("--kv-type", default="f16", choices=("f16", "f32", "q8_0"), help="of the cache")
    p.add_argument("--keys", action="store_true", help="every metadata key instead")
    p.add_argument("--tensors", action="store_true", help="every tensor instead")
    p.add_argument(
        "--check", action="store_true", help="read all weights; NaN or infinity is an error"
    )


def info(args: Arguments) -> None:
    from ..engine.progress import checking
    from ..gguf.finite import check_finite
    from . import info as about

    with open_file(args.model) as file:
        if args.keys:
            lines = about.keys(file.metadata)
        elif args.tensors:
            lines = about.tensor_lines(file.tensors)
        else:
            lines = about.report(file, args.n_ctx, args.kv_type)
        for line in lines:
            print(line)
        if args.check:
            check_finite(file, checking)
            print(f"weights      all of {len(file.tensors)} tensors are finite")


# ---- explain


def explain_arguments(p: Parser) -> None:
    p.add_argument(
        "model", metavar="ARCH|MODEL", nargs="?", help=f"llama, bert, ...; or {MODEL_HELP}"
    )


def explain(args: Arguments) -> None:
    from ..models import explain as programs
    from ..models.archs import ARCHS

    if args.model in ARCHS:
        lines = list(programs.explain(*programs.example(args.model)))
    else:
        with open_file(args.model) as file:
            lines = list(programs.explain(file.metadata, file.tensors))
    print("\n".join(lines))


# ---- tokenize


def tokenize_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("text", metavar="TEXT", help="- reads standard input")
    p.add_argument("--ids", action="store_true", help="only the ids, on one line")
    p.add_argument("--no-special", action="store_true", help="add no special tokens")
    p.add_argument("--no-parse-special", action="store_true", help="<s> in the text is just text")


def tokenize(args: Arguments) -> None:
    from .. import tokenizers

    refuse_lonely_model("tokenize", args.model, args.text)
    with open_file(args.model) as file:
        tokenizer = tokenizers.load(file.metadata)
    ids = tokenizer.encode(text_argument(args.text), not args.no_special, not args.no_parse_special)
    if args.ids:
        print(*ids)
        return
    for i in ids:
        shown = tokenizer.token_bytes(i) or tokenizer.token_text(i).encode()
        print(f"{i:>8}  {shown.decode('utf-8', 'backslashreplace')!r}")


# ---- devices


def no_arguments(p: Parser) -> None:
    """The command takes none."""


def devices(args: Arguments) -> None:
    import tinyllm

    for d in tinyllm.list_devices():
        print(f"{d.id:<12} {d.memory / 1e9:>7.1f} GB  {d.name}")


# ---- bench


def bench_arguments(p: Parser) -> None:
    model_argument(p)
    load_options(p)
    p.add_argument(
        "-p", "--n-prompt", type=int, default=512, metavar="N", help="default %(default)s"
    )
    p.add_argument("-n", "--n-gen", type=int, default=64, metavar="N", help="default %(default)s")
    p.add_argument("-d", "--depth", type=int, default=0, metavar="N", help="tokens in the context")
    p.add_argument("-r", "--repeat", type=int, default=3, metavar="N", help="default %(default)s")
    p.add_argument("--json", action="store_true", help="one line of JSON")


def bench(args: Arguments) -> None:
    from . import bench as benchmark

    with load_decoder(args) as model:
        results = benchmark.measure(model, args.n_prompt, args.n_gen, args.depth, args.repeat)
        about = benchmark.describe(model)
    print(
        json.dumps(benchmark.as_json(about, results))
        if args.json
        else benchmark.as_table(about, results)
    )


# ---- perplexity


def perplexity_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("file", metavar="FILE", help="a text in UTF-8; - reads standard input")
    load_options(p)
    p.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens, half of them scored"
    )
    p.add_argument("--n-windows", type=int, metavar="N", help="at most; default: all")


def perplexity(args: Arguments) -> None:
    from tqdm import tqdm

    from .perplexity import perplexity as score

    text = read_text(args.file)
    with load_decoder(args) as model:
        ids = model.tokenizer.encode(text, parse_special=False)
        found = score(model, ids, args.window, args.n_windows,
                      lambda starts, n: tqdm(starts, "scoring", n, leave=False, disable=None))  # fmt: skip
    print(
        f"perplexity {found.value:.4f} ± {found.error:.4f} "
        f"({found.n_scored} tokens of {found.n_windows} windows of {args.window})"
    )


# ---- quantize


def quantize_arguments(p: Parser) -> None:
    from ..gguf.mixtures import MIXTURES

    p.add_argument(
        "source", metavar="IN", help="an F16, BF16 or F32 file; of a split one the first"
    )
    p.add_argument("target", metavar="OUT", help="the file to write")
    p.add_argument("format", metavar="FORMAT", nargs="?", type=str.upper, default="Q4_K_M",
                   choices=tuple(MIXTURES), help=f"default Q4_K_M; one of {' '.join(MIXTURES)}")  # fmt: skip
    p.add_argument("-t", "--n-threads", type=int, metavar="N", help="default: all cores")
    p.add_argument(
        "--requantize", action="store_true", help="also from quantised types; adds their errors"
    )


def quantize(args: Arguments) -> None:
    from tqdm import tqdm

    from ..gguf.quantize import quantize_file

    with open_file(args.source) as file:
        source, n_tensors = file.path, len(file.tensors)
        n_weights = sum(tensor.n_elements for tensor in file.tensors.values())
    with tqdm(total=n_tensors, desc="quantizing", leave=False, unit="tensor", disable=None) as bar:
        types = quantize_file(
            source, args.target, args.format, requantize=args.requantize,
            n_threads=args.n_threads, report=lambda *_: bar.update(),
        )  # fmt: skip
    for kind, n in Counter(types.values()).most_common():
        print(f"{kind:<8} {n} tensors")
    nbytes = Path(args.target).stat().st_size
    print(f"{args.target}: {nbytes / 1e6:.1f} MB, {8 * nbytes / n_weights:.2f} bits per weight")


# ---- warmup


def warmup_arguments(p: Parser) -> None:
    model_argument(p)
    load_options(p)


def warmup(args: Arguments) -> None:
    from ..kernels.cpu import jit
    from .warmup import warm_up

    with load_model(args) as model:
        warm_up(model)
        print(f"ready on {model.device}; {jit.report()}")


# ---- all of them


COMMANDS = {
    "run": Command(
        "Continue a text, word by word.",
        'tinyllm run model.gguf "Once upon a time" -n 100 --seed 1',
        run_arguments, run,
    ),
    "embed": Command(
        "Print each text's embedding as a line of JSON.",
        'tinyllm embed all-MiniLM-L6-v2.gguf2.f16.gguf "A first text" "A second"',
        embed_arguments, embed,
    ),
    "info": Command(
        "Say what a file holds and how it would run; no weights are read, but with --check.",
        "tinyllm info model.gguf -c 8192",
        info_arguments, info,
    ),
    "explain": Command(
        "Show a model's layers as a program, line by line with shapes.",
        "tinyllm explain gemma2",
        explain_arguments, explain,
    ),
    "tokenize": Command(
        "Print a text's tokens; a vocabulary-only file is enough.",
        'tinyllm tokenize model.gguf "Hello, world"',
        tokenize_arguments, tokenize,
    ),
    "devices": Command(
        "List what models can run on.", "tinyllm devices", no_arguments, devices,
    ),
    "warmup": Command(
        "Compile a model's kernels ahead of its first use; they are kept on disk.",
        "tinyllm warmup model.gguf",
        warmup_arguments, warmup,
    ),
    "bench": Command(
        "Measure tokens per second, of a prompt (pp) and one by one (tg), as llama-bench does.",
        "tinyllm bench model.gguf -p 512 -n 64 -t 2 -r 3",
        bench_arguments, bench,
    ),
    "perplexity": Command(
        "Score a text, as llama.cpp's tool of that name does.",
        "tinyllm perplexity model.gguf wiki.test.raw --window 512",
        perplexity_arguments, perplexity,
    ),
    "quantize": Command(
        "Write a model again in fewer bits.",
        "tinyllm quantize model-f16.gguf model-q4.gguf Q4_K_M",
        quantize_arguments, quantize,
    ),
}  # fmt: skip
ELSEWHERE = {"chat": "Talk with a model."}


def overview() -> str:
    summaries = {name: c.summary for name, c in COMMANDS.items()} | ELSEWHERE
    lines = [f"  {name:<12} {summary}" for name, summary in summaries.items()]
    return "\n".join([
        "usage: tinyllm COMMAND ...\n\nRun language models from GGUF files.\n\ncommands:", *lines,
        "\nexample:\n  tinyllm run \"Once upon a time\"\n\nEach command explains itself: tinyllm run --help",
    ])  # fmt: skip


def dispatch(argv: Sequence[str]) -> None:
    """Run the command that the first argument names with the others."""
    name, rest = (argv[0], list(argv[1:])) if argv else ("", [])
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"tinyllm {__version__}")
    elif name == "chat":
        from .repl import main as chat

        chat(rest)
    elif name in COMMANDS:
        command = COMMANDS[name]
        command.run(command.parser(name).parse_intermixed_args(rest))
    else:
        raise ArgumentError(unknown_command(name))


def unknown_command(name: str) -> str:
    known = [*COMMANDS, *ELSEWHERE]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown command {name!r}; {hint}" if name else f"no command; {hint}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    0 when it worked, 2 for a wrong argument, 1 for any other error (one line on stderr says which), 130
    after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    try:
        dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (TinyLLMError, OSError, MemoryError) as e:
        message = " ".join(str(e).split()) or type(e).__name__
        show(f"tinyllm: {message}\n", sys.stderr)
        return USAGE_ERROR if isinstance(e, ArgumentError) else FAILED
