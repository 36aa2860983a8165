"""Runs untrusted Python tools: every call in a fresh process behind bubblewrap, on an empty root, with resource limits.

It says below what it does not cover, and it does not decide what a tool's answer is worth.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pact import sandbox_worker as wire

_GRACE = 5.0  # seconds beyond a call's own limit after which the worker itself counts as hung
_START = 60.0  # seconds a worker may take to start
_REQUEST_BYTES = 1 << 24
_LONGEST = 86_400.0  # seconds; clocks below overflow at some point
_PACKAGES = "/packages"
# One thread for numerical libraries: the filter refuses them more, and they size their pools when they are loaded.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
_MEND = (
    "or pass unsafe_no_isolation=True to run tools with resource limits only, free to read files and use the network"
)


@dataclass(frozen=True)
class ToolResult:
    """``output``: the observation; of a failed call it starts `an error occured when call`. ``error``: its reason."""

    ok: bool
    output: str
    error: str | None = None


@dataclass(frozen=True)
class SandboxLimits:
    """Of one call. ``memory_bytes``: address space. ``output_bytes``: of the result in UTF-8; a longer one fails.
    ``scratch_bytes``, ``scratch_files``: of /tmp. ``open_files``: file descriptors."""

    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    scratch_bytes: int = 16 << 20
    scratch_files: int = 10_000
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            highest = 1 << 30 if name == "output_bytes" else 1 << 62  # what a reply and the kernel can count
            if not isinstance(value, int) or not 1 <= value <= highest:
                raise ValueError(f"sandbox limit {name} must be a positive integer up to {highest}, got {value!r}")


class _WorkerLost(Exception):
    """The worker ended before it answered."""


class Sandbox:
    """Calls functions of untrusted Python source.

    A long-lived worker sits behind bubblewrap and forks one child a call, so a call costs milliseconds and no state
    passes from one to the next. The child sees a read-only root with /usr, the interpreter's standard library, what
    ``packages`` names and an empty /tmp (wiped after every call; read-only with bubblewrap older than 0.7, which cannot
    bound its size); no network, none of our environment variables or open files, no /proc, no capabilities. A system
    call filter refuses it new processes, threads and programs (so there is nothing to count and no tree to kill),
    signals, tracing, sockets, and whatever would outlive it or reach its worker. Memory, output, files, CPU time and
    wall clock are limited. Hashes and ``random`` are seeded alike in every call, so that a result repeats.

    Not covered: holes in the kernel; side channels (timing, counters such as process ids); a tool that slows its
    neighbours by using a full core until its time is up; what the standard library, /usr and ``packages`` contain
    (readable); a tool that lies about its own result; tools that need threads, processes or sockets (they fail). The
    code of ``preload`` is not under the filter. With ``unsafe_no_isolation`` only limits and filter are left.

    Args:
        workers: how many calls may run at once, from threads; ``call`` waits for a free one.
        packages: files and folders that tools may import beside the standard library, as they lie in site-packages
            (a package with shared libraries of its own needs them too: numpy and numpy.libs). They are bound read-only
            side by side in one folder on ``sys.path``; without isolation they are found where they lie.
        preload: modules the worker imports once, before it forks, so that calls do not pay for it. Their own code runs
            behind the walls, but before the system call filter; what it writes to /tmp is wiped. Memory they take
            counts against each call's limit.
        unsafe_no_isolation: run without bubblewrap: the tools read and write this user's files and use the network.
            Limits stay, except those of /tmp, and so does the system call filter, except for sockets.
        **limits: fields of ``SandboxLimits``.

    Raises:
        RuntimeError: bubblewrap is missing or cannot start here, or a module of ``preload`` cannot be imported; the
            message holds the mend.
        ValueError, TypeError: a limit that cannot be, or an unknown one; packages that are missing or share a name.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        packages: Sequence[Path] = (),
        preload: Sequence[str] = (),
        unsafe_no_isolation: bool = False,
        **limits: int,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.limits = SandboxLimits(**limits)
        self._workers = workers
        self._command = _command(self.limits, _checked(packages), list(preload), isolated=not unsafe_no_isolation)
        self._open_pool()
        # A sandbox that cannot start says so now, not at the first call.
        self._slots.put(self._start(self._slots.get()))

    def call(self, source: str, name: str, arguments: dict[str, Any], timeout: float = 10.0) -> ToolResult:
        """Execute ``source`` as one module, with ``datetime`` (the class) at hand, and call its function ``name``.

        A dict or list becomes JSON (``ensure_ascii=False``), anything else ``str``. Whatever the tool does is a result,
        never an exception: failures read `an error occured when call NAME: REASON` (FTRL's wording). A call whose
        worker was lost is repeated once on a new one.

        Args:
            arguments: the keyword arguments; JSON values only.
            timeout: wall-clock limit in seconds.

        Raises:
            ValueError: the timeout is not a positive number of seconds, or over a day.
            RuntimeError: the sandbox is closed, or a lost worker cannot be replaced.
        """
        if not (math.isfinite(timeout) and 0 < timeout <= _LONGEST):
            raise ValueError(f"timeout must be a positive number of seconds up to {_LONGEST:g}, got {timeout}")
        if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
            return _failure(name, "the arguments must be a JSON object")
        try:
            request = json.dumps({"source": source, "name": name, "arguments": arguments}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return _failure(name, f"the arguments are not JSON: {error}")
        if len(request) > _REQUEST_BYTES:
            return _failure(name, f"source and arguments have {len(request)} bytes, over the limit of {_REQUEST_BYTES}")
        for _ in range(2):
            with contextlib.suppress(_WorkerLost):
                status, text = self._request(request, timeout)
                if status == wire.OK:
                    return ToolResult(True, text)
                return _failure(name, text if status == wire.FAILED else f"timed out after {timeout:g} seconds")
        return _failure(name, "it ended the sandbox worker")

    def close(self) -> None:
        """End the workers, each after the call it is in; later calls raise RuntimeError."""
        self._finalizer()  # the starting thread stays: its end would end the calls under way

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_pool(self) -> None:
        self._process_id = os.getpid()
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self._workers):
            self._slots.put(None)
        # bubblewrap ends its sandbox with the THREAD that started it, so all are started by one that stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="pact-sandbox")
        self._finalizer = weakref.finalize(self, _end_idle, self._slots, self._process_id)

    def _request(self, request: bytes, timeout: float) -> tuple[int, str]:
        if self._process_id != os.getpid():
            self._open_pool()  # after a fork: the workers belong to the parent
        slot = self._slots.get()
        try:
            if not self._finalizer.alive:
                raise RuntimeError("this sandbox is closed")
            slot = self._start(slot)
            return slot.request(request, timeout)
        except BaseException as error:
            if slot is not None:
                slot.kill()
            slot = None
            if isinstance(error, TimeoutError):
                return wire.TIMED_OUT, ""
            raise
        finally:
            if slot is not None and not self._finalizer.alive:  # closed while this call ran
                slot.kill()
                slot = None
            self._slots.put(slot)

    def _start(self, slot: _Worker | None) -> _Worker:
        if slot is not None and slot.alive():
            return slot
        return self._starter.submit(_Worker, self._command, self.limits.output_bytes).result()


