"""A cache that does not fit is refused before it is taken, with sizes, and what was loaded goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tinyllm
from tinyllm import system
from tinyllm.errors import DeviceError

resource = pytest.importorskip("resource")

LIMITED = """
import resource, sys
import tinyllm
from tinyllm.errors import DeviceError
from pathlib import Path

def limit(room):
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))

model = tinyllm.load()
text = str(model.generate("Once", max_tokens=8, temperature=0))
limit(64 << 20)
refused = []
for work in (lambda: model.new_state(200_000), lambda: tinyllm.load(n_ctx=10**6).new_state()):
    try:
        work()
    except DeviceError as e:
        refused.append(str(e))
assert str(model.generate("Once", max_tokens=8, temperature=0)) == text
states = []
try:
    while True:
        states.append(model.new_state(500))
        model.generate("Once", max_tokens=2, state=states[-1])
except DeviceError as e:
    refused.append(str(e))
del states
assert str(model.generate("Once", max_tokens=8, temperature=0)) == text
print(*refused, sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_cache_beyond_the_limit_of_the_process() -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    assert "n_ctx=200000 need 409.6 MB" in lines[0]
    assert all(" are free. Use a smaller n_ctx" in line for line in lines)


def test_memory_that_goes_between_the_check_and_the_taking(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tinyllm.load()

    def refuse(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(model.network.be), "new_cache", refuse)
    with pytest.raises(DeviceError, match=r"gave no memory for .*n_ctx=64"):
        model.new_state(64)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_limit_of_the_process_counts_as_what_is_free() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20), before[1]))
        assert 200 << 20 < system.available_bytes() <= 256 << 20
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
