"""Texts with all that decides them in a file, to be repeated bit for bit and gone on from at any token."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import import_module, metadata, resources
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.generate import DAMAGED
from ..errors import ArgumentError, NumericError
from ..files import read_text, replacing
from ..models.state import ids_of
from ..models.step import hook_of
from .points import whole
from .stored import FORM, options_of, parse, stored_options

if TYPE_CHECKING:
    from ..engine.completion import Completion, Prompt
    from ..model import Model

MAX_TOKENS = 256  # what ``generate`` takes where nothing is said
GRAMMARS = {"json_schema", "regex", "grammar"}
PIECE = 1 << 22  # bytes of a file that are hashed at a time
DECIDES = (
    "kernels",
    "models",
    "gguf",
    "engine",
    "tokenizers",
    "sampling.py",
    "text.py",
)  # the parts of the package whose code makes bits
SOURCES = (".py", ".h", ".cl", ".cu", ".c")


@dataclass(frozen=True)
class Recorded:
    """One text: what was asked for, and what came of it.

    ``logits`` has for each choice of a token, at its place in the text, a hash of the logits that it was made
    from, "" where a grammar left no choice; ``chosen`` the chosen token's own logit. ``parent`` is the run
    that it branches from and how many of its tokens it keeps; ``forced`` are these tokens and what was put
    behind them.
    """

    prompt_ids: list[int]
    options: dict[str, Any]
    ids: list[int]
    text: str
    finish_reason: str
    logits: list[str]
    chosen: list[float | None]
    parent: tuple[int, int] | None = None
    forced: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Parted:
    """Where a repeated text parts from the recorded one.

    ``bits`` is the first token whose logits have other bits, and ``difference`` by how much the recorded
    token's logit moved there; None where only later ones could be compared. ``token`` is the first token that
    is another one, with both ``words``; None if the texts are the same.
    """

    run: int
    bits: int | None
    difference: float | None
    token: int | None
    words: tuple[str, str] | None

    def __str__(self) -> str:
        parts = []
        if self.bits is not None:
            moved = "" if self.difference is None else f" by {self.difference:.3g}"
            parts.append(f"the logits of token {self.bits} differ{moved}")
        if self.token is not None and self.words is not None:
            parts.append(f"token {self.token} is {self.words[1]!r}, recorded is {self.words[0]!r}")
        if self.token is None:
            parts.append("the text is the same")
        return f"run {self.run}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Replay:
    """What ``replay`` found: what has ``changed`` since the recording, and where texts ``parted``."""

    changed: list[str]
    parted: list[Parted]

    @property
    def same(self) -> bool:
        """Whether every logit of every text has the recorded bits."""
        return not self.parted


class NotAllowed(ArgumentError):
    """A token that is to be put at a place, ``at``, which the grammar does not allow there."""

    def __init__(self, at: int) -> None:
        super().__init__(f"the grammar does not allow the tokens that are put there, at token {at}")
        self.at = at


class Watch:
    """Hashes the logits of each choice, and forces the first tokens of a branch. A processor of logits.

    ``logits`` has by place the logit of the token of ``told``, without it that of the token that was chosen.
    """

    def __init__(
        self, n_prompt: int, forced: Sequence[int], told: Sequence[int] | None = None
    ) -> None:
        self.n_prompt, self.forced, self.told = n_prompt, forced, told
        self.hashes: dict[int, str] = {}
        self.logits: dict[int, float | None] = {}
        self._last: tuple[int, np.ndarray] | None = None

    def __call__(self, ids: list[int], logits: np.ndarray) -> np.ndarray | None:
        self.note(ids[self.n_prompt :])
        at = len(ids) - self.n_prompt
        row = np.array(logits, np.float32)
        self.hashes[at] = hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest()
        self._last = at, row
        if at >= len(self.forced):
            return None
        only = np.full_like(row, -np.inf)
        only[self.forced[at]] = 0
        return only

    def note(self, ids: Sequence[int]) -> None:
        """Keep one logit of the last row, now that the text is known up to its place."""
        if self._last is None:
            return
        at, row = self._last
        tokens = ids if self.told is None else self.told
        if at < len(tokens):
            x = float(row[tokens[at]])
            self.logits[at] = x if math.isfinite(x) else None  # a bias may forbid what is put there
        self._last = None

    @property
    def is_put(self) -> bool:
        """Whether the last choice was of a token that is forced."""
        return self._last is not None and self._last[0] < len(self.forced)


class Recording:
    """Generations of a model with everything that decides their bits; made by ``tinyllm.record``.

    ``about`` says of which model, by which code and with which settings; ``runs`` are the texts.
    """

    def __init__(
        self, model: Model | None, about: dict[str, Any], runs: Sequence[Recorded] = ()
    ) -> None:
        self._model, self.about, self.runs = model, about, list(runs)

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """``Model.generate`` for one prompt, whose outcome is recorded.

        Options are those that a file can hold: sampling, ``max_tokens``, ``stop``, ``json_schema``, ``regex``,
        ``grammar``, ``whole`` and ``lora``. Without a ``seed`` one is drawn and recorded.
        """
        return self._run(self._need().prompt_ids(prompt), options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """Answer messages by the file's template; the rest is as for ``generate``."""
        return self._run(self._need().turn(messages).ids, options)

    def branch(
        self, run: int, at: int, token: int | str | Sequence[int] | None = None, **options: Any
    ) -> Completion:
        """Go on from a recorded text's first ``at`` tokens, and record that as a run of its own.

        Parameters
        ----------
        run : int
            The text's number in ``runs``.
        at : int
            How many of its tokens stay.
        token : int, str or sequence of int, optional
            What is put behind them, such as another word. Default: nothing; the text goes on by the options.
        **options
            What differs from the recorded options. The same seed draws the same random numbers at each token.

        Raises
        ------
        ArgumentError
            There is no such run or token, max_tokens leaves no room, or a grammar does not allow the tokens.
        """
        run, at = whole(run, "run"), whole(at, "at")
        if not 0 <= run < len(self.runs):
            raise ArgumentError(
                f"run={run!r:.20}; the recording has runs 0 to {len(self.runs) - 1}"
            )
        base = self.runs[run]
        if not 0 <= at <= len(base.ids):
            raise ArgumentError(f"at={at!r:.20}; the text has {len(base.ids)} tokens")
        m = self._need()
        if isinstance(token, str):
            token = m.tokenizer.encode(token, add_special=False)
        some = [] if token is None else token if isinstance(token, Iterable) else [token]
        put = ids_of(some, "token", "a token's id, a text or ids")
        given = {**options_of(base.options), **options}
        forced = [*base.ids[:at], *put]
        most = given.get("max_tokens", MAX_TOKENS)
        if isinstance(most, Integral) and 0 <= int(most) <= len(forced):
            raise ArgumentError(
                f"max_tokens={most}, but {len(forced)} tokens are kept and put there; give more, or -1"
            )
        return self._run(base.prompt_ids, given, (run, at), forced)

    def _need(self) -> Model:
        if self._model is None:
            raise ArgumentError("the recording was read from a file; give its model to open it")
        return self._model

    def _run(
        self,
        ids: list[int],
        options: dict[str, Any],
        parent: tuple[int, int] | None = None,
        forced: Sequence[int] = (),
    ) -> Completion:
        options = stored_options(options)
        options.setdefault("seed", secrets.randbits(48))
        m = self._need()
        check_plain(m)
        done, watch = run(m, ids, options, forced)
        check_put(done, forced, options)
        at = range(max(watch.hashes, default=-1) + 1)
        chosen = [watch.logits.get(i) if i < len(done.ids) else None for i in at]
        hashes = [watch.hashes.get(i, "") for i in at]
        self.runs.append(
            Recorded(
                ids, options, done.ids, done.text, done.finish_reason, hashes, chosen, parent,
                list(forced),
            )
        )  # fmt: skip
        return done

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the recording as JSON."""
        whole = {"tinyllm_recording": FORM, **self.about, "runs": [asdict(r) for r in self.runs]}
        text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with replacing(path) as file:
            file.write(
                text.encode(errors="backslashreplace")
            )  # half a pair is \ud800, JSON's own escape

    @classmethod
    def read(cls, path: str | os.PathLike[str], model: Model | None = None) -> Recording:
        """Read a recording; with a ``model``, it can be gone on with.

        Raises
        ------
        ArgumentError
            The file is no recording, or the model differs from the recorded one.
        """
        text = read_text(path)
        try:
            whole, found = parse(text)
        except ArgumentError as e:
            raise ArgumentError(f"{path} is no recording of ours: {e}") from None
        runs = [Recorded(**{**r, "parent": r["parent"] and tuple(r["parent"])}) for r in found]
        if model is not None and (changed := changes(whole, about(model))):
            raise ArgumentError(f"{path} was recorded with something else: {'; '.join(changed)}")
        return cls(model, whole, runs)

    @property
    def settings(self) -> dict[str, Any]:
        """What ``load`` takes to load the model as it was: device, n_gpu_layers, kv_type, compute, n_ctx."""
        return dict(self.about["settings"])

    def __repr__(self) -> str:
        return f"<tinyllm.Recording of {len(self.runs)} texts by {self.about['model']['name']}>"


def record(model: Model) -> Recording:
    """Begin a recording of what a model writes.

    Examples
    --------
    >>> import tinyllm
    >>> m = tinyllm.load()
    >>> recording = tinyllm.record(m)
    >>> text = recording.generate("Once upon a time", max_tokens=8).text
    >>> tinyllm.replay(recording, m).same
    True
    """
    return Recording(model, about(model))


def replay(recording: Recording | str | os.PathLike[str], model: Model) -> Replay:
    """Generate a recording's texts again, and say what differs.

    Parameters
    ----------
    recording : Recording or path-like
        What was recorded, or its file.
    model : Model
        The model to repeat it with, usually loaded with the recording's ``settings``.

    Returns
    -------
    Replay
        ``same``: every logit has the recorded bits. Else ``changed`` names what is not as recorded (the file,
        the code, settings), and ``parted`` where each text parts.

    Raises
    ------
    ArgumentError
        The file is no recording, or the model cannot read its tokens.
    """
    if not isinstance(recording, Recording):
        recording = Recording.read(recording)
    parted = []
    changed = changes(recording.about, about(model))
    for i, was in enumerate(recording.runs):
        check_ids(model, was.ids)
        try:
            done, watch = run(model, was.prompt_ids, was.options, was.forced, was.ids)
        except NotAllowed as e:
            word = model.tokenizer.decode([was.forced[e.at]])
            parted.append(Parted(i, None, None, e.at, (word, "none that the grammar allows")))
            continue
        found = parting(i, was, done, watch, model)
        if found is not None:
            parted.append(found)
    return Replay(changed, parted)


def run(
    m: Model,
    ids: list[int],
    options: Mapping[str, Any],
    forced: Sequence[int],
    told: Sequence[int] | None = None,
) -> tuple[Completion, Watch]:
    """Generate a text, and watch its logits."""
    check_ids(m, forced)
    watch = Watch(len(ids), forced, told)
    try:
        done = m.generate(ids, logits_processor=watch, **options_of(options))
    except NumericError as e:
        if watch.is_put and str(e) != DAMAGED:
            raise NotAllowed(len(watch.hashes) and max(watch.hashes)) from None
        raise
    watch.note(done.ids)
    return done, watch


def check_ids(m: Model, ids: Sequence[int]) -> None:
    """Raise ArgumentError unless a model has all these tokens."""
    n = m.network.n_vocab
    for i in ids:
        if not 0 <= i < n:
            raise ArgumentError(f"token {i!r:.40}; the model has tokens 0 to {n - 1}")


def check_put(done: Completion, forced: Sequence[int], options: Mapping[str, Any]) -> None:
    """Raise NotAllowed unless a text begins with what was put there, or ended within it."""
    pairs = enumerate(zip(done.ids, forced, strict=False))
    other = next((at for at, (a, b) in pairs if a != b), None)
    if other is None and len(done.ids) < len(forced) and GRAMMARS & set(options):
        other = len(done.ids)
    if other is not None:
        raise NotAllowed(other)


def check_plain(m: Model) -> None:
    """Raise ArgumentError while a context changes a model's activations: what comes then is not the model's."""
    if hook_of(m.network.number, None) is not None:
        raise ArgumentError(
            "a context such as steered() or patched() is around the call, which no recording holds and "
            "no comparison tells; a control vector can be given to load(control=...)"
        )


def parting(i: int, was: Recorded, done: Completion, watch: Watch, m: Model) -> Parted | None:
    """Where a repeated text parts from the recorded one; None if every bit is the same."""
    most = max(len(was.ids), len(done.ids))
    pairs = [(was.ids[t : t + 1], done.ids[t : t + 1]) for t in range(most)]
    token = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
    n = max(watch.hashes, default=-1) + 1
    common = len(was.ids) if token is None else token  # here the recorded token is the chosen one
    now = [(watch.hashes.get(t, ""), watch.logits.get(t) if t < common else None) for t in range(n)]
    recorded = enumerate(zip(was.logits, was.chosen, strict=True))
    then = [(mark, x if t < common else None) for t, (mark, x) in recorded]
    until = max(n, len(then)) if token is None else min(token + 1, len(then))
    bits = next((t for t in range(until) if now[t : t + 1] != then[t : t + 1]), None)
    ends = [(x.finish_reason, x.text) for x in (was, done)]
    if token is None and bits is None and ends[0] == ends[1]:
        return None
    difference = None
    if bits is not None and bits < min(len(was.ids), len(then)):
        ours, theirs = watch.logits.get(bits), was.chosen[bits]
        difference = None if ours is None or theirs is None else abs(ours - theirs)
    words: tuple[str, str] | None = None
    if token is None and bits is None:  # all tokens agree, but not how the text ended, or the text
        (a, old), (b, new) = ends
        token, words = len(was.ids), (a, b) if a != b else (_short(old), _short(new))
    elif token is not None:
        first, second = (m.tokenizer.decode(x) if x else "the end" for x in pairs[token])
        words = first, second
    return Parted(i, bits, difference, token, words)


# ---- what decides


def about(m: Model) -> dict[str, Any]:
    """All that decides a model's bits, but for the options of a call."""
    check_plain(m)
    net = m.network
    path = Path(m.path)
    on_gpu = [s for s in net.stages if s.be.where.is_gpu] or list(net.stages)
    divided = len(on_gpu) < len(net.stages)
    return {
        "model": {"name": path.name, "sha256": hash_of_files(m._file.paths), "arch": m.arch},
        "code": {
            "tinyllm": _version(),
            "sources": hash_of_sources(),
            "numpy": np.__version__,
            "llvmlite": import_module("llvmlite").__version__,
            "llguidance": _version_of("llguidance"),
            "python": ".".join(map(str, sys.version_info[:3])),
        },
        "settings": {
            "device": ",".join(s.be.where.id for s in on_gpu),
            "n_gpu_layers": sum(len(s.layers) for s in on_gpu) if divided else None,
            "kv_type": net.kv_type,
            "compute": getattr(net.be, "compute", "f32"),
            "n_ctx": m.n_ctx,
        },
        "hardware": {"name of each device": m.device},
        "beside": {
            "adapters": m.adapters,
            "digest": net.adapters.digest(net.adapters.scales),
            # a call may give an adapter a scale that is 0 otherwise
            "weights": net.adapters.digest((1.0,) * len(net.adapters)),
            "kernels": ", ".join(net.kernels),
        },
    }


