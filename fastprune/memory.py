"""How the C library hands memory to CPU tensors: :func:`tune_cpu_memory`, its undoing, and a report."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# <malloc.h> and <sys/mman.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MADV_HUGEPAGE = 14
_IS_MMAPPED = 2  # bit of the size word in front of a block
_MB = 1 << 20
_HUGE_PAGE = 2 * _MB
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")

_tuned: MemoryTuning | None = None


@dataclass
class MemoryTuning:
    """What :func:`tune_cpu_memory` did.

    Attributes:
        active: The settings are in force; False where nothing could be done, and after :meth:`undo`.
        actions: Setting to what was done, or ``{"nothing done": why}``.
    """

    active: bool
    actions: dict[str, str]

    def __str__(self) -> str:
        return "; ".join(f"{name}: {text}" for name, text in self.actions.items())

    def undo(self) -> None:
        """Give all free memory back to the system and set glibc to give it back from now on.

        The limit on mapped blocks returns to its documented default, 65536.  glibc also adapts two thresholds by
        itself until somebody sets one: that is switched off for good, so they are set to where it ends in a process
        that has freed large tensors, 32 MB (mapped from there on) and 64 MB (trimmed from there on), rather than to the
        128 kB it starts from, with which every tensor would be mapped anew.  Huge pages in use stay.  Where something
        allocated later sits on top of the extended heap, the address space below it cannot be returned: blocks that fit
        are still served from there, and their pages kept.  Calling it again does nothing.
        """
        global _tuned
        if not self.active:
            return
        libc = _libc()
        for option, value in ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 32 * _MB), (_M_TRIM_THRESHOLD, 64 * _MB)):
            _mallopt(libc, option, value)
        libc.malloc_trim(0)
        self.active = False
        self.actions = {"undone": "free memory goes back to the system; glibc's own adaptation of it stays off"}
        _tuned = None


def tune_cpu_memory() -> MemoryTuning:
    """Keep freed CPU memory in the process, so that the next step's tensors do not fault in every page anew.

    By default glibc maps large blocks from the system and returns them as soon as they are freed, and so a training
    step spends much of its time in page faults, its eager parts included.  This

    * takes all blocks from the heap (``M_MMAP_MAX`` 0), whatever their size,
    * never shrinks the heap (``M_TRIM_THRESHOLD`` -1),
    * extends it once by half the machine's memory, address space only, and asks for transparent huge pages there if
      the kernel leaves that to the program (``madvise``).

    The process keeps the memory of its peak until :meth:`MemoryTuning.undo`, and the heap may fragment: a step with
    tensors of hundreds of megabytes can peak higher than before.  ``bench/e2e/step.py`` measures both sides.  Blocks
    allocated by threads other than the main one live in arenas of at most 64 MB each, which this does not change.

    Opt-in, process-wide, idempotent, and only for glibc: with musl, macOS, Windows, or another malloc preloaded
    (jemalloc, tcmalloc, ...) nothing is done, and the result says why.  ``fastprune doctor`` prints it.

    Returns: What was done; the same object while it is in force.
    """
    global _tuned
    if _tuned is not None:
        return _tuned
    if reason := why_not():
        return MemoryTuning(False, {"nothing done": reason})
    libc = _libc()
    _mallopt(libc, _M_TRIM_THRESHOLD, -1)
    _mallopt(libc, _M_MMAP_MAX, 0)
    actions = {"large blocks": "from the heap, reused after they are freed (M_MMAP_MAX 0, M_TRIM_THRESHOLD -1)"}
    _tuned = MemoryTuning(True, actions | _extend_heap(libc))
    return _tuned


def why_not() -> str | None:
    """Why :func:`tune_cpu_memory` does nothing in this process; None when it can work."""
    if sys.platform != "linux":
        return f"it needs Linux with glibc, this is {sys.platform}"
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return "it needs glibc, this C library is another one (musl?)"
    owner = _malloc_owner(libc)
    if not owner.startswith(("libc.so", "libc-")):
        return f"malloc is that of {owner}, not glibc's; it has its own way of keeping memory"
    return None


def report() -> dict[str, str]:
    """Facts about CPU memory in words: what ``fastprune doctor`` prints.  Changes nothing."""
    reason = why_not()
    if _tuned is not None:
        lines = {"tuning": "on", **_tuned.actions}
    else:
        lines = {"tuning": f"not possible: {reason}" if reason else "off; fastprune.tune_cpu_memory() turns it on"}
    if sys.platform != "linux":
        return lines
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        lines["C library"] = f"glibc {libc.gnu_get_libc_version().decode()}, malloc of {_malloc_owner(libc)}"
    lines["transparent huge pages"] = f"{_thp()} (kernel), {_kb('smaps_rollup', 'AnonHugePages') >> 10} MB in use"
    names = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", *(n for n in os.environ if n.startswith("MALLOC_")))
    settings = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    lines["environment"] = (settings or "no malloc settings") + "; glibc.malloc.hugetlb works only from the start"
    import resource  # not on Windows

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    lines["so far"] = f"{faults} page faults, peak {_kb('status', 'VmHWM') >> 10} MB resident"
    return lines


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


def _mallopt(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.mallopt(option, value) != 1:
        raise OSError(f"tune_cpu_memory: glibc refused mallopt({option}, {value})")


def _extend_heap(libc: ctypes.CDLL) -> dict[str, str]:
    """One block, larger than any hole in the heap, is advised and freed: it becomes the heap's untouched top."""
    name = "heap"
    if _read(_OVERCOMMIT) == "2":  # untouched memory would count as used
        return {name: "not extended, because the system forbids overcommitting (vm.overcommit_memory 2)"}
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = libc.malloc(size)
    if not block:
        return {name: f"not extended, because {size // _MB} MB of address space are not to be had (ulimit -v?)"}
    if ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED:
        libc.free(block)
        return {name: "not extended, because this was not called from the main thread"}
    thp, advised = _thp(), False
    if thp == "madvise":
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        advised = libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE) == 0
    libc.free(block)
    huge = "with huge pages" if advised or thp == "always" else f"without huge pages (kernel: {thp})"
    return {name: f"{size // _MB} MB of address space added, {huge}"}


def _malloc_owner(libc: ctypes.CDLL) -> str:
    """File name of the library whose malloc this process calls."""

    class DlInfo(ctypes.Structure):
        _fields_ = (
            ("fname", ctypes.c_char_p),
            ("fbase", ctypes.c_void_p),
            ("sname", ctypes.c_char_p),
            ("saddr", ctypes.c_void_p),
        )

    info = DlInfo()
    if not libc.dladdr(ctypes.cast(libc.malloc, ctypes.c_void_p), ctypes.byref(info)):
        return "an unknown library"
    return Path(os.fsdecode(info.fname)).name


def _thp() -> str:
    """``always``, ``madvise``, ``never``, or ``unknown``: the word in brackets."""
    return _read(_THP).partition("[")[2].partition("]")[0] or "unknown"


def _kb(file: str, name: str) -> int:
    """A number of /proc/self/``file``, kB; 0 if it is not there."""
    rows = _read(Path("/proc/self", file)).splitlines()
    return next((int(row.split()[1]) for row in rows if row.startswith(f"{name}:")), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
