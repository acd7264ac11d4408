"""What depends on the operating system: processors, memory, waiting threads, forks, files, folders.

Linux, macOS and Windows have branches of their own. Another system gets what POSIX and Python promise, and
where they promise nothing, a cautious assumption. No other file of the package asks which system it runs on.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

NAME = sys.platform  # "linux", "darwin", "win32" or another
MACHINE = platform.machine()  # "x86_64", "arm64" or another
ASSUMED_MEMORY = 4 << 30  # bytes, on a system that does not say
ASSUMED_CACHE = 32 << 20  # bytes, likewise
NO_LIMIT = 1 << 62
KERNEL32 = "kernel32"


def _native(name: str, library: str | None = None) -> Any:
    """A function of the system's libraries; None where it has no such function."""
    try:
        return getattr(getattr(ctypes, "WinDLL", ctypes.CDLL)(library), name)
    except (AttributeError, OSError, TypeError):
        return None


def _read(path: str) -> str:
    """A file in which the system describes itself; "" where it is not there."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError):
        return ""


# ---- processors


def cpu_name() -> str:
    """The processor's name, as its maker writes it."""
    if sys.platform == "darwin":
        name = _sysctl("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")
    elif sys.platform == "win32":
        name = _registered_cpu()
    else:
        lines = _read("/proc/cpuinfo").splitlines()
        name = next((s.partition(":")[2] for s in lines if s.startswith("model name")), "")
    return name.strip() or platform.processor() or platform.machine()


def cache_bytes() -> int:
    """The size of the processor's largest cache; ``ASSUMED_CACHE`` on a system that does not say."""
    if sys.platform == "darwin":
        return _sysctl_number("hw.l2cachesize") or ASSUMED_CACHE
    sizes = []
    for i in range(5):
        text = _read(f"/sys/devices/system/cpu/cpu0/cache/index{i}/size").strip()
        if text[:-1].isdigit() and text[-1] in "KMG":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=ASSUMED_CACHE)


def _registered_cpu() -> str:
    key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    try:
        import winreg

        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as processor:  # type: ignore[attr-defined]
            return str(winreg.QueryValueEx(processor, "ProcessorNameString")[0])  # type: ignore[attr-defined]
    except (ImportError, OSError):
        return ""


def n_cores() -> int:
    """How many physical cores this process may use; logical processors where the system tells no more."""
    if sys.platform == "darwin":
        found = _sysctl_number("hw.physicalcpu")
    elif sys.platform == "win32":
        found = _windows_cores()
    else:
        found = len({_siblings(cpu) for cpu in _allowed_cpus()})
    return found or os.cpu_count() or 1


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The logical processors that share this one's core."""
    return _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


