"""Replicas of the server on 1 to 1,000 nodes, played from measured times.

    python benchmarks/scale.py --measure model.gguf --json benchmarks/results/scale.json
    python benchmarks/scale.py --check 1 2 4     # and beside Ray's nodes on this machine, whose steps sleep

Conversations begin at random times. Each turn asks with all that was said before, and its client thinks before
the next. A replica reads one prompt at a time, as much of it as it has not read before, then writes all its
texts side by side. A node that fails forgets what it had read; its requests go to others. The policy is that of
tinyllm.ray: the router's ``ranked`` is the server's own.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import machine, write_json
from nodes import Namespaces, Nodes

from tinyllm.ray.prefixes import ranked

SLOTS = 16  # texts that a replica writes at a time
HELD = 32_768  # tokens of conversations that a replica keeps
PLAYS = 15  # beside Ray: where the order of turns is chance, each play has numbers of its own


@dataclass(frozen=True)
class Costs:
    """Seconds: a prompt's token, a step that writes one text, what each further text adds, a node's return.

    ``message_s`` is what a message to a replica or from it takes, on average.
    """

    read_s: float = 0.001
    step_s: float = 0.012
    row_s: float = 0.002
    return_s: float = 30.0
    message_s: float = 0.0

    def step(self, n_texts: int) -> float:
        """Seconds of a step that writes so many texts."""
        return self.step_s + (n_texts - 1) * self.row_s


@dataclass(frozen=True)
class Load:
    """Conversations for each node, how they go on, and how often a node fails."""

    conversations: int = 25
    turns: int = 6
    over_s: float = 60.0  # they begin within so many seconds
    think_s: float = 4.0
    asked: int = 60  # tokens of a question, on average
    answered: int = 40
    failures_per_hour: float = 0.0

    def talks(self, n_nodes: int, seed: int) -> list[Talk]:
        """The conversations for so many nodes."""
        chance = random.Random(seed)

        def about(n: int) -> int:
            return max(1, round(chance.uniform(0.5, 1.5) * n))

        return [
            Talk(number, chance.uniform(0, self.over_s),
                 [(about(self.asked), about(self.answered)) for _ in range(self.turns)],
                 [chance.expovariate(1 / self.think_s) for _ in range(self.turns)])
            for number in range(self.conversations * n_nodes)
        ]  # fmt: skip


@dataclass
class Talk:
    """A conversation: its start, tokens of each question and answer, seconds of thought after each answer."""

    number: int
    start: float
    turns: list[tuple[int, int]]
    thinks: list[float]


@dataclass
class Turn:
    """A question of a conversation that is on its way, its prompt with all before it."""

    talk: Talk
    index: int
    asked_at: float
    left: int = 0  # tokens still to write
    cached: int = 0

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        before = sum(a + b for a, b in self.talk.turns[: self.index])
        return before + self.talk.turns[self.index][0]


@dataclass
class Replica:
    """What one server does, in blocks of time: it reads a prompt, or writes until a text ends."""

    costs: Costs
    waiting: deque[Turn] = field(default_factory=deque)
    running: list[Turn] = field(default_factory=list)
    held: OrderedDict[int, int] = field(default_factory=OrderedDict)  # tokens, by conversation
    reading: Turn | None = None
    steps: int = 0
    began: float = 0.0
    version: int = 0  # changes where an arrival brings the block's end forward

    @property
    def busy(self) -> bool:
        """Whether a block is going on."""
        return self.reading is not None or self.steps > 0

    def begin(self, now: float) -> float:
        """Begin the next block -> when it ends."""
        self.version += 1
        self.began = now
        if self.waiting and len(self.running) < SLOTS:
            turn = self.reading = self.waiting.popleft()
            turn.cached = min(self.held.get(turn.talk.number, 0), turn.prompt - 1)
            return now + (turn.prompt - turn.cached) * self.costs.read_s
        self.steps = min(turn.left for turn in self.running) if self.running else 0
        return now + self.steps * self.costs.step(len(self.running) or 1)

    def cut(self, now: float) -> float:
        """End a block of steps with the one that is being computed -> when."""
        self.version += 1
        step = self.costs.step(len(self.running))
        self.steps = min(self.steps, int((now - self.began) / step) + 1)
        return self.began + self.steps * step

    def end(self) -> list[Turn]:
        """End the block -> the turns whose answers are whole."""
        if (turn := self.reading) is not None:
            self.reading, turn.left = None, turn.talk.turns[turn.index][1]
            self.running.append(turn)
            return []
        for turn in self.running:
            turn.left -= self.steps
        self.steps = 0
        done = [turn for turn in self.running if turn.left <= 0]
        self.running = [turn for turn in self.running if turn.left > 0]
        for turn in done:
            self.held[turn.talk.number] = turn.prompt + turn.talk.turns[turn.index][1]
            self.held.move_to_end(turn.talk.number)
            while sum(self.held.values()) > HELD:
                self.held.popitem(last=False)
        return done

    def fail(self) -> list[Turn]:
        """Lose all -> the turns that go elsewhere."""
        lost = [*self.waiting, *self.running, *([self.reading] if self.reading else [])]
        version = self.version + 1
        self.__init__(self.costs)  # type: ignore[misc]
        self.version = version
        return lost


class Router:
    """Chooses a replica: the first by rank that is there, or any."""

    def __init__(self, n: int, prefixes: bool, seed: int) -> None:
        self.names, self.prefixes = [f"replica-{i}" for i in range(n)], prefixes
        self.there, self.seed = set(range(n)), seed
        self._ranks: dict[int, list[int]] = {}

    def choose(self, turn: Turn) -> int | None:
        """A replica for a conversation's turn; None while there is none.

        By chance, but by each turn's own, so that two plays whose turns come in another order choose alike.
        """
        if not self.there:
            return None
        talk = turn.talk
        if not self.prefixes:
            draw = random.Random(f"{self.seed} {talk.number} {turn.index}").random()
            i = int(draw * len(self.there))
            return i if len(self.there) == len(self.names) else sorted(self.there)[i]
        if talk.number not in self._ranks:
            self._ranks[talk.number] = ranked(str(talk.number).encode(), self.names)
        return next(i for i in self._ranks[talk.number] if i in self.there)


@dataclass
class Found:
    """What came of a load: turns, tokens written, tokens of prompts and those found computed, latencies."""

    turns: int = 0
    written: int = 0
    prompts: int = 0
    cached: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def note(self, turn: Turn, now: float) -> None:
        """A turn was answered."""
        self.turns += 1
        self.written += turn.talk.turns[turn.index][1]
        self.prompts += turn.prompt
        self.cached += turn.cached
        self.seconds = max(self.seconds, now)
        self.latencies.append(now - turn.asked_at)

    def summary(self) -> dict[str, float]:
        """The numbers of a table's line."""
        cuts = statistics.quantiles(self.latencies, n=20)
        return {
            "turns": self.turns, "tokens_per_s": self.written / self.seconds,
            "cached": self.cached / self.prompts, "cached_tokens": self.cached,
            "mean_s": statistics.fmean(self.latencies), "p50_s": cuts[9], "p95_s": cuts[18],
        }  # fmt: skip


