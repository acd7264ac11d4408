"""docs/server.md: its examples run against a server, and its tables name every field."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.server import create_app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "server.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:4891"
SHELL = re.findall(r"^```sh\n(curl .*?)^```", TEXT, re.S | re.M)
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
SCRIPT = re.findall(r"^```js\n(.*?)^```", TEXT, re.S | re.M)
NODE_MODULES = Path(sys.prefix) / "clients" / "node_modules"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def url(model: tinyllm.Model, serve: Callable[[Any], str]) -> str:
    """The address of a server as ``tinyllm serve`` starts it."""
    return serve(create_app({"bundled": model}))


def run(command: list[str], url: str, **how: Any) -> str:
    """What a command of the page prints, with its address replaced."""
    told = [word.replace(ADDRESS, url) for word in command]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(told, capture_output=True, text=True, timeout=300, env=environment, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", SHELL, ids=lambda c: c.split()[2].rpartition("/")[2])
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_curl(command: str, url: str) -> None:
    assert ADDRESS in command
    found = run(["bash", "-c", command], url)
    if "-sN" in command:
        assert found.rstrip().endswith("data: [DONE]")
    else:
        assert "error" not in json.loads(found)


def client_of(code: str) -> str:
    """The package that an example shows."""
    found = re.match(r"(?:from|import) (\w+)", code)
    assert found
    return found[1]


@pytest.mark.parametrize("code", PYTHON, ids=client_of)
def test_python(code: str, url: str) -> None:
    assert ADDRESS in code
    needs = re.findall(r"^(?:from|import) (\w+)", code, re.M)
    for name in needs:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not here")
    assert run([sys.executable, "-W", "ignore", "-c", code], url).strip()


def package_of(code: str) -> str:
    """The package of npm that an example shows."""
    found = re.search(r'from "(.+?)"', code)
    assert found
    return found[1]


@pytest.mark.skipif(NODE is None, reason="node is not here")
@pytest.mark.parametrize("code", SCRIPT, ids=package_of)
def test_javascript(code: str, url: str, tmp_path: Path) -> None:
    if not (NODE_MODULES / package_of(code)).is_dir():
        pytest.skip(f"{package_of(code)} is not in {NODE_MODULES}")
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "example.mjs").write_text(code.replace(ADDRESS, url), "utf-8")
    assert run([str(NODE), "example.mjs"], url, cwd=tmp_path).strip()


def test_every_field_is_named(app: Any) -> None:
    api = app.get("/openapi.json").json()
    for path, methods in api["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body is None:
            assert f"`{path}`" in TEXT
            continue
        name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        told = section(path)
        fields = set(api["components"]["schemas"][name]["properties"])
        assert {f for f in fields if f"`{f}`" not in told} == set(), path


def section(path: str) -> str:
    """What the page says of an endpoint: a section, or a row."""
    for part in re.split(r"^##+ ", TEXT, flags=re.M):
        if f"`{path}`" in part.partition("\n")[0]:
            return part
    (row,) = [
        line for line in TEXT.splitlines() if line.startswith(f"| `{path}` |") and "yes" not in line
    ]
    return row
