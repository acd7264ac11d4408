"""Rows become tiles: every format's fields, in order, for whole tiles and for parts of one."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from tinyllm.kernels.cpu import tiles
from tinyllm.kernels.cpu.formats import FORMATS

FIELDS = {name: (f.fields, f.block_bytes) for name, f in FORMATS.items()}
FIELDS |= {f"{n} bytes": (((0, n),), n) for n in (1, 2, 4)}
FIELDS |= {f"16 bytes of {n}": ([(i, n) for i in range(0, 16, n)], 16) for n in (1, 2, 4)}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("n_rows", [1, 15, 16, 33])
def test_a_tile_has_each_field_of_its_rows_side_by_side(name: str, n_rows: int) -> None:
    fields, block_bytes = FIELDS[name]
    rows = np.random.default_rng(n_rows).integers(0, 256, (n_rows, 3 * block_bytes), np.uint8)
    n_tiles = -(-n_rows // 16)
    whole = np.zeros((n_tiles * 16, 3, block_bytes), np.uint8)
    whole[:n_rows] = rows.reshape(n_rows, 3, block_bytes)
    blocks = whole.reshape(n_tiles, 16, 3, block_bytes).swapaxes(1, 2)
    expected = [blocks[..., at : at + n].reshape(n_tiles, 3, -1) for at, n in fields]

    out = tiles.room.take(whole.nbytes)
    out[:] = 0xAA
    tiles.interleave_rows(rows, out.ctypes.data, 3, tiles.runs(fields))
    assert np.array_equal(out, np.concatenate(expected, -1).reshape(-1))


def test_memory_lies_side_by_side_and_goes_with_the_last_that_is_in_it() -> None:
    room = tiles.Room()
    first, second = room.take(100), room.take(1000)
    assert second.ctypes.data - first.ctypes.data == 128
    large = room.take(tiles.CHUNK)
    assert large.ctypes.data % 64 == 0
    chunks = [weakref.ref(a.base) for a in (first, large)]
    del first
    gc.collect()
    assert all(chunk() is not None for chunk in chunks)
    del second, large
    gc.collect()
    assert all(chunk() is None for chunk in chunks)
    assert room.take(64).nbytes == 64


@pytest.mark.parametrize("n_threads", [1, 3])
def test_pieces_are_shared_and_an_error_ends_the_work(n_threads: int) -> None:
    done: list[int] = []
    tiles.share(range(100), done.append, n_threads)
    assert sorted(done) == list(range(100))

    def fail(piece: int) -> None:
        done.append(piece)
        if piece == 5:
            raise OSError("the disk has gone")

    done.clear()
    with pytest.raises(OSError, match="the disk has gone"):
        tiles.share(range(1_000_000), fail, n_threads)
    assert len(done) < 1_000_000
    done.clear()
    tiles.share(range(100), done.append, n_threads)  # the threads live on
    assert sorted(done) == list(range(100))


def test_several_may_share_at_once() -> None:
    done: list[list[int]] = [[], [], []]
    callers = [
        threading.Thread(target=tiles.share, args=(range(1000), part.append, 2)) for part in done
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [sorted(part) for part in done] == [list(range(1000))] * 3


def test_a_thread_that_cannot_start_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(tiles, "helpers", tiles.Helpers())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start"):
            tiles.share(range(10), print, 2)
