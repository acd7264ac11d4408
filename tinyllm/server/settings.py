"""What an operator of the server chooses: keys, origins, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..localdocs.answering import Quoting

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys, origins and limits of a server.

    Parameters
    ----------
    api_keys : tuple of str
        One of them must come with each request, unless there are none.
    origins : tuple of str
        Web pages that may use the server from a browser, besides its own: "https://example.org"; "*" for all.
    hosts : tuple of str
        Names by which the server may be called; none: any. They keep a web page from reaching a server of this
        machine by a name of its own that it points here.
    slots, queue : int
        Texts that a model writes at a time, and that may wait; with more, a request gets 429.
    max_body : int
        Bytes of a request.
    max_messages, max_choices, max_inputs : int
        Messages of a conversation, texts that one request may ask for, and texts to embed or to rank in one.
    max_schema : int
        Bytes of JSON schemas, grammars and descriptions of tools.
    ping_s : float
        Seconds after which a stream without news says that it is alive.
    send_s : float
        Seconds that a client may take to read what was sent, before it counts as gone.
    load_s : float
        Seconds that a request waits for its model to be loaded, before it gets 503.
    memory : int, optional
        Bytes that weights may take at a time, and texts what they leave of it; by default what the machine
        has free. One model is loaded in any case.
    template : str, optional
        A Jinja chat template to use instead of the models' own, or the name of a well-known one.
    log_prompts : bool
        Write requests' bodies into the log.
    documents : Quoting, optional
        Documents that chat completions may quote; their choices then have GPT4All's ``references``.
    load : mapping
        What ``tinyllm.load`` takes by keyword, for every model.
    """

    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    slots: int = 64
    queue: int = 256
    max_body: int = 16 * MIB
    max_messages: int = 4096
    max_choices: int = 64
    max_inputs: int = 2048
    max_schema: int = MIB
    ping_s: float = 5.0
    send_s: float = 60.0
    load_s: float = 60.0
    memory: int | None = None
    template: str | None = None
    log_prompts: bool = False
    documents: Quoting | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
