"""The program inside the sandbox: answers one call at a time, each in a forked child that is then thrown away.

Run by ``pact.sandbox`` as a script on the standard library alone. It limits what a call may use and do; the walls
around file system and network are bubblewrap's, not its own.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, NoReturn

REQUEST = struct.Struct("!dI")  # wall-clock limit in seconds, bytes of JSON that follow
REPLY = struct.Struct("!BI")  # status, bytes of UTF-8 text that follow
OK, FAILED, TIMED_OUT, READY, BROKEN = range(5)

_PROBE = "import os\ndef probe():\n    try:\n        os.fork()\n    except OSError:\n        return 'refused'\n"

# System calls a tool is refused: new processes, threads and programs, signals and memory of other processes, limits,
# namespaces, and the kernel interfaces with the longest record of holes. RLIMIT_NPROC alone does not bind root.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    "x86_64": {
        "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101, "rt_sigqueueinfo": 129,
        "mount": 165, "tkill": 200, "tgkill": 234, "keyctl": 250, "unshare": 272, "rt_tgsigqueueinfo": 297,
        "perf_event_open": 298, "prlimit64": 302, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
        "bpf": 321, "execveat": 322, "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425,
        "clone3": 435, "pidfd_getfd": 438,
    },
    "aarch64": {
        "mount": 40, "unshare": 97, "ptrace": 117, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
        "keyctl": 219, "clone": 220, "execve": 221, "rt_tgsigqueueinfo": 240, "perf_event_open": 241,
        "prlimit64": 261, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280,
        "execveat": 281, "userfaultfd": 282, "pidfd_send_signal": 424, "io_uring_setup": 425, "clone3": 435,
        "pidfd_getfd": 438,
    },
}  # fmt: skip


class SyscallFilter:
    """A seccomp program that answers EPERM to the calls of ``_REFUSED``; OSError where the kernel declines it."""

    def __init__(self) -> None:
        machine = platform.machine()
        if machine not in _ARCHITECTURES:
            raise OSError(f"no system call table for {machine}: add it to pact/sandbox_worker.py")
        load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
        refuse, kill, allow = 0x00050000 | 1, 0x80000000, 0x7FFF0000
        numbers = sorted(_REFUSED[machine].values())
        # Offsets 4 and 0 of seccomp_data hold architecture and number; the x32 table of x86_64 starts at bit 30.
        program = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
        program += [(at_least, len(numbers) + 1, 0, 0x40000000)]
        program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
        program += [(give, 0, 0, allow), (give, 0, 0, refuse)]
        self._code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
        self._program = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(self._code)))
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def install(self) -> None:
        set_seccomp, mode_filter, no_new_privileges = 22, 2, 38
        if self._prctl(no_new_privileges, 1, 0, 0, 0) or self._prctl(set_seccomp, mode_filter, self._program, 0, 0):
            raise OSError(ctypes.get_errno(), "the kernel declines the system call filter")


def invoke(request: dict[str, Any]) -> str:
    """Execute the source in one namespace, call the function, and turn its result into text the way FTRL does."""
    namespace: dict[str, Any] = {"__name__": "tool", "datetime": datetime.datetime}
    exec(compile(request["source"], "<tool>", "exec"), namespace)
    name = request["name"]
    if name not in namespace:
        raise NameError(f"name {name} is not defined")
    result = namespace[name](**request["arguments"])
    if type(result) in (dict, list):
        return json.dumps(result, ensure_ascii=False)
    return result if type(result) is str else str(result)


class Worker:
    """One call after the other over ``channel``, each in its own child."""

    def __init__(self, channel: socket.socket, config: dict[str, Any]) -> None:
        self.channel, self.config = channel, config
        self.filter = SyscallFilter()

    def start(self) -> None:
        """Check the filter, leave nothing of the preparations behind, and say so; OSError: this worker cannot serve."""
        probe = {"source": _PROBE, "name": "probe", "arguments": {}}
        status, text = self.run(json.dumps(probe).encode(), 30.0)
        if (status, text) != (OK, b"refused"):
            raise OSError(f"the system call filter does not hold: {text.decode()}")
        self._reply(READY, b"")

    def serve(self) -> None:
        while header := self._read(REQUEST.size):
            timeout, length = REQUEST.unpack(header)
            self._reply(*self.run(self._read(length), timeout))

    def run(self, request: bytes, timeout: float) -> tuple[int, bytes]:
        """Status and text of one call. A tool cannot outlive it, nor leave a file behind."""
        deadline = time.monotonic() + timeout
        result_fd, child_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._child(request, child_fd, timeout)
        os.close(child_fd)
        try:
            frame = self._collect(result_fd, deadline)
        finally:
            os.close(result_fd)
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._wipe_scratch()
        if frame is None:
            return TIMED_OUT, b""
        status, length = REPLY.unpack(frame[: REPLY.size]) if len(frame) >= REPLY.size else (None, 0)
        if status in (OK, FAILED) and len(frame) == REPLY.size + length:
            return status, frame[REPLY.size :]
        how = f"was ended by signal {-code}" if code < 0 and code != -signal.SIGKILL else "ended without a result"
        return FAILED, f"the process of the call {how}".encode()

    def _child(self, request: bytes, fd: int, timeout: float) -> NoReturn:
        try:
            status, text = FAILED, ""
            try:
                self._restrict(fd, timeout)
                random.seed(0)  # hashes are seeded too: a result depends on source, arguments and clock
                text, status = invoke(json.loads(request)), OK
            except BaseException as error:  # SystemExit and KeyboardInterrupt of a tool are its failure, not ours
                text = str(error) or type(error).__name__
            data, limit = text.encode("utf-8", "replace"), self.config["output_bytes"]
            if len(data) > limit:
                status, data = FAILED, f"its output has {len(data)} bytes, over the limit of {limit}".encode()
            data = REPLY.pack(status, len(data)) + data
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os._exit(0)

    def _restrict(self, fd: int, timeout: float) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.closerange(3, fd)
        os.closerange(fd + 1, max(null, self.channel.fileno()) + 1)
        config, cpu = self.config, int(timeout) + 2  # the worker's clock comes first; this one is the backstop
        limits = {
            resource.RLIMIT_CPU: cpu,
            resource.RLIMIT_AS: config["memory_bytes"],
            resource.RLIMIT_FSIZE: config["scratch_bytes"],
            resource.RLIMIT_NOFILE: config["open_files"],
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_CORE: 0,
        }
        for kind, value in limits.items():
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        self.filter.install()

    def _collect(self, fd: int, deadline: float) -> bytes | None:
        """What the child wrote until it closed the pipe, cut just over the limit; None when the time is up."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self.channel, 0)  # a hang-up is reported unasked: nobody waits for the result any more
        data = bytearray()
        while len(data) <= REPLY.size + self.config["output_bytes"]:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            events = dict(poller.poll(remaining * 1000))
            if self.channel.fileno() in events:
                raise SystemExit
            if fd in events:
                chunk = os.read(fd, 1 << 16)
                if not chunk:
                    break
                data += chunk
        return bytes(data)

    def _wipe_scratch(self) -> None:
        # Whatever cannot be wiped ends this worker: the next one starts with an empty folder.
        if self.config["scratch"] is not None:
            with os.scandir(self.config["scratch"]) as entries:
                for entry in entries:
                    shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = self.channel.recv(size - len(data))
            if not chunk:
                return b""
            data += chunk
        return bytes(data)

    def _reply(self, status: int, text: bytes) -> None:
        self.channel.sendall(REPLY.pack(status, len(text)) + text)