def _version() -> str:
    from .. import __version__

    return __version__


def _version_of(package: str) -> str | None:
    """The version of a package that need not be there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was recorded, in words."""
    found = []
    for part in ("model", "code", "settings", "hardware", "beside"):
        old, new = was.get(part, {}), now[part]
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key) and key != "name":
                found.append(f"{part} {key}: {_short(old.get(key))}, now {_short(new.get(key))}")
    return found


def _short(x: Any) -> str:
    text = str(x)
    return text if len(text) <= 40 else text[:12] + "..."


def hash_of_files(paths: Sequence[str]) -> str:
    """The SHA-256 of files, one after the other."""
    stamp = tuple((p, os.stat(p).st_mtime_ns, os.stat(p).st_size) for p in paths)
    return _hash_of(stamp)


@lru_cache(16)
def _hash_of(stamp: tuple[tuple[str, int, int], ...]) -> str:
    found = hashlib.sha256()
    for path, _, _ in stamp:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                found.update(piece)
    return found.hexdigest()


@lru_cache(1)
def hash_of_sources() -> str:
    """A hash of the code that makes logits and chooses tokens."""
    found, root = hashlib.sha256(), resources.files(__package__.partition(".")[0])
    for name in DECIDES:
        for path, file in sorted(_files(root / name, name), key=lambda pair: pair[0]):
            found.update(path.encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _files(place: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The sources at a place in the package, with their names."""
    if place.is_file():
        if name.endswith(SOURCES):
            yield name, place
        return
    for inner in place.iterdir():
        if inner.name != "__pycache__":
            yield from _files(inner, f"{name}/{inner.name}")
