"""What a researcher does with a model: look at its activations by name, replace them, and steer it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from operator import index
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .engine.completion import split_prompts
from .errors import ArgumentError

if TYPE_CHECKING:
    from .engine.completion import Prompt
    from .gguf import GGUFFile
    from .gguf.control import ControlVector
    from .models.network import Network
    from .research.attribution import Attribution, By
    from .research.cache import Cache
    from .research.grids import Grid, Metric, Over
    from .research.patches import Patch, Positions
    from .research.points import Names, Point
    from .research.vectors import Method
    from .tokenizers import Tokenizer


class Studied(ABC):
    """The part of a ``Model`` that shows its inside."""

    _file: GGUFFile

    @property
    @abstractmethod
    def network(self) -> Network:
        """The weights and their mathematics."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""

    @abstractmethod
    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens that are read for a prompt."""

    def points(self) -> list[Point]:
        """The points at which activations can be seen and replaced, in the order of a pass.

        Each has a ``name``, a ``shape`` ("T" stands for the rows, "S" for the positions that attention sees)
        and a ``meaning``. The first call reads three tokens.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> m.points()[0].name
        'embd'
        """
        from .research.points import points

        return list(points(self.network).values())

    @overload
    def run_with_cache(  # type: ignore[overload-overlap]  # a str is a sequence of str: it comes first
        self,
        prompt: Prompt,
        names: Names = ...,
        positions: Positions = ...,
        dtype: str = ...,
        stop_at_layer: int | None = ...,
    ) -> Cache: ...
    @overload
    def run_with_cache(
        self,
        prompt: Sequence[Prompt],
        names: Names = ...,
        positions: Positions = ...,
        dtype: str = ...,
        stop_at_layer: int | None = ...,
    ) -> list[Cache]: ...
    def run_with_cache(
        self,
        prompt: Prompt | Sequence[Prompt],
        names: Names = None,
        positions: Positions = None,
        dtype: str = "float32",
        stop_at_layer: int | None = None,
    ) -> Cache | list[Cache]:
        """Read a prompt, and keep its activations by name.

        Parameters
        ----------
        prompt : str, sequence of int, or a list of either
            As ``generate`` takes it. The prompts of a list are read side by side.
        names : str, sequence of str, or callable, optional
            Points ("blk.3.out", ("out", 3)), kinds ("out": of all layers), patterns ("blk.*.ffn_act"),
            TransformerLens' names and kinds ("resid_post"), or a function that says of each name whether it is
            kept. Default: all but attention's scores and probabilities and the results of single heads, which
            cost more than a copy.
        positions : int, slice or sequence of int, optional
            Keep only these positions' rows; negative ones count from the end of the prompt.
        dtype : {"float32", "float16"}
            What is kept of each value.
        stop_at_layer : int, optional
            End the pass before this layer; there are no logits then.

        Returns
        -------
        Cache, or a list of them
            A mapping of names to arrays, with ``ids`` and ``logits``.

        Raises
        ------
        ArgumentError
            The model has no such point or position.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> cache = m.run_with_cache("Once upon a time", names="out")
        >>> cache["blk.0.out"].shape == (len(cache.ids), m.config.n_embd)
        True
        """
        from .research.cache import run_with_cache

        prompts, many = split_prompts(prompt)
        ids = [self.prompt_ids(p) for p in prompts]
        found = run_with_cache(self.network, ids, names, positions, dtype, stop_at_layer)
        return found if many else found[0]

    def patched(
        self,
        name: str | tuple[str, int] | Patch | Sequence[Patch],
        value: Any = None,
        positions: Positions = None,
        heads: int | Sequence[int] | None = None,
        channels: int | Sequence[int] | None = None,
    ) -> AbstractContextManager[None]:
        """A context in which an activation, or a part of it, is replaced whenever this thread runs the model.

        Parameters
        ----------
        name : str, (str, int), Patch, or sequence of Patch
            A point, for which the other parameters say what takes its place, as ``Patch`` has them; or
            one or more patches.
        value : array, number or callable
            An array of the whole activation, of which the part is taken, or what broadcasts to the part; or a
            function of the part that returns its replacement, or changes it in place and returns None.
        positions, heads, channels : int or sequence of int, optional
            Which part; all of it by default. ``positions`` may be a slice; those that a sequence does not have
            are left out, as they may come while a text is written.

        Raises
        ------
        ArgumentError
            The model has no such point, head or channel.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> with m.patched("blk.0.attn_heads", 0, heads=1):
        ...     text = m.generate("Once upon a time", max_tokens=4, temperature=0).text
        """
        from .research.patches import Patch, Patches, patches_of, within

        if isinstance(name, (str, tuple)) and not any(isinstance(n, Patch) for n in name):
            if value is None:
                raise ArgumentError("value is missing; give an array, a number or a function")
            patches = [Patch(name, value, positions, heads, channels)]
        else:
            given = (value, positions, heads, channels)
            if any(x is not None for x in given):
                raise ArgumentError("a Patch has its own value, positions, heads and channels")
            patches = patches_of(name)  # type: ignore[arg-type]
        return within(self.network, Patches(self.network, patches))

    def steered(
        self,
        vectors: Mapping[int | str, Any],
        positions: Positions = None,
        scale: float = 1.0,
    ) -> AbstractContextManager[None]:
        """A context in which vectors are added to the residual stream, also while the model writes.

        Parameters
        ----------
        vectors : mapping of int or str to array
            For a layer, what is added behind it, or for a point: [n_embd]. A ``ControlVector`` is one.
        positions : int, slice or sequence of int, optional
            Only there; -1 is the last token whenever one is read. Those that a sequence does not have are left
            out, as they may come while a text is written. Default: everywhere.
        scale : float
            Multiplies the vectors.

        Examples
        --------
        >>> import numpy as np, tinyllm
        >>> m = tinyllm.load()
        >>> with m.steered({1: np.ones(m.config.n_embd)}, scale=0.1):
        ...     text = m.generate("Once upon a time", max_tokens=4, temperature=0).text
        """
        from .research.patches import Patches, steering, within

        patches = steering(self.network, vectors, positions, scale)
        return within(self.network, Patches(self.network, patches))

    def control_vector(
        self,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        method: Method = "mean",
        positions: Positions = -1,
    ) -> ControlVector:
        """What distinguishes two kinds of prompts in the residual stream, layer by layer.

        Parameters
        ----------
        positive, negative : sequence of prompts
            Texts or ids of the two kinds. For "pca" they are pairs: the first of each, the second of each, ...
        method : {"mean", "pca"}
            The difference of the two kinds' means; or the first principal direction of the pairs' differences,
            as long as the difference of the means is along it.
        positions : int, slice or sequence of int, optional
            Which tokens' rows stand for a prompt, by their mean: -1, the last one; None: all. The first token's
            row is like no other in many models: ``slice(1, None)`` leaves it out.

        Returns
        -------
        ControlVector
            A direction for each layer from the second on, for ``steered``, or to ``write`` for
            ``load(control=...)``. With the scale 1, a layer's direction leads as far as the kinds are apart.

        Raises
        ------
        ArgumentError
            One of the two has no prompts, or "pca" has no pairs.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> vector = m.control_vector(["I am happy", "A nice day"], ["I am sad", "A bad day"])
        >>> list(vector) == list(range(1, m.config.n_layer))
        True
        """
        from .research.vectors import control_vector

        kinds = [
            [self.prompt_ids(p) for p in (split_prompts(prompts)[0] if len(prompts) else [])]
            for prompts in (positive, negative)
        ]
        return control_vector(self.network, kinds[0], kinds[1], method, positions)

    def lens(self, x: np.ndarray) -> np.ndarray:
        """Logits of any rows of the residual stream, through the last norm and the head.

        Parameters
        ----------
        x : float array [..., n_embd]
            Such as the residual after a layer.

        Returns
        -------
        float32 [..., n_vocab]

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> cache = m.run_with_cache("Once upon a time", names="out", positions=-1)
        >>> m.lens(cache.stack("out")).shape == (m.config.n_layer, 1, m.network.n_vocab)
        True
        """
        from .research.points import floats

        rows = floats(x, "x")
        e = self.network.config.n_embd
        if rows.ndim == 0 or rows.shape[-1] != e:
            raise ArgumentError(f"x has shape {rows.shape}; expected rows of {e} values")
        flat = rows.reshape(-1, e)
        return self.network.lens(flat).reshape(*rows.shape[:-1], self.network.n_vocab)

    def attribute(
        self,
        prompt: Prompt,
        token: int | str,
        against: int | str | None = None,
        position: int = -1,
        by: By = "layers",
    ) -> Attribution:
        """What layers, heads or neurons add to a token's logit, with the last norm's magnitude held fixed.

        Parameters
        ----------
        prompt : str or sequence of int
            What is read.
        token, against : int or str
            Whose logit; with ``against``, the difference of the two. A text must be one token.
        position : int
            The logits after this token of the prompt.
        by : {"layers", "heads", "neurons"}
            Into what the logit is taken apart.

        Returns
        -------
        Attribution
            Its ``values``, ``embd``, ``constant`` and ``rest`` sum to ``total``.

        Raises
        ------
        UnsupportedModel
            The layers do not simply add two halves to one residual stream.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> found = m.attribute("Once upon a", " time", by="heads")
        >>> found.values.shape == (m.config.n_layer, m.config.n_head[0])
        True
        """
        from .research.attribution import attribute

        tokens = self._token(token), None if against is None else self._token(against)
        ids = self.prompt_ids(prompt)
        return attribute(self.network, self._file.tensors, ids, *tokens, position, by)

    def patch_grid(
        self,
        clean: Prompt,
        corrupted: Prompt,
        metric: Metric | tuple[str, str],
        point: str = "out",
        over: Over = "positions",
        positions: Positions = None,
    ) -> Grid:
        """Put activations of a clean run into a corrupted one, one place at a time, and measure each run.

        Parameters
        ----------
        clean, corrupted : str or sequence of int
            Two prompts of equally many tokens.
        metric : (token, token) or callable
            The difference of two tokens' logits after the last token, or a function of all of them [n_vocab].
        point : str
            A kind of point that layers have ("out", "attn_out", "ffn_out", "attn_heads", "q", ...), or
            "resid_pre".
        over : {"positions", "heads", "layers"}
            A run for each layer and position; for each layer and head; or for each layer.
        positions : int, slice or sequence of int, optional
            Which positions are patched, or are the columns. Default: all.

        Returns
        -------
        Grid
            Its ``values`` are [layers, positions], [layers, heads] or [layers, 1].

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> grid = m.patch_grid("Lily had a cat", "Lily had a dog", (5, 6))
        >>> grid.values.shape[0] == m.config.n_layer
        True
        """
        from .research.grids import patch_grid

        if not callable(metric):
            if isinstance(metric, str) or np.size(metric) != 2:
                raise ArgumentError(f"metric={metric!r:.60}; expected two tokens, or a function")
            metric = (self._token(metric[0]), self._token(metric[1]))
        ids = self.prompt_ids(clean), self.prompt_ids(corrupted)
        return patch_grid(self.network, *ids, point, metric, over, positions)

    def path_patch(
        self,
        clean: Prompt,
        corrupted: Prompt,
        senders: Patch | Sequence[Patch],
        receivers: Names,
        freeze: Names = (),
    ) -> np.ndarray:
        """Let only the paths from senders to receivers carry what a clean run differs by.

        Parameters
        ----------
        clean, corrupted : str or sequence of int
            Two prompts of equally many tokens.
        senders : Patch, or sequence of Patch
            Where the clean run's values go into the corrupted one; their own values are not used.
        receivers : str, sequence of str, or callable
            Points whose values, changed by the senders, go into a second corrupted run.
        freeze : str, sequence of str, or callable
            Points that stay as in the corrupted run while the receivers are computed, such as "attn_heads" for
            the paths that pass no other head.

        Returns
        -------
        float32 [len(corrupted), n_vocab]
            The logits of the second run.

        Examples
        --------
        >>> import tinyllm
        >>> from tinyllm.research import Patch
        >>> m = tinyllm.load()
        >>> sender = Patch("blk.0.attn_heads", 0, heads=1)
        >>> logits = m.path_patch("Lily had a cat", "Lily had a dog", [sender], ["blk.2.q"])
        """
        from .research.grids import path_patch

        ids = self.prompt_ids(clean), self.prompt_ids(corrupted)
        return path_patch(self.network, *ids, senders, receivers, freeze)

    def means(self, prompts: Sequence[Prompt], names: Names) -> dict[str, np.ndarray]:
        """The mean over all tokens of some prompts of each point's rows: what mean ablation puts in.

        Of points that have no rows (attention's scores and probabilities, states) it is the mean over the
        prompts, which must have equally many tokens for the first two.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> mean = m.means(["Tom ran home.", "Lily ate a cake."], "blk.1.attn_out")
        >>> with m.patched("blk.1.attn_out", mean["blk.1.attn_out"]):
        ...     logits = m.logits(m.prompt_ids("Once upon a time"))
        """
        from .research.cache import mean_of

        if not len(prompts):
            raise ArgumentError("prompts is empty; there is nothing to take the mean of")
        caches = self.run_with_cache(split_prompts(prompts)[0], names)
        return {n: mean_of(caches, n) for n in caches[0]}

    def _token(self, token: int | str) -> int:
        """A token by its id, or by a text that is one."""
        if not isinstance(token, str):
            try:
                return index(token)
            except TypeError:
                raise ArgumentError(f"token {token!r:.40}; expected an id or a text") from None
        ids = self.tokenizer.encode(token, add_special=False)
        if len(ids) != 1:
            raise ArgumentError(f"{token!r:.40} is {len(ids)} tokens; give an id")
        return ids[0]
