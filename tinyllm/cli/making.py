"""Commands that write files for models: convert, quantize, imatrix, control, merge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..files import check_apart, read_text
from .arguments import (
    MODEL_HELP,
    Arguments,
    Command,
    Parser,
    adapter,
    load_decoder,
    load_options,
    open_file,
    unescaped,
)
from .terminal import show

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def size(text: str) -> int:
    """Bytes from a number with a unit: "500M", "4G"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.upper())
    n = 0 if match is None else int(float(match[1]) * UNITS[match[2]])
    if n < 1:
        raise ArgumentError(f"{text!r:.40} is no size; expected a number such as 500M or 4G")
    return n


def writing_options(p: Parser) -> None:
    p.add_argument("-t", "--n-threads", type=int, metavar="N", help="default: all cores")
    p.add_argument(
        "--split", metavar="SIZE", help="write parts of about so many bytes each, such as 4G"
    )


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Any]:
    """A bar on standard error while tensors are written."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, leave=False, unit="tensor", disable=None) as bar:
        yield bar


def part_bytes(args: Arguments) -> int | None:
    return None if args.split is None else size(args.split)


def show_written(target: str, types: Mapping[str, str]) -> None:
    """Say which types the tensors have, and how large the file became."""
    for kind, n in Counter(types.values()).most_common():
        show(f"{kind:<8} {n} tensors\n")
    stem = Path(target.removesuffix(".gguf"))
    firsts = [Path(target), *stem.parent.glob(f"{escape(stem.name)}-00001-of-[0-9]*.gguf")]
    newest = max((f for f in firsts if f.exists()), key=lambda f: f.stat().st_mtime_ns)
    with open_file(str(newest)) as file:  # others may be left of an earlier run
        files = [Path(path) for path in file.paths]
        n_weights = sum(tensor.n_elements for tensor in file.tensors.values())
    nbytes = sum(f.stat().st_size for f in files)
    bits = f"{8 * nbytes / n_weights:.2f} bits per weight"
    parts = f" in {len(files)} parts" if len(files) > 1 else ""
    show(f"{files[0]}: {nbytes / 1e6:.1f} MB{parts}, {bits}\n")


# ---- convert


def convert_arguments(p: Parser) -> None:
    from ..gguf.mixtures import MIXTURES

    p.add_argument(
        "source", metavar="FOLDER", help="of a Hugging Face model: config.json, *.safetensors, ..."
    )
    p.add_argument("target", metavar="OUT", help="the .gguf file to write")
    p.add_argument("--type", type=str.upper, default="F16", metavar="TYPE", choices=tuple(MIXTURES),
                   help=f"default F16; one of {' '.join(MIXTURES)}")  # fmt: skip
    writing_options(p)


def convert(args: Arguments) -> None:
    from ..gguf.convert import convert as convert_folder

    with progress("converting", None) as bar:
        types = convert_folder(
            args.source, args.target, args.type, n_threads=args.n_threads,
            part_bytes=part_bytes(args), report=lambda *_: bar.update(),
        )  # fmt: skip
    show_written(args.target, types)


def rewrite(
    args: Arguments, doing: str, write: Callable[..., dict[str, str]], *more: Any, **how: Any
) -> None:
    """Write a file's tensors to another one, with a bar that counts them."""
    with open_file(args.source) as file:
        source, n_tensors = file.path, len(file.tensors)
    with progress(doing, n_tensors) as bar:
        how |= {"n_threads": args.n_threads, "part_bytes": part_bytes(args)}
        types = write(source, args.target, *more, report=lambda *_: bar.update(), **how)
    show_written(args.target, types)


# ---- quantize


def quantize_arguments(p: Parser) -> None:
    from ..gguf.mixtures import MIXTURES

    p.add_argument(
        "source", metavar="IN", help="an F16, BF16 or F32 file; of a split one the first"
    )
    p.add_argument("target", metavar="OUT", help="the file to write")
    p.add_argument("format", metavar="FORMAT", nargs="?", type=str.upper, default="Q4_K_M",
                   choices=tuple(MIXTURES), help=f"default Q4_K_M; one of {' '.join(MIXTURES)}")  # fmt: skip
    p.add_argument(
        "--requantize", action="store_true", help="also from quantised types; adds their errors"
    )
    p.add_argument("--imatrix", metavar="FILE", help="of `tinyllm imatrix`, or llama-imatrix")
    p.add_argument("--keep", action="append", default=[], metavar="REGEX",
                   help="tensors whose names match stay as they are; may be repeated")  # fmt: skip
    p.add_argument("--tensor-type", action="append", default=[], metavar="REGEX=TYPE",
                   help="another type for tensors whose names match; may be repeated")  # fmt: skip
    writing_options(p)


def quantize(args: Arguments) -> None:
    from ..gguf.quantize import quantize as quantize_file

    types = dict(map(chosen_type, args.tensor_type))
    how = {
        "requantize": args.requantize,
        "imatrix": args.imatrix,
        "keep": args.keep,
        "types": types,
    }
    rewrite(args, "quantizing", quantize_file, args.format, **how)


