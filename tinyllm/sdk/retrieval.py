"""Find, list and download the files of models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import quote

import requests

from .. import system
from ..hub import catalogue
from ..hub.catalogue import ConfigType, append_extension_if_missing
from ..hub.download import fetch, safe_name
from .arguments import path_of
from .templates import from_percent


class ModelFiles:
    """The part of `GPT4All` that needs no model."""

    @staticmethod
    def list_models() -> list[ConfigType]:
        """GPT4All's model list, fetched from https://gpt4all.io/models/models3.json."""
        return catalogue.fetch_list()

    @classmethod
    def retrieve_model(
        cls,
        model_name: str | os.PathLike[str],
        model_path: str | os.PathLike[str] | None = None,
        allow_download: bool = True,
        verbose: bool = False,
    ) -> ConfigType:
        """Find a model's file, downloading it if that is allowed and needed.

        Returns
        -------
        dict
            The entry of GPT4All's list, where there is one, with the file's "path" and "filename".
        """
        model_name = path_of("model_name", model_name)
        if model_path is not None:
            model_path = path_of("model_path", model_path)
        if model_name.startswith("hf:"):
            path = catalogue.download_hf(model_name, verbose, allow_download)
            return {"path": str(path), "filename": path.name}
        filename = append_extension_if_missing(model_name)
        directory = cls._directory(model_path)
        path = directory / system.expanded(filename)
        config: ConfigType = {"filename": filename}
        if path.exists():
            if allow_download:
                config |= _entry(filename, catalogue.known_models())
            if verbose:
                print(f"Found model file at {str(path)!r}", file=sys.stderr)  # noqa: T201
        elif allow_download and len(Path(filename).parts) == 1:
            config |= _entry(filename, cls._models_for(filename, directory))
            path = cls._download(filename, directory, config, verbose)
        else:
            raise FileNotFoundError(f"Model file does not exist: {path!r}")
        return {**config, "path": str(path)}

    @staticmethod
    def _directory(model_path: str | os.PathLike[str] | None) -> Path:
        directory = _default_directory() if model_path is None else system.expanded(model_path)
        if not directory.exists():
            raise FileNotFoundError(f"Model directory does not exist: {directory!r}")
        return directory

    @classmethod
    def _models_for(cls, filename: str, directory: Path) -> list[ConfigType]:
        """Fetch the list to download a file; without a network the error says in one line what to do."""
        try:
            return cls.list_models()
        except requests.exceptions.ConnectionError as error:
            raise requests.exceptions.ConnectionError(
                f"{filename} is not in {str(directory)!r} and cannot be downloaded: no connection to"
                " gpt4all.io. Copy the file there, or pass its path"
            ) from error

    @classmethod
    def _download(cls, name: str, directory: Path, config: ConfigType, verbose: bool) -> Path:
        size = config.get("filesize")
        more = {"expected_sha256": config["sha256sum"]} if config.get("sha256sum") else {}
        path = cls.download_model(
            name,
            directory,
            verbose=verbose,
            url=config.get("url"),
            expected_size=None if size is None else int(size),
            expected_md5=config.get("md5sum"),
            **more,
        )
        return Path(path)

    @staticmethod
    def download_model(
        model_filename: str,
        model_path: str | os.PathLike[str],
        verbose: bool = True,
        url: str | None = None,
        expected_size: int | None = None,
        expected_md5: str | None = None,
        *,
        expected_sha256: str | None = None,
    ) -> str | os.PathLike[str]:
        """Download a model, from gpt4all.io unless an address is given.

        An interrupted download is continued by the next call, of any process.

        Parameters
        ----------
        model_filename : str
            Name of the file, without directories.
        model_path : path
            The directory to put it in.
        verbose : bool
            Say on stderr what happens.
        url : str, optional
            Where the file is.
        expected_size : int, optional
            Its size in bytes.
        expected_md5, expected_sha256 : str, optional
            Its digests.

        Returns
        -------
        path
            The file.
        """
        name = safe_name(model_filename)
        return fetch(
            url or catalogue.FILES_URL + quote(name),
            system.expanded(model_path) / name,
            size=expected_size,
            md5=expected_md5,
            sha256=expected_sha256,
            verbose=verbose,
        )


def _entry(filename: str, models: list[ConfigType]) -> ConfigType:
    """The list's entry, with its old template as `GPT4All.chat_session` takes it."""
    entry = catalogue.entry_of(filename, models)
    if entry.get("promptTemplate"):
        entry["promptTemplate"] = from_percent(str(entry["promptTemplate"]))
    return entry


def _default_directory() -> Path:
    """The directory that programs may move by assigning ``DEFAULT_MODEL_DIRECTORY``."""
    from . import gpt4all

    directory = system.expanded(gpt4all.DEFAULT_MODEL_DIRECTORY)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError("Failed to create model download directory") from error
    return directory
