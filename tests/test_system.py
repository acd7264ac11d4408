"""Other systems, played on this one: their names, what they lack, and the functions that only they have."""

from __future__ import annotations

import ast
import compileall
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tinyllm
from tinyllm import gguf, system
from tinyllm.kernels.cpu import jit

PACKAGE = Path(tinyllm.__file__).parent
BUNDLED = PACKAGE / "data" / "bundled.gguf"

WORK = """
import http.server, threading, time
import tinyllm
from tinyllm import system
from tinyllm.sdk import GPT4All

model = tinyllm.load(n_threads=2)
text = model.generate("Once upon a time", max_tokens=12, temperature=0).text
if system.WAITING == "Sleep":
    time.sleep(0.2)  # this test's Sleep is a Python function: thousands of yields take long
start = time.process_time()
time.sleep(idle)
spent = time.process_time() - start
assert spent <= 0.02 * idle, f"an idle model took {spent} s in {idle} s"
vector = model.embed("Once upon a time")
assert vector.shape == (model.config.n_embd,)

bundled = tinyllm.loading.BUNDLED
with GPT4All(bundled.name, model_path=bundled.parent, allow_download=False, n_threads=2) as llm:
    with llm.chat_session():
        llm.generate("Hello", max_tokens=4)
        assert len(llm.current_chat_session) >= 2


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(bundled.stat().st_size))
        self.end_headers()
        self.wfile.write(bundled.read_bytes())

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
again = tinyllm.load("hf:owner/repo/m.gguf", n_threads=1)  # downloaded
assert again.path.startswith(str(system.cache_folder()))
assert again.generate("Once upon a time", max_tokens=12, temperature=0).text == text
print(system.WAITING, repr(text), vector.tobytes().hex())
"""

REMOVE = {
    "nothing": "",
    "sysconf": "del os.sysconf",
    "affinity": "del os.sched_getaffinity",
    "fcntl": "sys.modules['fcntl'] = None",
    "resource": "sys.modules['resource'] = None",
    "futex": "platform.machine = lambda: 'another'",
    "fork": "del os.fork, os.register_at_fork",
    "proc": """
def refuse(event, args):
    if event == "open" and str(args[0]).startswith(("/proc", "/sys")):
        raise FileNotFoundError(args[0])
sys.addaudithook(refuse)
""",
    "preadv": "del os.preadv",
    "large pages": "del mmap.MADV_HUGEPAGE",
    "anonymous": "del mmap.MAP_ANONYMOUS, mmap.MAP_PRIVATE",
}
EVERYTHING = "\n".join(REMOVE.values())
BEFORE = "import mmap, os, platform, sys\n"

FUNCTIONS = """
import concurrent.futures, ctypes, http.server, importlib.resources, shutil, subprocess, tempfile
import types, zipfile
import jinja2, llvmlite.binding as llvm, numpy, regex, requests, tqdm

real = ctypes.CDLL(None)
called, functions = set(), {}

def native(*kinds):
    def given(f):
        def counted(*args):
            called.add(f.__name__)
            return f(*args)
        functions[f.__name__] = ctypes.CFUNCTYPE(*kinds)(counted)
        return f
    return given

class Library:
    def __init__(self, name=None, *args, **how):
        pass
    def __getattr__(self, name):
        if name in functions:
            return functions[name]
        raise AttributeError(name)

number = {"x86_64": 202, "aarch64": 98}[platform.machine()]
P, I, L = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64

def futex(p, operation, value):
    return real.syscall(number, P(p), operation, I(value), None, None, 0)

def put(kind, address, value):
    kind.from_address(address).value = value
"""

