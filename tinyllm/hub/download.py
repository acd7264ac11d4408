"""Downloads of large files: they can be resumed, are verified, and happen once for all processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from ..errors import ArgumentError
from ..system import expanded, sync_folder
from .locks import locked

if TYPE_CHECKING:
    from requests import Response
    from tqdm import tqdm

BLOCK = 1 << 20  # bytes
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces of an answer
ATTEMPTS = 5  # give up after so many in a row that brought no new byte
BACK_OFF = 0.5  # seconds before the second attempt; doubles with each
MAX_WAIT = 30.0  # seconds, whatever Retry-After says
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

_sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Checks:
    """What is known about a file before it is fetched; None for what is not known."""

    size: int | None = None
    md5: str | None = None
    sha256: str | None = None


class HTTPError(ValueError):
    """The server's answer was not the file."""

    def __init__(self, status: int, reason: str, wait: float | None = None) -> None:
        super().__init__(f"Request failed: HTTP {status} {reason}")
        self.status, self.wait = status, wait


def safe_name(name: str) -> str:
    """Return the name if it can be that of a file directly inside a directory.

    Raises
    ------
    ArgumentError
        It is empty, has a path separator, a drive or a control character, or is ``.`` or ``..``.
    """
    bad = any(c in '/\\:<>"|?*' or ord(c) < 32 or ord(c) == 127 for c in name)
    if bad or name != name.strip() or name in ("", ".", ".."):
        raise ArgumentError(
            f"{name!r} is not the name of a file; a download stays in its directory"
        )
    return name


def fetch(
    url: str,
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    md5: str | None = None,
    sha256: str | None = None,
    headers: dict[str, str] | None = None,
    verbose: bool = True,
) -> Path:
    """Download `url` to `path`, unless the file is there.

    What has arrived is kept in ``path.part`` and a later call, also of another process, continues there.
    Several processes (or threads) that want the same file download it once. The file appears under its name
    only when it is whole, verified and on the disk.

    Parameters
    ----------
    url : str
        http or https; proxies are those of the environment.
    path : path
        The file to make. Its directory must exist.
    size : int, optional
        Expected size in bytes.
    md5, sha256 : str, optional
        Expected digests in hexadecimal. Without ``sha256``, the one a Hugging Face server states is used.
    headers : dict, optional
        Further request headers.
    verbose : bool
        Say on stderr what happens. The progress bar is shown in any case, but not in a log.

    Raises
    ------
    ValueError
        The server refused, or the file is not the expected one (it is removed).
    RuntimeError
        The connection ended again and again without one new byte.
    requests.exceptions.RequestException
        The server cannot be reached.
    """
    path = expanded(path)
    if path.exists():
        return path
    with locked(path.with_name(path.name + ".lock")):
        if not path.exists():
            checks = Checks(size, md5, sha256)
            _Transfer(url, path, checks, headers or {}, verbose).run()
    return path


