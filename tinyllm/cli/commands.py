"""The command line: one function per command, from its parsed arguments to what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from .. import __version__, plots
from ..errors import ArgumentError, TinyLLMError
from ..files import lines_of, read_text
from . import comparing, localdocs, making, mapping, recording
from .arguments import (
    MODEL_HELP,
    USAGE_ERROR,
    Arguments,
    Command,
    Parser,
    did_you_mean,
    is_model,
    json_option,
    load_decoder,
    load_model,
    load_options,
    model_and_text,
    model_argument,
    note,
    note_if_longer,
    open_file,
    sampling_of,
    sampling_options,
    text_arguments,
)
from .serving import serve, serve_arguments
from .shim import shim, shim_arguments
from .terminal import drop_output, has_terminal, prepare_streams, show

FAILED, INTERRUPTED = 1, 130  # exit codes


# ---- run


def run_arguments(p: Parser) -> None:
    text_arguments(p, "the text to continue")
    load_options(p)
    p.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help="-1: no limit")
    sampling_options(p)
    p.add_argument("--overflow", default="error", choices=("error", "shift", "truncate"),
                   help="when the context is full")  # fmt: skip
    p.add_argument(
        "--chat", action="store_true", help="answer the text, in the model's chat template"
    )
    p.add_argument("--system", metavar="TEXT", help="a system message; the text is answered")
    p.add_argument("--no-echo", action="store_true", help="do not repeat the prompt")
    json_option(p)


def run(args: Arguments) -> None:
    prompt, sampling = model_and_text("run", args), sampling_of(args)
    answers = args.chat or args.system is not None
    with load_decoder(args) as model:
        options = {**sampling, "stop": args.stop, "overflow": args.overflow, "stream": True}
        if answers:
            system = [] if args.system is None else [{"role": "system", "content": args.system}]
            messages = [*system, {"role": "user", "content": prompt}]
            pieces = model.chat(messages, max_tokens=args.max_tokens, **options)
        else:
            pieces = model.generate(prompt, args.max_tokens, **options)
            if (
                args.model
                and "tokenizer.chat_template" in model.metadata
                and has_terminal(sys.stderr)
            ):
                note("this model also answers: --chat puts the text into its chat template")
        if args.json:
            text = "".join(pieces)
        else:
            about = model.network.reader is not None  # the text is no continuation of the prompt
            show("" if args.no_echo or answers or about else prompt)
            for piece in pieces:
                show(piece)
            show("\n")
        done = pieces.completion
        if args.json:
            print_json({"text": text, "ids": done.ids, "finish_reason": done.finish_reason,
                        "n_prompt": len(done.prompt_ids), "model": str(model.path),
                        "prompt_per_s": done.timings.prompt_per_s,
                        "generated_per_s": done.timings.generated_per_s})  # fmt: skip
        if done.finish_reason == "context":
            note(
                f"the context of {model.n_ctx} tokens is full; --overflow shift goes on, -c N enlarges it"
            )


def print_json(found: object) -> None:
    show(json.dumps(found, ensure_ascii=False) + "\n")


# ---- embed


def embed_arguments(p: Parser) -> None:
    p.add_argument("words", metavar="[MODEL] TEXT", nargs="*",
                   help=f"texts, behind {MODEL_HELP}; - or nothing: lines of standard input")  # fmt: skip
    load_options(p)
    p.add_argument("--pooling", choices=("mean", "cls", "last"), help="default: as the file says")
    p.add_argument("--no-normalize", action="store_true", help="keep the vectors' lengths")


def embed(args: Arguments) -> None:
    texts = list(args.words)
    args.model = texts.pop(0) if texts and is_model(texts[0]) else None
    if texts in ([], ["-"]):
        texts = [] if has_terminal(sys.stdin) else lines_of(read_text("-"))
    if not texts:
        raise ArgumentError('there is no text; expected one or more: tinyllm embed "A text"')
    with load_model(args) as model:
        for vector in model.embed(texts, args.pooling, not args.no_normalize):
            print_json([float(f"{x:.7g}") for x in vector])


# ---- info


def info_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("-c", "--n-ctx", type=int, metavar="N", help="context to reckon the memory of")
    p.add_argument("--kv-type", default="f16", choices=("f16", "f32", "q8_0"), help="of the cache")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--keys", action="store_true", help="every metadata key instead")
    what.add_argument("--tensors", action="store_true", help="every tensor instead")
    p.add_argument(
        "--check", action="store_true", help="read all weights; NaN or infinity is an error"
    )
    json_option(what)


def info(args: Arguments) -> None:
    from ..engine.completion import check_n_ctx
    from ..engine.progress import checking
    from ..gguf.finite import check_finite
    from . import info as about

    n_ctx = check_n_ctx(args.n_ctx)
    with open_file(args.model) as file:
        if args.json:
            print_json(about.as_json(file, n_ctx, args.kv_type))
        elif args.keys:
            show_lines(about.keys(file.metadata))
        elif args.tensors:
            show_lines(about.tensor_lines(file.tensors))
        else:
            show_lines(about.report(file, n_ctx, args.kv_type))
        if args.check:
            check_finite(file, checking)
            if not args.json:
                show(f"weights      all of {len(file.tensors)} tensors are finite\n")


def show_lines(lines: Iterable[str]) -> None:
    for line in lines:
        show(line + "\n")


# ---- explain


def explain_arguments(p: Parser) -> None:
    p.add_argument(
        "model", metavar="ARCH|MODEL", nargs="?", help=f"llama, bert, ...; or {MODEL_HELP}"
    )


def explain(args: Arguments) -> None:
    from ..models import explain as programs
    from ..models.archs import ARCHS

    if args.model in ARCHS:
        show_lines(programs.explain(*programs.example(args.model)))
        return
    if args.model and not is_model(args.model) and (hint := did_you_mean(args.model, ARCHS)):
        raise ArgumentError(f"{args.model!r} is neither an architecture nor a file{hint}")
    with open_file(args.model) as file:
        show_lines(programs.explain(file.metadata, file.tensors))


# ---- tokenize


def tokenize_arguments(p: Parser) -> None:
    text_arguments(p, "the text")
    p.add_argument("--ids", action="store_true", help="only the ids, on one line")
    p.add_argument("--no-special", action="store_true", help="add no special tokens")
    p.add_argument("--no-parse-special", action="store_true", help="<s> in the text is just text")
    json_option(p)


def tokenize(args: Arguments) -> None:
    from .. import tokenizers

    text = model_and_text("tokenize", args)
    with open_file(args.model) as file:
        tokenizer = tokenizers.load(file.metadata)
    ids = tokenizer.encode(text, not args.no_special, not args.no_parse_special)
    shown = [tokenizer.token_bytes(i) or tokenizer.token_text(i).encode() for i in ids]
    if args.json:
        texts = [piece.decode("utf-8", "backslashreplace") for piece in shown]
        print_json({"ids": ids, "tokens": texts})
    elif args.ids:
        show(" ".join(map(str, ids)) + "\n")
    else:
        show_lines(
            f"{i:>8}  {t.decode('utf-8', 'backslashreplace')!r}"
            for i, t in zip(ids, shown, strict=True)
        )


# ---- devices

GENERIC = (
    "warning: generic kernels run on this cpu, many times slower than others: {} neither AVX2 with FMA and "
    "F16C nor ARM's dot product. {}"
)


def devices_arguments(p: Parser) -> None:
    json_option(p)


def devices(args: Arguments) -> None:
    import tinyllm

    from ..kernels.cpu import emit

    found = tinyllm.list_devices()
    cpu, *gpus = ({"id": d.id, **asdict(d)} for d in found)
    if args.json:
        print_json([{**cpu, "instructions": emit.instructions()}, *gpus])
    else:
        show_lines(f"{d.id:<12} {d.memory / 1e9:>7.1f} GB  {d.name}" for d in found)
        show(f"kernels of the cpu: {emit.instructions()}\n")
    if emit.instruction_set() == "generic":
        given = " ".join(f"{name}={value}" for name, value in emit.chosen().items())
        here = f"{given} names" if given else "the system tells of"
        names = " and ".join((emit.NAME, emit.FEATURES))
        advice = "Unset it, or name what it has" if given else f"{names} name what it has"
        note(GENERIC.format(here, advice))


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
    p.add_argument("--profile", action="store_true", help="where the time goes, kernel by kernel")
    p.add_argument("--plot", metavar="FILE", help="with --profile: a figure, .png, .svg or .pdf")
    json_option(p)


def bench(args: Arguments) -> None:
    from . import bench as benchmark
    from . import profile

    if args.plot is not None:
        if not args.profile:
            raise ArgumentError("--plot draws a profile; give --profile too")
        plots.check(args.plot)
    n = args.depth + max(args.n_prompt, args.n_gen)
    if args.n_ctx is not None and n > args.n_ctx:
        asked = f"-d {args.depth}, -p {args.n_prompt} and -n {args.n_gen}"
        raise ArgumentError(
            f"{asked} need a context of {n} tokens; -c {args.n_ctx} is less: leave it out"
        )
    with load_decoder(args) as model:
        if args.n_ctx is None:  # else it was told already
            note_if_longer(model, n)
        results = benchmark.measure(model, args.n_prompt, args.n_gen, args.depth, args.repeat)
        about = benchmark.describe(model)
        found = profile.report(model, results) if args.profile else None
    if args.plot is not None and found is not None:
        plots.profile(args.plot, found.bars())
    if args.json:
        more = {} if found is None else {"profile": found.as_json()}
        print_json(benchmark.as_json(about, results) | more)
    else:
        show(benchmark.as_table(about, results) + "\n")
        show_lines([] if found is None else found.lines())


# ---- lab


def lab_arguments(p: Parser) -> None:
    p.add_argument("files", metavar="FILE", nargs="+", help="of Python, CUDA C or OpenCL C")
    p.add_argument("--device", help="cpu (default), cuda[:i], opencl[:i]")
    p.add_argument("-t", "--n-threads", type=int, metavar="N", help="default: the physical cores")
    p.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="for each time; default %(default)s"
    )
    p.add_argument("--plot", metavar="FILE", help="draw the roofline: .png, .svg or .pdf")
    json_option(p)


def lab(args: Arguments) -> None:
    from .lab import examine

    if args.plot is not None:
        plots.check(args.plot)
    found = examine(args.files, args.device, args.n_threads, args.seconds)
    if args.plot is not None and found.points():
        plots.roofline(args.plot, found.device, found.limits, found.points())
    if args.json:
        print_json(found.as_json())
    else:
        show_lines(found.lines())
    if found.wrong:
        raise TinyLLMError("a kernel is wrong")


# ---- perplexity


def perplexity_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("file", metavar="FILE", help="a text in UTF-8; - reads standard input")
    load_options(p)
    p.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens, half of them scored"
    )
    p.add_argument("--n-windows", type=int, metavar="N", help="at most; default: all")
    json_option(p)


def perplexity(args: Arguments) -> None:
    from tqdm import tqdm

    from .perplexity import perplexity as score

    text = read_text(args.file)
    with load_decoder(args) as model:
        ids = model.tokenizer.encode(text, parse_special=False)
        found = score(model, ids, args.window, args.n_windows,
                      lambda starts, n: tqdm(starts, "scoring", n, leave=False, disable=None))  # fmt: skip
    if args.json:
        print_json(asdict(found))
    else:
        show(f"perplexity {found.value:.4f} ± {found.error:.4f} "
             f"({found.n_scored} tokens of {found.n_windows} windows of {args.window})\n")  # fmt: skip


# ---- warmup


def warmup_arguments(p: Parser) -> None:
    model_argument(p)
    load_options(p)


def warmup(args: Arguments) -> None:
    from ..kernels.cpu import jit, timing
    from .warmup import warm_up

    with load_model(args) as model:
        with timing.thoroughly() as timed:
            warm_up(model)
        stages = {stage.be.where.kind for stage in model.network.stages}
        kept = f"; {jit.report()}" if "cpu" in stages else ""
        kept = ", which compiles nothing" if stages == {"reference"} else kept
        show(f"ready on {model.device}{kept}\n")
        show("".join(f"{result}\n" for result in timed))


# ---- chat


def chat_arguments(p: Parser) -> None:
    p.add_argument("file", metavar="MODEL", nargs="?", help=MODEL_HELP)
    p.add_argument("-m", "--model", metavar="MODEL", help="another way to name it")
    load_options(p)
    p.add_argument("-d", dest="device", metavar="DEVICE", help="short for --device")
    p.add_argument("--system", default="", metavar="TEXT", help="the system message")
    p.add_argument("--template", metavar="FILE", help="a Jinja chat template; default: the model's")
    p.add_argument("-n", "--max-tokens", type=int, default=-1, metavar="N", help="of an answer")
    sampling_options(p)


def chat(args: Arguments) -> None:
    from .repl import talk

    talk(args)


# ---- help and completion


def help_arguments(p: Parser) -> None:
    p.add_argument("command", metavar="COMMAND", nargs="?", help="default: all of them, briefly")


def help_(args: Arguments) -> None:
    show(overview() if args.command is None else parser_of(args.command).format_help())


def completion_arguments(p: Parser) -> None:
    p.add_argument(
        "shell",
        metavar="SHELL",
        choices=("bash", "zsh", "fish"),
        help="its output goes into ~/.bashrc, ~/.zshrc or ~/.config/fish/completions/tinyllm.fish",
    )


def completion(args: Arguments) -> None:
    from .shells import script

    show(script(args.shell, {name: parser_of(name) for name in COMMANDS}, summaries()))


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
        "List what models can run on.", "tinyllm devices", devices_arguments, devices,
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
    "lab": Command(
        "Check kernels of your own, and rank them beside ours and the machine's limits.",
        "tinyllm lab mine.py --seconds 1 --plot roofline.svg",
        lab_arguments, lab,
    ),
    "perplexity": Command(
        "Score a text, as llama.cpp's tool of that name does.",
        "tinyllm perplexity model.gguf wiki.test.raw --window 512",
        perplexity_arguments, perplexity,
    ),
    **making.COMMANDS,
    **mapping.COMMANDS,
    **comparing.COMMANDS,
    **recording.COMMANDS,
    **localdocs.COMMANDS,
    "chat": Command(
        "Talk with a model.",
        'tinyllm chat -m model.gguf --system "Answer briefly."',
        chat_arguments, chat,
    ),
    "serve": Command(
        "Answer requests over HTTP, by the protocols of OpenAI, Anthropic and GPT4All's server.",
        "tinyllm serve model.gguf --port 4891",
        serve_arguments, serve,
    ),
    "shim": Command(
        "Let programs that import gpt4all find tinyllm.", "tinyllm shim on", shim_arguments, shim,
    ),
    "help": Command(
        "Explain a command.", "tinyllm help run", help_arguments, help_,
    ),
    "completion": Command(
        "Print what a shell needs to complete commands, options and choices.",
        "tinyllm completion bash",
        completion_arguments, completion,
    ),
}  # fmt: skip


def summaries() -> dict[str, str]:
    return {name: command.summary for name, command in COMMANDS.items()}


def overview() -> str:
    lines = [f"  {name:<12} {summary}" for name, summary in summaries().items()]
    return "\n".join([
        "usage: tinyllm COMMAND ...\n\nRun language models from GGUF files.\n\ncommands:", *lines,
        "\nexample:\n  tinyllm run \"Once upon a time\"\n\nEach command explains itself: tinyllm run --help\n",
    ])  # fmt: skip


def parser_of(name: str) -> Parser:
    if name not in COMMANDS:
        known = f"; expected one of {', '.join(COMMANDS)}"
        raise ArgumentError(f"unknown command {name!r}{did_you_mean(name, COMMANDS) or known}")
    return COMMANDS[name].parser(name)


def dispatch(argv: Sequence[str]) -> None:
    """Run the command that the first argument names with the others."""
    name, rest = (argv[0], list(argv[1:])) if argv else ("", [])
    if name in ("-h", "--help"):
        show(overview())
    elif name in ("-V", "--version"):
        show(f"tinyllm {__version__}\n")
    elif not name:
        raise ArgumentError(f"no command; expected one of {', '.join(COMMANDS)}")
    else:
        parser = parser_of(name)
        COMMANDS[name].run(parser.parse_intermixed_args(rest))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    0 when it worked, 2 for a wrong argument, 1 for any other error (one line on stderr says which), 130
    after Ctrl-C.
    """
    prepare_streams()
    try:
        dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        drop_output()
        return FAILED
    except (TinyLLMError, OSError, MemoryError) as e:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # the output is what failed: a full disk, say
            drop_output()
        message = " ".join(str(e).split()) or type(e).__name__
        show(f"tinyllm: {message}\n", sys.stderr)
        return USAGE_ERROR if isinstance(e, ArgumentError) else FAILED
