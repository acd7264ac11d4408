"""Several models by name: loaded when asked for, let go when another needs the memory, never while in use.

They share what is free: each may hold an equal part for its texts, which shrinks when another is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import loading
from ..engine.scheduler import Engine
from ..errors import ArgumentError, TinyLLMError
from ..model import Model
from ..system import available_bytes
from .errors import Refusal, busy
from .settings import Settings

log = logging.getLogger("tinyllm.server")
Source = str | Path | Model | None  # what ``tinyllm.load`` takes, or a model


class Served:
    """One model of the server: its names, and while it is loaded the model and its engine."""

    def __init__(self, name: str, source: Source, settings: Settings) -> None:
        self.name, self.source, self.settings = name, source, settings
        self.aliases: list[str] = []
        self.created = int(time.time())
        self.state = "unloaded"
        self.error: str | None = None
        self.in_use = 0  # requests that hold it
        self.n_texts = 0  # that are written or wait
        self.used_at = 0.0
        self._model: Model | None = None
        self._engine: Engine | None = None
        if isinstance(source, Model):
            self._set(source)

    @property
    def model(self) -> Model:
        """The loaded model."""
        assert self._model is not None
        return self._model

    @property
    def engine(self) -> Engine:
        """What writes its texts.

        Raises
        ------
        Refusal
            The model writes none.
        """
        if self._engine is None:
            raise Refusal(
                404, f"{self.name} reads texts and writes none; ask for embeddings",
                code="model_not_supported",
            )  # fmt: skip
        return self._engine

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def kind(self) -> str | None:
        """What it is for: "text", "embedding" or "rerank"; None before it was loaded."""
        if self._model is None:
            return None
        net = self._model.network
        if self._engine is not None:
            return "text"
        return "rerank" if net.decoder.rank is not None else "embedding"

    @property
    def free(self) -> int:
        """Bytes free where its weights are."""
        return min(stage.be.memory()[0] for stage in self.model.network.stages)

    @property
    def writes(self) -> bool:
        """Whether it is loaded, and writes texts."""
        return self._engine is not None

    @property
    def held(self) -> int:
        """Bytes that its texts hold."""
        return 0 if self._engine is None else self._engine.nbytes

    def share(self, room: int) -> None:
        """Let its texts hold as much of ``room`` bytes as an engine by itself takes of what is free."""
        if self._engine is not None:
            self._engine.max_bytes, self._engine.prefix_bytes = max(room // 2, 1), room // 4

    @property
    def nbytes(self) -> int:
        """Bytes of its file, which are about those of the loaded weights."""
        try:
            path = self._model.path if self._model is not None else self.source
            return os.stat(path or loading.BUNDLED).st_size if not isinstance(path, Model) else 0
        except OSError:
            return 0

    def load(self) -> None:
        """Read the weights, in a thread."""
        source = self.source
        assert not isinstance(source, Model)
        self._set(loading.load(source, **self.settings.load))

    def _set(self, model: Model) -> None:
        if model.config.causal:
            s = self.settings
            self._engine = Engine(model, max_queue=s.slots + s.queue, max_texts=s.slots)
        self._model, self.state, self.error = model, "loaded", None

    def let_go(self) -> Callable[[], None]:
        """Serve it no longer; what is returned frees its memory. A model given loaded stays with its giver."""
        engine, model = self._engine, self._model
        self._engine = self._model = None
        self.state = "unloaded"

        def free() -> None:
            if engine is not None:
                engine.close()
            if model is not None and not isinstance(self.source, Model):
                model.close()

        return free

    def admit(self, n_texts: int, param: str | None = None) -> None:
        """Count texts that will be written, as ``param`` asks for; refuse them when too many wait.

        Raises
        ------
        Refusal
            429, with the seconds after which to come again.
        """
        s = self.settings
        if n_texts > min(s.max_choices, s.slots + s.queue):
            most = min(s.max_choices, s.slots + s.queue)
            raise Refusal(400, f"{n_texts} texts in one request; at most {most}", param=param)
        waiting = self.n_texts + n_texts - s.slots
        if waiting > s.queue:
            raise busy(
                f"{waiting - n_texts} texts are waiting, as many as may", 1 + waiting // s.slots
            )
        self.n_texts += n_texts

    def about(self) -> dict[str, Any]:
        """What ``/v1/models`` tells of it."""
        meta: dict[str, Any] = {
            "state": self.state, "kind": self.kind, "size": self.nbytes, "aliases": self.aliases,
        }  # fmt: skip
        if self.error is not None:
            meta["error"] = self.error
        if self._model is not None:
            m = self._model
            meta |= {
                "n_ctx": m.n_ctx, "n_ctx_train": m.config.n_ctx_train, "n_vocab": m.network.n_vocab,
                "n_embd": m.config.n_embd, "arch": m.arch, "name": m.metadata.get("general.name"),
                "has_chat_template": bool(m.metadata.get("tokenizer.chat_template")),
                "device": m.device,
            }  # fmt: skip
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "tinyllm",
            "meta": meta,
        }  # fmt: skip


STOPS = "the server stops, and has ended this before its end; ask again"


class Pool:
    """The models of a server, the first being the default."""

    def __init__(self, models: Mapping[str, Source], settings: Settings) -> None:
        if not models:
            raise ArgumentError("there is no model to serve")
        self.settings = settings
        self.models = {name: Served(name, source, settings) for name, source in models.items()}
        self._names: dict[str, Served] = {}
        for served in self.models.values():
            for name in names_of(served):
                self._names.setdefault(name, served)
            for name, owner in self._names.items():
                if owner is served and name not in (served.name, place_of(served.source)):
                    served.aliases.append(name)
        self.workers = ThreadPoolExecutor(8, "tinyllm-server")
        self._share()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._turn: asyncio.Lock | None = None  # one model is loaded at a time
        self.running: set[Callable[[], object]] = set()  # each ends a request that is worked on
        self.stops = False  # whether texts are ended because the server is

    def __iter__(self) -> Iterator[Served]:
        return iter(self.models.values())

    @property
    def ready(self) -> bool:
        """Whether the default model is loaded, or at least one."""
        return any(served.loaded for served in self)

    def find(self, name: str | None) -> Served:
        """The model of a name; the first one for none.

        Raises
        ------
        Refusal
            404: there is no such model.
        """
        if not name:
            return next(iter(self))
        served = self._names.get(name) or self._names.get(name.lower())
        if served is None:
            known = ", ".join(self.models)
            raise Refusal(
                404, f"there is no model {name!r:.100}; this server has {known}",
                param="model", code="model_not_found",
            )  # fmt: skip
        return served

    async def hold(self, name: str | None) -> Served:
        """The loaded model of a name, in use until ``release``.

        Raises
        ------
        Refusal
            There is no such model, or it cannot be loaded now.
        """
        served = self.find(name)
        served.in_use += 1
        try:
            if not served.loaded:
                await self._wait(served)
        except BaseException:
            self.release(served)
            raise
        return served

    def release(self, served: Served) -> None:
        """Say that a request no longer uses a model."""
        served.in_use -= 1
        served.used_at = time.monotonic()

    def begin(self) -> None:
        """Begin to load the default model, unless it is loaded, being loaded, or has failed."""
        served = self.find(None)
        if served.state == "unloaded":
            self._task(served)

    def _task(self, served: Served) -> asyncio.Task[None]:
        """The loading of a model; it begins unless it has begun."""
        task = self._loading.get(served.name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(served))
            self._loading[served.name] = task

            def ended(task: asyncio.Task[None]) -> None:
                self._loading.pop(served.name, None)
                if not task.cancelled():
                    task.exception()  # who waited was told

            task.add_done_callback(ended)
        return task

    async def _wait(self, served: Served) -> None:
        """Wait until a model is loaded."""
        task = self._task(served)
        done, _ = await asyncio.wait([task], timeout=self.settings.load_s)
        if not done:
            raise Refusal(503, f"{served.name} is being loaded", headers={"Retry-After": "5"})
        task.result()

    async def _load(self, served: Served) -> None:
        loop = asyncio.get_running_loop()
        self._turn = self._turn or asyncio.Lock()
        async with self._turn:
            served.state = "loading"
            try:
                await self._make_room(served)
                await loop.run_in_executor(self.workers, served.load)
                log.info("%s is loaded on %s", served.name, served.model.device)
            except (TinyLLMError, OSError, ValueError, RuntimeError, MemoryError) as error:
                text = " ".join(str(error).split())
                log.error("%s cannot be loaded: %s", served.name, text)
                served.state, served.error = "failed", without_folder(text, served.source)
                raise Refusal(
                    503, f"{served.name} cannot be loaded: {served.error}",
                    headers={"Retry-After": "30"},
                ) from error  # fmt: skip
            except Refusal:
                served.state = "unloaded"
                raise
            finally:
                self._share()

    async def _make_room(self, new: Served) -> None:
        """Let models go that nobody uses, the longest unused first, until a new one fits."""
        loop = asyncio.get_running_loop()
        while not self._fits(new):
            idle = [
                s for s in self if s.loaded and not s.in_use and not isinstance(s.source, Model)
            ]
            if not idle:
                if self.settings.memory is None:
                    return  # loading tells whether it really does not fit
                raise Refusal(
                    503, f"there is no memory for {new.name} while the others are in use",
                    headers={"Retry-After": "5"},
                )  # fmt: skip
            oldest = min(idle, key=lambda s: s.used_at)
            await loop.run_in_executor(self.workers, oldest.let_go())
        self._share(new)  # the others let go of what will be its own while it is read

    def _fits(self, new: Served) -> bool:
        others = sum(s.nbytes for s in self if s.loaded)
        if self.settings.memory is not None:
            return not others or others + new.nbytes <= self.settings.memory
        return new.nbytes * 1.2 < self._free()

    def _free(self) -> int:
        """Bytes that may be taken, those included that texts hold now."""
        loaded = [s for s in self if s.loaded]
        held = sum(s.held for s in loaded)
        return min((s.free for s in loaded), default=available_bytes()) + held

    def _share(self, new: Served | None = None) -> None:
        """Give each model an equal part of the memory that weights leave to texts."""
        room = self._free() - (0 if new is None else new.nbytes)
        if self.settings.memory is not None:
            weights = sum(s.nbytes for s in self if s.loaded or s is new)
            room = min(room, self.settings.memory - weights)
        writers = [s for s in self if s.writes or s is new]
        for served in writers:
            served.share(max(room, 0) // len(writers))

    def end_texts(self) -> int:
        """End all that is written where it is, since the server stops; how many requests that were."""
        self.stops = True
        for cancel in self.running:
            cancel()
        return len(self.running)

    def refuse_if_it_stops(self) -> None:
        """Refusal where all texts are ended."""
        if self.stops:
            raise Refusal(503, STOPS, headers={"Retry-After": "5"})

    def close(self) -> None:
        """End all texts and free all models."""
        for served in self:
            served.let_go()()
        self.workers.shutdown(wait=False, cancel_futures=True)


def without_folder(text: str, source: Source) -> str:
    """A text without the folder of a model's file, which is nobody's matter."""
    place = place_of(source)
    if place is not None:
        for path in (Path(place).resolve(), Path(place).absolute(), Path(place)):
            if path.parent not in (Path(), Path(path.anchor)):
                text = text.replace(os.path.join(path.parent, ""), "")
    return text


def place_of(source: Source) -> str | None:
    """The path that names a file of this machine by its folder; None for any other source."""
    if source is None or isinstance(source, Model) or str(source).startswith("hf:"):
        return None
    return None if Path(source).parent == Path() else str(source)


def names_of(served: Served) -> Iterable[str]:
    """All names of a model: its own, its file's with and without the ending, and GPT4All's."""
    yield served.name
    source = served.source
    path = Path(source.path if isinstance(source, Model) else source or loading.BUNDLED)
    yield from (path.name, path.stem)
    if isinstance(source, str):
        yield source
    from ..hub.catalogue import known_models

    listed = [m for m in known_models() if m.get("filename") == path.name]
    yield from (m["name"] for m in listed if isinstance(m.get("name"), str))
    yield from [name.lower() for name in (served.name, path.name, path.stem)]
