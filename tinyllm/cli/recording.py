"""``tinyllm record`` and ``tinyllm replay``: texts with all that decides them, repeated bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, TinyLLMError
from ..files import check_apart, lines_of, read_text
from .arguments import (
    MODEL_HELP,
    Arguments,
    Command,
    Parser,
    beside_of,
    beside_options,
    json_option,
    load_decoder,
    load_options,
    model_argument,
    sampling_of,
    sampling_options,
    unescaped,
)
from .terminal import show

if TYPE_CHECKING:
    from ..research import Recording


def record_arguments(p: Parser) -> None:
    model_argument(p)
    p.add_argument("prompts", metavar="PROMPTS", help="a file in UTF-8: a prompt in each line")
    p.add_argument("-o", "--out", default="recording.json", metavar="FILE",
                   help="default %(default)s")  # fmt: skip
    p.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help="-1: no limit")
    p.add_argument("--chat", action="store_true", help="answer each, in the model's chat template")
    sampling_options(p)
    load_options(p)


def record(args: Arguments) -> None:
    from tqdm import tqdm

    from ..research.recording import record as begin

    options = {**sampling_of(args), "max_tokens": args.max_tokens, "stop": args.stop}
    prompts = [unescaped(line) for line in lines_of(read_text(args.prompts)) if line]
    if not prompts:
        raise ArgumentError(f"{args.prompts} has no prompts; expected one in each line")
    check_apart(args.out, [args.prompts])
    with load_decoder(args) as m:
        check_apart(args.out, m._file.paths)
        recording = begin(m)
        try:
            for prompt in tqdm(prompts, "recording", leave=False, disable=None):
                if args.chat:
                    recording.chat([{"role": "user", "content": prompt}], **options)
                else:
                    recording.generate(prompt, **options)
        finally:  # an error, or a key, does not take the texts before it
            if recording.runs:
                recording.write(args.out)
    show(f"{args.out}: {len(prompts)} texts\n")


def replay_arguments(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    p.add_argument("recording", metavar="FILE", help="what `tinyllm record` has written")
    p.add_argument("--branch", metavar="RUN:TOKEN",
                   help="go on from this token of a text, and show what comes of it")  # fmt: skip
    p.add_argument("--put", metavar="TEXT", type=unescaped, help="put this text there first")
    p.add_argument("--seed", type=int, metavar="N", help="draw by another seed behind the branch")
    p.add_argument("-n", "--max-tokens", type=int, metavar="N",
                   help="of the branch, with what it keeps; default: as recorded")  # fmt: skip
    p.add_argument("-o", "--out", metavar="FILE", help="write the recording with the branch")
    p.add_argument("--device", help="default: as recorded")
    p.add_argument("--kv-type", choices=("f16", "f32", "q8_0"), help="default: as recorded")
    p.add_argument("--compute", choices=("f32", "bf16", "exact"), help="default: as recorded")
    p.add_argument("-t", "--n-threads", type=int, metavar="N", help="default: the physical cores")
    beside_options(p)
    json_option(p)


def replay(args: Arguments) -> None:
    import tinyllm

    from ..research import Recording
    from .arguments import locate

    check_branch(args)
    recording = Recording.read(args.recording)
    wanted = {n: v for n in ("device", "kv_type", "compute") if (v := getattr(args, n)) is not None}
    settings: dict[str, Any] = {
        **recording.settings, **wanted, "n_threads": args.n_threads, **beside_of(args),
    }  # fmt: skip
    with tinyllm.load(locate(args.model), **settings) as m:
        if args.branch is not None:
            if args.out:
                check_apart(args.out, [args.recording, *m._file.paths])
            branch(args, Recording.read(args.recording, m))
            return
        found = tinyllm.replay(recording, m)
    if args.json:
        show(json.dumps({"same": found.same, **asdict(found)}, ensure_ascii=False) + "\n")
    else:
        lines = [f"changed: {line}" for line in found.changed] + list(map(str, found.parted))
        show("".join(line + "\n" for line in lines))
    n, other = len(recording.runs), len(found.parted)
    if other:
        raise TinyLLMError(f"{other} of {n} texts differ from the recording")
    if not args.json:
        show(f"{n} texts: every bit is as recorded\n")


def check_branch(args: Arguments) -> None:
    """ArgumentError for an option that has no meaning with a branch, or without one."""
    if args.branch is not None:
        if args.json:
            raise ArgumentError("--json has no meaning with --branch; -o writes the recording")
        return
    given = {"--put": args.put, "--seed": args.seed, "-n": args.max_tokens, "-o": args.out}
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"{name} has no meaning without --branch")


def branch(args: Arguments, recording: Recording) -> None:
    """Go on from a recorded token, show the text, and write it where asked."""
    run, _, at = args.branch.partition(":")
    if not (run.isdecimal() and at.isdecimal()):
        raise ArgumentError(f"--branch {args.branch!r:.40}; expected RUN:TOKEN, such as 0:12")
    options = {n: v for n in ("seed", "max_tokens") if (v := getattr(args, n)) is not None}
    done = recording.branch(int(run), int(at), args.put, **options)
    show(done.text + "\n")
    if args.out:
        recording.write(args.out)


COMMANDS = {
    "record": Command(
        "Write texts with everything that decides them to a file, for tinyllm replay.",
        "tinyllm record model.gguf prompts.txt -o session.json --seed 1",
        record_arguments, record,
    ),
    "replay": Command(
        "Repeat recorded texts bit for bit, or say where they part; go on from any token.",
        "tinyllm replay model.gguf session.json",
        replay_arguments, replay,
    ),
}  # fmt: skip
