"""Clients that come, cancel and go, for a long time: memory of the server stays flat, and no answers mix.

    python benchmarks/server_soak.py                 # 64 clients for 10 minutes; results/server-soak.json
    python benchmarks/server_soak.py MODEL --memory 0.5
    python benchmarks/server_soak.py --minutes 1 --clients 8 --output -

Each request was made alone before. Among the others it must give the same text, whole or streamed, or an error
that says so; streams are left at any byte. ``--memory`` is the server's: what texts are kept in has to be
full long before the end, for memory to be seen flat. Exit code 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from common import RESULTS, machine
from soak import flatness

PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions", "claude": "/v1/messages"}
WHO = ("a dog", "a cat", "the sea", "Lily", "a red ball", "rain", "two birds", "an old tree")
N_KINDS = 240
SCHEMA = {"type": "object", "properties": {"tame": {"type": "boolean"}}, "required": ["tame"]}


def request(i: int) -> tuple[str, dict[str, Any]]:
    """The protocol and the body of request number i, whose answer depends on nothing else."""
    told = f"Story {i} is about {WHO[i % 8]}. " * (1 + i % 7)
    common = {"max_tokens": 8 + i * 7 % 90, "seed": i, "temperature": 0.5 * (i % 3)}
    if i % 5 == 0:
        return "text", {**common, "prompt": told, "n": 1 + i % 2}
    if i % 5 == 1:
        return "claude", {**common, "messages": [{"role": "user", "content": told}]}
    held = {"json_schema": SCHEMA} if i % 10 == 2 else {}
    messages = [{"role": "system", "content": told}, {"role": "user", "content": "Go on."}]
    return "chat", {**common, **held, "messages": messages, "ignore_eos": not held}


def texts_of(kind: str, answer: dict[str, Any]) -> list[str]:
    """The texts of a whole answer."""
    if kind == "claude":
        return ["".join(block["text"] for block in answer["content"])]
    return [c["text"] if kind == "text" else c["message"]["content"] for c in answer["choices"]]


def joined(kind: str, events: list[dict[str, Any]], n: int) -> list[str]:
    """The texts of a stream."""
    texts = [""] * n
    for event in events:
        if kind == "claude":
            texts[0] += event.get("delta", {}).get("text", "")
        for choice in event.get("choices", ()):
            piece = choice["text"] if kind == "text" else choice["delta"].get("content")
            texts[choice["index"]] += piece or ""
    return texts


class Clients:
    """What the clients ask, and how they were answered."""

    def __init__(self, url: str) -> None:
        self.url, self.expected = url, {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def learn(self) -> None:
        """Make each request alone."""
        async with self.client() as client:
            for i in range(N_KINDS):
                kind, body = request(i)
                answer = await client.post(PATHS[kind], json=body)
                answer.raise_for_status()
                self.expected[i] = texts_of(kind, answer.json())

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=600, trust_env=False)

    async def live(self, number: int, end: float) -> None:
        """A client's life: requests in random order, some of them left in the middle."""
        r = random.Random(number)
        async with self.client() as client:
            while time.monotonic() < end:
                i, way = r.randrange(N_KINDS), r.random()
                try:
                    if way < 0.4:
                        await self.ask(client, i)
                    else:
                        patience = r.randrange(1, 12_000) if way < 0.75 else None
                        await self.follow(client, i, patience)
                except Exception as e:
                    self.wrong.append(f"request {i}: {type(e).__name__}: {e}"[:300])
                    await asyncio.sleep(0.1)

    async def ask(self, client: httpx.AsyncClient, i: int) -> None:
        kind, body = request(i)
        answer = await client.post(PATHS[kind], json=body)
        if await self.refused(answer):
            return
        self.check(i, texts_of(kind, answer.json()), "whole")

    async def follow(self, client: httpx.AsyncClient, i: int, patience: int | None) -> None:
        """Read a stream to its end, or so many bytes of it, or give it up before a byte has come."""
        kind, body = request(i)
        body = {**body, "stream": True}
        if patience is not None and patience < 2000:
            async with self.client() as own:  # whose connection is closed
                asked = own.stream("POST", PATHS[kind], json=body)
                try:
                    await asyncio.wait_for(asked.__aenter__(), patience / 2000)
                    self.counts["left at its start"] += 1
                except asyncio.TimeoutError:
                    self.counts["left before a byte"] += 1
            return
        asked = client.build_request("POST", PATHS[kind], json=body)
        answer = await client.send(asked, stream=True)
        try:
            if answer.status_code != 200:
                await answer.aread()
            if await self.refused(answer):
                return
            data = b""
            async for part in answer.aiter_raw():
                data += part
                if patience is not None and len(data) >= patience:
                    self.counts["left"] += 1
                    return
        finally:
            await answer.aclose()
        lines = [s[6:] for s in data.decode().splitlines() if s.startswith("data: ")]
        events = [json.loads(s) for s in lines if s != "[DONE]"]
        self.check(i, joined(kind, events, body.get("n", 1)), "streamed")

    async def refused(self, answer: httpx.Response) -> bool:
        """Whether a request came at a time when too many waited; it may then come again."""
        if answer.status_code != 429:
            answer.raise_for_status()
            return False
        assert int(answer.headers["retry-after"]) > 0
        self.counts["429"] += 1
        await asyncio.sleep(0.3)
        return True

    def check(self, i: int, texts: list[str], how: str) -> None:
        self.counts[how] += 1
        if texts != self.expected[i]:
            self.wrong.append(
                f"request {i}, {how}: {texts!r:.200} instead of {self.expected[i]!r:.200}"
            )


