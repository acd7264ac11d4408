"""Two files on the same tokens: how far their answers are apart, where it begins, and which tensors cost it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.scoring import losses_of
from ..errors import ArgumentError
from ..models.ahead import RunAhead
from ..models.build import build
from ..models.decoder import Block
from ..models.network import NUMBERS
from ..models.weights import Tensors
from .cache import read, run_with_cache
from .points import layer_of
from .recording import check_plain

if TYPE_CHECKING:
    from ..model import Model
    from ..models.network import Network

Progress = Callable[[Iterable[str], int], Iterable[str]]
WINDOW = 512  # tokens that are read together
# tensors that no block reads
BESIDE_BLOCKS = {"token_embd", "token_embd_norm", "position_embd", "output_norm", "output"}
BACK = 5  # tensors that are also put back together: those that cost most
OPENING = 16  # tokens of the text that both models go on from


@dataclass(frozen=True)
class Parting:
    """The first token at which two greedy texts differ: what each says of both tokens there."""

    position: int
    ours: str
    theirs: str
    p_a: tuple[float, float]  # model A's probabilities of its own token and of B's
    p_b: tuple[float, float]  # model B's of the same two


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; natural logarithms, each mean with its standard error.

    ``kl`` is that of B from A, ``agreement`` the share of tokens where both would choose the same next one.
    ``layers`` is the relative error of B's residual stream after each layer. ``tensors`` is by how much the KL
    falls when A's tensor takes the place of B's, for each that differs in type or values. For the worst five,
    ``together`` has by how much it falls with each and all that are worse back at once, ``predicted`` what the
    single runs say of that. Gains do not add, but what each tensor changes in the logits nearly does.
    """

    n_tokens: int
    kl: tuple[float, float]
    perplexity_a: tuple[float, float]
    perplexity_b: tuple[float, float]
    agreement: float
    parting: Parting | None
    layers: list[float]
    tensors: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    together: dict[str, float] = field(default_factory=dict)

    def worst(self, n: int = 5) -> list[str]:
        """The n tensors that cost most."""
        return sorted(self.tensors, key=lambda name: -self.tensors[name])[:n]


def compare(
    a: Model,
    b: Model,
    text: str | Sequence[int],
    tensors: bool | str = False,
    n_greedy: int = 64,
    progress: Progress = lambda names, n: names,
) -> Comparison:
    """Compare two models, usually quantisations or fine-tunes of one, on a text.

    Parameters
    ----------
    a, b : Model
        B is measured by A. Their vocabularies must be of one size.
    text : str or sequence of int
        What both read, in windows of 512 tokens.
    tensors : bool or "layers"
        Also run B with A's tensor in its place, for each tensor, or for all tensors of a layer together.
    n_greedy : int
        How many tokens both write after the first 16 of the text, to see where they part.
    progress : callable, optional
        Wraps the iteration over tensors.

    Raises
    ------
    ArgumentError
        The vocabularies differ, the text has less than two tokens, or a context such as ``steered`` is around
        the call.

    Examples
    --------
    >>> import tinyllm
    >>> a, b = tinyllm.load(), tinyllm.load(device="reference")
    >>> found = tinyllm.compare(a, b, "Once upon a time, there was a girl.")
    >>> found.kl[0] < 0.01
    True
    """
    for m in (a, b):
        if not hasattr(m, "network"):
            raise ArgumentError(f"{m!r:.60} is no model; load it first: tinyllm.load({m!r:.60})")
    if tensors not in (False, True, "layers"):
        raise ArgumentError(f"tensors={tensors!r:.40}; expected True, False or 'layers'")
    for m in (a, b):
        check_plain(m)
    ids = a.prompt_ids(text)
    if a.network.n_vocab != b.network.n_vocab or ids != b.prompt_ids(text):
        raise ArgumentError(
            "the two files have other vocabularies: their tokens cannot be compared"
        )
    if len(ids) < 2:
        raise ArgumentError(f"the text has {len(ids)} token; expected at least 2")
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    windows = [w for w in windows if len(w) > 1]
    ours, theirs = ([logits_of(m.network, w) for w in windows] for m in (a, b))
    each = np.concatenate([divergence(p, q) for p, q in zip(ours, theirs, strict=True)])
    same = [p.argmax(1) == q.argmax(1) for p, q in zip(ours, theirs, strict=True)]
    found = costs(a, b, windows, ours, theirs, tensors, progress) if tensors else {}
    return Comparison(
        n_tokens=sum(map(len, windows)),
        kl=mean(each),
        perplexity_a=perplexity(ours, windows),
        perplexity_b=perplexity(theirs, windows),
        agreement=float(np.concatenate(same).mean()),
        parting=parting(a, b, ids[:OPENING], n_greedy),
        layers=errors(a.network, b.network, windows[0]),
        **found,
    )


