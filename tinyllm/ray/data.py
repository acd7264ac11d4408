"""Classes for ``Dataset.map_batches`` of Ray Data: each actor loads a model once, and keeps it."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from .. import loading, mapping
from ..errors import ArgumentError, TinyLLMError
from ..mapping.tables import arrow_types

ROWS = 256  # that a batch has at most
CHARACTERS = 1 << 16  # that a batch's texts have, about
OWN = re.compile(r"\btinyllm\.errors\.\w+: *(.*\S)")  # in a traceback as Ray prints it
LISTENING_S = 10.0  # that a cluster may take to answer a first connection
BATCHES = 8  # that an actor gets at least, where there are rows enough: a lost one costs little


def ray() -> Any:
    """Ray, with its part for data sets; ArgumentError where it is not installed."""
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise ArgumentError(
            f"many machines need {error.name}: pip install 'tinyllm[ray]'"
        ) from None
    return ray


class Mapper:
    """A task on the texts of batches, for ``map_batches`` with ``batch_format="pyarrow"``.

    Parameters
    ----------
    model : str, optional
        What ``tinyllm.load`` takes, found on the machine of the actor; default: the bundled model.
    text : str
        The column of the texts.
    load : mapping, optional
        What else ``tinyllm.load`` takes. ``n_threads`` is the number of CPUs that Ray has given the actor.
    **options
        What the task of this name in ``tinyllm.mapping`` takes.

    Raises
    ------
    ArgumentError
        Ray is not installed; the message names the extra.
    """

    task: ClassVar[type[mapping.Task]]

    def __init__(
        self,
        model: str | None = None,
        text: str = "text",
        load: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        ray()
        self.text = text
        loaded = loading.load(model, **{"n_threads": threads(), **(load or {})})
        self._task = self.task(loaded, **options)

    def __call__(self, batch: Any) -> Any:
        """A table with the columns of the task's results behind its own, its rows in their order."""
        import pyarrow as pa

        if not isinstance(batch, pa.Table):
            raise ArgumentError(
                f"a batch is a {type(batch).__name__}; give map_batches batch_format='pyarrow'"
            )
        if self.text not in batch.column_names:
            known = ", ".join(map(repr, batch.column_names))
            raise ArgumentError(f"a batch has no column {self.text!r} but {known}; give text=")
        if (n := batch.column_names.count(self.text)) > 1:
            raise ArgumentError(f"a batch has {n} columns {self.text!r}; rename all but one")
        texts = batch.column(self.text).to_pylist()
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ArgumentError(
                    f"row {i} of a batch has {text!r:.60} in its column {self.text!r}; expected a text"
                )
        results = dict(self._task.run(enumerate(texts)))
        types = arrow_types()
        for name, kind in self._task.columns.items():
            if name in batch.column_names:
                raise ArgumentError(f"a batch has a column {name!r} already; rename it")
            found = [results[i][name] for i in range(len(batch))]
            batch = batch.append_column(pa.field(name, types[kind]), pa.array(found, types[kind]))
        return batch


class Embed(Mapper):
    """A column ``embedding`` for each text; takes what ``tinyllm.mapping.Embed`` takes."""

    task = mapping.Embed


class Generate(Mapper):
    """A column ``completion`` for each prompt; takes what ``tinyllm.mapping.Generate`` takes."""

    task = mapping.Generate


class Score(Mapper):
    """A column ``logprob`` for each text, and ``n_scored``, the tokens that it is the sum over."""

    task = mapping.Score


class Decide(Mapper):
    """A column ``answers`` for each text; takes the ``questions`` of ``tinyllm.mapping.Decide``."""

    task = mapping.Decide


MAPPERS: dict[str, type[Mapper]] = {
    "embed": Embed, "generate": Generate, "score": Score, "decide": Decide,
}  # fmt: skip


def threads() -> int | None:
    """The CPUs that Ray has given this actor; None where Ray is not running."""
    ray_ = ray()
    if not ray_.is_initialized():
        return None
    given = ray_.get_runtime_context().get_assigned_resources().get("CPU")
    return None if given is None else max(1, int(given))