class _ProcessorInformation(ctypes.Structure):
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION of the Windows API."""

    _fields_ = [
        ("mask", ctypes.c_size_t),
        ("relationship", ctypes.c_int),
        ("rest", ctypes.c_uint64 * 2),
    ]


def _windows_cores() -> int:
    """Cores with a logical processor in the process's affinity mask; 0 where Windows does not say."""
    process, affinity = _native("GetCurrentProcess", KERNEL32), ctypes.c_size_t()
    get_affinity = _native("GetProcessAffinityMask", KERNEL32)
    describe = _native("GetLogicalProcessorInformation", KERNEL32)
    if not (process and get_affinity and describe):
        return 0
    process.restype = ctypes.c_void_p
    handle, of_system = ctypes.c_void_p(process()), ctypes.c_size_t()
    if not get_affinity(handle, ctypes.byref(affinity), ctypes.byref(of_system)):
        return 0
    size = ctypes.c_uint32()
    describe(None, ctypes.byref(size))
    rows = (_ProcessorInformation * (size.value // ctypes.sizeof(_ProcessorInformation)))()
    if not describe(rows, ctypes.byref(size)):
        return 0
    return sum(row.relationship == 0 and bool(row.mask & affinity.value) for row in rows)


# LLVM's names of features: where Linux tells of each (number in the auxiliary vector, bit), and macOS
ON_LINUX = {"dotprod": (16, 20), "i8mm": (26, 13)}  # AT_HWCAP's ASIMDDP, AT_HWCAP2's I8MM
ON_MACOS = {"dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}
DOT_PRODUCT_ON_WINDOWS = 43  # PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE


def arm_features() -> set[str] | None:
    """Which of the features in ``ON_LINUX`` this ARM processor has; None where the system does not tell."""
    if sys.platform == "linux" and (tell := _native("getauxval")):
        tell.restype, tell.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return {name for name, (number, bit) in ON_LINUX.items() if tell(number) >> bit & 1}
    if sys.platform == "darwin":
        told = {name: _sysctl(key) for name, key in ON_MACOS.items()}
        return {name for name, v in told.items() if any(v)} if any(told.values()) else None
    if sys.platform == "win32" and (has := _native("IsProcessorFeaturePresent", KERNEL32)):
        return {"dotprod"} if has(DOT_PRODUCT_ON_WINDOWS) else set()
    return None


def allow_amx() -> bool:
    """Ask for the use of Intel's matrix unit, which Linux gives to a process that asks."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    syscall = _native("syscall")
    return bool(syscall) and syscall(arch_prctl, request_permission, tile_data) == 0


# ---- memory


def memory_bytes() -> int:
    """All of the main memory."""
    if sys.platform == "darwin":
        found = _sysctl_number("hw.memsize")
    elif sys.platform == "win32":
        found = _windows_memory()[0]
    else:
        found = _posix_memory()
    return found or _assumed_memory()


def available_bytes() -> int:
    """Main memory that can be taken without swapping, within the limits set to this process."""
    if sys.platform == "darwin":
        free = _mac_available()
    elif sys.platform == "win32":
        free = _windows_memory()[1]
    else:
        free = _linux_available()
    return min(free or memory_bytes() // 2, _cgroup_left(), _address_space_left())


@lru_cache(1)
def _assumed_memory() -> int:
    warnings.warn(
        f"this system ({NAME}) does not say how much memory it has; "
        f"{ASSUMED_MEMORY >> 30} GiB are assumed",
        RuntimeWarning,
        stacklevel=3,
    )
    return ASSUMED_MEMORY


def _posix_memory() -> int:
    try:
        return max(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return _meminfo("MemTotal")


def _linux_available() -> int:
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int:
    lines = _read("/proc/meminfo").splitlines()
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else 0


def _cgroup_left() -> int:
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    try:
        return max(0, int(limit) - int(used))
    except ValueError:  # "max", or no such file
        return NO_LIMIT


def _address_space_left() -> int:
    """What ``ulimit -v`` leaves to this process."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(_read("/proc/self/statm").split()[0])
    except (ImportError, AttributeError, ValueError, OSError, IndexError):
        return NO_LIMIT
    if limit == resource.RLIM_INFINITY:
        return NO_LIMIT
    return max(0, limit - pages * mmap.PAGESIZE)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("physical", "physical_left")),
        *((name, ctypes.c_uint64) for name in ("committed", "commit_left")),
        *((name, ctypes.c_uint64) for name in ("virtual", "virtual_left", "extended_left")),
    ]


def _windows_memory() -> tuple[int, int]:
    """Physical memory, and what of it this process can take; zeros where Windows does not say."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    call = _native("GlobalMemoryStatusEx", KERNEL32)
    if not call or not call(ctypes.byref(status)):
        return 0, 0
    left = min(status.physical_left, status.commit_left, status.virtual_left)
    return status.physical, left


def _sysctl(name: str) -> bytes:
    """A value that macOS keeps under a name; b"" where it keeps none."""
    call = _native("sysctlbyname")
    if not call:
        return b""
    value, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = call(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0))
    return b"" if failed else value.raw[: size.value]


def _sysctl_number(name: str) -> int:
    return int.from_bytes(_sysctl(name), sys.byteorder)


def _mac_available() -> int:
    """Free and inactive pages of macOS, from the first fields of vm_statistics64; 0 where it does not say."""
    host, call = _native("mach_host_self"), _native("host_statistics64")
    if not (host and call):
        return 0
    host_vm_info64, fields = 4, (ctypes.c_uint32 * 64)()
    count = ctypes.c_uint32(len(fields))
    if call(host(), host_vm_info64, fields, ctypes.byref(count)):
        return 0
    free, inactive = fields[0], fields[2]
    return int(free + inactive) * mmap.PAGESIZE


def map_memory(n_bytes: int) -> mmap.mmap:
    """Zeroed memory of this process alone, on large pages where the system has them."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, n_bytes)
    # private: else a forked child would write into its parent's memory
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


# ---- threads and processes

FUTEX = {"x86_64": 202, "aarch64": 98}.get(MACHINE, 0) if NAME == "linux" else 0

MONOTONIC = 6 if NAME == "darwin" else 1  # the number of clock_gettime's clock that is never set

Waiting = Literal["futex", "os_sync", "WaitOnAddress", "nanosleep", "Sleep"]


def _waiting() -> Waiting:
    """By which means native code waits until a number in memory changes.

    Linux, macOS 14.4 and Windows 8 wake a thread when another says so; elsewhere it looks again after a nap.
    """
    if FUTEX:
        return "futex"
    if NAME == "darwin" and _native("os_sync_wait_on_address"):
        return "os_sync"
    if NAME == "win32" and {"WaitOnAddress", "WakeByAddressAll"} <= native_symbols().keys():
        return "WaitOnAddress"
    return "Sleep" if NAME == "win32" else "nanosleep"


def native_symbols() -> dict[str, int]:
    """Addresses of functions that compiled kernels call and LLVM does not look for itself."""
    if NAME != "win32":
        return {}
    synch = "api-ms-win-core-synch-l1-2-0"
    homes = {"WaitOnAddress": synch, "WakeByAddressAll": synch, "Sleep": KERNEL32}
    homes["GetSystemTimePreciseAsFileTime"] = KERNEL32
    found = {name: _native(name, library) for name, library in homes.items()}
    return {
        name: ctypes.cast(f, ctypes.c_void_p).value or 0
        for name, f in found.items()
        if f is not None
    }


WAITING: Waiting = _waiting()
WAKES = WAITING not in ("nanosleep", "Sleep")


def after_fork(renew: Callable[[], object]) -> None:
    """Call ``renew`` in every forked child, where other threads do not exist and their locks stay held."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def native_stderr(run: Callable[[], object]) -> str:
    """What a library writes to the process's standard error while ``run`` runs; "" where there is none."""
    try:
        before = os.dup(2)
    except OSError:  # a program without a console, say
        run()
        return ""
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 2)
            run()
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        return file.read().decode(errors="replace")