def simulate(
    load: Load, costs: Costs, n: int, prefixes: bool, seed: int = 0, messages: int = 0
) -> Found:
    """Play a load on n replicas; ``messages`` is the seed of what each message takes."""
    router, replicas = Router(n, prefixes, seed), [Replica(costs) for _ in range(n)]
    chance, number, found = random.Random(seed + 1), itertools.count(), Found()
    events: list[tuple[float, int, str, Any]] = []
    parked: list[Turn] = []
    post = random.Random(messages)

    def message() -> float:
        return post.expovariate(1 / costs.message_s) if costs.message_s else 0.0

    def ask(talk: Talk, index: int, at: float) -> None:
        add(at + message(), "turn", Turn(talk, index, at))

    def add(at: float, kind: str, what: Any) -> None:
        heapq.heappush(events, (at, next(number), kind, what))

    talks = load.talks(n, seed)
    for talk in talks:
        ask(talk, 0, talk.start)
    rate = load.failures_per_hour / 3600
    if rate:
        for i in range(n):
            add(chance.expovariate(rate), "fail", i)
    left = len(talks) * load.turns
    while left:
        now, _, kind, what = heapq.heappop(events)
        if kind == "turn":
            i = router.choose(what)
            if i is None:
                parked.append(what)
                continue
            replica = replicas[i]
            replica.waiting.append(what)
            if not replica.busy:
                add(replica.begin(now), "end", (i, replica.version))
            elif replica.steps and len(replica.running) < SLOTS:
                add(replica.cut(now), "end", (i, replica.version))
        elif kind == "end" and what == (what[0], replicas[what[0]].version):
            replica = replicas[what[0]]
            for turn in replica.end():
                answered = now + message()
                found.note(turn, answered)
                left -= 1
                if turn.index + 1 < load.turns:
                    ask(turn.talk, turn.index + 1, answered + turn.talk.thinks[turn.index])
            end = replica.begin(now)
            if replica.busy:
                add(end, "end", (what[0], replica.version))
        elif kind == "fail":
            router.there.discard(what)
            add(now + costs.return_s, "back", what)
            for turn in replicas[what].fail():
                add(now, "turn", turn)
        elif kind == "back":
            router.there.add(what)
            add(now + chance.expovariate(rate), "fail", what)
            for turn in parked:
                add(now, "turn", turn)
            parked.clear()
    return found