@dataclass
class _Transfer:
    """The download of one file; its first `have` bytes are in the `.part` file."""

    url: str
    path: Path
    checks: Checks
    headers: dict[str, str]
    verbose: bool
    have: int = 0
    total: int | None = None
    note: dict[str, str] = field(default_factory=dict)  # what identifies the bytes we have

    def __post_init__(self) -> None:
        self.part = self.path.with_name(self.path.name + ".part")
        self.note_path = self.path.with_name(self.path.name + ".part.json")
        if not self.url.startswith(("http://", "https://")):
            raise ArgumentError(f"{self.url!r}: expected a http or https address")

    def run(self) -> None:
        resumed = self._find_kept()
        try:
            self._download_and_verify()
        except _WrongFile:
            if not resumed:
                raise
            self._say("What was kept of an earlier download is damaged; starting again.")
            self._download_and_verify()
        os.replace(self.part, self.path)
        sync_folder(self.path.parent)
        self._discard()
        self._say(f"Model downloaded to {str(self.path)!r}")

    def _download_and_verify(self) -> None:
        with self._opened() as part:
            try:
                self._download(part)
                self._verify(part)
            except _WrongFile:
                self._say("Cleaning up the interrupted download...")
                part.close()
                self._discard()
                self.have, self.total, self.note = 0, None, {}
                raise
            part.flush()
            _fsync(part)

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The ``.part`` file; it goes again when nothing arrived."""
        with open(self.part, "r+b" if self.part.exists() else "w+b") as part:
            try:
                yield part
            except BaseException:
                part.close()
                if not self.have:
                    self._discard()
                raise

    # ---- what an earlier call left

    def _find_kept(self) -> bool:
        """Use the bytes that an earlier call kept of this address; delete those of another one."""
        try:
            note = json.loads(self.note_path.read_text(encoding="utf-8"))
            have = self.part.stat().st_size
        except (OSError, ValueError):
            note, have = {}, 0
        if have and isinstance(note, dict) and note.get("url") == self.url:
            self.note, self.have = note, have
        else:
            self._discard()
        return self.have > 0

    def _discard(self) -> None:
        for leftover in (self.part, self.note_path):
            with suppress(FileNotFoundError):
                leftover.unlink()

    def _keep_note(self, response: Response) -> None:
        tag = response.headers.get("ETag", "")
        strong = tag if tag.startswith('"') else ""
        since = response.headers.get("Last-Modified", "")
        self.note = {"url": self.url, "if_range": strong or since}
        self.note_path.write_text(json.dumps(self.note), encoding="utf-8")

    # ---- the transfer

    def _download(self, part: IO[bytes]) -> None:
        failures, best = 0, self.have
        with _bar("Downloading", self.checks.size, self.have) as bar:
            while True:
                error = self._attempt(part, bar)
                if error is None:
                    return
                failures, best = (failures if self.have <= best else 0) + 1, max(best, self.have)
                if failures >= ATTEMPTS or (not self.have and _no_such_host(error)):
                    raise error
                _sleep(_pause(error, failures))
                if self.have:
                    _print(f"\nDownload interrupted, resuming from byte position {self.have}")

    def _attempt(self, part: IO[bytes], bar: tqdm[NoReturn]) -> Exception | None:
        """Make one request; return the error after which another may help, None when all is here."""
        import requests
        import urllib3

        try:
            with self._request() as response:
                self._place(part, response, bar)
                for block in _arriving(response):
                    self._write(part, block, bar)
        except HTTPError as error:
            if error.status not in TRANSIENT:
                raise
            return error
        except _Complete:
            return None
        except urllib3.exceptions.HTTPError:  # cut off: what came before is written
            return _stuck()
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            return self._unreachable(error)
        return None if self.total is None or self.have >= self.total else _stuck()

    def _unreachable(self, error: Exception) -> Exception:
        """An error of the same type whose message is one line that people understand."""
        kind, host = type(error), urlsplit(self.url).netloc
        told = kind(
            f"{self.path.name} cannot be downloaded: no connection to {host} ({kind.__name__})"
        )
        told.__cause__ = error
        return told

    def _request(self) -> Response:
        import requests

        # an encoding would change the meaning of ranges
        headers = {**self.headers, "Accept-Encoding": "identity"}
        if self.have:
            headers["Range"] = f"bytes={self.have}-"
            if self.note.get("if_range"):
                headers["If-Range"] = self.note["if_range"]
        return requests.get(self.url, stream=True, headers=headers, timeout=TIMEOUT)

    def _place(self, part: IO[bytes], response: Response, bar: tqdm[NoReturn]) -> None:
        """Read the answer's headers, and move in the file to where its bytes belong."""
        if response.status_code == 416:
            self._beyond_the_end(response)
        if response.status_code not in (200, 206):
            raise HTTPError(response.status_code, response.reason, _retry_after(response))
        encoding = response.headers.get("Content-Encoding")
        if encoding not in (None, "identity"):
            raise ValueError(f"Expected identity Content-Encoding, got {encoding}")
        start = _range_start(response) if response.status_code == 206 else 0
        if start != self.have:  # the server ignores ranges, or has another file now
            if start:
                raise ValueError(f"Expected bytes from position {self.have}, got them from {start}")
            self.have = 0
        self.total = self.checks.size or _total(response, start)
        self._learn_digest(response)
        self._keep_note(response)
        self._check_space()
        part.seek(self.have)
        part.truncate()
        bar.total = self.total
        bar.update(self.have - bar.n)

    def _beyond_the_end(self, response: Response) -> None:
        """Decide what it means that the server has no bytes after ours: the file is whole, or another one."""
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        if size == str(self.have):
            raise _Complete
        raise _WrongFile(f"Expected file size of {size or 'fewer'} bytes, got {self.have}")

    def _learn_digest(self, response: Response) -> None:
        """Take the SHA-256 of the file that Hugging Face states in its first answer, before it redirects."""
        first = response.history[0] if response.history else response
        tag = first.headers.get("X-Linked-ETag", "").strip('"')
        if self.checks.sha256 is None and len(tag) == 64:
            self.checks = Checks(self.checks.size, self.checks.md5, tag)

    def _check_space(self) -> None:
        needed = (self.total or 0) - self.have
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(
                f"{self.path.name} needs {needed} more bytes; {self.path.parent} has {free} left"
            )

    def _write(self, part: IO[bytes], block: bytes, bar: tqdm[NoReturn]) -> None:
        part.write(block)
        part.flush()  # the system has every byte that is counted, even if this process dies
        self.have += len(block)
        bar.update(len(block))
        if self.checks.size is not None and self.have > self.checks.size:
            raise _WrongFile(
                f"Expected file size of {self.checks.size} bytes, got at least {self.have}"
            )

    # ---- verification

    def _verify(self, part: IO[bytes]) -> None:
        size = part.seek(0, os.SEEK_END)
        if self.checks.size is not None and size != self.checks.size:
            raise _WrongFile(f"Expected file size of {self.checks.size} bytes, got {size}")
        wanted = {"MD5": self.checks.md5, "SHA256": self.checks.sha256}
        hashes = {name: hashlib.new(name.lower()) for name, digest in wanted.items() if digest}
        if not hashes:
            return
        part.seek(0)
        with _bar("Verifying", size) as bar:
            for block in _blocks(part):
                for h in hashes.values():
                    h.update(block)
                bar.update(len(block))
        for name, h in hashes.items():
            if h.hexdigest() != str(wanted[name]).lower():
                raise _WrongFile(f"Expected {name} hash of {wanted[name]!r}, got {h.hexdigest()!r}")

    def _say(self, line: str) -> None:
        if self.verbose:
            _print(line)


