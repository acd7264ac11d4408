"""Where test data lies, and what is skipped, by name, when it does not."""

from __future__ import annotations

import http.server
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True)  # a run's verdict is of the change, not of chance
if os.environ.get("CI"):
    settings.load_profile("ci")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and processes started here would too

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TINYLLM_TESTDATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of models and references; tests that need it skip when it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; set TINYLLM_TESTDATA")
    return DATA


@pytest.fixture(scope="session")
def stories260k(data: Path) -> Path:
    """A real trained LLaMA of 260,000 parameters."""
    return data / "models" / "stories260K.gguf"


@pytest.fixture
def serving() -> Iterator[Callable[[http.server.HTTPServer], None]]:
    """serving(server): it answers in a thread of its own until the test ends."""
    with ExitStack() as stack:

        def serve(server: http.server.HTTPServer) -> None:
            how = {"poll_interval": 0.01}
            thread = threading.Thread(target=server.serve_forever, kwargs=how)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)

        yield serve
