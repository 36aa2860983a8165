"""Attacks by way of the kernel: files, other processes, limits, namespaces, sockets, and what outlives a process."""

import os
import socket
from pathlib import Path

import pytest
from attack_setup import OUTSIDE, REFUSED, TIMED_OUT, Watched

from pact.sandbox_worker import _ARCHITECTURES, _REFUSED, _UNKNOWN


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "package.py").write_text("VALUE = 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACT_SECRET", OUTSIDE)
        watched = Watched([folder / "package.py"])
        yield watched
        watched.sandbox.close()


@pytest.fixture(scope="module")
def secret():
    """A file in the home folder, where keys lie."""
    path = Path.home() / f".pact-attack-{os.getpid()}"
    path.write_text(OUTSIDE)
    yield path
    assert path.read_text() == OUTSIDE
    path.unlink()


READING = {
    "home": "return open(given['path']).read()",
    "home by another root": "return open('/proc/self/root' + given['path']).read()",
    "home of the first process": "return open('/proc/1/root' + given['path']).read()",
    "home upwards": "return open('/tmp/' + '../' * 40 + given['path']).read()",
    "home by a link": "os.symlink(given['path'], '/tmp/link')\nreturn open('/tmp/link').read()",
    "home by its folder": "folder, name = os.path.split(given['path'])\nreturn os.listdir(folder).index(name)",
    "passwords": "return open('/etc/shadow').read()",
    "users": "import pwd\nreturn pwd.getpwuid(0).pw_dir + '?'",
    "host name": "return open('/etc/hostname').read()",
    "memory of itself": "return open('/proc/self/mem', 'rb').read(1)",
    "memory of its worker": "return open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "environment of processes": "return open('/proc/1/environ').read()",
    "command line of its worker": "return open(f'/proc/{os.getppid()}/cmdline').read()",
    "descriptors of its worker": "return os.listdir(f'/proc/{os.getppid()}/fd')",
    "memory of the machine": "return open('/dev/mem', 'rb').read(1)",
    "kernel log": "return open('/dev/kmsg').read()",
    "kernel settings": "return open('/proc/sys/kernel/hostname').read()",
    "devices": "return os.listdir('/sys')",
    "disk": "os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))\nreturn open('/tmp/disk', 'rb').read(1)",
    "terminal": "return open('/dev/tty').read()",
    "docker": "return os.listdir('/var/run')",
}

# What may come back: "done" would be a hole.
WRITING = {
    "root": "open('/x', 'w')",
    "programs": "open('/usr/bin/x', 'w')",
    "library": "open(os.__file__, 'a')",
    "compiled library": "os.mkdir(os.path.dirname(os.__file__) + '/new')",
    "worker's script": "open('/worker.py', 'a')",
    "worker's script removed": "os.unlink('/worker.py')",
    "worker's script replaced": "open('/tmp/x', 'w')\nos.rename('/tmp/x', '/worker.py')",
    "worker's script by its mode": "os.chmod('/worker.py', 0o777)",
    "worker's script by its times": "os.utime('/worker.py', (0, 0))",
    "worker's script by its attributes": "os.setxattr('/worker.py', 'user.x', b'1')",
    "worker's script by its owner": "os.chown('/worker.py', 65534, 65534)",
    "worker's script linked": "os.link('/worker.py', '/tmp/worker.py')",
    "package": "import package\nopen(package.__file__, 'a')",
    "beside a package": "open('/packages/new.py', 'w')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "named shared memory": (
        "from multiprocessing.shared_memory import SharedMemory\nSharedMemory('x', create=True, size=10)"
    ),
    "device": "os.unlink('/dev/null')",
    "new device": "open('/dev/new', 'w')",
    "system request": "open('/proc/sysrq-trigger', 'w').write('b')",
    "memory killer": "open('/proc/self/oom_score_adj', 'w').write('-1000')",
    "a temporary folder elsewhere": "import tempfile\ntempfile.mkstemp(dir='/var/tmp')",
    "attributes of /tmp": "os.setxattr('/tmp', 'user.message', b'1')",
}

PRIVILEGES = {
    "root's number": "os.setuid(0)",
    "root's group": "os.setgid(0)",
    "groups": "os.setgroups([0])",
    "another root": "os.chroot('/tmp')",
    "lower nice": "os.nice(-1)",
    "nice of its worker": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "nice of everyone": "os.setpriority(os.PRIO_USER, 0, 19)",
    "cores of its worker": "os.sched_setaffinity(os.getppid(), {0})",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "idle worker": "os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "limits of its worker": "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "host name": "import socket\nsocket.sethostname('x')",
}

