"""tune_cpu_memory: counted page faults before and after, undoing, and every case in which it must do nothing.

It changes the whole process, so each test has a process of its own; most load the module alone, without torch.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastprune import memory

ROOT = Path(__file__).resolve().parent.parent
PRELUDE = f"""
import ctypes, importlib.util, resource, sys, threading
spec = importlib.util.spec_from_file_location("memory", {str(ROOT / "fastprune" / "memory.py")!r})
memory = importlib.util.module_from_spec(spec)
sys.modules["memory"] = memory
spec.loader.exec_module(memory)
libc = memory._libc()
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults(use=None, mb=64, times=4):
    '''Page faults per pass of a loop that allocates, fills and frees a block.'''
    def block():
        p = libc.malloc(mb << 20)
        libc.memset(p, 1, mb << 20)
        libc.free(p)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        (use or block)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

PAGES = (64 << 20) / resource.getpagesize()  # of such a block
"""

needs_glibc = pytest.mark.skipif(memory.why_not() is not None, reason=memory.why_not() or "")


def python(code, **env):
    """Standard output of ``code`` after PRELUDE, in a new process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    run = subprocess.run([sys.executable, "-c", PRELUDE + code], env=clean | env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_glibc
def test_freed_blocks_are_reused():
    python("""
assert faults() > 0.9 * PAGES  # else there is nothing to tune
tuning = memory.tune_cpu_memory()
assert tuning.active, tuning
faults(times=1)
assert faults() < 0.01 * PAGES, faults()
assert faults(mb=200) < 0.3 * 200 / 64 * PAGES  # the first of four passes may grow the heap
""")


@needs_glibc
def test_tensors_are_reused_under_the_public_name():
    python(f"""
sys.path.insert(0, {str(ROOT)!r})
import fastprune as fp, torch
use = lambda: torch.empty(16 << 20).fill_(1.0)
use()
assert faults(use) > 0.9 * PAGES
assert fp.tune_cpu_memory().active
use()
assert faults(use) < 0.01 * PAGES, faults(use)
assert fp.memory.report()["tuning"] == "on"
""")


@needs_glibc
def test_undo_gives_memory_back_and_can_be_redone():
    python("""
before = resident_mb()
tuning = memory.tune_cpu_memory()
assert memory.tune_cpu_memory() is tuning  # idempotent
faults()
assert resident_mb() - before > 50  # kept
tuning.undo()
assert resident_mb() - before < 20, resident_mb() - before
assert not tuning.active and "undone" in tuning.actions
tuning.undo()
again = memory.tune_cpu_memory()
assert again.active and again is not tuning
faults(times=1)
assert faults() < 0.01 * PAGES
tuning.undo()  # of the first one: no longer in force, so nothing happens
assert faults() < 0.01 * PAGES and memory.tune_cpu_memory() is again
""")


@needs_glibc
def test_after_undo_blocks_below_32_mb_are_reused_as_glibc_would():
    python("""
memory.tune_cpu_memory().undo()
faults(mb=24, times=1)
assert faults(mb=24) < 0.01 * PAGES, faults(mb=24)
""")


@needs_glibc
def test_report_says_what_is_so():
    out = python("""
off = memory.report()
memory.tune_cpu_memory()
on = memory.report()
for lines in (off, on):
    assert all(isinstance(k, str) and isinstance(v, str) and v for k, v in lines.items())
    print(lines["tuning"], lines["C library"], lines["environment"], sep="|")
print(on["large blocks"], on["heap"], sep="|")
print(on["so far"])
print(on["transparent huge pages"])
""")
    off, on, actions, so_far, huge = out.splitlines()
    assert off.startswith("off; fastprune.tune_cpu_memory() turns it on|glibc 2.") and "libc" in off
    assert on.startswith("on|")
    assert "M_MMAP_MAX 0" in actions and "MB of address space" in actions
    assert re.fullmatch(r"[1-9]\d* page faults, peak [1-9]\d* MB resident", so_far)
    assert re.fullmatch(r"(always|madvise|never|unknown) \(kernel\), \d+ MB in use", huge)


@needs_glibc
def test_environment_is_reported():
    out = python("print(memory.report()['environment'])", MALLOC_ARENA_MAX="2")
    assert out.startswith("MALLOC_ARENA_MAX=2; ")


@needs_glibc
def test_without_address_space_the_heap_is_not_extended_but_blocks_are_reused():
    out = python("""
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
tuning = memory.tune_cpu_memory()
print(tuning)
faults(times=1)
assert tuning.active and faults() < 0.01 * PAGES
""")
    assert "address space are not to be had" in out


@needs_glibc
def test_from_another_thread_the_heap_is_not_extended():
    out = python("""
thread = threading.Thread(target=lambda: print(memory.tune_cpu_memory()))
thread.start()
thread.join()
faults(times=1)
assert faults() < 0.01 * PAGES
""")
    assert "heap: not extended, because this was not called from the main thread" in out


@needs_glibc
def test_strict_overcommit_leaves_the_heap_alone(tmp_path):
    (tmp_path / "overcommit").write_text("2\n")
    out = python(f"""
from pathlib import Path
memory._OVERCOMMIT = Path({str(tmp_path / "overcommit")!r})
print(memory.tune_cpu_memory())
""")
    assert "heap: not extended, because the system forbids overcommitting" in out


@needs_glibc
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_another_malloc_is_left_alone(tmp_path):
    source = tmp_path / "malloc.c"
    source.write_text("void *__libc_malloc(unsigned long); void *malloc(unsigned long n) { return __libc_malloc(n); }")
    library = tmp_path / "libjemalloc.so.2"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    out = python("print(memory.tune_cpu_memory()); print(memory.report())", LD_PRELOAD=str(library))
    tuning, report = out.splitlines()
    assert tuning.startswith("nothing done: malloc is that of libjemalloc.so.2")
    assert "not possible: malloc is that of libjemalloc.so.2" in report


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    tuning = memory.tune_cpu_memory()
    assert not tuning.active and f"this is {platform}" in str(tuning)
    tuning.undo()  # nothing to undo, nothing to fail
    assert memory.report() == {"tuning": f"not possible: it needs Linux with glibc, this is {platform}"}


def test_musl_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # no gnu_get_libc_version
    assert "needs glibc" in str(memory.tune_cpu_memory())
    assert "needs glibc" in memory.report()["tuning"]
