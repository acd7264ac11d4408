"""``tinyllm serve``: its options, and what they mean to the server."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, GGUFError, UnsupportedModel
from ..files import read_text
from .arguments import MODEL_HELP, Arguments, Parser, load_options, loading_of, locate, note
from .terminal import show

if TYPE_CHECKING:
    from ..localdocs.answering import Quoting
    from ..server.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve_arguments(p: Parser) -> None:
    p.add_argument("models", metavar="MODEL", nargs="*",
                   help=f"{MODEL_HELP}; a folder stands for all .gguf files in it")  # fmt: skip
    p.add_argument("--alias", action="append", default=[], metavar="NAME",
                   help="what clients call the model; repeated, for the second and so on")  # fmt: skip
    p.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: this machine only")
    p.add_argument(
        "--port", type=int, default=4891, metavar="N", help="default %(default)s; 0: any"
    )
    p.add_argument("--api-key", action="append", default=[], metavar="KEY",
                   help="ask clients for it; may be repeated; or $TINYLLM_API_KEY")  # fmt: skip
    p.add_argument("--cors", action="append", default=[], metavar="ORIGIN",
                   help="let pages of this origin call from a browser; * for all")  # fmt: skip
    p.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                   help="a further name by which the server may be called")  # fmt: skip
    p.add_argument("--localdocs", action="append", metavar="COLLECTION",
                   help="quote its documents in chats; - for all; may be repeated")  # fmt: skip
    p.add_argument("--chat-template", metavar="FILE|NAME",
                   help="a Jinja template, or chatml, llama3, ...; default: the model's own")  # fmt: skip
    load_options(p)
    p.add_argument("--slots", type=int, default=64, metavar="N",
                   help="texts written at a time; default %(default)s")  # fmt: skip
    p.add_argument("--queue", type=int, default=256, metavar="N",
                   help="texts that may wait; default %(default)s")  # fmt: skip
    p.add_argument(
        "--memory", type=float, metavar="GB", help="for weights and texts; default: what is free"
    )
    p.add_argument(
        "--max-body", type=float, default=16, metavar="MB", help="of a request; default %(default)s"
    )
    p.add_argument("--stop-seconds", type=float, default=30, metavar="S",
                   help="given to running requests after the first signal; default %(default)s")  # fmt: skip
    p.add_argument("--log-prompts", action="store_true", help="write requests into the log")
    p.add_argument("--quiet", action="store_true", help="do not log requests")


def serve(args: Arguments) -> None:
    from ..server import create_app

    models = models_of(args.models, args.alias)
    settings = settings_of(args)
    check_loading(models, settings.load)
    app = create_app(models, settings)
    from ..server.run import address_of, listen
    from ..server.run import serve as answer

    logging.basicConfig(
        level=logging.WARNING if args.quiet else logging.INFO, stream=sys.stderr,
        format="%(asctime)s %(message)s", datefmt="%H:%M:%S",
    )  # fmt: skip
    sock = listen(args.host, args.port)
    show(f"serving {', '.join(models)} on {address_of(sock)}\n")
    if args.host not in LOOPBACK and not app.pool.settings.api_keys:
        note("whoever reaches this machine may use the server; --api-key asks for a key")
    answer(app, sock, args.stop_seconds)


def settings_of(args: Arguments) -> Settings:
    """The options as the server takes them; impossible ones are refused before anything is loaded."""
    from ..server import Settings

    for name, least in (
        ("slots", 1),
        ("queue", 0),
        ("memory", 0),
        ("max_body", 0.001),
        ("stop_seconds", 0),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value < 1e9:
            raise ArgumentError(f"--{name.replace('_', '-')} {value:g}; expected at least {least}")
    if not 0 <= args.port < 1 << 16:
        raise ArgumentError(f"--port {args.port}; expected 0 to 65535")
    keys = [*args.api_key, *filter(None, [os.environ.get("TINYLLM_API_KEY")])]
    if not all(keys):
        raise ArgumentError("--api-key is empty; expected a key, or leave it out")
    names = ("localhost", "127.0.0.1", "[::1]", *args.allow_host) if args.host in LOOPBACK else ()
    return Settings(
        api_keys=tuple(keys), origins=tuple(args.cors), hosts=names, slots=args.slots,
        queue=args.queue, template=template_of(args.chat_template),
        memory=None if args.memory is None else int(args.memory * 1e9),
        documents=documents_of(args.localdocs), max_body=int(args.max_body * 1e6),
        log_prompts=args.log_prompts, load=loading_of(args),
    )  # fmt: skip


def check_loading(models: Mapping[str, str | Path | None], load: Mapping[str, Any]) -> None:
    """An error, before the port is open, for what loading would refuse later.

    That is a device that is not there, a number that means nothing, a first file that is no model, and adapters
    and control vectors that do not fit each model.
    """
    from .. import gguf, loading
    from ..engine.completion import check_n_ctx

    check_n_ctx(load["n_ctx"])
    options = (load[name] for name in ("device", "n_threads", "n_gpu_layers", "compute"))
    for stage in loading.placing(*options)(1):
        stage.be.close()
    with gguf.open(loading.locate(next(iter(models.values())))) as first:
        if load["compute"] == "bf16":
            loading.check_floats(first)
    if not (load["lora"] or load["control"] or load["control_layers"]):
        return
    for name, path in models.items():
        with gguf.open(loading.locate(path)) as file:
            try:
                loading.beside_file(file, load["lora"], load["control"], load["control_layers"])
            except (ArgumentError, GGUFError, UnsupportedModel) as e:
                raise ArgumentError(
                    f"{name}: {e}; --lora and --control go to every model that is served"
                ) from e


def documents_of(names: Sequence[str] | None) -> Quoting | None:
    """The collections that chats may quote; an unknown one is an error at once."""
    if names is None:
        return None
    from ..localdocs import LocalDocs
    from ..localdocs.answering import Quoting

    docs = LocalDocs()
    wanted = [name for name in names if name != "-"]
    for name in wanted:
        docs.collection(name)
    docs.embedder  # noqa: B018 (loaded now, not by the first request)
    return Quoting(docs, None if "-" in names else wanted)


def template_of(name: str | None) -> str | None:
    """A chat template: a file's text, or a well-known name."""
    from ..chat.known import WELL_KNOWN
    from ..chat.render import check, given_template

    if name is None:
        return None
    try:
        text = given_template(name if name in WELL_KNOWN else read_text(name))
    except OSError as e:
        known = ", ".join(WELL_KNOWN)
        raise ArgumentError(
            f"--chat-template {name}: {e.strerror}; expected a file, or one of {known}"
        ) from e
    check(text)
    return text


def models_of(words: Sequence[str], aliases: Sequence[str]) -> dict[str, str | Path | None]:
    """The models by name: an alias, or the file's name without its ending."""
    found: list[str | None] = []
    named: list[str | None] = [*words] or [None]
    for word in named:
        if word is not None and os.path.isdir(word):
            files = sorted(map(str, Path(word).glob("*.gguf")))
            if not files:
                raise ArgumentError(f"there is no .gguf file in {word}")
            found += files
        else:
            found.append(word)
    if len(aliases) > len(found):
        raise ArgumentError(f"{len(aliases)} aliases for {len(found)} models")
    models: dict[str, str | Path | None] = {}
    for i, source in enumerate(found):
        path = locate(source)
        name = aliases[i] if i < len(aliases) else "bundled" if source is None else path.stem
        if name in models:
            raise ArgumentError(f"two models are named {name!r}; give --alias for each")
        models[name] = None if source is None else path
    return models