class PackageFinder:
    """Finds the packages named, in their own folders, and nothing that lies beside them."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = {name.partition(".")[0]: folder for name, folder in folders.items()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self._folders[name]]) if name in self._folders else None


def prepare(config: dict[str, Any]) -> None:
    """Put the packages within reach and import what calls should not pay for; OSError names a module that fails."""
    if config["isolated"]:
        sys.path.append(config["packages"])
    else:
        sys.meta_path.append(PackageFinder(config["packages"]))
    for name in config["preload"]:
        try:
            importlib.import_module(name)
        except BaseException as error:  # SystemExit too: whatever it is, it is why there is no worker
            raise OSError(
                f"preloading {name} raised {type(error).__name__}: {error}; mend it, or add what it needs to packages"
            ) from error
    # What this first call touches is in memory for every child: it halves the cost of a call.
    invoke({"source": "def warm():\n    return {'é': 1}\n", "name": "warm", "arguments": {}})
    gc.freeze()


def main() -> None:
    config = json.loads(sys.argv[1])
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # what is preloaded must not read requests
    try:
        worker = Worker(channel, config)
        prepare(config)
        worker.start()
    except OSError as error:
        text = str(error).encode("utf-8", "replace")[:1000]
        channel.sendall(REPLY.pack(BROKEN, len(text)) + text)
    else:
        worker.serve()


if __name__ == "__main__":
    main()