class _Worker:
    """The near end of one ``sandbox_worker`` process."""

    def __init__(self, command: list[str], output_bytes: int) -> None:
        self._output_bytes = output_bytes
        self._channel, far_end = socket.socketpair()
        # A session of its own: an interrupt at the terminal is ours to handle. The environment is nearly empty.
        with far_end, tempfile.TemporaryFile() as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=far_end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd="/",
                env=_ENVIRONMENT,
                start_new_session=True,
            )
            far_end.close()
            try:
                status, text = self._receive(time.monotonic() + _START)
            except (_WorkerLost, TimeoutError):
                status, text = wire.BROKEN, ""
            if status != wire.READY:
                self.kill()
                if text:
                    raise RuntimeError(f"the sandbox cannot start: {text}")
                stderr.seek(0)
                lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
                raise RuntimeError(
                    f"the sandbox cannot start ({(lines or ['no message'])[-1]}): allow user namespaces here "
                    f"(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone or "
                    f"kernel.apparmor_restrict_unprivileged_userns; in a container, its security options), {_MEND}"
                )

    def alive(self) -> bool:
        return self._process.poll() is None

    def request(self, request: bytes, timeout: float) -> tuple[int, str]:
        """Raises _WorkerLost, or TimeoutError when the worker does not keep the call's limit."""
        deadline = time.monotonic() + timeout + _GRACE
        try:
            self._channel.settimeout(timeout + _GRACE)
            self._channel.sendall(wire.REQUEST.pack(timeout, len(request)) + request)
        except TimeoutError:
            raise
        except OSError as error:
            raise _WorkerLost from error
        return self._receive(deadline)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()

    def _receive(self, deadline: float) -> tuple[int, str]:
        status, length = wire.REPLY.unpack(self._read(wire.REPLY.size, deadline))
        if length > self._output_bytes + 1024:  # more than the worker's own messages: not our worker any more
            raise _WorkerLost
        return status, self._read(length, deadline).decode("utf-8", "replace")

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._channel.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                chunk = self._channel.recv(size - len(data))
            except TimeoutError:
                raise
            except OSError as error:
                raise _WorkerLost from error
            if not chunk:
                raise _WorkerLost
            data += chunk
        return bytes(data)


