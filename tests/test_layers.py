"""Who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tinyllm").rglob("*.py"))
MAX_LINES = 600
TABLES = {"iq_tables.py", "unassigned.py"}  # data, not code

BELOW_ENGINE = {"errors", "files", "gguf", "tokenizers", "kernels", "models", "sampling", "text"}
BELOW_MODEL = BELOW_ENGINE | {"engine", "chat", "hub"}
ALLOWED: dict[str, set[str]] = {
    "system": set(),
    "files": {"errors"},
    "errors": set(),
    "gguf": {"errors", "files"},
    "gguf.convert": {"errors", "files", "gguf", "tokenizers"},
    "tokenizers": {"errors", "gguf"},
    "kernels": {"errors", "gguf"},
    "kernels.backend": {
        "errors",
        "kernels.batch",
        "kernels.choose",
        "kernels.outside",
        "kernels.profile",
    },
    "models": {"errors", "files", "gguf", "kernels.backend"},
    "sampling": {"errors"},
    "text": {"errors", "tokenizers"},
    "engine": {"errors", "tokenizers", "kernels.backend", "models", "sampling", "text"},
    "engine.scheduler": {"errors", "engine", "models", "model", "chat"},  # the last two: for types
    "engine.completion": {"errors", "tokenizers", "engine", "models", "sampling", "text", "model"},
    "engine.speculate": {"errors", "engine", "models", "model"},  # the model: for types
    "chat": {"errors", "tokenizers"},
    "hub": {"errors", "files"},
    "course": set(),
    "plots": {"errors"},
    "chatting": BELOW_MODEL,
    "research": BELOW_MODEL | {"model"},
    "studied": BELOW_MODEL | {"research"},
    "model": BELOW_MODEL | {"chatting", "studied"},
    "loading": BELOW_MODEL | {"model"},
    "localdocs": BELOW_MODEL | {"model", "loading"},
    "sdk": BELOW_MODEL | {"model", "loading", "localdocs"},
    "server": BELOW_MODEL | {"model", "loading", "localdocs"},
    "mapping": BELOW_MODEL | {"model"},
    "ray": BELOW_MODEL | {"model", "loading", "mapping", "server"},
    "measuring": BELOW_MODEL | {"model", "loading"},
    "cli": BELOW_MODEL
    | {"model", "loading", "measuring", "localdocs", "plots", "sdk", "server"}
    | {"mapping", "ray", "research"},
    "__main__": {"cli"},
    "_pyinstaller": set(),
    "__init__": BELOW_MODEL | {"model", "loading", "measuring", "research", "sdk"},
}
THIRD_PARTY = {
    "cupy",
    "docx",
    "fastapi",
    "jinja2",
    "langchain_core",
    "llguidance",
    "llvmlite",
    "matplotlib",
    "PyInstaller",  # runs its hook
    "numba",
    "numpy",
    "prometheus_client",
    "pyarrow",
    "pyopencl",
    "pypdf",
    "ray",
    "regex",
    "requests",
    "selectolax",
    "tqdm",
    "uvicorn",
}
THIRD_PARTY |= {"urllib3", "cupy_backends"}  # parts of requests and of cupy
THIRD_PARTY |= {"pydantic", "starlette"}  # what fastapi is made of


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of what a module of ``package`` imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # it may be a module


def module_of(path: Path) -> str:
    """tinyllm/gguf/reader.py -> gguf.reader; a package's own file is <package>.__init__."""
    return ".".join(path.relative_to(ROOT / "tinyllm").with_suffix("").parts)