# ---- beside Ray's nodes


class Sleeper:
    """A replica in a process of Ray's, whose blocks sleep."""

    def __init__(self, costs: Costs) -> None:
        self.replica = Replica(costs)
        self.came = asyncio.Event()
        self.done: dict[int, asyncio.Future[int]] = {}
        self.task = asyncio.ensure_future(self.work())

    async def ask(self, turn: Turn) -> tuple[int, float]:
        """Answer a turn -> tokens of its prompt that were found computed, seconds that it was here."""
        came = time.monotonic()
        self.replica.waiting.append(turn)
        answer = self.done[turn.talk.number] = asyncio.get_running_loop().create_future()
        self.came.set()
        return await answer, time.monotonic() - came

    async def work(self) -> None:
        """Block after block."""
        now = time.monotonic()
        while True:
            end = self.replica.begin(now)
            if not self.replica.busy:
                self.came.clear()
                if not self.replica.waiting:
                    await self.came.wait()
                now = time.monotonic()
                continue
            self.came.clear()
            while (rest := end - time.monotonic()) > 0:
                try:
                    await asyncio.wait_for(self.came.wait(), rest)
                except asyncio.TimeoutError:
                    break
                self.came.clear()
                if self.replica.steps and len(self.replica.running) < SLOTS:
                    end = self.replica.cut(time.monotonic())
            for turn in self.replica.end():
                self.done.pop(turn.talk.number).set_result(turn.cached)
            now = end  # sleeping late does not add up


async def beside(load: Load, actors: list[Any], prefixes: bool, seed: int) -> tuple[Found, float]:
    """Play a load on actors -> what came of it, seconds of a message, on average."""
    router, found, zero = Router(len(actors), prefixes, seed), Found(), time.monotonic()
    messages: list[float] = []

    async def talk_to(talk: Talk) -> None:
        await asyncio.sleep(talk.start)
        for index, think in enumerate(talk.thinks):
            turn = Turn(talk, index, time.monotonic() - zero)
            turn.cached, there = await actors[router.choose(turn) or 0].ask.remote(turn)
            now = time.monotonic() - zero
            messages.append((now - turn.asked_at - there) / 2)
            found.note(turn, now)
            await asyncio.sleep(think)

    await asyncio.gather(*(talk_to(talk) for talk in load.talks(len(actors), seed)))
    return found, statistics.fmean(messages)


def check(
    counts: list[int], load: Load, costs: Costs, nodes: Nodes, rounds: int
) -> Iterator[dict[str, Any]]:
    """Each count of nodes, on Ray and played: nodes of one CPU on this machine, one replica on each.

    Both are medians: of the rounds, and of ``PLAYS`` for each round, with messages that take as long as Ray's
    did in it, on average.
    """
    import ray

    for n, prefixes in itertools.product(sorted(counts), (True, False)):
        nodes.grow(n)
        maker = ray.remote(num_cpus=1, max_concurrency=1000)(Sleeper)
        real, played, messages = [], [], []
        for _ in range(rounds):
            actors = [maker.options(scheduling_strategy="SPREAD").remote(costs) for _ in range(n)]
            ray.get([a.__ray_ready__.remote() for a in actors], timeout=600)
            found, message_s = asyncio.run(beside(load, actors, prefixes, 0))
            for actor in actors:
                ray.kill(actor)
            real.append(found.summary())
            messages.append(message_s)
            posted = replace(costs, message_s=message_s)
            played += [simulate(load, posted, n, prefixes, 0, i).summary() for i in range(PLAYS)]
        yield {
            "nodes": n, "prefixes": prefixes, "message_s": messages,
            "ray": middle(real), "ray_range": ends(real),
            "played": middle(played), "played_range": ends(played),
        }  # fmt: skip