def _end_idle(slots: queue.LifoQueue[_Worker | None], owner: int) -> None:
    if os.getpid() != owner:  # a forked copy on its way out: the workers are not its own
        return
    idle = []
    with contextlib.suppress(queue.Empty):
        while True:
            idle.append(slots.get_nowait())
    for worker in idle:
        if worker is not None:
            worker.kill()
        slots.put(None)


def _failure(name: str, reason: str) -> ToolResult:
    return ToolResult(False, f"an error occured when call {name}: {reason}", reason)


def _checked(packages: Sequence[Path]) -> dict[str, Path]:
    """Name in the packages folder -> where it lies."""
    if isinstance(packages, str | Path):
        raise TypeError(f"packages must be a list of paths, got {packages!r}: put it in brackets")
    places: dict[str, Path] = {}
    for path in map(Path, packages):
        if not path.exists():
            raise ValueError(f"the package {path} does not exist: install it, or correct the path")
        if path.name in places:
            raise ValueError(f"two packages are called {path.name}: leave one of them out")
        places[path.name] = path.absolute()
    return places


def _command(limits: SandboxLimits, packages: dict[str, Path], preload: list[str], isolated: bool) -> list[str]:
    """The worker's command line: the interpreter on its standard library and ``packages``, behind bubblewrap when
    isolated."""
    script, interpreter = Path(wire.__file__).resolve(), Path(sys.executable).resolve()
    config: dict[str, Any] = {**asdict(limits), "isolated": isolated, "scratch": None, "preload": preload}
    flags = ["-B", "-S", "-s", "-P"]
    if not isolated:
        config["packages"] = {name: str(path.parent) for name, path in packages.items()}
        return [str(interpreter), *flags, str(script), json.dumps(config)]
    config["packages"] = _PACKAGES
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise RuntimeError(f"the sandbox needs bubblewrap: install it (Debian: apt-get install bubblewrap), {_MEND}")
    walls = [bwrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    walls += ["--die-with-parent", "--new-session"]
    for path in _needed_paths(interpreter):
        walls += (
            ["--symlink", os.readlink(path), str(path)] if path.is_symlink() else ["--ro-bind", str(path), str(path)]
        )
    for name, path in packages.items():
        walls += ["--ro-bind", str(path), f"{_PACKAGES}/{name}"]
    for path in _other_packages():
        walls += ["--tmpfs", str(path), "--remount-ro", str(path)]
    walls += ["--ro-bind", str(script), "/worker.py", "--tmpfs", "/dev"]
    for name in ("null", "zero", "full", "random", "urandom"):
        walls += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    if _version(bwrap) >= (0, 7):
        walls += ["--size", str(limits.scratch_bytes), "--tmpfs", "/tmp"]
        config["scratch"] = "/tmp"
    walls += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
    return [*walls, str(interpreter), *flags, "/worker.py", json.dumps(config)]


def _needed_paths(interpreter: Path) -> list[Path]:
    """/usr, the loader's folders, and interpreter, standard library and shared libraries where they lie elsewhere."""
    base = {"installed_base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not a virtual environment's own
    own = [interpreter, *(Path(sysconfig.get_path(name, vars=base)).resolve() for name in ("stdlib", "platstdlib"))]
    libraries = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib").resolve()
    own += sorted(libraries.glob("*.so*")) if libraries.is_dir() else []
    system = [path for path in map(Path, ("/usr", "/lib", "/lib64")) if path.exists()]
    return system + [path for path in dict.fromkeys(own) if not path.is_relative_to("/usr")]


def _other_packages() -> list[Path]:
    """Folders of third-party packages below what is bound for the standard library."""
    base = {"installed_base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    stdlib = Path(sysconfig.get_path("stdlib", vars=base)).resolve()
    folders = [stdlib / "site-packages", stdlib / "dist-packages", Path("/usr/lib/python3/dist-packages")]
    return [path for path in folders if path.is_dir()]


def _version(bwrap: str) -> tuple[int, ...]:
    text = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout
    return tuple(int(part) for part in text.split()[-1].split(".")[:2]) if text.strip() else (0, 0)