# Shared by name: message queues, memory, semaphores, keys; and the ways around walls that have no Python name.
CALLS = {
    "ptrace": "syscall('ptrace', 16, os.getppid(), 0, 0)",
    "memory of its worker": "syscall('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)",
    "memory of its worker, written": "syscall('process_vm_writev', os.getppid(), 0, 0, 0, 0, 0)",
    "System V memory": "syscall('shmget', 7, 4096, 0o1666)",
    "System V queue": "syscall('msgget', 7, 0o1666)",
    "System V semaphore": "syscall('semget', 7, 1, 0o1666)",
    "POSIX queue": "syscall('mq_open', b'x', 0o102, 0o666, 0)",
    "key": "syscall('add_key', b'user', b'x', b'y', 1, -4)",
    "key ring": "syscall('keyctl', 0, -4, 0)",
    "user namespace": "syscall('unshare', 0x10000000)",
    "namespace of its worker": "syscall('setns', 0, 0)",
    "mount": "syscall('mount', b'proc', b'/tmp', b'proc', 0, 0)",
    "mount made writable": "syscall('mount', 0, b'/', 0, 0x1020, 0)",
    "mount of the new kind": "syscall('fsopen', b'proc', 0)",
    "unmount": "syscall('umount2', b'/tmp', 2)",
    "file by its handle": "syscall('open_by_handle_at', -100, 0, 0)",
    "io_uring": "syscall('io_uring_setup', 1, 0)",
    "userfaultfd": "syscall('userfaultfd', 0)",
    "bpf": "syscall('bpf', 0, 0, 0)",
    "performance counters": "syscall('perf_event_open', 0, 0, -1, -1, 0)",
    "watches": "syscall('inotify_init1', 0)",
    "watches of everything": "syscall('fanotify_init', 0, 0)",
    "personality": "syscall('personality', 0x0400000)",
    "descriptor of its worker": "syscall('pidfd_getfd', 0, 0, 0)",
    "disk priority of its worker": "syscall('ioprio_set', 1, os.getppid(), 0x6000)",
    "input to a terminal": "syscall('ioctl', 0, 0x5412, 0)",
    "line discipline": "syscall('ioctl', 0, 0x5423, 0)",
    "flush of all disks": "syscall('sync')",
    "power": "syscall('reboot', 0xfee1dead, 672274793, 0x1234567, 0)",
}

FAMILIES = [
    "AF_UNIX",
    "AF_INET",
    "AF_INET6",
    "AF_NETLINK",
    "AF_PACKET",
    "AF_VSOCK",
    "AF_ALG",
    "AF_BLUETOOTH",
    "AF_CAN",
    "AF_TIPC",
    "AF_QIPCRTR",
    "AF_RDS",
    "AF_KEY",
]

# Left in /tmp for the clean-up to stumble over.
LEFT = {
    "many files": "for i in range(5000): open(f'/tmp/{i}', 'w').close()",
    "deep folders": "for i in range(3000):\n    os.mkdir('x' * 9)\n    os.chdir('x' * 9)",
    "deep folders of long names": "for i in range(100):\n    os.mkdir('x' * 255)\n    os.chdir('x' * 255)",
    "wide and deep": "for i in range(50): os.makedirs('/tmp/' + '/'.join(f'{i}-{j}' for j in range(20)))",
    "closed folders": "os.umask(0)\nos.mkdir('/tmp/a')\nos.mkdir('/tmp/a/b', 0)\nos.mkdir('/tmp/c', 0)",
    "closed files": "os.open('/tmp/x', os.O_CREAT | os.O_WRONLY, 0)",
    "names that are no text": (
        "for n in set(range(1, 256)) - {47}: open(b'/tmp/\\xff' + bytes([n, 10, 32]), 'w').close()"
    ),
    "links to the library": (
        "for i, n in enumerate(('/usr', '/worker.py', '/packages', '/', '.')): os.symlink(n, f'/tmp/{i}')"
    ),
    "links in folders": "os.makedirs('/tmp/a/b')\nos.symlink('/usr', '/tmp/a/l')\nos.symlink('..', '/tmp/a/b/l')",
    "circle of links": "os.symlink('b', '/tmp/a')\nos.symlink('a', '/tmp/b')",
    "pipe with a name": "os.mkfifo('/tmp/x')",
    "file of holes": "os.truncate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 21)",
    "open file without a name": "keep = open('/tmp/x', 'wb')\nos.unlink('/tmp/x')\nkeep.write(bytes(1 << 20))",
    "mapped file": (
        "import mmap\nf = open('/tmp/x', 'wb+')\nf.truncate(1 << 20)\nkeep = mmap.mmap(f.fileno(), 0)\n"
        "keep[:] = bytes(1 << 20)"
    ),
    "lock": "import fcntl\nkeep = open('/tmp/x', 'w')\nfcntl.lockf(keep, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "settings of the process": (
        "os.umask(0o777)\nos.chdir('/usr')\nos.environ['LEFT'] = '1'\ngc.disable()\nsignal.alarm(99)"
    ),
}


