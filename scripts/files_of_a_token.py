"""Count the files that somebody opens who follows one token: scripts/files_of_a_token.py [--names]

Nothing is guessed from the text: the bundled model runs, and the Python stack says which files led to a place.

to the Backend     the files on the stack wherever ``tinyllm run`` calls an operation of its backend, and the
                   Backend's contract
to the arithmetic  further, those on the stack when the first dot instruction of a product is emitted; not the
                   compiler that stands in between (jit, translate), as one need not read Python's
a decode step      the files of which any code runs between one id and the next, when the step is replayed
climbs             how often the calls from ``GPT4All.generate`` to ``Network.forward`` come back to a file that
                   they had left
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tinyllm  # noqa: E402
from tinyllm.cli import main  # noqa: E402
from tinyllm.engine.generate import Run, steps  # noqa: E402
from tinyllm.kernels.cpu import emit, jit  # noqa: E402
from tinyllm.models.network import Network  # noqa: E402
from tinyllm.sampling import Sampler, SamplingParams  # noqa: E402
from tinyllm.sdk import GPT4All  # noqa: E402

PACKAGE = Path(tinyllm.__file__).parent
CPU, LOOP = "kernels/cpu/backend.py", "engine/generate.py"
COMPILER = {"kernels/cpu/jit.py", "kernels/cpu/translate.py"}
AT_MOST = {"to the Backend": 10, "to the arithmetic": 14, "a decode step": 12, "climbs": 2}


def file_of(frame: FrameType) -> str | None:
    """A frame's file below the package, None for others."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def stack(frame: FrameType | None) -> list[str]:
    """The package's files on the stack, outermost first, one entry a call."""
    found = []
    while frame is not None:
        if name := file_of(frame):
            found.append(name)
        frame = frame.f_back
    return found[::-1]


@contextlib.contextmanager
def watching(seen: Callable[[FrameType], object]) -> Iterator[None]:
    """Show ``seen`` each frame of the package that begins on this thread."""

    def event(frame: FrameType, what: str, arg: object) -> None:
        if what == "call" and file_of(frame):
            seen(frame)

    sys.setprofile(event)
    try:
        yield
    finally:
        sys.setprofile(None)


def quietly(*argv: str) -> None:
    """Run a command line, its output dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(argv) == 0


def to_the_backend() -> list[str]:
    """Files on the stack at the backend's operations, and the contract of these."""
    found: dict[str, None] = {}

    def seen(frame: FrameType) -> None:
        caller = file_of(frame.f_back) if frame.f_back else None
        computes = frame.f_code.co_name != "top_k"  # sampling's question comes on the way back
        crosses = (
            computes
            and file_of(frame) == CPU
            and caller is not None
            and not caller.startswith("kernels/")
        )
        if crosses and LOOP in stack(frame):
            found.update(dict.fromkeys(n for n in stack(frame) if not n.startswith("kernels/")))

    with watching(seen):
        quietly("run", "Once upon a time", "-n", "1")
    return [*found, "kernels/backend.py"]


def to_the_arithmetic() -> list[str]:
    """Files on the stack between the backend and the first dot product that is emitted."""
    found: list[str] = []

    def noting(operation: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object, **more: object) -> object:
            if not found:
                found.extend(n for n in stack(sys._getframe()) if n.startswith("kernels/"))
            return operation(*args, **more)

        return noted

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TINYLLM_CACHE=folder):
        jit.cache_folder.cache_clear()
        with contextlib.ExitStack() as watched:
            for name in ("dot", "pairs"):  # without VNNI kernels add the pairs up themselves
                operation = noting(getattr(emit.Emit, name))
                watched.enter_context(mock.patch.object(emit.Emit, name, operation))
            quietly("run", "Once", "-n", "1")
    jit.cache_folder.cache_clear()
    return [n for n in dict.fromkeys(found) if n not in COMPILER]


def a_decode_step() -> list[str]:
    """Files whose code runs between two ids of a text, once steps are replayed."""
    found: dict[str, None] = {}

    def seen(frame: FrameType) -> None:
        if LOOP in stack(frame):
            found[str(file_of(frame))] = None

    with tinyllm.load() as model:
        state = model.new_state(64)
        state.append(model.tokenizer.encode("Once upon a time"))
        run = Run(
            state,
            Sampler(SamplingParams(seed=1), model.network.n_vocab, model.network.be.top_k),
            30,
        )
        work = steps(model.network, [run])
        for _ in range(10):
            next(work)
        with watching(seen):
            next(work)
        work.close()
    return [*found]


def climbs() -> list[str]:
    """Files that the calls from ``GPT4All.generate`` to ``Network.forward`` come back to."""
    paths: list[list[str]] = []
    forward = Network.forward

    def noted(*args: object, **more: object) -> object:
        paths.append(stack(sys._getframe().f_back))
        return forward(*args, **more)

    bundled = PACKAGE / "data" / "bundled.gguf"
    with mock.patch.object(Network, "forward", noted), GPT4All(str(bundled)) as model:
        with model.chat_session():
            model.generate("Hello", max_tokens=2)
    (path, *_) = paths
    rooms = [name for i, name in enumerate(path) if i == 0 or path[i - 1] != name]
    return [name for i, name in enumerate(rooms) if name in rooms[:i]]


def counts() -> dict[str, list[str]]:
    """The files of each count; kernels are compiled first, as they are but once in a process."""
    arithmetic = to_the_arithmetic()
    backend = to_the_backend()
    return {
        "to the Backend": backend,
        "to the arithmetic": backend + arithmetic,
        "a decode step": a_decode_step(),
        "climbs": climbs(),
    }


if __name__ == "__main__":
    for what, files in counts().items():
        print(f"{what:<18} {len(files):>2} (at most {AT_MOST[what]})")
        if "--names" in sys.argv:
            print(*files, sep="\n", end="\n\n")
