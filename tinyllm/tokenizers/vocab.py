"""The vocabulary as the file's metadata tell it: tokens, their types, and the special ids.

Every field is checked once, here; the tokenizers rely on it. Keys are those of `tokenizer.ggml.*`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import GGUFError
from ..gguf import StringArray
from . import names
from .names import BYTE, NORMAL, UNDEFINED

PREFIX = "tokenizer.ggml."
NO_TOKEN = 0xFFFFFFFF  # what some converters write for "none"
MAX_TOKENS = 1 << 22
MAX_TOKEN_CHARS = 1 << 14  # the longest of real vocabularies has 512; longer ones only cost time

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# The roles of special tokens and the keys that assign them, the later key winning.
ROLES: dict[str, tuple[str, ...]] = {
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "eot": ("eot_token_id",),
    "eom": ("eom_token_id",),
    "unk": ("unknown_token_id",),
    "sep": ("seperator_token_id",),  # the format's own spelling
    "pad": ("padding_token_id",),
    "mask": ("mask_token_id",),
    "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
    "fim_mid": ("fim_mid_token_id", "middle_token_id"),
    "fim_pad": ("fim_pad_token_id",),
    "fim_rep": ("fim_rep_token_id",),
    "fim_sep": ("fim_sep_token_id",),
}


class Vocab:
    """Tokens and what each is, read from metadata and checked.

    Parameters
    ----------
    metadata : Mapping
        All metadata of the file; only ``tokenizer.ggml.*`` and ``general.*`` are read.
    defaults : Mapping of str to int
        Ids of roles that the file does not name; those beyond the vocabulary are dropped.

    Attributes
    ----------
    tokens : list of str
        The tokens as spelled in the file; stray bytes as lone surrogates.
    ids : dict of str to int
        The inverse of `tokens`.
    types : uint8 [n_vocab]
        One of NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, UNDEFINED.
    special : dict of str to int
        Role ("bos", "eos", "fim_pad", ...) to id; roles without a token are absent.
    eog : frozenset of int
        Ids that end a generation.

    Raises
    ------
    GGUFError
        If a key is missing, of the wrong type or length, or names a token that does not exist.
    """

    def __init__(self, metadata: Mapping[str, Any], defaults: Mapping[str, int]) -> None:
        self._metadata = metadata
        self.tokens = _named_where_empty(self.strings("tokens", required=True))
        self.ids = self._index()
        self.types = self._read_types()
        self.special = self._read_special(defaults)
        self.eog = names.assign(self)
        self._check_bytes()

    def __len__(self) -> int:
        return len(self.tokens)

    # ---- one key

    def get(self, key: str) -> Any:
        """The raw value of ``tokenizer.ggml.<key>``, or None."""
        return self._metadata.get(PREFIX + key)

    def general(self, key: str) -> str:
        """The text ``general.<key>``, empty when absent."""
        value = self._metadata.get("general." + key, "")
        return value if isinstance(value, str) else ""

    def text(self, key: str) -> str:
        """A text key, empty when absent."""
        value = self.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise key_error(key, f"text is expected, not {_kind(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean key."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, (bool, np.bool_)):
            raise key_error(key, f"{value!r} where true or false is expected")
        return bool(value)

    def strings(self, key: str, required: bool = False) -> list[str]:
        """An array of strings, empty when absent."""
        return list(self.stored(key, required))

    def stored(self, key: str, required: bool = False) -> StringArray | list[str]:
        """An array of strings, empty when absent; one that a file holds is not decoded yet."""
        value = self.get(key)
        if isinstance(value, StringArray):
            return value
        if value is None:
            if required:
                raise key_error(key, "missing")
            return []
        out: Any = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(out, (list, tuple)) or not all(map(str.__instancecheck__, out)):
            raise key_error(key, f"an array of strings is expected, not {_kind(value)}")
        return list(out)

    def numbers(self, key: str, dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        """One number per token, or None when the key is absent."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, (str, bytes, Mapping)):
            raise key_error(key, f"an array of numbers is expected, not {_kind(value)}")
        out = np.asarray(value)
        kinds = "iuf" if np.dtype(dtype).kind == "f" else "iu"
        if out.ndim != 1 or out.dtype.kind not in kinds:
            raise key_error(key, f"an array of numbers is expected, not {_kind(value)}")
        if len(out) != len(self.tokens):
            raise key_error(key, f"{len(out)} values for {len(self.tokens)} tokens")
        with np.errstate(over="ignore"):  # a score beyond float32 is as good as infinite
            return out.astype(dtype)

    def scores(self) -> npt.NDArray[np.float32]:
        """The score of every token, float32 [n_vocab]; zeros when the file has none."""
        out = self.numbers("scores", np.float32)
        if out is None:
            return np.zeros(len(self), np.float32)
        wrong = np.flatnonzero(np.isnan(out) | (out == np.inf))
        if len(wrong):
            raise key_error("scores", f"the score of token {wrong[0]} is {out[wrong[0]]}")
        return out

    # ---- everything, when it is made

    def _index(self) -> dict[str, int]:
        tokens = self.tokens
        if not 0 < len(tokens) <= MAX_TOKENS:
            raise key_error(
                "tokens", f"{len(tokens)} tokens; between 1 and {MAX_TOKENS} are expected"
            )
        longest = max(map(len, tokens))
        if longest > MAX_TOKEN_CHARS:
            i = next(i for i, token in enumerate(tokens) if len(token) == longest)
            raise key_error(
                "tokens", f"token {i} has {longest} characters, more than {MAX_TOKEN_CHARS}"
            )
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            a, b = _first_duplicate(tokens)
            raise key_error("tokens", f"tokens {a} and {b} are both {tokens[a][:40]!r}")
        return ids

    def _read_types(self) -> npt.NDArray[np.uint8]:
        raw = self.numbers("token_type", np.int64)
        if raw is None:
            return np.full(len(self), NORMAL, np.uint8)
        wrong = np.flatnonzero((raw < UNDEFINED) | (raw > BYTE))
        if len(wrong):
            i = int(wrong[0])
            raise key_error("token_type", f"token {i} has the type {raw[i]}; 0 to {BYTE} are known")
        return raw.astype(np.uint8)

    def _read_special(self, defaults: Mapping[str, int]) -> dict[str, int]:
        out = {role: i for role, i in defaults.items() if i < len(self)}
        for role, keys in ROLES.items():
            for key in keys:
                value = self.get(key)
                if value is None:
                    continue
                none = isinstance(value, int | np.integer) and value == NO_TOKEN
                if none and role not in ("bos", "eos"):
                    if out.pop(role, None) is not None:
                        warnings.warn(f"{PREFIX + key} is {value}: no {role} token", stacklevel=4)
                else:
                    out[role] = self._checked_id(key, value)
        return out

    def _checked_id(self, key: str, value: Any) -> int:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise key_error(key, f"{value!r} where a token id is expected")
        if not 0 <= value < len(self):
            raise key_error(
                key, f"{value}, but the vocabulary has only the ids 0 to {len(self) - 1}"
            )
        return int(value)

    def _check_bytes(self) -> None:
        for i in np.flatnonzero(self.types == BYTE):
            if not _BYTE_TOKEN.fullmatch(self.tokens[i]):
                raise key_error(
                    "tokens",
                    f"token {i} is of type byte, but spelled {self.tokens[i][:40]!r}; "
                    "<0x00> to <0xFF> are expected",
                )

    # ---- questions

    def of_types(self, *types: int) -> list[int]:
        """Ids whose type is one of `types`, ascending."""
        out: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return out

    def byte_value(self, i: int) -> int:
        """The byte that the byte token `i` stands for."""
        return int(self.tokens[i][3:5], 16)

    def byte_id(self, byte: int) -> int | None:
        """The token for one byte: ``<0x0A>``, or else the character itself."""
        i = self.ids.get(f"<0x{byte:02X}>")
        return self.ids.get(chr(byte)) if i is None and byte < 128 else i


def _named_where_empty(tokens: list[str]) -> list[str]:
    """Give empty tokens, which nothing could ever produce, a distinct spelling as llama.cpp does."""
    if "" not in tokens:
        return tokens
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]


def _first_duplicate(tokens: Sequence[str]) -> tuple[int, int]:
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if seen.setdefault(token, i) != i:
            return seen[token], i
    raise AssertionError("no duplicate")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def key_error(key: str, message: str) -> GGUFError:
    """The error that names ``tokenizer.ggml.<key>``."""
    return GGUFError(message, name=PREFIX + key)