# ---- files

OPEN_FLAGS = (  # a pipe nobody writes to must not hold us, and no byte is translated
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
_seeking = threading.Lock()


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read into ``view`` from a place of a file; how many bytes came. Threads may share the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def lock_file(fd: int, waits: Callable[[], object] = lambda: None) -> None:
    """Hold an open file alone, once no other process or thread holds it; closing it lets go.

    ``waits`` is called once where another holds it now.
    """
    if (flock := _posix_lock()) or (flock := _windows_lock()):
        if not flock(fd, False):
            waits()
            flock(fd, True)
        return
    warnings.warn(
        f"this system ({NAME}) has no file locks: let no two processes download the same file",
        RuntimeWarning,
        stacklevel=2,
    )


def _posix_lock() -> Callable[[int, bool], bool] | None:
    """Locks an open file, waiting or not; whether it is locked now."""
    try:
        import fcntl
    except ImportError:
        return None

    def lock_whole(fd: int, wait: bool) -> bool:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        return False

    return lock_whole


def _windows_lock() -> Callable[[int, bool], bool] | None:
    """Locks an open file, waiting or not; whether it is locked now."""
    try:
        import msvcrt
    except ImportError:
        return None

    def lock_first_byte(fd: int, wait: bool) -> bool:
        while True:
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                return True
            except OSError:  # another has it
                if not wait:
                    return False
                time.sleep(0.1)

    return lock_first_byte


def reuse_address(sock: socket.socket) -> None:
    """Let a port be listened on again at once; Windows does so anyway, and the option would share the port."""
    if sys.platform != "win32":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def sync_folder(path: Path) -> None:
    """Make a new name in a folder durable; Windows has no such call."""
    if NAME == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def library_file(name: str, major: int) -> str:
    """The file of a shared library of NVIDIA's, of a major version."""
    bits = 8 * struct.calcsize("P")
    return f"{name}{bits}_{major}.dll" if NAME == "win32" else f"lib{name}.so.{major}"


# ---- folders


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path in which "~" and "~user" stand for home folders, as a shell reads it."""
    return Path(os.path.expanduser(path))


def home() -> Path:
    """The user's home folder; for a user without one, a private folder among the temporary ones."""
    try:
        return Path.home()
    except RuntimeError:  # a container's bare number, say
        return _private_folder()


@lru_cache(1)
def _private_folder() -> Path:
    """A folder that nobody else writes to, kept between processes; where there is none, no folder at all."""
    try:
        path = Path(tempfile.gettempdir()) / f"tinyllm-{os.getuid()}"
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and path.is_dir():
            return path
        return Path(tempfile.mkdtemp(prefix="tinyllm-"))
    except (AttributeError, OSError):
        return Path(os.devnull)  # nothing can be made below it


def cache_folder() -> Path:
    """Where what can be had again is kept: $TINYLLM_CACHE, or a folder in the user's cache folder."""
    if chosen := os.environ.get("TINYLLM_CACHE"):
        return expanded(chosen)
    if NAME == "win32":
        users = os.environ.get("LOCALAPPDATA") or home() / "AppData" / "Local"
    elif NAME == "darwin":
        users = home() / "Library" / "Caches"
    else:
        users = os.environ.get("XDG_CACHE_HOME") or home() / ".cache"
    return expanded(users) / "tinyllm"


def data_folder() -> Path:
    """Where what the user made is kept: ``$XDG_DATA_HOME/tinyllm``, or what stands for it."""
    if NAME == "win32":
        users = os.environ.get("LOCALAPPDATA") or home() / "AppData" / "Local"
    elif NAME == "darwin":
        users = home() / "Library" / "Application Support"
    else:
        users = os.environ.get("XDG_DATA_HOME") or home() / ".local" / "share"
    return expanded(users) / "tinyllm"


def limit_memory(nbytes: int) -> None:
    """Let this process take so much address space at most, where the system can hold it to that."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    except (ImportError, AttributeError, ValueError, OSError):
        pass
