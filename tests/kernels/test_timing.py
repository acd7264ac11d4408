"""Ways to read weights give the same bits; the fastest on this machine is found and kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import normal, stored
from test_cpu import ONE, product

from tinyllm.kernels.cpu import jit, matmul, micro, timing
from tinyllm.kernels.cpu.timing import Way

WAYS = [Way(order, ahead) for order in micro.ORDERS for ahead in (0, 2048)]


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ2_S"])
def test_every_way_gives_the_same_bits(monkeypatch: Any, type_name: str) -> None:
    w, x = ONE.load(stored(type_name, 80, 512)), normal(37, 512)
    found = []
    for way in WAYS:
        monkeypatch.setattr(matmul, "way_of", lambda *_, way=way: way)
        found.append([product(ONE, w, x[:n]) for n in (1, 2, 4, 15, 30, 37)])
    for others in found[1:]:
        for y, other in zip(found[0], others, strict=True):
            assert np.array_equal(y, other)


@pytest.mark.parametrize("type_name", ["F16", "BF16", "F32"])
def test_asking_for_floats_ahead_changes_no_bit(monkeypatch: Any, type_name: str) -> None:
    w, x = ONE.load(stored(type_name, 80, 515)), normal(27, 515)
    for n in (1, 5, 16, 27):
        monkeypatch.setattr(matmul, "way_of", lambda *_: Way())
        plain = product(ONE, w, x[:n])
        monkeypatch.setattr(matmul, "way_of", lambda *_: Way(ahead=4096))
        assert np.array_equal(product(ONE, w, x[:n]), plain)


class Clock:
    """Time that passes as a script says: seconds of a run by way and round."""

    def __init__(self, seconds: Callable[[Way, int], float], share: float = 1.0) -> None:
        self.now, self.seconds, self.rounds, self.share = 0.0, seconds, 0, share

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.share * self.now

    time = staticmethod(time.time)

    def tape(self) -> Any:
        return _Tape(self)

    def record(self, tape: Any, address: int, pieces: int, way: Way) -> None:
        tape.way = way

    def chosen(self, orders: tuple[str, ...] = ("parts", "block")) -> Way:
        return timing.chosen("fake_1", orders, self.record, 1 << 20, 1)


class _Tape:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.runs = clock, 0

    def run(self, n_workers: int) -> None:
        self.clock.now += self.clock.seconds(self.way, self.runs)
        self.runs += 1
        self.clock.rounds += 1


@pytest.fixture
def clock(monkeypatch: Any, tmp_path: Path) -> Iterator[Callable[..., Clock]]:
    """Makes clocks; nothing is known at first, and what is kept goes to a folder of the test's own."""

    def make(seconds: Callable[[Way, int], float], share: float = 1.0) -> Clock:
        made = Clock(seconds, share)
        monkeypatch.setattr(timing, "time", made)
        monkeypatch.setattr(timing, "Tape", made.tape)
        monkeypatch.setattr(timing, "_results", {})
        return made

    monkeypatch.setattr(timing, "SMALLEST", 1 << 21)
    monkeypatch.setattr(timing, "PATIENCE", 1000.0)
    monkeypatch.setattr(timing.system, "cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    return make


def far_is_fast(way: Way, i: int) -> float:
    return 2.0 - way.ahead / 16384 + (way.order == "block")


def near_is_fast(way: Way, i: int) -> float:
    return 1.0 + way.ahead / 16384


def test_the_fastest_way_wins_and_the_next_process_knows_it(clock: Any) -> None:
    first = clock(far_is_fast)
    assert first.chosen() == Way("parts", 16384)
    n = first.rounds
    assert n == timing.ROUNDS * (len(timing.QUICK) + len(timing.BURSTS))
    first.chosen()
    assert first.rounds == n  # known to this process
    other = clock(near_is_fast)
    assert other.chosen() == Way("parts", 16384)
    assert other.rounds == 0


def test_nothing_is_asked_for_where_that_gains_little(clock: Any) -> None:
    assert clock(lambda way, i: 1.0 - way.ahead / 10**7).chosen() == Way()


def an_hour_passes(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - timing.GOOD_FOR - 1,) * 2)


@pytest.mark.parametrize("disturbed", ["rounds", "neighbour"])
def test_a_doubtful_measurement_is_taken_again_later(
    clock: Any, tmp_path: Path, disturbed: str
) -> None:
    if disturbed == "rounds":
        busy = clock(lambda way, i: far_is_fast(way, i) * (1 + i))
    else:
        busy = clock(far_is_fast, share=0.5)
    assert busy.chosen() == busy.chosen() == Way("parts", 16384)
    assert busy.rounds == timing.ROUNDS * (len(timing.QUICK) + len(timing.BURSTS))
    soon = clock(near_is_fast)
    assert soon.chosen() == Way("parts", 16384)
    assert soon.rounds == 0
    an_hour_passes(tmp_path)
    later = clock(near_is_fast)
    assert later.chosen() == Way()
    assert later.rounds > 0
    an_hour_passes(tmp_path)
    assert clock(far_is_fast).chosen() == Way()  # there was no doubt


def test_a_machine_without_time_is_not_waited_for(clock: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 3.0)
    busy = clock(far_is_fast)
    assert busy.chosen() == Way()  # not all ways were tried
    assert busy.rounds == 2
    assert timing._results["fake_1"].doubtful
    assert str(timing._results["fake_1"]).endswith("(for now: the machine is busy)")


def test_warming_up_measures_again_and_says_what_won(clock: Any) -> None:
    clock(near_is_fast).chosen()
    again = clock(far_is_fast)
    with timing.thoroughly() as found:
        assert again.chosen(("parts",)) == Way("parts", 24576)
    assert again.rounds == timing.MANY_ROUNDS * len(timing.THOROUGH)
    assert str(found[0]).startswith("fake_1: 0.0 GB/s by parts, 24576 bytes ahead; 0.0 with")
    assert clock(far_is_fast).chosen() == Way("parts", 24576)


def test_a_spoiled_file_is_measured_again(clock: Any, tmp_path: Path) -> None:
    clock(far_is_fast).chosen()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    again = clock(far_is_fast)
    assert again.chosen() == Way("parts", 16384)
    assert again.rounds > 0


def test_small_matrices_are_not_timed(monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "_measure", None)
    w = ONE.load(stored("Q4_0", 64, 512))
    assert product(ONE, w, normal(1, 512)).shape == (1, 64)


def test_large_matrices_are_timed_once(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "_results", {})
    monkeypatch.setattr(timing, "SMALLEST", 1 << 22)
    monkeypatch.setattr(timing.system, "cache_bytes", lambda: 1 << 20)
    folder = jit.cache_folder()
    monkeypatch.setattr(timing, "_path", lambda name: tmp_path / name if folder else None)
    for type_name, n in (("Q4_0", 1), ("Q4_0", 5), ("Q6_K", 1), ("F16", 1), ("F16", 3)):
        w, x = ONE.load(stored(type_name, 2048, 512)), normal(n, 512)
        y = product(ONE, w, x)
        assert np.array_equal(product(ONE, w, x), y)
    assert set(timing._results) == {"Q4_0_1", "Q4_0_6", "Q6_K_1", "F16_1", "F16_4"}
    for result in timing._results.values():
        assert all(rate > 0 for rate in result.rates.values())