# Modes, owners and times: of the devices, which are the host's own files, of what is bound, and of /tmp.
CHANGING = {
    "mode": "os.chmod(given['path'], 0o600)",
    "mode, by descriptor": "os.fchmod(os.open(given['path'], os.O_DIRECTORY * given['folder']), 0o600)",
    "mode, by fchmodat2": "return syscall('fchmodat2', -100, given['path'].encode(), 0o600, 0)",
    "owner": "os.chown(given['path'], os.getuid(), os.getgid())",
    "times": "os.utime(given['path'], (1, 4242))",
    "times, by descriptor": "os.utime(os.open(given['path'], os.O_DIRECTORY * given['folder']), (1, 4242))",
    "an attribute": "os.setxattr(given['path'], 'user.x', b'1')",
}
PLACES = ("/dev/null", "/dev/full", "/dev/urandom", "/dev", "/usr/bin/env", "/worker.py", "/tmp")

# What can be found of another call's request or result in the memory this one inherits.
SEARCH = """
step, vec = 4096, ctypes.c_ubyte()
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
def mapped(place): return libc.mincore(place, step, ctypes.byref(vec)) == 0
top = end = libc.sbrk(0)  # of the heap
while mapped(end - step): end -= step
low = id(object()) & ~0xfffff  # an arena of Python's objects: one MiB
while not mapped(low): low += step
high = low
while mapped(high) and high & 0xfffff or high == low: high += step
own = ('OF-THIS-' + given['mark']).encode() * 200
seen = ctypes.string_at(end, top - end) + ctypes.string_at(low, high - low)
return seen.count(b'OF-AN-' + b'EARLIER-' + given['mark'].encode()), seen.count(b'OF-THIS-' + b'CALL') > 0
"""


def cases(table):
    return pytest.mark.parametrize("body", table.values(), ids=table.keys())


@cases(READING)
def test_reading(watched, secret, body):
    watched.attack(
        body,
        "error occured.*(No such file|not permitted|Permission denied|uid not found|No such device|not in list)",
        path=str(secret),
    )


@cases(WRITING)
def test_writing(watched, body):
    watched.attack(
        body + "\nreturn 'done'", f"error occured.*({REFUSED}|Read-only|No such file|denied|No usable|Invalid cross)"
    )


@cases(PRIVILEGES)
def test_privileges(watched, body):
    watched.attack(body + "\nreturn 'done'", f"error occured.*({REFUSED}|denied|Invalid argument|not allowed)")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_calls(watched, call):
    watched.attack(f"return {call}", "^EPERM$")