def resident(pid: int) -> int:
    """Bytes of main memory that a process holds now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


async def soak(url: str, pid: int, n_clients: int, seconds: float) -> dict[str, Any]:
    """Load a server; what came of it."""
    clients, memory = Clients(url), []
    await clients.learn()
    start = time.monotonic()
    lives = [asyncio.ensure_future(clients.live(n, start + seconds)) for n in range(n_clients)]
    while time.monotonic() < start + seconds:
        memory.append(resident(pid))
        await asyncio.sleep(1)
    await asyncio.gather(*lives)
    async with clients.client() as client:
        for _ in range(600):  # what was left ends within a token
            text = (await client.get("/metrics")).text
            left = {m[0]: float(m[1]) for m in re.findall(r"^(tinyllm_\w+).* (\S+)$", text, re.M)}
            if not left["tinyllm_texts"]:
                break
            await asyncio.sleep(0.1)
    return {
        "minutes": round((time.monotonic() - start) / 60, 2), "clients": n_clients,
        "requests": dict(sorted(clients.counts.items())), "wrong": clients.wrong[:20],
        "n_wrong": len(clients.wrong), "texts_left": int(left["tinyllm_texts"]),
        "requests_left": int(left["tinyllm_requests_running"]) - 1,  # this one
        "tokens_written": int(left["tinyllm_generated_tokens_total"]), **flatness(memory),
    }  # fmt: skip


def good(result: dict[str, Any]) -> bool:
    left = result["texts_left"] or result["requests_left"]
    answered = all(result["requests"].get(how) for how in ("whole", "streamed", "left"))
    return result["flat"] and answered and not (result["n_wrong"] or left)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the bundled one")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--memory", type=float, default=0.06, help="the server's, in GB")
    parser.add_argument("--slots", type=int, default=24)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--output", default=str(RESULTS / "server-soak.json"))
    return parser.parse_args()


def main() -> int:
    a = arguments()
    limits = ("--memory", str(a.memory), "--slots", str(a.slots), "--queue", str(a.queue))
    command = [sys.executable, "-m", "tinyllm", "serve", *filter(None, [a.model]), "--port", "0"]
    with subprocess.Popen(
        [*command, "--quiet", *limits], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://[\d.:]+", server.stdout.readline())
            assert found is not None
            result = asyncio.run(soak(found[0], server.pid, a.clients, 60 * a.minutes))
        finally:
            server.terminate()
    model = Path(a.model).stem if a.model else "bundled"
    told = {**machine(), "model": model, "budget_gb": a.memory, **result}
    text = json.dumps(told, indent=1, ensure_ascii=False)
    if a.output == "-":
        print(text)
    else:
        Path(a.output).write_text(text + "\n", "utf-8")
    return int(not good(result))


if __name__ == "__main__":
    sys.exit(main())
