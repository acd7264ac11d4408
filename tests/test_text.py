"""Streaming text: cut anywhere, it shows the same characters, and never a part of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllm.errors import ArgumentError, StateError
from tinyllm.text import TextStream


class Pieces:
    """A tokenizer whose ids index a list of byte strings."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.token_bytes = pieces.__getitem__


def stream_of(
    pieces: list[bytes | str], stop=(), special_stops=None
) -> tuple[TextStream, list[str]]:
    """A stream after all pieces were pushed, up to its stop, and what each push returned."""
    data = [p.encode() if isinstance(p, str) else p for p in pieces]
    stream, shown = TextStream(Pieces(data), stop, special_stops), []
    for i in range(len(data)):
        shown.append(stream.push(i))
        if stream.stopped is not None:
            break
    return stream, shown


# ---- characters


def test_characters_are_shown_whole():
    _, shown = stream_of([b"a\xe2", b"\x82", b"\xac", b"b"])
    assert shown == ["a", "", "€", "b"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"\xff"], "\ufffd"),
        ([b"\xe2\x82", b"x"], "\ufffdx"),
        ([b"\xf0\x9f\x98", b"\xe2\x82\xac"], "\ufffd€"),
        ([b"\xed\xa0\x80"], "\ufffd\ufffd\ufffd"),  # a surrogate is no character
        ([b"\xc0\x80"], "\ufffd\ufffd"),  # nor is an overlong form
    ],
)
def test_invalid_bytes_become_replacement_characters(pieces, expected):
    stream, _ = stream_of(pieces)
    assert stream.text == expected
    assert stream.finish() == ""


def test_an_unfinished_character_at_the_end_is_dropped():
    stream, shown = stream_of(["ab", b"\xf0\x9f\x98"])
    assert shown == ["ab", ""]
    assert stream.finish() == ""
    assert stream.text == "ab"
    assert stream.n_held_tokens == 0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=12), st.data())
def test_any_cut_of_the_bytes_shows_the_same_text(text, draw):
    data = text.encode()
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    stream, shown = stream_of(pieces)
    assert "".join(shown) == stream.text == text


# ---- stop strings


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "stopped", "n_held"),
    [
        (["a", "STOP", "b"], ["STOP"], ["a", ""], "STOP", 1),
        (["a", "ST", "OP"], ["STOP"], ["a", "", ""], "STOP", 2),
        (["a", "ST", "AR"], ["STOP"], ["a", "", "STAR"], None, 0),
        (["a", "S", "T"], ["STOP"], ["a", "", ""], None, 2),
        (
            ["aS", "TOP"],
            ["STOP"],
            ["a", ""],
            "STOP",
            1,
        ),  # the first token is shown in part: it stays
        (["aSTOPb"], ["STOP"], ["a"], "STOP", 0),
        (["SSTOP"], ["STOP"], ["S"], "STOP", 0),
        (["S", "S", "TOP"], ["STOP"], ["", "S", ""], "STOP", 2),
        (["aab", "aac"], ["aabaac"], ["", ""], "aabaac", 2),
        (["aab", "aab", "aac"], ["aabaac"], ["", "aab", ""], "aabaac", 2),
        (["x\n", "\n"], ["\n\n"], ["x", ""], "\n\n", 1),
        (["abcd"], ["cd", "bc"], ["a"], "bc", 0),  # the earliest counts
        (["abcd"], ["bcd", "bc"], ["a"], "bcd", 0),  # then the first listed
        (["a", "b"], ["abx", "b"], ["", "a"], "b", 1),
        (["a", b"\xe2", b"\x82\xac", "b"], ["€b"], ["a", "", "", ""], "€b", 3),
        ([b"a\xe2", b"\x82\xac", "b"], ["€b"], ["a", "", ""], "€b", 2),
        (["STOP"], "STOP", [""], "STOP", 1),  # a str is one stop string, not four
        (["a", "", "S", "TOP"], ["STOP"], ["a", "", "", ""], "STOP", 2),
        (["S", "", "TOP"], ["STOP"], ["", "", ""], "STOP", 3),
    ],
)
def test_stop_strings(pieces, stop, shown, stopped, n_held):
    stream, got = stream_of(pieces, stop)
    assert (got, stream.stopped, stream.n_held_tokens) == (shown, stopped, n_held)
    assert stream.text == "".join(shown)


def test_finish_shows_what_was_held_back():
    stream, _ = stream_of(["a", "ST"], ["STOP"])
    assert stream.n_held_tokens == 1
    assert stream.finish() == "ST"
    assert (stream.text, stream.stopped, stream.n_held_tokens) == ("aST", None, 0)


def test_finish_after_a_stop_shows_nothing_and_changes_nothing():
    stream, _ = stream_of(["a", "STOP"], ["STOP"])
    assert stream.finish() == stream.finish() == ""
    assert (stream.text, stream.stopped, stream.n_held_tokens) == ("a", "STOP", 1)


def test_a_special_stop_releases_what_was_held_and_is_not_shown():
    stream, shown = stream_of(["a", "ST", ""], ["STOP"], special_stops={2: "<|end|>"})
    assert shown == ["a", "", "ST"]
    assert (stream.stopped, stream.n_held_tokens) == ("<|end|>", 1)


def test_a_special_stop_drops_an_unfinished_character():
    stream, _ = stream_of(["a", b"\xe2", ""], special_stops={2: "<|end|>"})
    assert (stream.text, stream.stopped, stream.n_held_tokens) == ("a", "<|end|>", 1)


@pytest.mark.parametrize("end", ["finish", "stop"])
def test_nothing_may_follow_the_end(end):
    stream = TextStream(Pieces([b"a"]), stop=["a"])
    if end == "finish":
        stream.finish()
    else:
        stream.push(0)
    with pytest.raises(StateError):
        stream.push(0)


@pytest.mark.parametrize("stop", [[""], [3], [b"x"]])
def test_stop_strings_are_checked(stop):
    with pytest.raises(ArgumentError, match="expected strings of at least one character"):
        TextStream(Pieces([]), stop)


words = st.lists(st.text("ab€", max_size=4), max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words, st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
def test_streaming_finds_the_stop_that_a_search_finds(pieces, stop):
    """Against the simplest oracle: search the text so far, after every token."""
    stream, _ = stream_of(pieces, stop)
    whole = "".join(pieces)
    for n in range(len(pieces) + 1):
        so_far = "".join(pieces[:n])
        found = [(so_far.find(s), i) for i, s in enumerate(stop) if s in so_far]
        if found:
            at, which = min(found)
            kept = "".join(pieces[: n - stream.n_held_tokens])
            assert (stream.text, stream.stopped) == (whole[:at], stop[which])
            assert kept.startswith(stream.text)  # no token that was shown is dropped
            dropped = pieces[n - stream.n_held_tokens : n]
            assert len("".join(dropped)) <= len(so_far) - at
            return
    assert stream.stopped is None
    assert stream.text + stream.finish() == whole