MAC = """
@native(ctypes.c_int, ctypes.c_char_p, P, P, P, ctypes.c_size_t)
def sysctlbyname(name, value, size, new, length):
    known = {
        b"hw.memsize": (16 << 30).to_bytes(8, "little"),
        b"hw.physicalcpu": (2).to_bytes(4, "little"),
        b"machdep.cpu.brand_string": b"Apple M9\\0",
    }
    assert length == 0
    ctypes.memmove(value, known[name], len(known[name]))
    put(ctypes.c_size_t, size, len(known[name]))
    return 0

@native(I)
def mach_host_self():
    return 77

@native(ctypes.c_int, I, ctypes.c_int, P, P)
def host_statistics64(host, kind, fields, count):
    assert (host, kind) == (77, 4)
    for place, pages in enumerate((1 << 18, 1, 1 << 17)):
        put(I, fields + 4 * place, pages)
    return 0

ctypes.CDLL = Library
sys.platform, platform.machine = "darwin", lambda: "arm64"
"""
MAC_WAITS = """
@native(ctypes.c_int, P, L, ctypes.c_size_t, I)
def os_sync_wait_on_address(p, value, size, flags):
    assert (size, flags) == (4, 0)
    return futex(p, 128, value)

@native(ctypes.c_int, P, ctypes.c_size_t, I)
def os_sync_wake_by_address_all(p, size, flags):
    assert (size, flags) == (4, 0)
    return futex(p, 129, 1 << 20)

for name in ("os_sync_wait_on_address", "os_sync_wake_by_address_all"):
    llvm.add_symbol(name, ctypes.cast(functions[name], P).value)
"""
MAC_SAYS = """
assert system.cpu_name() == "Apple M9"
assert (system.n_cores(), system.memory_bytes()) == (2, 16 << 30)
assert system.available_bytes() == ((1 << 18) + (1 << 17)) * mmap.PAGESIZE
assert system.cache_folder().parts[-3:] == ("Library", "Caches", "tinyllm")
assert {"sysctlbyname", "mach_host_self", "host_statistics64"} <= called
from tinyllm.sdk.devices import split_device
assert split_device("gpu") == ("metal", None)
"""

WINDOWS = """
import struct

@native(ctypes.c_int, P)
def GlobalMemoryStatusEx(status):
    assert ctypes.c_uint32.from_address(status).value == 64
    sizes = struct.pack("<7Q", 16 << 30, 8 << 30, 32 << 30, 4 << 30, 1 << 47, 1 << 46, 0)
    ctypes.memmove(status + 8, sizes, 56)
    return 1

@native(P)
def GetCurrentProcess():
    return 2**64 - 1

@native(ctypes.c_int, P, P, P)
def GetProcessAffinityMask(process, mask, of_system):
    assert process == 2**64 - 1
    put(ctypes.c_size_t, mask, 0b001111)
    put(ctypes.c_size_t, of_system, 0b111111)
    return 1

@native(ctypes.c_int, P, P)
def GetLogicalProcessorInformation(rows, size):
    found = [(0b000011, 0), (0b001100, 0), (0b110000, 0), (0b111111, 2)]  # three cores, a cache
    raw = b"".join(struct.pack("<Qi4xQQ", *row, 0, 0) for row in found)
    put(I, size, len(raw))
    if rows:
        ctypes.memmove(rows, raw, len(raw))
    return int(bool(rows))

@native(None, I)
def Sleep(milliseconds):
    real.usleep(15_600 if milliseconds else 0)  # until the next tick of Windows's clock

ctypes.WinDLL = Library
sys.platform, platform.machine = "win32", lambda: "AMD64"
winreg = sys.modules["winreg"] = types.ModuleType("winreg")
winreg.HKEY_LOCAL_MACHINE = 1
winreg.OpenKey = lambda root, path: open(os.devnull)
winreg.QueryValueEx = lambda key, name: ({"ProcessorNameString": "Ryzen "}[name], 1)
msvcrt = sys.modules["msvcrt"] = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK, refusals = 2, [OSError("held"), OSError("held")]
def locking(fd, mode, n):
    called.add("locking")
    if refusals:
        raise refusals.pop()
msvcrt.locking = locking
os.environ["LOCALAPPDATA"] = os.environ["HOME"]
"""
WINDOWS_WAITS = """
@native(ctypes.c_int, P, P, ctypes.c_size_t, I)
def WaitOnAddress(p, compared, size, milliseconds):
    assert (size, milliseconds) == (4, 0xFFFFFFFF)
    futex(p, 128, I.from_address(compared).value)
    return 1

@native(None, P)
def WakeByAddressAll(p):
    futex(p, 129, 1 << 20)
"""
WINDOWS_SAYS = """
assert system.cpu_name() == "Ryzen"
assert (system.n_cores(), system.memory_bytes()) == (2, 16 << 30)
assert system.available_bytes() == 4 << 30
assert "locking" in called
assert system.cache_folder().name == "tinyllm"
assert system.library_file("cublas", 12) == "cublas64_12.dll"
"""
UNKNOWN = "sys.platform, platform.machine = 'plan9', lambda: 'another'\n"


