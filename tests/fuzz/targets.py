"""What the fuzzer feeds: for each target its inputs and the function that must survive their mutants."""

from __future__ import annotations

import io
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinyllm
from tinyllm import gguf, tokenizers
from tinyllm.chat import render as chat
from tinyllm.errors import TinyLLMError

sys.path.append(str(Path(__file__).parents[1] / "gguf"))  # as pytest does for the tests there
from malformed import VALID, written
from malformed_models import BPE, SPM, UNIGRAM, WPM, use
from malformed_models import VALID as MODELS

from . import structured  # it imports them too

RWKV = {
    "tokenizer.ggml.model": "rwkv",
    "tokenizer.ggml.tokens": ["<s>", *(f"\\x{i:02x}" for i in range(256)), "ab", " a", "\\n\\n"],
}
TEXTS = ("", "ab a ab", "Grüße 中文 🙂", "  \n\t ", "<s>a</s><unk>", "a" * 300, "\x00\x7f\u200b")
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "12345"},
]
TEMPLATES = (
    "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>\\n' + m.content | trim }}{% endfor %}",
    "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + 1 %}"
    "{% if loop.last and m.role == 'user' %}{{ m.content[:3] * ns.i }}"
    "{% else %}{{ m | tojson }}{% endif %}{% endfor %}",
    "{% macro turn(m, n=2) %}{{ bos_token }}{{ '%s: %5d' % (m.role, n) }}"
    "{{ m.content.split(' ') | join('-') }}{% endmacro %}"
    "{% for m in messages[1:] %}{{ turn(m, range(loop.index) | length) }}{% endfor %}{{ eos_token }}",
)
DATA = Path(os.environ.get("TINYLLM_TESTDATA", Path(__file__).parents[3] / "shared" / "data"))
REAL_TEMPLATES = sorted((DATA / "chat_templates").rglob("*.jinja"))[::4]


@dataclass(frozen=True)
class Target:
    """Inputs that work, and a function that takes a mutant of one."""

    name: str
    inputs: list[bytes]
    feed: Callable[[bytes], Any]
    structured: Callable[[random.Random], bytes] | None = None  # makes a mutant in another way


def scratch_file() -> Path:
    """A file in memory if the machine has such a place; removed with the process's folder."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    SCRATCH.append(tempfile.TemporaryDirectory(prefix="tinyllm-fuzz-", dir=folder))
    return Path(SCRATCH[-1].name) / "mutant.gguf"


SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def reader() -> Target:
    """Open, read everything; what is accepted must be written back as it was."""
    path = scratch_file()

    def feed(raw: bytes) -> None:
        path.write_bytes(raw)
        with gguf.open(path) as file:
            for tensor in file.tensors.values():
                tensor.raw.sum()
            for value in file.metadata.values():
                if isinstance(value, gguf.StringArray):
                    value.tolist()
            if not any(map(has_empty_list, file.metadata.values())):
                check_round_trip(file, raw)

    return Target("gguf", list(VALID.values()), feed)


def has_empty_list(value: Any) -> bool:
    """An empty list of lists has no type to be written with."""
    return isinstance(value, list) and (value == [] or any(map(has_empty_list, value)))


def check_round_trip(file: gguf.GGUFFile, raw: bytes) -> None:
    out = io.BytesIO()
    order = {"version": file.version, "byteorder": file.byteorder}
    gguf.write(out, file.exact_metadata, file.tensors, **order)
    ours = out.getvalue()
    n = min(len(ours), len(raw))
    padding = ours[n:] + raw[n:]
    if ours[:n] != raw[:n] or any(padding) or len(padding) >= file.alignment:
        raise AssertionError("the accepted file is written back with other bytes")


def tokenizer() -> Target:
    """Build a vocabulary; what it encodes must decode."""
    path = scratch_file()
    inputs = [written(v, {}) for v in (SPM, BPE, UNIGRAM, WPM, RWKV)]

    def feed(raw: bytes) -> None:
        path.write_bytes(raw)
        with gguf.open(path) as file:
            vocabulary = tokenizers.load(file.metadata)
        for text in TEXTS:
            ids = vocabulary.encode(text)
            vocabulary.decode(ids)
            vocabulary.decode_bytes(ids[::-1], skip_special=True)

    files = structured.opened(inputs, path.parent)
    return Target("tokenizer", inputs, feed, lambda rng: structured.mutant(files, rng))


def template() -> Target:
    """Render a conversation with a damaged template."""

    def feed(raw: bytes) -> None:
        text = raw.decode("utf-8", "replace")
        chat.render(text, MESSAGES, bos_token="<s>", eos_token="</s>")

    real = [path.read_bytes() for path in REAL_TEMPLATES]
    return Target(
        "template", [t.encode() for t in TEMPLATES] + list(filter(works(feed), real)), feed
    )


def works(feed: Callable[[bytes], None]) -> Callable[[bytes], bool]:
    """Real templates may refuse our messages, or ask for tools."""

    def test(raw: bytes) -> bool:
        try:
            feed(raw)
        except TinyLLMError:
            return False
        return True

    return test


def model() -> Target:
    """Load a small model and let it write three tokens."""
    path = scratch_file()

    def feed(raw: bytes) -> None:
        path.write_bytes(raw)
        use(str(path))

    inputs = list(MODELS.values())
    files = structured.opened(inputs, path.parent)
    return Target("model", inputs, feed, lambda rng: structured.mutant(files, rng))


def state() -> Target:
    """Load a saved conversation and continue it."""
    path = scratch_file()
    saved = path.with_name("state.npz")
    path.write_bytes(MODELS["spm"])
    loaded = tinyllm.load(path, device="reference", n_ctx=32)

    def feed(raw: bytes) -> None:
        saved.write_bytes(raw)
        conversation = loaded.new_state()
        conversation.restore(saved)
        loaded.generate("a", max_tokens=1, state=conversation)

    inputs = []
    for text in ("ab", "a b c d e f"):
        conversation = loaded.new_state()
        loaded.generate(text, max_tokens=2, state=conversation)
        conversation.save(saved)
        inputs.append(saved.read_bytes())
    return Target("state", inputs, feed)


TARGETS: dict[str, Callable[[], Target]] = {
    "gguf": reader,
    "tokenizer": tokenizer,
    "template": template,
    "model": model,
    "state": state,
}
