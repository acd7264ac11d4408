"""Ray's nodes on this machine, each with one CPU: side by side, or in network namespaces of their own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

for name, value in {
    "RAY_worker_niceness": "0",  # else workers give way to all that runs beside them
    "RAY_agent_register_timeout_ms": "600000",  # else a node ends whose agents start late
    "RAY_AUTH_MODE": "token",  # else `ray start` takes the token of the user's, and a driver none
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}.items():
    os.environ.setdefault(name, value)

MEMORY = 100_000_000  # bytes that a node's store of objects has
NET = "10.213.0"  # what the namespaces' addresses begin with
PORT = 6380


class Nodes:
    """A cluster that begins with one node; the processes of all share the machine's network."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._size = {"num_cpus": 1, "object_store_memory": MEMORY}
        head = {**self._size, "include_dashboard": False}
        self._cluster = Cluster(True, head_node_args=head)
        ray.init(self._cluster.address, log_to_driver=False, logging_level="warning")

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()
        self._close()

    def grow(self, n: int) -> None:
        """Start nodes until there are n."""
        import ray

        while self._count() < n:
            self._add()
        end = time.monotonic() + 600
        while ray.cluster_resources().get("CPU", 0) < n:
            assert time.monotonic() < end, f"no {n} nodes within ten minutes"
            self._revive()
            time.sleep(0.1)

    def _count(self) -> int:
        return len(self._cluster.list_all_nodes())

    def _add(self) -> None:
        self._cluster.add_node(**self._size)

    def _revive(self) -> None:
        """Start nodes again that ended: on a busy machine Ray gives one up after 30 seconds."""

    def _close(self) -> None:
        self._cluster.shutdown()


class Namespaces(Nodes):
    """A cluster whose nodes have addresses of their own: `ray start` in network namespaces at one bridge.

    The head, without a CPU, has the bridge's address. It needs Linux, root and iproute2.
    """

    def __init__(self) -> None:
        import ray

        self._processes: list[subprocess.Popen[Any]] = []
        ip("link", "add", "tinyllm", "type", "bridge")
        try:
            ip("addr", "add", f"{NET}.1/24", "dev", "tinyllm")
            ip("link", "set", "tinyllm", "up")
            self._head = start(
                "--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=0", number=1
            )
            address = f"{NET}.1:{PORT}"
            options = {
                "log_to_driver": False,
                "logging_level": "warning",
                "_node_ip_address": f"{NET}.1",
            }
            for left in reversed(range(60)):
                try:
                    ray.init(address, **options)
                    return
                except Exception:  # Ray has no type for a head that is not there yet
                    if not left:
                        raise
                    time.sleep(2)
        except BaseException:
            self._close()
            raise

    def _count(self) -> int:
        return len(self._processes)

    def _add(self) -> None:
        i = self._count()
        name, inside = f"tinyllm{i}", ("netns", "exec", f"tinyllm{i}", "ip")
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", "tinyllm", "up")
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "addr", "add", f"{NET}.{i + 2}/24", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        self._processes.append(self._start(i))

    def _start(self, i: int) -> subprocess.Popen[Any]:
        options = f"--address={NET}.1:{PORT}", "--num-cpus=1"
        return start(*options, number=i + 2, namespace=f"tinyllm{i}")

    def _revive(self) -> None:
        for i, process in enumerate(self._processes):
            if process.poll() is not None:
                self._processes[i] = self._start(i)

    def _close(self) -> None:
        n = self._count()
        for process in [
            *reversed(self._processes),
            *([self._head] if hasattr(self, "_head") else []),
        ]:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for i in range(n):
            ip("netns", "del", f"tinyllm{i}")
        ip("link", "del", "tinyllm")


def start(*options: str, number: int, namespace: str | None = None) -> subprocess.Popen[Any]:
    """`ray start` with an address on the bridge, in a namespace or in none; its processes are one group."""
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options,
               f"--node-ip-address={NET}.{number}", f"--object-store-memory={MEMORY}"]  # fmt: skip
    return subprocess.Popen(
        [*inside, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def ip(*words: str) -> None:
    """iproute2's command."""
    subprocess.run(["ip", *words], check=True)