def python(code: str, *flags: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    """A program's run in a process of its own; an environment variable that is None is taken away."""
    given = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env}
    kept = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, *flags, "-c", code]
    folder = Path(__file__).parent / "data"  # Python would look for the package in its own
    run = subprocess.run(command, env=kept, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def work(before: str, home: Path, after: str = "", idle: float = 0.05) -> list[str]:
    """Do everything on a system that ``before`` makes; how threads waited, the text, an embedding."""
    code = f"{BEFORE}{before}\nidle = {idle}\n{WORK}{after}"
    env = {"HOME": str(home), "XDG_CACHE_HOME": None, "LOCALAPPDATA": None, "TINYLLM_CACHE": None}
    return python(code, **env).stdout.split(" ", 1)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What this system answers, with nothing removed."""
    return work("", tmp_path_factory.mktemp("home"))


IDLE = 2.0  # seconds in which an idle model may take 2 % of a core


@pytest.mark.parametrize("name", REMOVE)
def test_each_of_linuxs_names_can_be_missing(name: str, tmp_path: Path, here: list[str]) -> None:
    idle = IDLE if name in ("nothing", "futex") else 0.05
    waiting, answer = work(REMOVE[name], tmp_path, idle=idle)
    assert answer == here[1]  # to the bit
    assert waiting == ("nanosleep" if name == "futex" else here[0])


@pytest.mark.parametrize("renamed", ["", UNKNOWN])
def test_all_of_linuxs_names_can_be_missing(renamed: str, tmp_path: Path, here: list[str]) -> None:
    assert work(f"{EVERYTHING}\n{renamed}", tmp_path, idle=IDLE) == ["nanosleep", here[1]]


@pytest.mark.skipif(not system.FUTEX, reason="plays other systems' waiting with Linux's")
@pytest.mark.parametrize(
    ("waits", "waiting"), [(MAC_WAITS, "os_sync"), ("", "nanosleep")], ids=["new", "old"]
)
def test_macos_as_far_as_it_can_be_played(
    waits: str, waiting: str, tmp_path: Path, here: list[str]
) -> None:
    after = MAC_SAYS + "assert 'os_sync_wait_on_address' in called\n" * bool(waits)
    lacks = "\n".join(REMOVE[n] for n in ("affinity", "proc", "large pages"))
    before = FUNCTIONS + waits + MAC + lacks
    assert work(before, tmp_path, after, IDLE) == [waiting, here[1]]


@pytest.mark.skipif(not system.FUTEX, reason="plays other systems' waiting with Linux's")
@pytest.mark.parametrize(
    ("waits", "waiting"), [(WINDOWS_WAITS, "WaitOnAddress"), ("", "Sleep")], ids=["new", "old"]
)
def test_windows_as_far_as_it_can_be_played(
    waits: str, waiting: str, tmp_path: Path, here: list[str]
) -> None:
    used = "WaitOnAddress" if waits else "Sleep"
    after = f"{WINDOWS_SAYS}assert {used!r} in called\n"
    before = FUNCTIONS + waits + EVERYTHING + WINDOWS
    assert work(before, tmp_path, after, IDLE) == [waiting, here[1]]


@pytest.mark.parametrize("name", ["darwin", "win32"])
def test_a_system_without_the_functions_it_should_have_is_taken_for_unknown(name: str) -> None:
    """No library is what it was taken for: nothing is found, and nothing raises AttributeError."""
    code = f"""{EVERYTHING}
import ctypes, tempfile, subprocess
sys.platform = {name!r}
from tinyllm import system
assert not system.WAKES
assert system.memory_bytes() == 2 * system.available_bytes() == system.ASSUMED_MEMORY
assert system.n_cores() >= 1 and not system.allow_amx()
system.cpu_name()
"""
    said = python(BEFORE + code).stderr
    assert said.count("does not say how much memory it has; 4 GiB are assumed") == 1


def test_a_system_without_file_locks_says_so(tmp_path: Path) -> None:
    code = f"""{REMOVE["fcntl"]}
from pathlib import Path
from tinyllm.hub.locks import locked
with locked(Path({str(tmp_path / "lock")!r})):
    pass
"""
    assert "has no file locks" in python(BEFORE + code).stderr


ASKING = re.compile(
    r"sys\.platform|os\.name\b|hasattr\((os|mmap)\b|fcntl|msvcrt|winreg|resource\.|register_at_fork"
    r"|os\.sysconf|sched_get|/proc/|/sys/|Path\.home|XDG_|LOCALAPPDATA|getuid|os\.uname"
)


def test_only_one_file_asks_about_the_system() -> None:
    asking = {f.name for f in PACKAGE.rglob("*.py") if ASKING.search(f.read_text("utf-8"))}
    assert asking == {"system.py"}
    imported = {
        f.name
        for f in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(f.read_text("utf-8")))
        if isinstance(node, ast.Import) and {a.name for a in node.names} & {"platform", "resource"}
    }
    assert imported == {"system.py"}


# ---- folders

NOBODY = """
import pwd
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
"""


def test_a_user_without_a_home_or_a_name_needs_none(tmp_path: Path, here: list[str]) -> None:
    code = (
        f"{BEFORE}{NOBODY}\nidle = 0.05\n{WORK}print(system.home(), system.home().stat().st_mode)"
    )
    none = {"HOME": None, "XDG_CACHE_HOME": None, "TINYLLM_CACHE": None}
    lines = python(code, **none, TMPDIR=str(tmp_path)).stdout.splitlines()
    assert lines[0].split(" ", 1)[1] == here[1].strip()
    home, mode = lines[1].split()
    assert Path(home) == tmp_path / f"tinyllm-{os.getuid()}"
    assert int(mode) & 0o777 == 0o700


def test_a_temporary_home_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    """Kernels are kept there: who writes to it runs code as this user."""
    planted = tmp_path / f"tinyllm-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    code = f"{NOBODY}\nfrom tinyllm import system\nprint(system.home())"
    home = Path(python(code, HOME=None, TMPDIR=str(tmp_path)).stdout.strip())
    assert home != planted
    assert home.parent == tmp_path
    assert home.stat().st_mode & 0o777 == 0o700


def test_where_no_folder_can_be_written_kernels_are_not_kept(tmp_path: Path) -> None:
    """A root file system that is read-only, and no folder for temporary files."""
    code = f"""{NOBODY}
import tempfile
def none():
    raise FileNotFoundError("No usable temporary directory found")
tempfile.gettempdir = none
import tinyllm
from tinyllm import system
from tinyllm.kernels.cpu import jit
jit._candidates = lambda: [system.cache_folder()]
from tinyllm.sdk import GPT4All
print(tinyllm.load().generate("Once", max_tokens=1).text, jit.cache_folder())
try:
    tinyllm.load("no-such-model.gguf")
except FileNotFoundError as e:
    print("not found")
"""
    lines = python(
        code, HOME=None, XDG_CACHE_HOME=None, TINYLLM_CACHE=None, https_proxy="http://127.0.0.1:9"
    )
    assert lines.stdout.splitlines()[-2].endswith(" None")
    assert lines.stdout.splitlines()[-1] == "not found"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyllm.hub import catalogue
    from tinyllm.sdk import GPT4All

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TINYLLM_CACHE", "~/x")
    assert system.cache_folder() == catalogue.cache_folder() == tmp_path / "x"
    assert jit._candidates() == [tmp_path / "x"]
    shutil.copy(BUNDLED, tmp_path / "m.gguf")
    for name in ("~/m.gguf", Path("~/m.gguf")):
        assert tinyllm.load(name).path == str(tmp_path / "m.gguf")
    for name, folder in (("m", "~"), ("~/m.gguf", None)):
        with GPT4All(name, model_path=folder, allow_download=False) as llm:
            assert llm.config["path"] == str(tmp_path / "m.gguf")
    model = tinyllm.load()
    state = model.new_state(8)
    state.save("~/s.npz")
    state.restore("~/s.npz")
    gguf.write("~/w.gguf", {"general.name": "x"}, {})
    with gguf.open("~/w.gguf") as file:
        assert file.metadata["general.name"] == "x"
    assert {p.name for p in tmp_path.iterdir()} >= {"m.gguf", "s.npz", "w.gguf"}


# ---- shipped without a folder of sources

ONCE = """
import tinyllm
from tinyllm.kernels.cpu import jit
model = tinyllm.load(n_threads=1)
print(tinyllm.__file__, model.device, jit._fingerprint())
print(repr(model.generate("Once upon a time", max_tokens=12, temperature=0).text))
"""


def copied(folder: Path, edit: str = "") -> Path:
    """The package in another folder; with a version of its kernels that differs by a line."""
    shutil.copytree(PACKAGE, folder / "tinyllm", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "tinyllm" / "kernels" / "cpu" / "micro.py").open("a") as f:
        f.write(edit)
    return folder


def test_the_package_runs_from_a_zip_of_its_sources(tmp_path: Path, here: list[str]) -> None:
    archive = tmp_path / "t.zip"
    with zipfile.ZipFile(archive, "w") as f:
        for file in copied(tmp_path / "copy").rglob("*.*"):
            f.write(file, file.relative_to(tmp_path / "copy"))
    first, text = python(
        ONCE, PYTHONPATH=str(archive), HOME=str(tmp_path), TINYLLM_CACHE=None
    ).stdout.splitlines()
    where, device, _ = first.split()
    assert where.startswith(str(archive))
    assert device == "cpu"
    assert here[1].startswith(text)


def test_bytecode_alone_runs_and_says_what_is_missing(tmp_path: Path, here: list[str]) -> None:
    names = set()
    for i, edit in enumerate(("", "ANOTHER = 1\n")):
        folder = copied(tmp_path / str(i), edit)
        compileall.compile_dir(folder, quiet=2, legacy=True)
        for source in folder.rglob("*.py"):
            source.unlink()
        run = python(ONCE, PYTHONPATH=str(folder), HOME=str(tmp_path), TINYLLM_CACHE=None)
        first, text = run.stdout.splitlines()
        where, device, name = first.split()
        assert where.endswith(".pyc")
        assert device == "reference"
        assert "sources of the CPU's kernels are missing" in run.stderr
        assert len(text) > 20
        names.add(name)
    assert len(names) == 2  # no version finds the kernels of another


def test_pyinstaller_is_told_to_ship_the_sources_of_kernels() -> None:
    from tinyllm import _pyinstaller

    (folder,) = _pyinstaller.hook_dirs()
    hook = (Path(folder) / "hook-tinyllm.py").read_text()
    assert 'module_collection_mode = {"tinyllm.kernels.cpu": "pyz+py"}' in hook
