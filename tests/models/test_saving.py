"""A state that was saved goes on in another as it would have itself: to the bit, wherever it was cut."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinyllm
from tinyllm.loading import BUNDLED


@cache
def model(path: Path, kv_type: Any) -> tinyllm.Model:
    return tinyllm.load(path, kv_type=kv_type)


def goes_on(m: tinyllm.Model, ids: list[int], cut: int, rooms: tuple[int, int], path: Path) -> None:
    """Read ``ids`` up to the cut, save, and read the rest here and elsewhere."""
    state, other = m.new_state(rooms[0]), m.new_state(rooms[1])
    m.logits(ids[:cut], state)
    state.save(path)
    other.restore(path)
    assert (other.ids, other.n_past) == (ids[:cut], cut)
    assert np.array_equal(m.logits(ids[cut:], state), m.logits(ids[cut:], other))
    state.save(path)
    saved = path.read_bytes()
    other.save(path)
    assert path.read_bytes() == saved  # rooms of another size make no difference


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kv_type=st.sampled_from(["f16", "f32", "q8_0"]))
def test_a_saved_state_goes_on_to_the_bit(data: Any, kv_type: str, tmp_path: Path) -> None:
    m = model(BUNDLED, kv_type)
    ids = data.draw(st.lists(st.integers(0, m.network.n_vocab - 1), min_size=2, max_size=40))
    cut = data.draw(st.integers(1, len(ids) - 1))
    rooms = data.draw(st.tuples(*[st.integers(40, 90)] * 2))
    goes_on(m, ids, cut, rooms, tmp_path / "state.npz")


@pytest.mark.parametrize("name", ["mamba", "rwkv7"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_so_does_a_recurrent_one(name: str, drawn: Any, data: Path, tmp_path: Path) -> None:
    path = data / "golden" / "models" / f"{name}.gguf"
    if not path.exists():
        pytest.skip(f"no {path.name} in the test data")
    m = model(path, "f16")
    ids = drawn.draw(st.lists(st.integers(0, m.network.n_vocab - 1), min_size=2, max_size=12))
    goes_on(m, ids, drawn.draw(st.integers(1, len(ids) - 1)), (16, 24), tmp_path / "state.npz")