def logits_of(net: Network, ids: list[int]) -> np.ndarray:
    """Logits after each token [T, V]."""
    found = read(net, [ids], None)[0]
    assert found is not None
    return found


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row of two arrays of logits, float64 [T]."""
    out = np.empty(len(p))
    for t, (x, y) in enumerate(zip(p.astype(np.float64), q.astype(np.float64), strict=True)):
        x, y = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (x, y))
        out[t] = np.exp(x) @ (x - y)
    return out


def mean(x: np.ndarray) -> tuple[float, float]:
    """Mean and standard error."""
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0


def perplexity(logits: Sequence[np.ndarray], windows: Sequence[list[int]]) -> tuple[float, float]:
    """That of the windows' tokens, but for each window's first, and its standard error."""
    pairs = zip(logits, windows, strict=True)
    value, error = mean(np.concatenate([losses_of(x[:-1], np.array(w[1:])) for x, w in pairs]))
    return float(np.exp(value)), float(np.exp(value) * error)


def parting(a: Model, b: Model, opening: list[int], n: int) -> Parting | None:
    """Where greedy texts part; None if they do not within n tokens."""
    if n < 1:
        return None
    ours, theirs = (m.generate(opening, max_tokens=n, temperature=0).ids for m in (a, b))
    until = min(len(ours), len(theirs))
    at = next((i for i in range(until) if ours[i] != theirs[i]), until)
    if at == until:  # one text may have ended
        return None
    pair = [ours[at], theirs[at]]
    probabilities = []
    for m in (a, b):
        last = logits_of(m.network, opening + ours[:at])[-1].astype(np.float64)
        p = np.exp(last - last.max())
        probabilities.append((float(p[pair[0]] / p.sum()), float(p[pair[1]] / p.sum())))
    words = [a.tokenizer.decode([i]) for i in pair]
    return Parting(len(opening) + at, words[0], words[1], probabilities[0], probabilities[1])


def errors(a: Network, b: Network, ids: list[int]) -> list[float]:
    """The relative error of b's residual stream after each layer."""
    ours, theirs = (run_with_cache(n, [ids], "out", None, "float32", None)[0] for n in (a, b))
    return [
        float(np.linalg.norm(theirs[name] - ours[name]) / np.linalg.norm(ours[name]))
        for name in ours
        if name in theirs
    ]


def costs(
    a: Model,
    b: Model,
    windows: Sequence[list[int]],
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    which: bool | str,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """By how much the KL falls with A's tensors, or layers, in B's: the last three fields of a Comparison."""
    own = a._file.tensors
    other = [n for n, t in b._file.tensors.items() if n in own and differs(own[n], t)]
    groups: dict[str, list[str]] = {}
    for name in other:
        layer = layer_of(name)
        label = f"blk.{layer}" if which == "layers" and layer >= 0 else name
        groups.setdefault(label, []).append(name)

    def run(labels: Sequence[str]) -> list[np.ndarray]:
        net = with_tensors(b, {n: own[n] for label in labels for n in groups[label]})
        return [logits_of(net, w) for w in windows]

    def apart(logits: Sequence[np.ndarray]) -> float:
        return mean(np.concatenate(list(map(divergence, ours, logits))))[0]

    kl = apart(theirs)
    alone = {label: kl - apart(run([label])) for label in progress(groups, len(groups))}
    worst = sorted(alone, key=lambda label: -alone[label])[:BACK]
    moved, predicted, together = list(theirs), {}, {}
    for i, label in enumerate(worst):
        single = run([label])
        moved = [m + (x - y) for m, x, y in zip(moved, single, theirs, strict=True)]
        predicted[label] = kl - apart(moved)
        together[label] = kl - apart(run(worst[: i + 1]))
    return {"tensors": alone, "predicted": predicted, "together": together}


def differs(x: Any, y: Any) -> bool:
    """Whether two tensors of one name hold other bytes."""
    return bool(x.shape == y.shape and (x.type != y.type or not np.array_equal(x.raw, y.raw)))


def with_tensors(m: Model, tensors: Mapping[str, Any]) -> Network:
    """The model's network with other tensors in the place of its own; layers without any are shared.

    So are the embedding, the last norm and the head, unless a tensor is one of theirs.
    """
    net, all_tensors = m.network, {**m._file.tensors, **tensors}
    layers = {layer_of(name) for name in tensors}
    ends = {name.split(".")[0] for name in tensors if layer_of(name) < 0}
    if ends - BESIDE_BLOCKS or len(net.stages) > 1:
        return build(
            m.metadata, all_tensors, net.be, net.kv_type, strict=False, adapters=net.adapters
        )
    made = object.__new__(type(net))
    made.__dict__.update(net.__dict__)
    made.ahead = RunAhead(enabled=False)
    made.number = next(NUMBERS)  # steps recorded with the other weights are not its own
    decoder = object.__new__(type(net.decoder))
    decoder.__dict__.update(net.decoder.__dict__)
    root = Tensors(all_tensors, net.be, net.config, adapters=net.adapters)
    make = net.arch.block or Block
    decoder.blocks = [
        make(net.config, net.arch, i, root.layer(i)) if net.config.blocks[i] in layers else block
        for i, block in enumerate(net.decoder.blocks)
    ]
    if ends:
        decoder.read_beside_blocks(net.config, net.arch, root, root.below("", net.be))
    made.decoder = decoder
    return made
