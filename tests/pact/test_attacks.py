"""Attacks with what a process has: memory, time, output, crashes, signals, results, and the worker's own Python."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from attack_setup import MEMORY, NO_RESULT, OUTSIDE, REFUSED, TIMED_OUT, Watched

from pact.sandbox import Sandbox


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACT_SECRET", OUTSIDE)
        watched = Watched([])
        yield watched
        watched.sandbox.close()


PROCESSES = {
    "fork bomb": ("while True: os.fork()", REFUSED),
    "fork bomb that takes no for an answer": ("while True:\n    try: os.fork()\n    except OSError: pass", TIMED_OUT),
    "clone": ("return [syscall('clone', 17, 0, 0, 0, 0), syscall('clone3', 0, 0)]", r'\["EPERM", "EPERM"\]'),
    "posix_spawn": ("os.posix_spawn('/usr/bin/env', ['env'], {})", REFUSED),
    "exec": ("os.execv('/usr/bin/env', ['env'])", REFUSED),
    "system": ("return os.system('true')", "^(-1|32512)$"),
    "subprocess": ("import subprocess\nsubprocess.run(['/usr/bin/env'])", REFUSED),
    "multiprocessing": ("import multiprocessing as m\nm.get_context('fork').Process(target=print).start()", REFUSED),
    "pty": ("os.forkpty()", REFUSED + "|No such file"),
    "thread": ("import threading\nthreading.Thread(target=print).start()", "can't start new thread"),
    "thread pool": (
        "from concurrent.futures import ThreadPoolExecutor as Pool\nPool(64).submit(time.sleep, 60)",
        "can't start new thread",
    ),
    "memory as a program": (
        "fd = os.open('/tmp/x', os.O_CREAT | os.O_RDWR, 0o700)\nos.write(fd, b'#!/usr/bin/env')\n"
        "return syscall('execveat', fd, b'', 0, 0, 0x1000)",
        "EPERM",
    ),
}

MEMORY_BOMBS = {
    "list": ("x = [0]\nwhile True: x += x", MEMORY),
    "bytes": ("return len(bytes(1 << 30))", MEMORY),
    "small objects": ("x = []\nwhile True: x.append({len(x): [len(x)]})", MEMORY + "|" + TIMED_OUT),
    "str": ("return len('x' * (1 << 40))", MEMORY),
    "str doubled": ("x = 'ab'\nwhile True: x = x + x", MEMORY),
    "int power": ("return (1 << (1 << 36)).bit_length()", MEMORY + "|too many digits"),
    "format": ("return len('%1000000000d' % 1)", MEMORY),
    "mmap": ("import mmap\nkeep = [mmap.mmap(-1, 1 << 26) for _ in range(100)]", MEMORY),
    "shared mmap": (
        "import mmap\nkeep = [mmap.mmap(-1, 1 << 26, flags=mmap.MAP_SHARED) for _ in range(100)]",
        MEMORY,
    ),
    "memfd": ("os.memfd_create('x')", REFUSED),
    "malloc": (
        "libc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\nreturn libc.malloc(ctypes.c_size_t(1 << 34))",
        "None",
    ),
    "pipes": (
        "import fcntl\nheld = 0\ntry:\n    while True:\n        r, w = os.pipe()\n        os.set_blocking(w, False)\n"
        "        fcntl.fcntl(w, 1031, 1 << 20)\n        held += os.write(w, bytes(1 << 20))\n"
        "except OSError as error:\n    return held < 64 << 20, error.errno",
        r"\(True, \d+\)",
    ),
    "list of an endless iterator": ("return list(iter(int, 1))", MEMORY + "|" + TIMED_OUT),
}

ENDLESS = {
    "loop": "while True: pass",
    "regular expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "big power": "return (7 ** 20_000_000) % 3",
    "sum of a range": "return sum(range(10 ** 12))",
    "itertools": "import itertools\nreturn -1 in itertools.count()",
    "sleep": "time.sleep(3600)",
    "select": "import select\nselect.select([], [], [])",
    "lock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "pause": "signal.pause()",
    "read of an own pipe": "r, w = os.pipe()\nos.read(r, 1)",
    "every exception caught": "while True:\n    try: time.sleep(1)\n    except BaseException: pass",
    "signals ignored": (
        "for number in set(range(1, 65)) - {9, 19, 32, 33}: signal.signal(number, signal.SIG_IGN)\nwhile True: pass"
    ),
    "signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "recursion without depth": "import functools\nfunctools.reduce(lambda a, b: a, iter(int, 1))",
    "endless printing": "while True: print('x' * 1000)",
    "decompression": "import zlib\nx = zlib.compress(bytes(1 << 24))\nwhile True: zlib.decompress(x)",
    "flood of one descriptor": "while True:\n    try: os.write(1, bytes(1 << 16))\n    except OSError: pass",
}

OUTPUT = {
    "one byte too much": ("return 'x' * ((1 << 20) + 1)", "over the limit of 1048576"),
    "few characters of many bytes": ("return '\U0001f600' * (1 << 19)", "over the limit of"),
    "huge JSON": ("return {str(i): 'x' * 100 for i in range(20_000)}", "over the limit of"),
    "error text": ("raise ValueError('x' * (1 << 24))", "over the limit of"),
    "lone surrogates": ("return 'a\\ud800\\udfffb'", r"^a\?\?b$"),
    "surrogates in JSON": ("return {'\\ud800': '\\udc00'}", r'^{"\?": "\?"}$'),
    "NUL and control characters": ("return 'a\\0\\x1b[2J\\u202e\\x7f'", "^a\0\x1b\\[2J\u202e\x7f$"),
    "not a number": ("return [float('nan'), float('-inf')]", r"^\[NaN, -Infinity\]$"),
    "digits": ("return 10 ** 10_000", "4300 digits"),
    "bytes": ("return b'\\xff\\0'", r"^b'\\xff\\x00'$"),
    "name of an error": ("raise type('\\ud800\\n', (Exception,), {})", "surrogates not allowed"),
}

# gc.get_objects() does not list what was frozen before the fork; the frames below the tool do.
FIND_WORKER = "w = sys._getframe()\nwhile 'self' not in w.f_locals: w = w.f_back\nw = w.f_locals['self']\n"

CRASHES = {
    "null pointer": ("ctypes.string_at(0)", "ended by signal 11"),
    "faulthandler": ("import faulthandler\nfaulthandler._read_null()", "ended by signal 11"),
    "stack of C": ("import faulthandler\nfaulthandler._stack_overflow()", "ended by signal|RuntimeError|overflow"),
    "abort": ("os.abort()", "ended by signal"),
    "C abort": ("ctypes.CDLL(None).abort()", "ended by signal"),
    "illegal code object": (
        "f = lambda: 1\nf.__code__ = f.__code__.replace(co_code=bytes([255, 255] * 40))\nf()",
        "ended by signal|error occured",
    ),
    "write over Python": (
        "ctypes.memset(id(int), 0xff, 400)\nreturn [int(x) for x in '12']",
        "ended by signal|" + NO_RESULT + "|error occured",
    ),
    "recursion": ("def f(): f()\nf()", "maximum recursion depth"),
    "recursion without a limit": (
        "sys.setrecursionlimit(1 << 30)\nclass A:\n    def __repr__(self): return repr([self])\nrepr(A())",
        "ended by signal|MemoryError",
    ),
    "deep result": ("x = []\nfor _ in range(100_000): x = [x]\nreturn x", "recursion|ended by signal"),
    "freed too deep": ("x = None\nfor _ in range(1_000_000): x = (x,)\nx = None\nreturn 'freed'", "freed"),
    "alarm": ("signal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile True: pass", "ended by signal 14"),
    "exit": ("sys.exit('bye')", "tool: bye$"),
    "hard exit": ("os._exit(0)", NO_RESULT),
    "exit of C": ("ctypes.CDLL(None).exit(0)", NO_RESULT),
}

SIGNALS = {
    "everyone": ("os.kill(-1, 9)", REFUSED),
    "the parent": ("os.kill(os.getppid(), 9)", REFUSED),
    "the group": ("os.killpg(0, 9)", REFUSED),
    "the first process": ("os.kill(1, 9)", REFUSED),
    "itself, stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", REFUSED),
    "a thread of the parent": ("return syscall('tgkill', os.getppid(), os.getppid(), 9)", "EPERM"),
    "queued": ("return syscall('rt_sigqueueinfo', os.getppid(), 9, 0)", "EPERM"),
    "by a descriptor": ("return [syscall('pidfd_open', os.getppid(), 0)]", "EPERM"),
    "by an owned pipe": (
        "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETSIG, 9)",
        REFUSED,
    ),
    "by a pipe of its worker": (
        "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
        REFUSED,
    ),
    "by a pipe, extended": (
        "r, w = os.pipe()\nreturn syscall('fcntl', r, 15, ctypes.byref((ctypes.c_int * 2)(1, os.getppid())))",
        "EPERM",
    ),
    "by a socket": (
        "import fcntl, socket, struct\na, b = socket.socketpair()\n"
        "fcntl.ioctl(a, 0x8901, struct.pack('i', os.getppid()))",
        REFUSED,
    ),
    "out of reach of its group": ("os.setsid()", REFUSED),
    "another group": ("os.setpgid(0, 0)", REFUSED),
    "survival of its worker": ("return syscall('prctl', 1, 0, 0, 0, 0)", "EPERM"),
}

RESULTS = {
    "generator": ("yield 1", "^<generator object tool"),
    "coroutine": ("async def f(): pass\nreturn f()", "^<coroutine object"),
    "pickle": (
        "class Bomb:\n    def __reduce__(self): return os.system, ('true',)\nreturn [Bomb()]",
        "not JSON serializable",
    ),
    "unpickled": ("import pickle\nreturn pickle.loads(b\"cos\\nsystem\\n(S'true'\\ntR.\")", "^(-1|32512)$"),
    "itself": ("x = []\nx.append(x)\nreturn x", "Circular reference"),
    "dict of itself": ("x = {}\nx['x'] = x\nreturn x", "Circular reference"),
    "endless text": ("class A:\n    def __str__(self):\n        while True: pass\nreturn A()", TIMED_OUT),
    "text that exits": ("class A:\n    def __str__(self): raise SystemExit('out')\nreturn A()", "tool: out$"),
    "text that is none": ("class A:\n    def __str__(self): return 1\nreturn A()", "returned non-string"),
    "text with its own bytes": (
        "class S(str):\n    def encode(self, *a): return b'forged'\nclass A:\n"
        "    def __str__(self): return S('x')\nreturn A()",
        "^forged$",
    ),
    "text with no bytes": (
        "class S(str):\n    def encode(self, *a): return 5\nclass A:\n    def __str__(self): return S('x')\nreturn A()",
        NO_RESULT,
    ),
    "str of its own": ("class S(str):\n    def __str__(self): return 'other'\nreturn S('x')", "^other$"),
    "dict of its own": ("class D(dict):\n    def items(self): raise KeyError\nreturn D(a=1)", "^{'a': 1}$"),
    "list of its own": (
        "class L(list):\n    def __iter__(self): return iter(int, 1)\nreturn [L([1])]",
        r"^\[\[1\]\]$|timed out",
    ),
    "class that lies": (
        "class A:\n    __class__ = dict\n    def __str__(self): return 'lie'\nreturn A()",
        "^lie$",
    ),
    "equal to everything": (
        "class A:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "    def __str__(self): return 'a'\nreturn A()",
        "^a$",
    ),
    "metaclass": (
        "class M(type):\n    def __eq__(self, other): raise SystemExit('meta')\n    __hash__ = None\n"
        "class A(metaclass=M):\n    def __str__(self): return 'a'\nreturn A()",
        "tool: meta$|^a$",
    ),
    "error with endless text": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        TIMED_OUT,
    ),
    "error with failing text": ("class E(Exception):\n    def __str__(self): raise E\nraise E", NO_RESULT),
    "error that is no exception": ("raise 5", "exceptions must derive"),
    "group of errors": ("raise BaseExceptionGroup('many', [KeyboardInterrupt(), ValueError('x')])", "many"),
    "keyboard": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "finalizer": (
        "class A:\n    def __del__(self):\n        while True: pass\nkeep = A()\nreturn 'kept'",
        TIMED_OUT,
    ),
    "at exit": ("import atexit\natexit.register(lambda: time.sleep(60))\nreturn 'left'", "^left$"),
}

PYTHON = {
    "json": ("import json\njson.dumps = json.loads = lambda *a, **k: 'forged'\nreturn {}", "^forged$"),
    "exit of the child": ("os._exit = lambda code: None\nreturn 'alive'", f"^alive$|{NO_RESULT}"),
    "write": ("os.write = lambda *a: 0\nreturn 'lost'", TIMED_OUT),
    "modules": ("sys.modules.clear()\nreturn 'cleared'", "cleared|" + NO_RESULT + "|error occured"),
    "builtins": (
        "import builtins\nfor name in list(vars(builtins)): delattr(builtins, name)",
        "error occured|" + NO_RESULT,
    ),
    "encoder": (
        "import json.encoder\njson.encoder.c_make_encoder = None\njson.encoder.JSONEncoder.iterencode = 1",
        "None",
    ),
    "worker's loop": (
        "import __main__\n__main__.Worker._reply = __main__.Worker.run = None\n__main__.REPLY = None",
        NO_RESULT,
    ),
    "worker's loop, run again": (
        FIND_WORKER + "w._reply(0, b'forged')\nreturn w.serve()",
        "Bad file descriptor",
    ),
    "worker's clean-up": (
        FIND_WORKER + "w.config['scratch'] = '/usr'\nw._wipe_scratch()",
        "Read-only|not permitted",
    ),
    "frames": (
        "frame, seen = sys._getframe(), []\nwhile frame:\n    seen.append(frame.f_code.co_name)\n"
        "    frame.f_locals.update(status=3, text='forged', fd=1)\n    frame = frame.f_back\n"
        "return 'seen' if '_child' in seen else ''",
        "^seen$",
    ),
    "reply of the worker": (
        "import struct\nfor fd in range(3, 1024):\n    try: os.write(fd, struct.pack('!BI', 3, 0))\n"
        "    except OSError: pass\n"
        "os._exit(0)",
        NO_RESULT,
    ),
    "reply with a false length": (
        "import struct\nfor fd in range(3, 1024):\n    try: os.write(fd, struct.pack('!BI', 0, 1 << 31))\n"
        "    except OSError: pass\nos._exit(0)",
        NO_RESULT,
    ),
    "two replies": (
        "import struct\nfor fd in range(3, 1024):\n    try: os.write(fd, 2 * struct.pack('!BI', 0, 0))\n"
        "    except OSError: pass\nos._exit(0)",
        NO_RESULT,
    ),
    "reply that never ends": (
        "while True:\n    for fd in range(3, 1024):\n        try: os.write(fd, b'x' * 4096)\n"
        "        except OSError: pass",
        NO_RESULT + "|" + TIMED_OUT,
    ),
    "reply that never comes": ("os.closerange(0, 1024)\ntime.sleep(60)", NO_RESULT + "|" + TIMED_OUT),
    "descriptors mixed up": (
        "null = os.open('/dev/null', os.O_RDWR)\nfor fd in range(64):\n    try: os.dup2(null, fd)\n"
        "    except OSError: pass\n"
        "return 'lost'",
        NO_RESULT,
    ),
    "trace": ("sys.settrace(lambda *a: 1 / 0)\n(lambda: 1)()", "division by zero|" + NO_RESULT),
    "profile": ("sys.setprofile(lambda *a: time.sleep(60))\nreturn 1", TIMED_OUT),
    "audit": (
        "def hook(*a): raise SystemExit('heard')\nsys.addaudithook(hook)\nopen('/dev/null')",
        "heard|" + NO_RESULT,
    ),
    "garbage": ("gc.callbacks.append(lambda *a: time.sleep(60))\ngc.collect()", TIMED_OUT),
    "warnings": ("import warnings\nwarnings.showwarning = sys.exit\nwarnings.warn('x')\nreturn 'warned'", "x|warned"),
    "hooks": ("sys.excepthook = sys.unraisablehook = lambda *a: os.read(0, 9)\nraise ValueError('hooked')", "hooked"),
    "streams": ("sys.stdout = sys.stderr = sys.stdin = None\nprint('x')\nreturn 'printed'", "^printed$"),
    "standard input": ("return repr(sys.stdin.read() + str(os.read(0, 100)))", "^\"b''\"$"),
    "breakpoint": ("breakpoint()\nreturn 1", "error occured"),
    "input": ("return input('> ')", "EOF"),
    "interaction": ("import code\ncode.interact()\nreturn 'back'", "back"),
    "import hooks": ("sys.meta_path.clear()\nsys.path_hooks.clear()\nimport wave", "No module named 'wave'"),
    "frozen modules": ("import os.path\nos.path.join = os.fork = os.kill = None\nreturn 'gone'", "^gone$"),
}

SOURCES = {
    "brackets": ("(" * 200_000, "too many nested|recursion|MemoryError"),
    "minus signs": ("x = " + "-" * 2_000_000 + "1", "recursion|MemoryError|ended by signal|too (complex|deep)"),
    "attributes": ("x" + ".x" * 200_000, "recursion|MemoryError|ended by signal|not defined"),
    "blocks": ("\n".join(" " * i + "if 1:" for i in range(200)), "too many|indent"),
    "constants": ("x = ((((1 << 1000) << 60000) ** 99) ** 99) ** 9999", MEMORY + "|" + TIMED_OUT),
    "text": ("'" + "x" * (8 << 20) + "'", "name tool is not defined"),
    "names": ("\n".join(f"n{i} = {i}" for i in range(100_000)), "name tool is not defined|" + MEMORY + "|" + TIMED_OUT),
    "NUL": ("x = 1\0", "null byte"),
    "encoding": ("# coding: latin-1\nx = '\ud800'", "surrogates not allowed"),
    "loop on import": ("while True: pass", TIMED_OUT),
    "exit on import": ("raise SystemExit", "SystemExit"),
    "no source": ("", "name tool is not defined"),
}


def cases(table):
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


@pytest.mark.parametrize("body", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless(watched, body):
    watched.attack(body, TIMED_OUT, timeout=0.3)


@cases(PROCESSES)
def test_processes(watched, case):
    watched.attack(*case, timeout=0.5)


@cases(MEMORY_BOMBS)
def test_memory(watched, case):
    watched.attack(*case, timeout=2.0)


@cases(OUTPUT)
def test_output(watched, case):
    watched.attack(*case)


@cases(CRASHES)
def test_crashes(watched, case):
    watched.attack(*case)


@cases(SIGNALS)
def test_signals(watched, case):
    watched.attack(*case)


@cases(RESULTS)
def test_results(watched, case):
    watched.attack(*case, timeout=0.5)


@cases(PYTHON)
def test_python(watched, case):
    watched.attack(*case, timeout=0.5)


@cases(SOURCES)
def test_sources(watched, case):
    watched.attack_source(*case, timeout=1.0)


def test_a_request_that_is_too_large(watched):
    watched.attack_source("#" * (17 << 20), "over the limit of 16777216")


def test_an_attack_in_one_worker_leaves_its_neighbour_alone():
    with Sandbox(workers=2) as sandbox:
        with ThreadPoolExecutor(2) as pool:
            hostile = pool.submit(sandbox.call, "def tool():\n    x = [0]\n    while True: x += x", "tool", {}, 2.0)
            friendly = [sandbox.call("def tool(i): return i", "tool", {"i": i}).output for i in range(20)]
        assert not hostile.result().ok
    assert friendly == [str(i) for i in range(20)]