def per_node(cpus: int | None = None, leave: int = 1) -> dict[str, Any]:
    """What ``map_batches`` takes so that each node of the cluster loads the model once, for nearly all CPUs.

    Parameters
    ----------
    cpus : int, optional
        CPUs, and so threads, of an actor; default: those of the smallest node but those that are left. A node
        with several times as many gets several actors.
    leave : int
        CPUs of a node that are left where it has more: Ray's readers and writers need one, or all waits
        for ever.

    Examples
    --------
    >>> options = {"fn_constructor_kwargs": {"model": "m.gguf"}, **per_node()}  # doctest: +SKIP
    >>> ray.data.read_parquet("in").map_batches(Embed, **options)  # doctest: +SKIP
    """
    ray_ = ray()
    if not ray_.is_initialized():
        raise ArgumentError("Ray is not running here; call ray.init() before per_node()")
    nodes = [node["Resources"].get("CPU", 0) for node in ray_.nodes() if node["Alive"]]
    counts = [int(n) for n in nodes if n >= 1]
    if not counts or (cpus is not None and not 1 <= cpus <= max(counts)):
        raise ArgumentError(
            f"cpus={cpus}; the cluster's nodes have {', '.join(f'{n:g}' for n in nodes)} CPUs"
        )
    cpus = cpus or max(1, min(counts) - leave)
    n_actors = sum(max(n >= cpus, (n - leave) // cpus) for n in counts)
    actors = ray_.data.ActorPoolStrategy(size=n_actors)
    return {"num_cpus": cpus, "compute": actors, "batch_format": "pyarrow", "batch_size": ROWS}


def map_rows(
    address: str,
    task: str,
    rows: Iterable[tuple[int, str]],
    model: str | None,
    load: Mapping[str, Any],
    options: Mapping[str, Any],
    cpus: int | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The results of numbered texts, computed on a cluster, as they come.

    Parameters
    ----------
    address : str
        The cluster: "auto", "host:port", or "local" for a new one on this machine.
    task : str
        "embed", "generate", "score" or "decide".
    rows : iterable of (number, text)
        They are sent to the cluster's memory first, which keeps on disk what it does not hold.
    model, load, options
        What the class of the task takes.
    cpus : int, optional
        As ``per_node`` has it.
    tell : callable
        Told in a line what is being waited for: starting the workers takes Ray up to a minute.

    Raises
    ------
    ArgumentError
        The task takes no such options.
    TinyLLMError
        There is no such cluster, or an actor failed; the message says why.
    """
    import pyarrow as pa

    MAPPERS[task].task.check(**options)
    ray_ = ray()
    with connected(address):
        how = per_node(cpus, leave=0)  # rows come from this process
        tell(f"Ray starts workers: {how['compute'].min_size}, CPUs of each: {how['num_cpus']}")
        tables = [
            pa.table({"row": [n for n, _ in part], "text": [t for _, t in part]})
            for part in parts(list(rows), BATCHES * how["compute"].min_size)
        ]
        ray_.data.DataContext.get_current().enable_progress_bars = False  # the caller counts rows
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        bars = logging.getLogger("ray.data._internal.progress")  # it warns that they are off
        bars.setLevel(logging.ERROR)
        keywords = {"model": model, "load": load, **options}
        data = ray_.data.from_arrow(tables).map_batches(
            MAPPERS[task], fn_constructor_kwargs=keywords, **{**how, "batch_size": None}
        )
        try:
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.drop_columns(["text"]).to_pylist():
                    if (vector := row.get("embedding")) is not None:
                        row["embedding"] = np.array(vector, np.float32)
                    yield row.pop("row"), row
        except ray_.exceptions.RayError as error:
            raise TinyLLMError(f"on a node of {address}: {reason(error)}") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster; one that the caller has made already stays."""
    ray_ = ray()
    if ray_.is_initialized():
        yield
        return
    if address not in ("auto", "local"):
        answers(address)
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray_.init(address, log_to_driver=False, logging_level="warning", **local)
    except Exception as error:  # Ray has no type for these
        raise TinyLLMError(
            f"no Ray cluster at {address}: {reason(error)}{hint(address)}"
        ) from error
    try:
        yield
    finally:
        ray_.shutdown()


def hint(address: str) -> str:
    """What to try where a cluster that listens lets nobody in: Ray sends a token only where it is told to."""
    if address in ("auto", "local") or os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return ""
    return "; if it asks for a token (`ray start` does where one exists), set RAY_AUTH_MODE=token"


def answers(address: str) -> None:
    """TinyLLMError where nobody listens at "host:port": Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise TinyLLMError(f"no Ray cluster at {address}: expected auto, local or host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LISTENING_S).close()
    except (OSError, UnicodeError) as error:  # the second: no name of a host
        raise TinyLLMError(f"no Ray cluster at {address}: {error}") from error


def parts(rows: list[tuple[int, str]], least: int) -> Iterator[list[tuple[int, str]]]:
    """Rows in batches of about ``CHARACTERS``, at most ``ROWS``, and ``least`` of them where rows suffice."""
    most = max(1, min(ROWS, len(rows) // least))
    part: list[tuple[int, str]] = []
    n = 0
    for row in rows:
        part.append(row)
        n += len(row[1])
        if n >= CHARACTERS or len(part) == most:
            yield part
            part, n = [], 0
    if part:
        yield part


def reason(error: BaseException) -> str:
    """What an error that an actor raised was, without the way it took: tinyllm's own, else the last line."""
    if own := OWN.findall(str(error)):
        return str(own[-1])  # Ray goes on with what it advises
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
