"""What the attack tests share: a watched sandbox. After every attack it looks for damage on both sides of the walls."""

import json
import re
import textwrap
import time
from pathlib import Path

import pact.sandbox
from pact.sandbox import Sandbox
from pact.sandbox_worker import _ARCHITECTURES, _NETWORK, _REFUSED, _REFUSED_USES

GRACE = 3.0  # seconds beyond its timeout within which a call must be back, on a busy machine
TIMED_OUT = "timed out after"
REFUSED = "not permitted|PermissionError"
NO_RESULT = "ended without a result"
MEMORY = "MemoryError|Cannot allocate memory|ended by signal"
OUTSIDE = "SECRET-OF-THE-HOST-7351"

# Attacks find these at hand. ``syscall`` returns the errno's name, or the result when the call went through.
PRELUDE = f"""
import ctypes, errno, gc, os, signal, sys, time
NUMBERS = { ({**_REFUSED, **_NETWORK, **{name: use[0] for name, use in _REFUSED_USES.items()}})!r}
COLUMN = {list(_ARCHITECTURES)!r}.index(os.uname().machine)
def syscall(call, *arguments):
    number = call if isinstance(call, int) else NUMBERS[call][COLUMN]
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
"""

# Everything a call could find of the one before it in the same worker.
PROBE = """
import builtins, ctypes, errno, hashlib, json, os, signal, sys
def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()
def modules():
    return digest(sorted((name, sorted(vars(module))) for name, module in sys.modules.items() if name != "ctypes"))
def open_files():
    found = []
    for fd in range(1024):
        try:
            os.fstat(fd)
            found.append(fd)
        except OSError:
            pass
    return found
def probe():
    before = modules()
    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(256)
    # SHM_INFO, MSG_INFO, SEM_INFO: the highest index in use
    queues = [libc.shmctl(0, 14, room), libc.msgctl(0, 12, room), libc.semctl(0, 0, 19, room)]
    top = os.stat("/tmp")
    return {
        "modules": before, "builtins": digest(sorted(vars(builtins))), "files": open_files(), "queues": queues,
        "environment": dict(os.environ), "tmp": os.listdir("/tmp"), "mode": top.st_mode, "written": top.st_mtime_ns,
        "attributes": os.listxattr("/tmp"), "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "worker's priority": os.getpriority(os.PRIO_PROCESS, os.getppid()),
        "cores": sorted(os.sched_getaffinity(0)), "scheduler": os.sched_getscheduler(0), "folder": os.getcwd(),
        "worker": os.getppid(), "mask": os.umask(0), "host": os.uname().nodename, "path": sys.path,
        "handlers": [str(signal.getsignal(n)) for n in range(1, 32)], "blocked": sorted(signal.pthread_sigmask(0, [])),
        "dumps": json.dumps({"a": [1, None]}), "user": [os.getresuid(), os.getresgid()],
        "devices": [(name, os.stat("/dev/" + name).st_mode) for name in sorted(os.listdir("/dev"))],
        "limit": sys.getrecursionlimit(), "flags": gc_state(),
    }
def gc_state():
    import gc, warnings
    return [gc.isenabled(), gc.get_threshold(), len(gc.callbacks), len(warnings.filters), sys.gettrace() is None]
"""


class Watched:
    """A sandbox of one worker, so that the probe runs where the attack ran."""

    def __init__(self, packages: list[Path]) -> None:
        self.sandbox = Sandbox(packages=packages, scratch_bytes=4 << 20, memory_bytes=256 << 20)
        self.watched = [Path(pact.sandbox.wire.__file__), *packages]
        self.before = self._state()

    def _state(self) -> list:
        """What the next call finds, the processes of this sandbox, and the files tools can see."""
        probe = self.sandbox.call(PROBE, "probe", {}, 10.0)
        assert probe.ok, probe.error
        [worker] = self.sandbox._slots.queue
        files = [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) for path in self.watched]
        return [json.loads(probe.output), _tree(worker._process.pid), files]

    def attack(self, body: str, expected: str, timeout: float = 5.0, **given: object) -> str:
        """Run ``body`` (top-level code, a line of dashes, the function's body) and return its output, which must match
        ``expected``; then nothing may have changed."""
        top, _, inner = textwrap.dedent(body).rpartition("\n---\n")
        source = PRELUDE + top + "\ndef tool(**given):\n" + textwrap.indent(inner, "    ")
        return self.attack_source(source, expected, timeout, **given)

    def attack_source(self, source: str, expected: str, timeout: float = 5.0, **given: object) -> str:
        started = time.monotonic()
        result = self.sandbox.call(source, "tool", given, timeout)
        took = time.monotonic() - started
        assert OUTSIDE not in result.output
        assert re.search(expected, result.output), result.output[:2000]
        assert took < timeout + GRACE, f"took {took:.1f} s"
        assert self._state() == self.before
        return result.output


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in _tree(int(child)))]