def lineage(module: str) -> Iterator[str]:
    """A module's name, then those of the packages that hold it, the nearest first."""
    parts = module.split(".")
    yield from (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def crossings(module: str, source: str) -> set[str]:
    """Imports of ``module`` that its layer may not make, as dotted names below tinyllm."""
    layer = next((m for m in lineage(module) if m in ALLOWED), "")
    package = ".".join(["tinyllm", *module.split(".")[:-1]])
    found = set()
    for name in imports(ast.parse(source), package):
        top, _, rest = name.partition(".")
        if top != "tinyllm":
            continue
        target = rest.split(".")[0]
        if (
            target not in ALLOWED or target == layer or rest.startswith(f"{layer}.")
        ):  # a public name, or the layer itself
            continue
        may = ALLOWED[layer] | ({"system"} if layer != "errors" else set())  # for all to ask
        if not any(rest == m or rest.startswith(m + ".") or m.startswith(rest + ".") for m in may):
            found.add(rest)
    return found


class WithoutTypeChecking(ast.NodeTransformer):
    """Leaves out what only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST:
        only_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return ast.Pass() if only_for_types else self.generic_visit(node)


# what the one file for users of another library imports: they have it
THEIRS = {"research.bridge": {"torch", "transformer_lens"}}


def undeclared(source: str) -> set[str]:
    """Packages that a module imports when it runs although pyproject.toml does not name them."""
    tree = WithoutTypeChecking().visit(ast.parse(source))
    tops = {name.partition(".")[0] for name in imports(tree, "tinyllm.any.depth.here")}
    return tops - {"tinyllm"} - THIRD_PARTY - sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_are_declared(path):
    assert undeclared(path.read_text("utf-8")) <= THEIRS.get(module_of(path), set())


def test_an_undeclared_import_is_found_wherever_it_runs():
    source = (
        "if TYPE_CHECKING:\n    import mypy_extensions\ndef f():\n    import torch.nn\nimport gguf"
    )
    assert undeclared(source) == {"torch", "gguf"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path):
    assert not crossings(module_of(path), path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("module", "source", "crossing"),
    [
        ("models.decoder", "from ..kernels.cpu.backend import CPUBackend", "kernels.cpu.backend"),
        (
            "models.decoder",
            "def f():\n    from tinyllm.kernels import reference",
            "kernels.reference",
        ),
        ("gguf.reader", "from .. import kernels", "kernels"),
        ("gguf.quants.float", "from ...tokenizers import bpe", "tokenizers"),
        ("sampling", "import tinyllm.models.decoder", "models.decoder"),
        (
            "kernels.cpu.matmul",
            "if TYPE_CHECKING:\n    from ...models.step import Step",
            "models.step",
        ),
        ("engine.generate", "from ..sdk import GPT4All", "sdk"),
        ("kernels.backend", "def f():\n    from .cpu import backend", "kernels.cpu"),
    ],
)
def test_a_wrong_import_is_found(module, source, crossing):
    assert crossing in crossings(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.decoder", "from ..kernels.backend import Backend"),
        ("models.decoder", "from ..kernels import backend"),
        ("kernels.cpu.matmul", "from .simd import load\nfrom ...errors import DeviceError"),
        ("gguf.__init__", "from .reader import GGUFFile\nfrom ..errors import GGUFError"),
    ],
)
def test_a_right_import_is_not(module, source):
    assert not crossings(module, source)


def graph() -> dict[str, set[str]]:
    """Which modules each module imports when it runs, wherever the statement stands."""
    modules = {module_of(p): p for p in FILES}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = WithoutTypeChecking().visit(ast.parse(path.read_text("utf-8")))
        package = ".".join(["tinyllm", *module.split(".")[:-1]])
        names = {name.removeprefix("tinyllm.") for name in imports(tree, package)}
        found[module] = (names & modules.keys()) - {module}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which leads to all others of its group."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for other in edges[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    reached = {module: reach(module) for module in edges}
    groups = {frozenset(o for o in there if m in reached[o]) for m, there in reached.items()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_module_leads_back_to_itself_at_run_time():
    upstream = ["sdk.embed4all", "sdk.gpt4all", "sdk.retrieval"]  # GPT4All's names force these
    assert circles(graph()) == [upstream]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_every_module_has_a_layer():
    assert {module_of(p).split(".")[0] for p in FILES} <= set(ALLOWED)


@pytest.mark.parametrize("path", [p for p in FILES if p.name not in TABLES], ids=module_of)
def test_files_are_short(path):
    lines = path.read_text("utf-8").count("\n")
    assert lines <= MAX_LINES, f"{lines} lines, at most {MAX_LINES}: split it"


def test_modules_of_tests_have_names_of_their_own():
    names = Counter(p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py")
    assert [
        n for n, count in names.items() if count > 1
    ] == []  # pytest would refuse to collect them
