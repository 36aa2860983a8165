"""The program inside the sandbox: answers one call at a time, each in a forked child that is then thrown away.

Run by ``pact.sandbox`` as a script on the standard library alone. It limits what a call may use and do; the walls
around file system and network are bubblewrap's, not its own.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import gc
import importlib
import json
import mmap
import os
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, NoReturn

REQUEST = struct.Struct("!dI")  # wall-clock limit in seconds, bytes of JSON that follow
REPLY = struct.Struct("!BI")  # status, bytes of UTF-8 text that follow
OK, FAILED, TIMED_OUT, READY, BROKEN = range(5)
STARTED = b"\1"  # the first byte a child writes: it has read its request

_READING = 4.0  # seconds a child may take to start and read its request
_WATCH = 0.05  # seconds between two looks at what a call under way has left in /tmp
_PROBE = "import os\ndef probe():\n    try:\n        os.fork()\n    except OSError:\n        return 'refused'\n"

# System calls a tool is refused, with their numbers on x86_64 and aarch64 (0: not there). RLIMIT_NPROC alone does not
# bind root. Without capabilities the kernel refuses some of these anyway; without isolation only this table does.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    # new processes, threads and programs
    "clone": (56, 220), "fork": (57, 0), "vfork": (58, 0), "execve": (59, 221), "execveat": (322, 281),
    "clone3": (435, 435),
    # signals to and memory of other processes; leaving the process group that is killed
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272), "setpgid": (109, 154),
    "setsid": (112, 157),
    # limits and scheduling, its own and its worker's
    "prlimit64": (302, 261), "setrlimit": (160, 164), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239), "mbind": (237, 235),
    "set_mempolicy": (238, 237), "set_mempolicy_home_node": (450, 450),
    # what would outlive the process: System V and POSIX queues, memory and semaphores, keys, extended attributes
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    # modes, owners and times of files: the devices are the host's own, and ours where we are root; locks on others
    "chmod": (90, 0), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, 0),
    "fchown": (93, 55), "lchown": (94, 0), "fchownat": (260, 54), "utime": (132, 0), "utimes": (235, 0),
    "futimesat": (261, 0), "utimensat": (280, 88), "flock": (73, 32),
    # memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "inotify_init": (253, 0), "inotify_init1": (294, 26),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "statmount": (457, 457),
    "listmount": (458, 458),
    # the kernel interfaces with the longest record of holes
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "personality": (135, 92), "modify_ldt": (154, 0),
    "fanotify_init": (300, 262), "vhangup": (153, 58),
    # the machine: clock, modules, log, names, swap, power, disks
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116), "sethostname": (170, 161),
    "setdomainname": (171, 162), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "iopl": (172, 0), "ioperm": (173, 0), "sync": (162, 81),
    "syncfs": (306, 267),
}  # fmt: skip
_NETWORK = {"socket": (41, 198)}
# Of these only some uses are refused: (place of the argument, its values). A signal's receiver and kind can be set by
# fcntl and ioctl too; the rest pushes input into a terminal or loads a line discipline.
_REFUSED_USES = {
    "fcntl": ((72, 25), 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "ioctl": ((16, 29), 1, (0x8901, 0x8902, 0x5412, 0x541C, 0x5423)),  # FIOSETOWN, SIOCSPGRP, TIOCSTI, -LINUX, -SETD
    "prctl": ((157, 167), 0, (1,)),  # PR_SET_PDEATHSIG: it dies with its worker
    "socketpair": ((53, 199), 0, tuple(family for family in range(64) if family != socket.AF_UNIX)),
}
_UNKNOWN = 463  # the first number this table does not know; the x32 calls of x86_64 lie above it


class SyscallFilter:
    """A seccomp program that answers EPERM to ``_REFUSED`` (and new sockets, unless ``network``) and ENOSYS to calls
    newer than this table; OSError where the kernel declines it."""

    def __init__(self, network: bool) -> None:
        machine = platform.machine()
        if machine not in _ARCHITECTURES:
            raise OSError(f"no system call table for {machine}: add it to pact/sandbox_worker.py")
        column = list(_ARCHITECTURES).index(machine)
        load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
        refuse, absent, kill, allow = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000, 0x7FFF0000
        # seccomp_data: the number at 0, the architecture at 4, arguments of 8 bytes from 16 (low half first).
        program = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
        program += [(at_least, 0, 1, _UNKNOWN), (give, 0, 0, absent)]
        for numbers in (_REFUSED if network else _REFUSED | _NETWORK).values():
            if numbers[column]:
                program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
        for numbers, place, values in _REFUSED_USES.values():
            program += [(equal, 0, 2 * len(values) + 2, numbers[column]), (load, 0, 0, 16 + 8 * place)]
            program += [step for value in values for step in ((equal, 0, 1, value), (give, 0, 0, refuse))]
            program += [(give, 0, 0, allow)]
        program += [(give, 0, 0, allow)]
        self._code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
        self._program = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(self._code)))
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def install(self) -> None:
        """From here on this process is under the filter, and it ends with its parent."""
        set_death_signal, set_seccomp, mode_filter, no_new_privileges = 1, 22, 2, 38
        self._prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
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


class Stopped(Exception):
    """The call under way must end."""

    def __init__(self, status: int, text: bytes = b"") -> None:
        self.status, self.text = status, text


class Worker:
    """One call after the other over ``channel``, each in its own child."""

    def __init__(self, channel: socket.socket, config: dict[str, Any]) -> None:
        self.channel, self.config = channel, config
        # Requests and results pass by here without entering this process's heap, which every later call inherits: the
        # child reads its request from the channel, and its result waits in pages that are dropped once it is sent.
        self._room = mmap.mmap(-1, 1 + REPLY.size + config["output_bytes"] + 1, flags=mmap.MAP_PRIVATE)
        self.filter = SyscallFilter(network=not config["isolated"])

    def start(self) -> None:
        """Check the filter, leave nothing of the preparations behind, and say so; OSError: this worker cannot serve."""
        probe = json.dumps({"source": _PROBE, "name": "probe", "arguments": {}}).encode()
        status, text = self.run(lambda: probe, 30.0)
        if (status, text) != (OK, b"refused"):
            raise OSError(f"its first call, which tries to fork, ended with: {bytes(text).decode('utf-8', 'replace')}")
        self._reply(READY, b"")

    def serve(self) -> None:
        while header := self._read(REQUEST.size):
            timeout, length = REQUEST.unpack(header)
            self._reply(*self.run(lambda: self._read(length), timeout))  # noqa: B023  (called at once)

    def run(self, take: Callable[[], bytes], timeout: float) -> tuple[int, bytes | memoryview]:
        """Status and text of one call, whose request the child gets from ``take``. A tool cannot outlive it, nor leave
        a file behind."""
        result_fd, child_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._child(take, child_fd, timeout)
        os.close(child_fd)
        stopped, size = None, 0
        try:
            size = self._collect(result_fd, timeout)
        except Stopped as reason:
            stopped = reason
        finally:
            os.close(result_fd)
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._wipe_scratch()
        if self._room[:1] != STARTED:
            raise SystemExit  # part of the request may still be in the channel
        if stopped is not None:
            return stopped.status, stopped.text
        status, length = REPLY.unpack_from(self._room, 1) if size > REPLY.size else (None, 0)
        if status in (OK, FAILED) and size == 1 + REPLY.size + length:
            return status, memoryview(self._room)[1 + REPLY.size : size]
        how = f"was ended by signal {-code}" if code < 0 and code != -signal.SIGKILL else "ended without a result"
        return FAILED, f"the process of the call {how}".encode()

    def _child(self, take: Callable[[], bytes], fd: int, timeout: float) -> NoReturn:
        try:
            request = take()
            os.write(fd, STARTED)
            status, text = FAILED, ""
            try:
                self._restrict(fd, timeout)
                random.seed(0)  # hashes are seeded too: a result depends on source, arguments and clock
                text, status = invoke(json.loads(request)), OK
            except BaseException as error:  # SystemExit and KeyboardInterrupt of a tool are its failure, not ours
                # Frees what the tool held: else there may be no memory to say so.
                error.__traceback__ = error.__context__ = None
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
        os.closerange(fd + 1, 1 << 20)
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

    def _collect(self, fd: int, timeout: float) -> int:
        """Read what the child writes into the room until it closes the pipe or is over the limit; returns how many
        bytes it was. Stopped when its time is up, which runs from when it has its request."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self.channel, 0)  # a hang-up is reported unasked: nobody waits for the result any more
        size, deadline = 0, time.monotonic() + _READING
        while size < len(self._room):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise Stopped(TIMED_OUT)
            events = dict(poller.poll(min(remaining, _WATCH) * 1000))
            if self.channel.fileno() in events:
                raise SystemExit
            if fd in events:
                with memoryview(self._room) as room, room[size:] as free:
                    count = os.readv(fd, [free])
                if not count:
                    break
                if not size:
                    deadline = time.monotonic() + timeout
                size += count
            self._count_files()
        return size

    def _count_files(self) -> None:
        # The kernel bounds the bytes of /tmp, not the number of files, and each costs it memory that no limit counts.
        if self.config["scratch"] is not None:
            state, limit = os.statvfs(self.config["scratch"]), self.config["scratch_files"]
            if state.f_files - state.f_ffree > limit + 1:
                raise Stopped(FAILED, f"it made more than {limit} files".encode())

    def _wipe_scratch(self) -> None:
        """Empty /tmp, whatever the tool did to modes, depth and names. What cannot be wiped ends this worker."""
        if self.config["scratch"] is None:
            return
        root = os.fsencode(self.config["scratch"])
        os.chmod(root, 0o700)
        prefix = os.urandom(16).hex().encode()  # drawn after the tool has ended: it cannot have made such a name
        raised = 0
        while entries := list(os.scandir(root)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for inner in list(os.scandir(entry.path)):
                    if not inner.is_dir(follow_symlinks=False):
                        os.unlink(inner.path)
                        continue
                    # A folder inside comes to the top, so that no path is ever too long and no nesting too deep.
                    os.chmod(inner.path, 0o700)
                    os.rename(inner.path, b"%s/%s-%d" % (root, prefix, raised))
                    raised += 1
                os.rmdir(entry.path)
        os.utime(root, (0, 0))  # these would carry a message from call to call

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = self.channel.recv(size - len(data))
            if not chunk:
                return b""
            data += chunk
        return bytes(data)

    def _reply(self, status: int, text: bytes | memoryview) -> None:
        self.channel.sendall(REPLY.pack(status, len(text)))
        self.channel.sendall(text)
        if isinstance(text, memoryview):
            text.release()
        self._room.madvise(mmap.MADV_DONTNEED)  # private pages without a file read as zeros again


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