def chosen_type(text: str) -> tuple[str, str]:
    """A regular expression and a type out of ``REGEX=TYPE``."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise ArgumentError(f"--tensor-type {text!r:.60}; expected REGEX=TYPE, as in ffn_down=Q6_K")
    return pattern, kind


# ---- imatrix


def imatrix_arguments(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", help="a .gguf file, as exact as you have it")
    p.add_argument("text", metavar="TEXT", help="a file in UTF-8: what the model will be used for")
    p.add_argument("-o", "--out", default="imatrix.gguf", metavar="FILE",
                   help="default imatrix.gguf; a name in .dat gives llama.cpp's older format")  # fmt: skip
    p.add_argument("--window", type=int, default=512, metavar="N", help="tokens of a piece")
    p.add_argument("--n-windows", type=int, metavar="N", help="at most so many pieces")
    p.add_argument("--device", help="cpu (default), cuda[:i], opencl[:i]")
    p.add_argument("-t", "--n-threads", type=int, metavar="N", help="default: the physical cores")


def imatrix(args: Arguments) -> None:
    from tqdm import tqdm

    from ..measuring import imatrix as measure

    check_apart(args.out, [args.text])
    found = measure(
        args.model, read_text(args.text), args.out, window=args.window, n_windows=args.n_windows,
        device=args.device, n_threads=args.n_threads, dataset=Path(args.text).name,
        progress=lambda pieces, n: tqdm(pieces, "measuring", n, leave=False, disable=None),
    )  # fmt: skip
    show(f"{args.out}: {len(found.sums)} matrices, {found.chunks} pieces of text\n")


# ---- merge


def merge_arguments(p: Parser) -> None:
    p.add_argument("source", metavar="IN", help="a .gguf file; of a split one the first")
    p.add_argument("target", metavar="OUT", help="the file to write")
    p.add_argument("lora", metavar="ADAPTER[=SCALE]", nargs="+",
                   help="a .gguf file or a folder of PEFT's, with its scale (1 unless said)")  # fmt: skip
    writing_options(p)


def merge(args: Arguments) -> None:
    from ..gguf.merge import merge as merge_files

    rewrite(args, "merging", merge_files, [adapter(text) for text in args.lora])


# ---- control


def control_arguments(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("positive", metavar="POSITIVE", help="a file in UTF-8: a prompt in each line")
    p.add_argument("negative", metavar="NEGATIVE", help="a file of prompts of the other kind")
    p.add_argument(
        "-o", "--out", default="control.gguf", metavar="FILE", help="default %(default)s"
    )
    p.add_argument("--method", default="mean", choices=("mean", "pca"),
                   help="the difference of the means, or the main direction of pairs of lines")  # fmt: skip
    p.add_argument("--all-tokens", action="store_true",
                   help="a prompt is the mean of its tokens but the first, not its last one")  # fmt: skip
    load_options(p)


def control(args: Arguments) -> None:
    check_apart(args.out, [args.positive, args.negative])
    positive, negative = prompts_of(args.positive), prompts_of(args.negative)
    with load_decoder(args) as m:
        check_apart(args.out, m._file.paths)
        vector = m.control_vector(
            positive, negative, args.method, slice(1, None) if args.all_tokens else -1
        )
    vector.write(args.out)
    n = f"{len(positive)} and {len(negative)}"
    show(f"{args.out}: directions of layers 1 to {max(map(int, vector))}, from {n} prompts\n")


def prompts_of(path: str) -> list[str]:
    r"""The lines of a file that are not empty; ``\n`` and the like are understood."""
    found = [unescaped(line) for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise ArgumentError(f"{path} has no prompts; expected one in each line")
    return found


COMMANDS = {
    "convert": Command(
        "Write a folder of safetensors as a GGUF file.",
        "tinyllm convert SmolLM2-135M-Instruct smollm2.gguf --type Q8_0",
        convert_arguments, convert,
    ),
    "quantize": Command(
        "Write a model again in fewer bits.",
        "tinyllm quantize model-f16.gguf model-q4.gguf Q4_K_M",
        quantize_arguments, quantize,
    ),
    "imatrix": Command(
        "Measure which inputs of a model's matrices are large, for quantize --imatrix.",
        "tinyllm imatrix model-f16.gguf text.txt -o model.imatrix.gguf",
        imatrix_arguments, imatrix,
    ),
    "control": Command(
        "Make a control vector, for --control, from prompts of two kinds.",
        "tinyllm control model.gguf formal.txt casual.txt -o formal.gguf",
        control_arguments, control,
    ),
    "merge": Command(
        "Write a model again with adapters in its weights.",
        "tinyllm merge model-f16.gguf merged-f16.gguf my-adapter=0.5",
        merge_arguments, merge,
    ),
}  # fmt: skip
