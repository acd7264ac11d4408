"""Where models come from: GPT4All's list, Hugging Face, and the directories on this machine."""

from __future__ import annotations

import difflib
import functools
import json
import os
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import ArgumentError
from ..files import replacing
from ..system import cache_folder, expanded, home
from .download import TIMEOUT, HTTPError, fetch, safe_name

ConfigType = dict[str, Any]

LIST_URL = "https://gpt4all.io/models/models3.json"
FILES_URL = "https://gpt4all.io/models/gguf/"
HUB_URL = "https://huggingface.co"
HF_NAME = re.compile(r"hf:([\w.-]+)/([\w.-]+?)(?:@([\w.-]+))?/(.+)")

DEFAULT_MODEL_DIRECTORY = home() / ".cache" / "gpt4all"


def fetch_list() -> list[ConfigType]:
    """GPT4All's model list, from the network; kept for `known_models`."""
    import requests

    response = requests.get(LIST_URL, timeout=TIMEOUT)
    if response.status_code != 200:
        raise ValueError(f"Request failed: HTTP {response.status_code} {response.reason}")
    models = [
        m for m in response.json() if isinstance(m, dict) and isinstance(m.get("filename"), str)
    ]
    _keep_list(models)
    return models


def _keep_list(models: list[ConfigType]) -> None:
    path = cache_folder() / "models3.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            f.write(json.dumps(models).encode())
    except OSError:  # the home directory cannot be written: the list is fetched again next time
        return


def known_models() -> list[ConfigType]:
    """The list as last fetched, or else that of the package. Asks no network."""
    try:
        models = json.loads((cache_folder() / "models3.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        models = None
    return models if isinstance(models, list) else packaged_list()["models"]


@functools.cache
def packaged_list() -> dict[str, Any]:
    """The list that comes with the package: its "models", its "date" and where it is from."""
    data = pkgutil.get_data("tinyllm", "data/models3.json")
    assert data is not None
    found: dict[str, Any] = json.loads(data)
    return found


def entry_of(filename: str, models: Iterable[ConfigType]) -> ConfigType:
    """A copy of the list's entry for a file; empty when it has none."""
    return dict(next((m for m in models if m.get("filename") == filename), {}))


def download_listed(entry: ConfigType, directory: Path, verbose: bool = True) -> Path:
    """Download a file of the list into a directory, with the list's size and digests."""
    name, size = safe_name(entry["filename"]), entry.get("filesize")
    return fetch(
        entry.get("url") or FILES_URL + quote(name),
        directory / name,
        size=None if size is None else int(size),
        md5=entry.get("md5sum"),
        sha256=entry.get("sha256sum"),
        verbose=verbose,
    )


def download_hf(name: str, verbose: bool = True, allow_download: bool = True) -> Path:
    """The file ``hf:owner/repo/file.gguf`` (or ``hf:owner/repo@revision/file.gguf``), downloaded once.

    A repository that needs permission is opened with the token in $HF_TOKEN; $HF_ENDPOINT names another
    server.

    Raises
    ------
    ArgumentError
        The name does not have that form.
    ValueError
        There is no such file, or it needs permission.
    FileNotFoundError
        It is not on this machine, and must not be downloaded.
    """
    match = HF_NAME.fullmatch(name)
    if not match or any(part in ("", ".", "..") for part in name[3:].split("/")):
        raise ArgumentError(f"{name!r}: expected hf:owner/repo/file.gguf")
    owner, repo, revision, file = match.groups()
    parts = [
        safe_name(part)
        for part in (owner, repo + (f"@{revision}" if revision else ""), *file.split("/"))
    ]
    path = cache_folder() / "hf" / Path(*parts)
    if not allow_download and not path.exists():
        raise FileNotFoundError(f"Model file does not exist: {path!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    hub = os.environ.get("HF_ENDPOINT") or HUB_URL
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{hub.rstrip('/')}/{owner}/{repo}/resolve/{revision or 'main'}/{quote(file)}"
    try:
        return fetch(url, path, headers=headers, verbose=verbose)
    except HTTPError as error:
        hint = {401: "; if it exists, accept its licence and set HF_TOKEN", 403: "; set HF_TOKEN"}
        raise ValueError(f"{name}: {error}{hint.get(error.status, '')}") from error


def find_model(
    name: str | os.PathLike[str], *, allow_download: bool = True, verbose: bool = True
) -> Path:
    """A model's file: a path, an ``hf:`` name, or a file name of GPT4All's list.

    The network is asked only for a file that is not on this machine.

    Raises
    ------
    FileNotFoundError
        There is no such file, and none can be downloaded under this name.
    """
    if isinstance(name, str) and name.startswith("hf:"):
        return download_hf(name, verbose, allow_download)
    path = expanded(name)
    here = [path, DEFAULT_MODEL_DIRECTORY / append_extension_if_missing(str(name))]
    found = next((p for p in here if p.is_file()), None)
    if found is not None:
        return found
    listed = len(path.parts) == 1 and allow_download
    file = append_extension_if_missing(str(name))
    models = known_models() if listed else []
    entry = entry_of(file, models)
    if listed and not entry:
        models = _list_for(str(name))
        entry = entry_of(file, models)
    if not entry:
        raise FileNotFoundError(_not_found(str(name), models))
    DEFAULT_MODEL_DIRECTORY.mkdir(parents=True, exist_ok=True)
    return download_listed(entry, DEFAULT_MODEL_DIRECTORY, verbose)


def _list_for(name: str) -> list[ConfigType]:
    """Fetch the list to find a name that no file has; without a network the error is a missing file."""
    import requests

    try:
        return fetch_list()
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise FileNotFoundError(
            f"{_not_found(name, known_models())}; GPT4All's list was not asked: no connection to gpt4all.io"
        ) from error


def _not_found(name: str, models: list[ConfigType]) -> str:
    listed = {m["filename"].lower(): m["filename"] for m in models}
    near = [listed[n] for n in difflib.get_close_matches(name.lower(), listed, n=3, cutoff=0.4)]
    also = f"; GPT4All's list has {', '.join(near)}" if near else ""
    return f"Model file does not exist: {name!r}{also}"


def append_extension_if_missing(model_name: str) -> str:
    """The name of a model's file: the model's name, with .gguf unless it has an ending already."""
    return model_name if model_name.endswith((".bin", ".gguf")) else f"{model_name}.gguf"