def test_every_refused_call_answers(watched):
    """Twice: with arguments of zero, which are harmless, and beyond the end of the table."""
    column = list(_ARCHITECTURES).index(os.uname().machine)
    numbers = sorted(numbers[column] for numbers in _REFUSED.values() if numbers[column])
    body = "return sorted({str(syscall(number, 0, 0, 0, 0, 0)) for number in given['numbers']})"
    watched.attack(body, r'^\["EPERM"\]$', numbers=numbers)
    watched.attack(body, r'^\["ENOSYS"\]$', numbers=[_UNKNOWN, _UNKNOWN + 1, 1000, (1 << 30) + 1, (1 << 31) - 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_sockets(watched, family):
    number = int(getattr(socket, family, 15))  # AF_KEY has no name in Python
    body = "import socket\nseen = []\nfor kind in range(1, 6):\n    try: socket.socket(given['f'], kind)\n"
    body += "    except PermissionError: seen.append('EPERM')\nreturn seen"
    watched.attack(body, r'^\["EPERM"(, "EPERM"){4}\]$', f=number)


def test_socket_pairs(watched):
    """They connect a process with itself: harmless, and event loops need one."""
    body = "import socket\na, b = socket.socketpair()\na.send(b'x')\nreturn b.recv(1).decode()"
    watched.attack(body, "^x$")
    watched.attack("import asyncio\nasync def f(): return 'looped'\nreturn asyncio.run(f())", "^looped$")
    watched.attack("import socket\nsocket.socketpair(30, 1)", REFUSED)


def test_names_and_connections(watched):
    """A listener on the host, by address and by abstract name, hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0pact-attack-{os.getpid()}")
        unix.listen()
        for listener in (server, unix):
            listener.setblocking(False)
        given = {"port": server.getsockname()[1], "pid": os.getpid()}
        connect = "import socket\ns = socket.socket({})\ns.connect({})\nreturn 'connected'"
        watched.attack(connect.format("2", "('127.0.0.1', given['port'])"), REFUSED, **given)
        watched.attack(connect.format("1", "chr(0) + f\"pact-attack-{given['pid']}\""), REFUSED, **given)
        watched.attack("import urllib.request\nurllib.request.urlopen('http://localhost')", "error occured", **given)
        watched.attack("import socket\nreturn socket.getaddrinfo('example.org', 80)", "error occured", **given)
        for listener in (server, unix):
            with pytest.raises(BlockingIOError):
                listener.accept()


@cases(LEFT)
def test_what_is_left_behind(watched, body):
    watched.attack("os.chdir('/tmp')\n" + body + "\nreturn 'left'", "^left$")


@cases(LEFT)
def test_what_is_left_behind_by_a_call_that_is_killed(watched, body):
    watched.attack("os.chdir('/tmp')\n" + body + "\nwhile True: time.sleep(1)", TIMED_OUT, timeout=0.4)


@pytest.mark.parametrize("path", PLACES)
@cases(CHANGING)
def test_no_mode_owner_or_time_changes(watched, path, body):
    before = os.stat(path) if path not in ("/worker.py", "/tmp") else None
    watched.attack(body, REFUSED + "|EPERM|Read-only|not supported", path=path, folder=int(path in ("/dev", "/tmp")))
    if before is not None:
        assert os.stat(path)[:7] == before[:7]
        assert os.stat(path).st_mtime != 4242


def test_the_next_call_does_not_inherit_what_was_said(watched):
    """Neither arguments nor results go through the memory that calls are forked from."""
    secret = "OF-AN-EARLIER-CALL-" + "x9y8z7" * 4
    said = watched.sandbox.call("def tool(said): return said * 3", "tool", {"said": secret})
    assert said.output == secret * 3
    watched.attack(SEARCH, r"^\(0, True\)$", mark="CALL")


def test_packages_of_the_host_are_not_there(watched):
    body = "import sysconfig, glob\nreturn glob.glob('/usr/lib/python3/dist-packages/*') + "
    watched.attack(body + "glob.glob(sysconfig.get_path('stdlib') + '/*-packages/*')", r"^\[\]$")


def test_a_full_scratch_folder(watched):
    full = "try:\n    for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\n"
    watched.attack(full + "except OSError as error:\n    return error.errno, i < 10", r"\(28, True\)")
    watched.attack("open('/tmp/x', 'wb').write(bytes(1 << 24))", "File too large")
    watched.attack(
        "os.posix_fallocate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 0, 1 << 30)", "File too large|No space"
    )


@pytest.mark.parametrize(
    "make",
    [
        "open(f'/tmp/{i}', 'w').close()",
        "os.mkdir(f'/tmp/{i}')",
        "open('/tmp/x', 'a').close(); os.link('/tmp/x', f'/tmp/{i}')",
        "os.symlink('/', f'/tmp/{i}')",
    ],
)
def test_a_million_files(watched, make):
    body = f"for i in range(1_000_000):\n    try: {make}\n    except OSError: pass"
    watched.attack(body, "more than 10000 files|" + TIMED_OUT, timeout=2.0)


def test_descriptors_run_out(watched):
    body = "held = []\ntry:\n    while True: held.append(os.open('/dev/null', 0))\n"
    body += "except OSError as error:\n    return error.errno, len(held) < 64"
    watched.attack(body, r"\(24, True\)")
    watched.attack("keep = [os.dup(0) for _ in range(1 << 20)]", "Too many open files")
