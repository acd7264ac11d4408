"""Linear probes: what can be read off activations, by ridge regression in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from .points import floats, whole

PENALTIES = tuple(float(10.0**e) for e in range(-3, 6))


@dataclass(frozen=True)
class Probe:
    """A number, or a yes or no, as a linear function of activations.

    ``weights`` [E] and ``bias`` make ``predict``; ``penalty`` is the one of ``penalties`` that predicted best
    what it had not seen, and ``score`` how well: the share of right answers for yes and no, for numbers the
    share of their variance (R2). ``scores`` has it for each penalty.

    Examples
    --------
    >>> import numpy as np
    >>> from tinyllm.research import Probe
    >>> x = np.random.default_rng(0).normal(size=(40, 8))
    >>> probe = Probe.fit(x, x[:, 2] > 0)
    >>> probe.score > 0.8
    True
    """

    weights: np.ndarray
    bias: float
    penalty: float
    score: float
    penalties: tuple[float, ...]
    scores: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        x: npt.ArrayLike,
        y: npt.ArrayLike,
        penalties: Sequence[float] = PENALTIES,
        n_folds: int = 5,
        groups: Sequence[int] | None = None,
    ) -> Probe:
        """Fit a probe, and choose its penalty by cross-validation.

        Parameters
        ----------
        x : float array [n, E]
            Activations: a row for each example.
        y : bool or float array [n]
            What is to be read off: yes or no, which become 1 and -1, or numbers.
        penalties : sequence of float
            Factors of the weights' squares, of which the best is taken.
        n_folds : int
            Each example is predicted by a probe of the others: so many times a part is left out.
        groups : sequence of int [n], optional
            Examples of one group, such as two wordings of one sentence, are left out together. Default: each
            is its own. Groups go to the folds in turn.

        Raises
        ------
        ArgumentError
            The arrays do not fit, hold NaN, or are too few for the folds; all of y are one.
        """
        rows, answers = floats(x, "x", np.float64), np.asarray(y)
        if answers.dtype == object and all(isinstance(a, bool | np.bool_) for a in answers.flat):
            answers = answers.astype(bool)  # a column of a table
        truth = answers.dtype == bool
        target = np.where(answers, 1.0, -1.0) if truth else floats(answers, "y", np.float64)
        if rows.ndim != 2 or target.shape != rows.shape[:1] or not len(rows):
            raise ArgumentError(
                f"x of shape {rows.shape} and y of shape {target.shape}; expected [n, E] and [n]"
            )
        if not (np.isfinite(rows).all() and np.isfinite(target).all()):
            raise ArgumentError("x or y has a NaN or an infinity")
        if (target == target[0]).all():
            raise ArgumentError(f"every y is {answers[0]}; expected some that differ")
        factors = floats(penalties, "penalties", np.float64)
        fine = factors.ndim == 1 and factors.size > 0
        if not fine or not (np.isfinite(factors).all() and factors.min() > 0):
            raise ArgumentError(f"penalties={penalties!r:.60}; expected numbers above 0")
        penalties = list(map(float, factors))
        own = np.arange(len(rows)) if groups is None else np.asarray(groups)
        if own.shape != target.shape:
            raise ArgumentError(
                f"groups of shape {own.shape}; expected one for each of {len(rows)}"
            )
        number = np.unique(own, return_inverse=True)[1]
        if not 2 <= whole(n_folds, "n_folds") <= number.max() + 1:
            raise ArgumentError(
                f"n_folds={n_folds!r:.20}; expected 2 to {number.max() + 1}, which is how many groups there are"
            )
        found = np.empty((len(penalties), len(rows)))
        for fold in range(n_folds):
            out = number % n_folds == fold
            weights, biases = ridge(rows[~out], target[~out], penalties)
            found[:, out] = weights @ rows[out].T + biases[:, None]
        if truth:
            scores = ((found > 0) == (target > 0)).mean(1)
        else:
            scores = 1 - ((found - target) ** 2).mean(1) / target.var()
        best = int(scores.argmax())
        weights, biases = ridge(rows, target, [penalties[best]])
        each = tuple(map(float, scores))
        return cls(
            weights[0], float(biases[0]), penalties[best], each[best], tuple(penalties), each
        )

    def predict(self, x: npt.ArrayLike) -> np.ndarray:
        """What the probe reads off rows [..., E] -> float64 [...]; above 0 means yes."""
        rows = floats(x, "x", np.float64)
        if rows.ndim == 0 or rows.shape[-1] != len(self.weights):
            raise ArgumentError(
                f"x has shape {rows.shape}; expected rows of {len(self.weights)} values"
            )
        return np.asarray(rows @ self.weights + self.bias)


def ridge(
    x: np.ndarray, y: np.ndarray, penalties: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [P, E] and biases [P] that minimise |x w + b - y|^2 + penalty |w|^2, by one decomposition."""
    centre, middle = x.mean(0), y.mean()
    u, s, vt = np.linalg.svd(x - centre, full_matrices=False)
    shrunk = s / (s**2 + np.asarray(penalties, np.float64)[:, None])
    weights = (shrunk * (u.T @ (y - middle))) @ vt
    return weights, middle - weights @ centre