class _WrongFile(ValueError):
    """What arrived is not the expected file."""


class _Complete(Exception):
    """Nothing is left to fetch."""


def _print(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201


def _stuck() -> RuntimeError:
    return RuntimeError("Download not making progress, aborting.")


def _no_such_host(error: Exception) -> bool:
    """Did no name server know the host? Then there is no network, or the name is wrong."""
    cause: object = error
    while isinstance(cause, BaseException):
        if isinstance(cause, socket.gaierror) or type(cause).__name__ == "NameResolutionError":
            return True
        inner = getattr(cause, "reason", None) or next(iter(cause.args), None)
        cause = cause.__cause__ or (inner if isinstance(inner, BaseException) else None)
    return False


def _pause(error: Exception, failures: int) -> float:
    asked = error.wait if isinstance(error, HTTPError) else None
    return min(MAX_WAIT, BACK_OFF * 2.0 ** (failures - 1) if asked is None else asked)


def _retry_after(response: Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _range_start(response: Response) -> int:
    digits = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    if not digits.isdigit():
        raise ValueError("Connection was interrupted and server does not support range requests")
    return int(digits)


def _total(response: Response, start: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _arriving(response: Response) -> Iterator[bytes]:
    """The answer's bytes piece by piece as they arrive: a cut loses nothing of what came before it."""
    raw = response.raw
    # urllib3 1.26 has no read1, and its read does not wait for all
    read = getattr(raw, "read1", raw.read)
    while block := read(BLOCK, decode_content=False):
        yield block


def _bar(desc: str, total: int | None, initial: int = 0) -> tqdm[NoReturn]:
    from tqdm import tqdm

    # a log is no place for a bar that redraws itself; a notebook, whose stream is its own, is one
    logged = sys.stderr is sys.__stderr__ and not (sys.stderr and sys.stderr.isatty())
    return tqdm(desc=desc, total=total, initial=initial, unit="iB", unit_scale=True, disable=logged)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _fsync(file: IO[bytes] | int) -> None:
    """Force a file's content onto the disk."""
    os.fsync(file if isinstance(file, int) else file.fileno())
