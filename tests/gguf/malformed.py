"""Malformed GGUF files, made by the writer and then damaged at one place.

`cases` yields (name, bytes, fragment of the expected message). Names begin with the part of the file concerned:
``header/``, ``key/``, ``tensor/`` or ``data/``. `VALID` are the files that the cases start from.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyllm import gguf
from tinyllm.gguf.types import REMOVED, VALUE_IDS

Case = tuple[str, bytes, str]
TOP = 2**64 - 1


def written(metadata: dict[str, Any], tensors: dict[str, Any], **kwargs: Any) -> bytes:
    out = io.BytesIO()
    gguf.write(out, metadata, tensors, **kwargs)
    return out.getvalue()


METADATA = {
    "general.architecture": "llama",
    "general.alignment": np.uint32(32),
    "llama.block_count": 1,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b"],
    "tokenizer.ggml.scores": np.zeros(5, np.float32),
    "tokenizer.ggml.add_bos_token": True,
}
TENSORS = {
    "token_embd.weight": np.ones((5, 32), np.float32),
    "output_norm.weight": np.ones(33, np.float32),  # 132 bytes: padding follows
    "blk.0.ffn_up.weight": gguf.RawTensor("Q4_0", (4, 64), np.zeros(144, np.uint8)),
}
MODEL = written(METADATA, TENSORS)
KEYS_ONLY = written(METADATA, {})
VALID = {
    "model": MODEL,
    "big-endian": written(METADATA, TENSORS, byteorder="big"),
    "version-2": written(METADATA, TENSORS, version=2),
    "keys-only": KEYS_ONLY,
    "empty": written({}, {}),
}


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(raw: bytes, n: int | None = None) -> bytes:
    """A string as stored; `n` may lie about its length."""
    return u64(len(raw) if n is None else n) + raw


def preamble(n_tensors: int, n_keys: int, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(n_tensors) + u64(n_keys)


def one_key(payload: bytes, kind: str | int, key: bytes = b"k") -> bytes:
    """A file of one key whose value is `payload`."""
    type_id = VALUE_IDS[kind] if isinstance(kind, str) else kind
    return preamble(0, 1) + text(key) + u32(type_id) + payload


def array(kind: str | int, n: int, payload: bytes = b"") -> bytes:
    return u32(VALUE_IDS[kind] if isinstance(kind, str) else kind) + u64(n) + payload


def info(name: bytes, dims: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def one_tensor(
    dims: tuple[int, ...] = (32,),
    type_id: int = 0,
    offset: int = 0,
    name: bytes = b"w",
    n_data: int = 128,
    record: bytes | None = None,
) -> bytes:
    """A file of one tensor, well formed unless an argument makes it otherwise."""
    head = preamble(1, 0) + (record if record is not None else info(name, dims, type_id, offset))
    return head + bytes(-len(head) % 32) + bytes(n_data)


def two_tensors(second: int, first: int = 0, n_data: int = 256, name: bytes = b"v") -> bytes:
    """Two F32 tensors of 128 bytes at these offsets."""
    head = preamble(2, 0) + info(b"w", (32,), 0, first) + info(name, (32,), 0, second)
    return head + bytes(-len(head) % 32) + bytes(n_data)


def replaced(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def with_alignment(payload: bytes, kind: str) -> bytes:
    return one_key(payload, kind, b"general.alignment")


def with_architecture(value: bytes) -> bytes:
    return one_key(text(value), "STRING", b"general.architecture")


def header_cases() -> Iterator[Case]:
    for n in range(24):
        yield f"header/{n}-bytes", MODEL[:n], "not a GGUF" if n < 4 else "bytes, but only"
    magics = {b"lmgg": "legacy", b"tjgg": "legacy", b"fmgg": "legacy", b"algg": "legacy"} | {
        b"GGUE": "not a GGUF",
        b"FUGG": "reversed",
        b"\0\0\0\0": "not a GGUF",
        b"PK\3\4": "zip",
        b"<!DO": "web page",
        b"vers": "pointer",
        b"\x1f\x8b\x08\x00": "gzip",
    }
    for magic, message in magics.items():
        yield f"header/magic-{magic!r}", replaced(MODEL, 0, magic), message
    for version in (0, 1, 4, 99, 2**31, TOP >> 32):
        yield f"header/version-{version}", replaced(MODEL, 4, u32(version)), "GGUF version"
    big = VALID["big-endian"]
    yield "header/version-big-little", replaced(MODEL, 4, big[4:8]), "tensors; at most"
    yield "header/version-little-big", replaced(big, 4, MODEL[4:8]), "tensors; at most"
    yield "header/version-1-big", replaced(big, 4, struct.pack(">I", 1)), "GGUF version 1"
    for name, at in (("tensors", 8), ("keys", 16)):
        for count in (TOP, 2**63, 2**63 - 1, 2**32, 65537):
            yield (
                f"header/{name}-{count}",
                replaced(MODEL, at, u64(count)),
                f"{count} {name}; at most",
            )
        yield f"header/{name}-remaining", replaced(MODEL, at, u64(300)), f"300 {name} take"
    yield "header/counts-together", preamble(2, 2) + bytes(70), "do not fit"
    yield "header/key-missing", replaced(KEYS_ONLY, 16, u64(8)), "the length of a key"
    yield "header/tensor-missing", replaced(MODEL, 8, u64(4)), "a tensor name"
    yield (
        "header/tensor-unannounced",
        replaced(MODEL, 8, u64(2)),
        "bytes between tensors must be zero",
    )


def key_cases() -> Iterator[Case]:
    value = u32(4) + u32(1)
    for n in (TOP, 2**63, 2**31, 65536):
        yield (
            f"key/length-{n}",
            preamble(0, 1) + text(b"k", n) + value,
            f"{n} bytes, but at most 65535",
        )
    yield "key/length-remaining", preamble(0, 1) + text(b"k", 10) + value, "10 bytes, but only 9"
    long = b"k" * 65536
    yield "key/65536-bytes", preamble(0, 1) + text(long) + value, "at most 65535"
    bad_names = {b"": "empty", b"\xff\xfe": "UTF-8", b"a\0b": "control", b"a\nb": "control"}
    for name, message in bad_names.items():
        yield f"key/name-{name!r}", one_key(u32(1), "U32", name), message
    yield (
        "key/long-name",
        one_key(b"", "U64", b"n" * 60_000),
        f"{'n' * 200}...: 1 U64 takes 8 bytes",
    )
    once = text(b"k") + value
    yield "key/twice", preamble(0, 2) + once + once, "k: the key stands twice, first at byte 24"
    for type_id in (13, 255, TOP >> 32):
        yield f"key/type-{type_id}", one_key(u32(1), type_id), f"k: value type {type_id} does"
        payload = array(type_id, 1, u32(1))
        yield (
            f"key/array-type-{type_id}",
            one_key(payload, "ARRAY"),
            f"k: array of value type {type_id}",
        )
    for byte in (2, 255):
        yield f"key/bool-{byte}", one_key(bytes([byte]), "BOOL"), f"k: a bool is 0 or 1, not {byte}"
    bools = array("BOOL", 4, b"\0\1\7\1")
    yield "key/bool-array", one_key(bools, "ARRAY"), "byte 51, k: a bool is 0 or 1, not 7"
    for n in (TOP, 2**63, 2**40, 6):
        yield (
            f"key/string-{n}",
            one_key(text(b"hello", n), "STRING"),
            f"k: the string is said to have {n}",
        )
    yield from scalar_cases()
    yield from array_cases()
    yield from general_cases()


def scalar_cases() -> Iterator[Case]:
    for kind in ("U8", "I8", "U16", "I16", "U32", "I32", "F32", "BOOL", "U64", "I64", "F64"):
        size = gguf.types.VALUE_DTYPES[kind].itemsize
        raw = one_key(bytes(size - 1), kind, b"llama.x")
        yield f"key/truncated-{kind}", raw, f"llama.x: 1 {kind} takes {size} bytes, but only"
    for kind, code in (("F32", "<f"), ("F64", "<d")):
        for number in (float("nan"), float("inf"), float("-inf")):
            raw = one_key(struct.pack(code, number), kind)
            yield f"key/{kind}-{number}", raw, f"k: {number} where a finite number"
    yield "key/no-type", preamble(0, 1) + text(b"12345678"), "12345678: the value's type takes 4"


def array_cases() -> Iterator[Case]:
    for kind, n in (("U8", TOP), ("U64", 2**61), ("F64", 2**62), ("I32", 2**63), ("U16", 5)):
        raw = one_key(array(kind, n, bytes(8)), "ARRAY")
        yield f"key/array-{kind}-{n}", raw, f"k: an array of {n} {kind} values takes at least"
    for n in (10**9, 2**61, 2**64 - 1, 10):
        raw = one_key(array("STRING", n, bytes(72)), "ARRAY")
        yield f"key/strings-{n}", raw, f"k: an array of {n} strings takes at least"
    cut = array("STRING", 3, text(b"a") + text(b"b", 2**62) + text(b"c"))
    yield "key/strings-length", one_key(cut, "ARRAY"), "byte 58, k: string 1 is said to have"
    last = array("STRING", 3, text(b"aa") + text(b"bb") + text(b"cccccc", 7))
    yield (
        "key/strings-last",
        one_key(last, "ARRAY"),
        "k: string 2 is said to have 7 bytes, but only 6",
    )
    short = array("STRING", 3, text(b"a") + text(b"12345678"))
    yield "key/strings-missing", one_key(short, "ARRAY"), "k: the length of string 2"
    deep = array("ARRAY", 1) * 10_000 + array("U8", 0)
    yield "key/nested-deep", one_key(deep, "ARRAY"), "k: arrays inside arrays go deeper than 4"
    yield "key/nested-many", one_key(array("ARRAY", TOP), "ARRAY"), "arrays takes at least"
    wide = array("ARRAY", 70_000, array("U8", 0) * 70_000)
    yield "key/nested-wide", one_key(wide, "ARRAY"), "or are more than 65536"
    inner = array("ARRAY", 1, array("U64", 2**61))
    yield "key/nested-length", one_key(inner, "ARRAY"), f"k: an array of {2**61} U64 values"
    yield (
        "key/array-no-length",
        one_key(u32(0) + bytes(7), "ARRAY"),
        "k: the array's length takes 8",
    )
    many = array("STRING", 2**21 + 1, bytes(8 * (2**21 + 1)))
    yield "key/strings-too-many", one_key(many, "ARRAY"), "k: more than 2097152 strings"


def general_cases() -> Iterator[Case]:
    for n in (0, 3, 33, 2**17, 2**31, 2**32 - 1):
        yield f"key/alignment-{n}", with_alignment(u32(n), "U32"), "general.alignment: found U32"
    yield "key/alignment-2^63", with_alignment(u64(2**63), "U64"), "general.alignment: found U64"
    yield "key/alignment-U64", with_alignment(u64(32), "U64"), "general.alignment: found U64 '32'"
    yield "key/alignment-I32", with_alignment(u32(32), "I32"), "general.alignment: found I32 '32'"
    yield "key/alignment-BOOL", with_alignment(b"\1", "BOOL"), "general.alignment: found BOOL"
    yield "key/alignment-F32", with_alignment(struct.pack("<f", 32), "F32"), "found F32 '32.0'"
    yield "key/alignment-STRING", with_alignment(text(b"32"), "STRING"), "found STRING '32'"
    yield "key/alignment-ARRAY", with_alignment(array("U32", 1, u32(32)), "ARRAY"), "found ARRAY"
    names = [
        b"",
        b"a/b",
        b"../../etc/passwd",
        b"a b",
        b"a\nb",
        b"a\0",
        b"\xff",
        "ä".encode(),
        b".a",
    ]
    for name in (*names, b"a" * 65, b"a" * 1_000_000):
        label = repr(name) if len(name) < 20 else f"{len(name)}-bytes"
        message = "general.architecture: found STRING"
        yield f"key/architecture-{label}", with_architecture(name), message
    for kind, payload in (("U32", u32(1)), ("ARRAY", array("STRING", 1, text(b"llama")))):
        raw = one_key(payload, kind, b"general.architecture")
        yield f"key/architecture-{kind}", raw, f"general.architecture: found {kind}"


def tensor_cases() -> Iterator[Case]:
    rest = info(b"w", (32,), 0, 0)[9:]
    for n in (TOP, 2**63, 2**31, 64):
        raw = one_tensor(record=text(b"w", n) + rest)
        yield f"tensor/name-length-{n}", raw, f"{n} bytes, but at most 63"
    cut = preamble(1, 0) + text(b"w", 40) + rest
    yield "tensor/name-remaining", cut, "40 bytes, but only 25"
    yield "tensor/name-64-bytes", one_tensor(name=b"w" * 64), "at most 63"
    for name in (b"", b"\xff", b"a\0b", b"a\nb", b"\x1b[2J"):
        yield f"tensor/name-{name!r}", one_tensor(name=name), "a tensor name"
    yield "tensor/twice", two_tensors(128, name=b"w"), "w: the tensor stands twice"
    for n in (0, 5, TOP >> 32):
        raw = one_tensor(record=text(b"w") + u32(n) + bytes(60))
        yield f"tensor/dims-{n}", raw, f"w: {n} dimensions"
    for dims in ((0,), (0, 32), (32, 0), (32, 1, 0, 1)):
        yield f"tensor/shape-{dims}", one_tensor(dims), "w: shape"
    huge: list[tuple[int, ...]] = [
        *((2**63,), (TOP,), (2**32, 2**32), (2**63 - 1, 2, 1, 1), (2**62, 4)),
        *((2**31, 2**31, 2**31, 2**31), (TOP, TOP, TOP, TOP), (2**62,), (2**62 - 4,), (64,)),
    ]
    for dims in huge:
        raw = one_tensor(dims, n_data=128)
        yield f"tensor/shape-{dims}", raw, "w: "
    yield "tensor/nbytes-wraps", one_tensor((2**62 - 2, 2)), "w: F32 of shape"
    yield "tensor/pad-wraps", one_tensor((TOP - 15,), 24), "w: I8 of shape"
    for type_id, name in REMOVED.items():
        yield (
            f"tensor/type-{name}",
            one_tensor((256,), type_id),
            f"w: tensor type {type_id} ({name}) was",
        )
    for type_id in (43, 255, 2**31, TOP >> 32):
        yield (
            f"tensor/type-{type_id}",
            one_tensor((256,), type_id),
            f"w: tensor type {type_id} is unk",
        )
    for type_id, n in (
        (2, 31),
        (2, 1),
        (12, 128),
        (16, 255),
        (39, 16),
        (40, 32),
        (41, 64),
        (42, 32),
    ):
        message = "w: rows of"
        yield f"tensor/blocks-{type_id}-{n}", one_tensor((n, 32), type_id), message
    infos = one_tensor()[24:57]
    for n in range(0, len(infos), 3):
        yield f"tensor/truncated-{n}", preamble(1, 0) + infos[:n], "byte"


def data_cases() -> Iterator[Case]:
    for offset in (1, 16, 32, 128, 2**31, 2**63, TOP - 31):
        yield f"data/first-offset-{offset}", one_tensor(offset=offset), "w: the offset is"
    for offset in (0, 64, 96, 127, 129, 144, 160, 2**63, TOP - 127):
        yield f"data/second-offset-{offset}", two_tensors(offset), "v: the offset is"
    yield "data/decreasing", two_tensors(0, 128), "w: the offset is 128, expected 0"
    yield "data/missing", one_tensor(n_data=0), "w: F32 of shape"
    yield "data/one-byte-short", one_tensor(n_data=127), "w: the data are bytes"
    yield "data/no-second", two_tensors(128, n_data=128), "v: the data are bytes"
    yield "data/model-cut", MODEL[:-20], "blk.0.ffn_up.weight: the data are bytes"
    yield "data/past-size", one_tensor((1024,)), "w: F32 of shape"
    for n in (1, 31, 32, 4096):
        yield f"data/trailing-{n}", one_tensor(n_data=128 + n) + b"x", "follow the last tensor"
    yield "data/trailing-zeros", one_tensor(n_data=128 + 4096), "follow the last tensor"
    yield "data/trailing-keys-only", KEYS_ONLY + bytes(64), "follow the last tensor"
    yield "data/final-padding", MODEL[:-1] + b"x", "bytes between tensors must be zero"
    head = one_tensor()
    yield "data/header-padding", replaced(head, 60, b"x"), "w: bytes between tensors must be zero"
    gap = MODEL.index(np.ones(33, np.float32).tobytes()) + 5 * 32 * 4 + 132
    yield "data/middle-padding", replaced(MODEL, gap, b"x"), "blk.0.ffn_up.weight: bytes between"
    other = replaced(MODEL, MODEL.index(b"general.alignment") + 21, u32(64))
    yield "data/other-alignment", other, "token_embd.weight: "


GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (
    header_cases,
    key_cases,
    tensor_cases,
    data_cases,
)


def cases() -> Iterator[Case]:
    """Every malformed file: (name, bytes, fragment of the message)."""
    for group in GROUPS:
        yield from group()
