# ruff: noqa: E501
"""GPT4All's list, Hugging Face names, and finding a model."""

from __future__ import annotations

import hashlib
import http.server
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from tinyllm.hub import catalogue

MODEL = b"GGUF of a sort" * 1000
LIST = [
    {
        "filename": "Small-1B.Q4_0.gguf",
        "filesize": str(len(MODEL)),
        "md5sum": hashlib.md5(MODEL).hexdigest(),
        "url": None,
        "name": "Small",
    },
    {"name": "an entry without a file"},
]


class Site(http.server.ThreadingHTTPServer):
    """Serves what `pages` holds; everything else is 404."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site = self.server
        assert isinstance(site, Site)
        site.asked.append((self.path, self.headers.get("Authorization")))
        body = site.pages.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serving: Callable[[Site], None]) -> Site:
    site = Site()
    site.pages = {"/models3.json": json.dumps(LIST).encode(), "/gguf/Small-1B.Q4_0.gguf": MODEL}
    monkeypatch.setattr(catalogue, "LIST_URL", site.url + "/models3.json")
    monkeypatch.setattr(catalogue, "FILES_URL", site.url + "/gguf/")
    monkeypatch.setattr(catalogue, "DEFAULT_MODEL_DIRECTORY", tmp_path / "models")
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    serving(site)
    return site


def test_the_list_is_kept_for_later(site: Site) -> None:
    assert catalogue.known_models() == catalogue.packaged_list()["models"]
    assert catalogue.fetch_list() == LIST[:1]
    assert catalogue.known_models() == LIST[:1]
    assert len(site.asked) == 1


def test_a_missing_list_is_an_error(site: Site) -> None:
    site.pages.clear()
    with pytest.raises(ValueError, match=r"^Request failed: HTTP 404 Not Found$"):
        catalogue.fetch_list()


@pytest.mark.parametrize("content", ["{", "{}", "null", ""])
def test_a_damaged_kept_list_counts_as_none(content: str, site: Site) -> None:
    catalogue.fetch_list()
    (catalogue.cache_folder() / "models3.json").write_text(content)
    assert catalogue.known_models() == catalogue.packaged_list()["models"]


def test_the_package_has_the_list_and_its_date(site: Site) -> None:
    packaged = catalogue.packaged_list()
    assert datetime.strptime(packaged["date"], "%Y-%m")
    assert "MIT" in packaged["license"]
    assert len(packaged["models"]) == 32
    assert not site.asked


def test_a_name_that_only_a_newer_list_has_is_found(site: Site) -> None:
    assert not catalogue.entry_of("Small-1B.Q4_0.gguf", catalogue.known_models())
    assert catalogue.find_model("Small-1B.Q4_0").read_bytes() == MODEL


def test_the_repositorys_own_list_parses(data: Path, site: Site) -> None:
    site.pages["/models3.json"] = (data / "models3.json").read_bytes()
    models = catalogue.fetch_list()
    entry = catalogue.entry_of("Meta-Llama-3-8B-Instruct.Q4_0.gguf", models)
    assert entry["name"] == "Llama 3 8B Instruct"
    assert catalogue.entry_of("nothing.gguf", models) == {}


def test_a_listed_model_is_downloaded_once(site: Site) -> None:
    path = catalogue.find_model("Small-1B.Q4_0")
    assert path.read_bytes() == MODEL
    assert catalogue.find_model("Small-1B.Q4_0.gguf") == path
    assert [page for page, _ in site.asked] == ["/models3.json", "/gguf/Small-1B.Q4_0.gguf"]


def test_a_path_asks_no_network(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"x")
    assert catalogue.find_model(file) == file
    assert not site.asked


def test_an_unknown_name_is_told_the_nearest(site: Site) -> None:
    with pytest.raises(FileNotFoundError, match=r"GPT4All's list has Small-1B.Q4_0.gguf"):
        catalogue.find_model("small-2b")
    with pytest.raises(FileNotFoundError, match=r"does not exist: 'no/such.gguf'"):
        catalogue.find_model("no/such.gguf")


@pytest.mark.parametrize("name", ["../../x.gguf", "a/b.gguf", "x\0.gguf"])
def test_a_hostile_list_cannot_leave_the_directory(name: str, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the name of a file"):
        catalogue.download_listed({"filename": name}, tmp_path)
    assert not site.asked


def test_hugging_face_files_download_once(site: Site) -> None:
    site.pages["/me/repo/resolve/main/sub/m-Q4_0.gguf"] = MODEL
    site.pages["/me/repo/resolve/v2/m.gguf"] = b"two"
    path = catalogue.find_model("hf:me/repo/sub/m-Q4_0.gguf")
    assert path.read_bytes() == MODEL
    assert catalogue.find_model("hf:me/repo/sub/m-Q4_0.gguf") == path
    assert catalogue.find_model("hf:me/repo@v2/m.gguf").read_bytes() == b"two"
    assert len(site.asked) == 2


def test_the_token_is_sent_where_it_is_set(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/me/repo/resolve/main/m.gguf"] = MODEL
    monkeypatch.setenv("HF_TOKEN", "t")
    catalogue.download_hf("hf:me/repo/m.gguf")
    assert site.asked[0][1] == "Bearer t"


def test_a_missing_hugging_face_file_is_named(site: Site) -> None:
    with pytest.raises(
        ValueError, match=r"^hf:me/repo/m\.gguf: Request failed: HTTP 404 Not Found$"
    ):
        catalogue.download_hf("hf:me/repo/m.gguf")


@pytest.mark.parametrize("name", ["hf:", "hf:me/m.gguf", "hf:me/../m.gguf", "hf:me/r/../x", "hf:me/r/", "hf:me/r/a//b"])  # fmt: skip
def test_malformed_hugging_face_names_are_refused(name: str, site: Site) -> None:
    with pytest.raises(ValueError, match=r"expected hf:owner/repo/file.gguf"):
        catalogue.download_hf(name)
    assert not site.asked


def test_without_a_network_the_file_is_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(catalogue, "LIST_URL", "http://127.0.0.1:9/models3.json")
    monkeypatch.setattr(catalogue, "DEFAULT_MODEL_DIRECTORY", tmp_path)
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        FileNotFoundError, match=r"'some-model'; GPT4All's list was not asked: no conn"
    ):
        catalogue.find_model("some-model")