def middle(found: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number."""
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def ends(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """The least and the most of each number."""
    values = {name: [each[name] for each in found] for name in found[0]}
    return {name: [min(all_), max(all_)] for name, all_ in values.items()}


def furthest(checked: list[dict[str, Any]]) -> str:
    """The largest difference between Ray and what is played, in a line."""
    share, name, one = max(
        ((abs(one["ray"][name] / one["played"][name] - 1), name, one)
         for one in checked for name in ("tokens_per_s", "mean_s", "p50_s", "p95_s")),
        key=lambda found: found[0],
    )  # fmt: skip
    way = "prefixes" if one["prefixes"] else "random"
    return f"largest difference: {100 * share:.1f} %, {name}, {one['nodes']} nodes, {way}"


# ---- measuring


def measure(path: str | None, n_threads: int | None) -> Costs:
    """The costs of a model on this machine."""
    import tinyllm

    with tinyllm.load(path, n_threads=n_threads, prefix_bytes=0) as model:
        ids = model.tokenizer.encode("Once upon a time there was a cat. " * 20)[:128]

        def best(prompts: list[list[int]], n: int) -> float:
            times = []
            for _ in range(5):
                start = time.perf_counter()
                model.generate(prompts, max_tokens=n, temperature=0, logit_bias=no_end)
                times.append(time.perf_counter() - start)
            return min(times)

        no_end = dict.fromkeys(model.tokenizer.eog, -1e9)
        read = (best([ids], 1) - best([ids[:8]], 1)) / (len(ids) - 8)
        one = (best([ids[:8]], 33) - best([ids[:8]], 1)) / 32
        many = (best([ids[:8]] * SLOTS, 33) - best([ids[:8]] * SLOTS, 1)) / 32
    return Costs(read, one, max(0.0, (many - one) / (SLOTS - 1)))


# ---- the command


def line(n: int, name: str, s: dict[str, float]) -> str:
    """One line of the table."""
    return (f"{n:>6} {name:<9} {s['tokens_per_s']:>10.0f} {s['p50_s']:>8.2f} {s['p95_s']:>8.2f} "
            f"{100 * s['cached']:>7.1f} %")  # fmt: skip


def main() -> None:
    """Measure, play, and check."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--measure", metavar="MODEL", help="take the costs of this model; else made up")
    p.add_argument("--costs", type=Path, metavar="FILE", help="take those of this report")
    p.add_argument("-t", "--n-threads", type=int, metavar="N")
    p.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64, 256, 1000])
    p.add_argument("--check", type=int, nargs="*", default=[], metavar="N", help="on Ray, too")
    p.add_argument("--rounds", type=int, default=1, metavar="N", help="of --check; their median")
    p.add_argument("--namespaces", action="store_true",
                   help="each of Ray's nodes in a network namespace; needs root")  # fmt: skip
    p.add_argument("--failures", type=float, default=0.5, metavar="X", help="of a node an hour")
    p.add_argument("--seconds", type=float, default=60, help="within which conversations begin")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args()
    if min([*args.nodes, *args.check, args.rounds]) < 1:
        p.error("--nodes, --check and --rounds take numbers from 1")
    costs = Costs()
    if args.costs:
        try:
            costs = Costs(**json.loads(args.costs.read_text("utf-8"))["costs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            p.error(f"--costs {args.costs}: no report of this program ({error})")
    elif args.measure:
        costs = measure(args.measure, args.n_threads)
    load = Load(over_s=args.seconds)
    report: dict[str, Any] = {"machine": machine(), "costs": asdict(costs), "load": asdict(load)}
    print(f"read {1e3 * costs.read_s:.2f} ms a token, steps {1e3 * costs.step(1):.2f} ms for 1 text, "
          f"{1e3 * costs.step(SLOTS):.2f} ms for {SLOTS}")  # fmt: skip
    print(" nodes routing    tokens/s    p50 s    p95 s    cached")
    report["played"] = []
    for n in args.nodes:
        for prefixes in (True, False):
            rough = Load(**{**asdict(load), "failures_per_hour": args.failures})
            found = simulate(rough, costs, n, prefixes).summary()
            report["played"].append({"nodes": n, "prefixes": prefixes, **found})
            print(line(n, "prefixes" if prefixes else "random", found))
    report["checked"] = []
    if args.check:
        with Namespaces() if args.namespaces else Nodes() as nodes:
            for one in check(args.check, load, costs, nodes, args.rounds):
                report["checked"].append(one)
                print(line(one["nodes"], "on Ray", one["ray"]))
                print(line(one["nodes"], "played", one["played"]), flush=True)
        print(furthest(report["checked"]))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
