"""The sandbox: faithful to `python main.py`, and not to be harmed. `python -m pytest tests/test_sandbox.py`

Three parts: programs whose bytes must equal a real interpreter's, hostile programs by class, and the
library's own conduct (time-outs, batches, bad use, lost servers).
"""
import builtins
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from sandbox import Job, Sandbox

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs the Linux layers")


@pytest.fixture(scope="module", autouse=True)
def private_tempdir(tmp_path_factory):
    """A temporary folder that no other process uses, so that what is left behind can be counted."""
    before, tempfile.tempdir = tempfile.tempdir, os.path.realpath(tmp_path_factory.mktemp("temporary"))
    yield tempfile.tempdir
    tempfile.tempdir = before


@pytest.fixture(scope="module")
def sandbox(private_tempdir):
    os.environ["HOST_SECRET"] = "secret of the host"
    with Sandbox(workers=1, timeout=10) as sandbox:
        yield sandbox
    del os.environ["HOST_SECRET"]


@pytest.fixture(scope="module")
def layers(sandbox):
    return sandbox.report()


def real_python(code, stdin=""):
    """(stdout, stderr, exit code) of `python main.py` in an empty folder, that folder's prefix removed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        folder = os.path.realpath(folder)
        with open(os.path.join(folder, "main.py"), "wb") as file:
            file.write(code.encode("utf-8", "surrogateescape"))
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder,
                       "PYTHONHASHSEED": "0"}
        done = subprocess.run([sys.executable, "main.py"], cwd=folder, env=environment, capture_output=True,
                              input=stdin.encode("utf-8", "surrogateescape"), timeout=60)
        out, err = (text.replace(folder.encode() + b"/", b"").decode("utf-8", "surrogateescape")
                    for text in (done.stdout, done.stderr))
        return out, err, done.returncode


# ------------------------------------------------------------------------------------------- fidelity

ARGUMENTS = {"UnicodeDecodeError": "'utf-8', b'x', 0, 1, 'why'", "UnicodeEncodeError": "'utf-8', 'x', 0, 1, 'why'",
             "UnicodeTranslateError": "'x', 0, 1, 'why'", "ExceptionGroup": "'g', [ValueError(1)]",
             "BaseExceptionGroup": "'g', [KeyboardInterrupt()]"}
RAISES = {f"raise {name}": f"print('before')\ndef f():\n    raise {name}({ARGUMENTS.get(name, repr('why'))})\nf()"
          for name, kind in sorted(vars(builtins).items())
          if isinstance(kind, type) and issubclass(kind, BaseException)}
FAITHFUL = RAISES | {
    "empty": "",
    "unicode": "print('héllo ∑ 😀')",
    "surrogate": "print('\\udc80abc')",
    "lone surrogate": "print('a', flush=True)\nprint('\\ud800')",
    "bytes out": "import sys\nsys.stdout.buffer.write(bytes(range(256)))",
    "carriage returns": "print('a\\r\\nb\\rc', end='')",
    "no newline": "import sys\nsys.stdout.write('x')\nsys.stderr.write('y')",
    "echo": "import sys\nfor line in sys.stdin: print(repr(line))",
    "stdin bytes": "import sys\nprint(sys.stdin.buffer.read())",
    "stdin facts": "import sys\nprint(sys.stdin.isatty(), sys.stdin.encoding, sys.stdin.errors, sys.stdin.seekable())",
    "stdout facts": "import sys\nfor s in sys.stdout, sys.stderr:\n    print(s, s.line_buffering, s.write_through, "
                    "s.errors, s.name, s.mode, s.isatty(), s.fileno())",
    "input eof": "while True: print(input('> '))",
    "syntax": "def f(:\n    pass",
    "indentation": "if 1:\nprint(1)",
    "tabs": "if 1:\n        x = 1\n\ty = 2",
    "unterminated": "x = 'abc\nprint(x)",
    "open bracket": "x = (1,\nprint(x",
    "bad encoding": "# -*- coding: nonsense -*-\nprint(1)",
    "latin encoding": "# -*- coding: latin-1 -*-\nprint('\udce9')",
    "not utf-8": "print('\udce9')",
    "bom": "\ufeffprint('bom')",
    "crlf": "print(1)\r\nif 1:\r\n    print(2)\r\n    1/0\r\n",
    "form feed": "print(1)\n\x0cprint(2)",
    "future": "from __future__ import barry_as_FLUFL\nprint(1 <> 2)",
    "syntax warning": "x = 1\nprint(x is 1)",
    "invalid escape": "print('\\d')",
    "deprecation": "import warnings\nwarnings.warn('old', DeprecationWarning)\nwarnings.warn('odd')",
    "warning as error": "import warnings\nwarnings.simplefilter('error')\nwarnings.warn('odd')",
    "return outside": "return 1",
    "long line": "x = " + " + ".join(["1"] * 3000) + "\nprint(x)",
    "deep nesting": "(" * 150 + ")" * 150,
    "chained": "try:\n    {}['k']\nexcept KeyError as e:\n    raise ValueError('v') from e",
    "context": "try:\n    1/0\nexcept ZeroDivisionError:\n    undefined",
    "suppressed": "try:\n    1/0\nexcept ZeroDivisionError:\n    raise ValueError from None",
    "note": "e = ValueError('v')\ne.add_note('look\\nhere')\nraise e",
    "group": "raise ExceptionGroup('many', [ValueError(1), ExceptionGroup('in', [KeyError('k')])])",
    "suggestion": "class A:\n    value = 1\nprint(A().vaule)",
    "name suggestion": "prin(1)",
    "import error": "import nonexistent_module",
    "from import": "from os import pathh",
    "carets": "def f(x):\n    return (x['a']['b']\n            ['c'] + 1)\nf({'a': {'b': {}}})",
    "wide carets": "x = {'キー': 1}['値'] + len('日本')",
    "str raises": "class E(Exception):\n    def __str__(self): 1/0\nraise E",
    "not an exception": "raise 3",
    "recursion": "def f(n): return f(n + 1)\nf(0)",
    "recursion depth": "n = 0\ndef f():\n    global n\n    n += 1\n    f()\ntry: f()\nexcept RecursionError as e: print(n, e)",
    "mutual recursion": "def f(n): g(n)\ndef g(n): f(n)\nf(0)",
    "repr recursion": "a = []\nfor _ in range(100000): a = [a]\nprint(repr(a))",
    "exit none": "import sys\nprint(1)\nsys.exit()",
    "exit number": "import sys\nsys.exit(300)",
    "exit negative": "import sys\nsys.exit(-1)",
    "exit text": "import sys\nsys.exit('why')",
    "exit tuple": "raise SystemExit((1, 'x'))",
    "exit huge": "import sys\nsys.exit(10 ** 30)",
    "exit true": "import sys\nsys.exit(True)",
    "quit": "print(1)\nquit()",
    "os._exit": "import os\nprint('lost')\nos._exit(7)",
    "os._exit flushed": "import os\nprint('x' * 5000)\nprint('kept', flush=True)\nprint('lost')\nos._exit(0)",
    "abort": "import os\nprint('lost')\nos.abort()",
    "sigterm": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "sigkill": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "sigint": "import os, signal\nprint(1)\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**7): pass",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "signal handler": "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *a: print('got', a[0]))\n"
                      "os.kill(os.getpid(), signal.SIGUSR1)\nprint('end')",
    "alarm": "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: 1/0)\nsignal.setitimer(0, 0.05)\ntime.sleep(5)",
    "dispositions": "import signal\nfor s in sorted(signal.valid_signals()): print(s, signal.getsignal(s))\n"
                    "print(signal.pthread_sigmask(0, []))",
    "broken pipe": "import signal, os\nr, w = os.pipe()\nos.close(r)\nos.write(w, b'x')",
    "atexit": "import atexit\natexit.register(print, 'bye')\natexit.register(lambda: 1/0)\nprint('hi')\n1/0",
    "atexit order": "import atexit, sys\nfor i in range(3): atexit.register(print, i)\nsys.exit(2)",
    "atexit exits": "import atexit, sys\natexit.register(lambda: sys.exit(9))\nprint(1)",
    "del at exit": "class A:\n    def __del__(self): print('del', self.__class__.__name__)\na = A()\nb = A()\nb.me = b",
    "generator finally": "def g():\n    try: yield 1\n    finally: print('closed')\nx = g()\nnext(x)",
    "weakref at exit": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'final')\n",
    "stdout closed": "import sys\nprint(1)\nsys.stdout.close()",
    "stdout none": "import sys\nsys.stdout = None\nprint(1)",
    "close fd 1": "import os\nprint(1)\nos.close(1)",
    "close fds": "import os\nprint('a', flush=True)\nos.closerange(0, 300)\nprint('b')",
    "dup2": "import os\nos.dup2(1, 2)\n1/0",
    "thread": "import threading, time\ndef work():\n    time.sleep(.1)\n    print('thread')\n"
              "threading.Thread(target=work).start()\nprint('main')",
    "daemon thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nprint(1)",
    "thread error": "import threading\nt = threading.Thread(target=lambda: 1/0, name='T')\nt.start()\nt.join()\nprint(2)",
    "raw thread error": "import _thread, time\n_thread.start_new_thread(lambda: 1/0, ())\ntime.sleep(.1)",
    "unraisable": "class A:\n    def __del__(self): 1/0\nA()\nprint(1)",
    "excepthook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__)\n1/0",
    "excepthook fails": "import sys\nsys.excepthook = lambda *a: 1/0\nraise KeyError(1)",
    "main": "import sys\nprint(__name__, __doc__, __package__, __spec__, __cached__, __builtins__.__name__)\n"
            "print(sorted(globals()), __file__.endswith('/main.py'), sys.argv)\nprint(__loader__.__class__)",
    "docstring": "'''about'''\nprint(__doc__, __annotations__ if '__annotations__' in globals() else None)",
    "file": "print(__file__)\nprint(open(__file__).read())\nimport os\nprint(os.listdir())",
    "path": "import sys\nprint([p.split('/')[-1] for p in sys.path[1:]], len(sys.path), sys.path[0] + '/main.py' == __file__)",
    "import self": "import main\nprint(main.__name__)",
    "flags": "import sys\nprint(sys.flags, sys.warnoptions, sys._xoptions, sys.dont_write_bytecode)",
    "orig argv": "import sys\nprint(sys.orig_argv, sys.executable, sys.prefix, sys.base_prefix)",
    "modules": "import sys\nprint(sorted(set(sys.modules) - {'sitecustomize', 'apport_python_hook'}))",
    "hooks": "import sys\nprint(sys.meta_path, sys.path_hooks, sys.gettrace(), sys.getprofile())\n"
             "print(len(sys.path_importer_cache))",
    "collect": "import gc\nprint(gc.collect(), gc.isenabled())",
    "frames": "import sys, traceback, inspect\ntraceback.print_stack()\nprint(sys._getframe().f_back, len(inspect.stack()))",
    "getsource": "import inspect\ndef f(x):\n    return x + 1\nprint(inspect.getsource(f))\n"
                 "import sys\nprint(inspect.getsource(sys.modules['__main__']))",
    "pickle": "import pickle\nclass A:\n    x = 1\nprint(pickle.loads(pickle.dumps(A())).x, pickle.dumps(A, 0))",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\nprint(P(1), P('a') == P(1))",
    "enum": "import enum\nclass C(enum.Enum):\n    A = 1\nprint(C.A, C(2))",
    "hash": "print(hash('abc'), {'a', 'b', 'c', 'd'}, hash(b'x'))",
    "random": "import random\nrandom.seed(3)\nprint(random.random(), random.sample(range(100), 5))",
    "random differs": "import random, uuid\nprint(len({random.random()}), uuid.uuid4().version)",
    "gc": "import gc\nprint(gc.isenabled(), gc.get_threshold(), gc.garbage)",
    "cycles": "import gc\ngc.collect()\na = []\na.append(a)\ndel a\nprint(gc.collect())",
    "recursion limit": "import sys\nprint(sys.getrecursionlimit(), sys.getswitchinterval())",
    "locale": "import locale, sys\nprint(locale.getpreferredencoding(), sys.getfilesystemencoding(), "
              "sys.getfilesystemencodeerrors(), locale.setlocale(locale.LC_ALL))",
    "time zone": "import time, datetime\nprint(time.tzname, datetime.datetime(2020, 1, 1).astimezone().tzinfo)",
    "umask": "import os\nold = os.umask(0)\nprint(oct(old))\nopen('f', 'w').close()\nprint(oct(os.stat('f').st_mode))",
    "write file": "open('a.txt', 'w').write('x' * 10)\nimport os\nprint(sorted(os.listdir()), os.path.getsize('a.txt'))",
    "temp file": "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')\nprint(tempfile.gettempdir())",
    "import local": "open('helper.py', 'w').write('def f(): 1/0')\nimport helper\nhelper.f()",
    "subprocess": "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(6 * 7)'], "
                  "capture_output=True, text=True))",
    "system": "import os\nprint('a', flush=True)\nprint(os.system('echo b; exit 3'))",
    "fork": "import os\nprint('a')\npid = os.fork()\nprint('b', pid == 0)\nif pid: os.waitpid(pid, 0)",
    "multiprocessing": "import multiprocessing as m\ndef f(x): return x * x\nif __name__ == '__main__':\n"
                       "    with m.Pool(2) as p: print(p.map(f, range(5)))",
    "spawn": "import multiprocessing as m\ndef f(q): q.put(__name__)\nif __name__ == '__main__':\n"
             "    c = m.get_context('spawn')\n    q = c.Queue()\n    p = c.Process(target=f, args=(q,))\n"
             "    p.start()\n    print(q.get(), p.join(), p.exitcode)",
    "executor": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as e: print(list(e.map(abs, [-1, 2])))",
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(.01)\n    return 3\nprint(asyncio.run(f()))",
    "never awaited": "async def f(): pass\nf()",
    "socket pair": "import socket\na, b = socket.socketpair()\na.send(b'x')\nprint(b.recv(1))",
    "loopback": "import socket, threading\ns = socket.create_server(('127.0.0.1', 0))\n"
                "def serve():\n    c, _ = s.accept()\n    c.sendall(b'hello')\n    c.close()\n"
                "threading.Thread(target=serve).start()\nprint(socket.create_connection(s.getsockname()).recv(9))",
    "logging": "import logging\nlogging.warning('w')\nlogging.basicConfig(level=10)\ntry: 1/0\nexcept Exception: logging.exception('e')",
    "argparse": "import argparse\np = argparse.ArgumentParser()\np.add_argument('x')\np.parse_args()",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 2)\n"
                "if __name__ == '__main__': unittest.main(argv=['main.py', '-q', '--locals'], exit=True, buffer=False, "
                "testRunner=unittest.TextTestRunner(stream=open('/dev/null', 'w')))",
    "doctest": "def f():\n    '''\n    >>> f()\n    2\n    '''\n    return 1\nimport doctest\nprint(doctest.testmod())",
    "exec": "exec('def f():\\n    1/0')\nf()",
    "compile": "eval(compile('1 +', 'made.py', 'eval'))",
    "runpy": "import runpy\nopen('other.py', 'w').write('print(__name__, 1/0)')\nrunpy.run_path('other.py', run_name='__main__')",
    "settrace": "import sys\nsys.settrace(lambda f, e, a: print(f.f_code.co_name, e, f.f_lineno))\ndef f(): pass\nf()\nsys.settrace(None)",
    "audit": "import sys\nsys.addaudithook(lambda e, a: e == 'os.listdir' and print(e))\nimport os\nos.listdir()",
    "faulthandler": "import faulthandler\nprint(faulthandler.is_enabled())\nfaulthandler.dump_traceback()",
    "displayhook": "import sys\nsys.displayhook(3)\nprint(_)",
    "big output": "print('x' * 200000)\n1/0",
    "interleaved": "import sys\nfor i in range(100):\n    print(i)\n    print(-i, file=sys.stderr)",
    "memory error": "raise MemoryError",
    "int digits": "print(10 ** 5000)",
    "environment": "import os\nprint(sorted(k for k in os.environ if k.startswith('PYTHON')), os.environ['HOME'] == os.getcwd())",
    "cpu count": "import os\nprint(os.cpu_count(), len(os.sched_getaffinity(0)))",
    "stdlib": "import json, re, collections, decimal, fractions, heapq, statistics, string, textwrap, csv, sqlite3, "
              "hashlib, zlib, struct, calendar, difflib, functools, itertools, operator, typing, xml.etree.ElementTree\n"
              "print(json.dumps({'a': [1, 2.5]}), hashlib.sha256(b'').hexdigest(), decimal.Decimal(1) / 3)",
}
STDIN = "first line\nséc\udcffond\n\nlast without newline"


NEED_FOLDERS = {"temp file", "multiprocessing", "spawn", "loopback", "many big files", "many files", "deep folders"}


def skip_without_folders(name, layers):
    if name in NEED_FOLDERS and layers["mount namespace"] != "":
        pytest.skip("without a mount namespace /tmp and /dev/shm are closed, and the folder's total size is open")


@pytest.mark.parametrize("name", FAITHFUL)
def test_bytes_equal_real_python(sandbox, layers, name):
    skip_without_folders(name, layers)
    code = FAITHFUL[name]
    ours, real = sandbox.run(code, STDIN), real_python(code, STDIN)
    ours = ours.stdout, ours.stderr, ours.exit_code
    addresses = r"0x[0-9a-f]{8,}"           # of objects: no two interpreters agree on them
    assert [re.sub(addresses, "ADDRESS", str(part)) for part in ours] == [
        re.sub(addresses, "ADDRESS", str(part)) for part in real]


# ------------------------------------------------------------------------------------------ hostility

FORK_BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
THREADS = "import threading, time\nn = 0\ntry:\n    while n < 5000:\n        threading.Thread(target=time.sleep, " \
          "args=(60,), daemon=True).start()\n        n += 1\nexcept RuntimeError: pass\nprint(n < 5000, flush=True)"
EATERS = "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        x = bytearray(100 << 20)\n" \
         "        time.sleep(60)\ntime.sleep(60)"
DAEMON = """import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open('marker', 'w').write('x')
        time.sleep(60)
    os._exit(0)
os.wait()
while not os.path.exists('marker'): time.sleep(.01)
print('done')"""

# name: (program, statuses allowed, what stdout must hold, limits in seconds: time-out, wall)
HOSTILE = {
    "endless loop": ("while True: pass", "timeout", "", 0.5, 2),
    "sleeper": ("import time\ntime.sleep(60)", "timeout", "", 0.5, 2),
    "waits for input": ("import os\nos.dup2(os.pipe()[0], 0)\ninput()", "timeout", "", 0.5, 2),
    "ignores signals": ("import signal\nfor s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n"
                        "    except OSError: pass\nwhile True: pass", "timeout", "", 0.5, 2),
    "blocks signals": ("import signal\nsignal.pthread_sigmask(0, signal.valid_signals())\nwhile True: pass",
                       "timeout", "", 0.5, 2),
    "catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass",
                           "timeout", "", 0.5, 2),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout", "", 0.5, 2),
    "stuck in C": ("'a' * 10**6 in iter(int, 1)", "timeout", "", 0.5, 2),
    "regex blow-up": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", "timeout", "", 0.5, 2),
    "huge power": ("print(len(str(9 ** 9 ** 9)))", "timeout memory error", "", 1, 4),
    "atexit hangs": ("import atexit, time\natexit.register(time.sleep, 60)\nprint(1)", "timeout", "1\n", 0.5, 2),
    "thread keeps it": ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
                        "timeout", "", 0.5, 2),
    "resets its alarm": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
                         "timeout crash", "", 5, 4),
    "fork bomb": (FORK_BOMB, "timeout memory", "", 1, 6),
    "fork tree": ("import os, time\nfor _ in range(6): os.fork()\ntime.sleep(60)", "timeout", "", 1, 4),
    "daemon": (DAEMON, "ok", "done\n", 5, 2),
    "daemon holds stdout": ("import os, time\nif os.fork() == 0:\n    time.sleep(60)\nprint('main')", "ok", "main\n", 5, 2),
    "child outlives parent": ("import subprocess\nsubprocess.Popen(['sleep', '60'])\nprint(1)", "ok", "1\n", 5, 2),
    "stopped child": ("import os, signal\np = os.fork()\nif p == 0:\n    os.kill(os.getpid(), signal.SIGSTOP)\nprint(1)",
                      "ok", None, 5, 2),
    "zombies": ("import os\nfor _ in range(50):\n    if os.fork() == 0: os._exit(0)\nprint(1)", "ok", "1\n", 5, 3),
    "orphans": ("import os\nfor _ in range(300):\n    if os.fork() == 0:\n        if os.fork() == 0: os._exit(0)\n"
                "        os._exit(0)\n    os.wait()\nprint(1)", "ok error", None, 8, 8),
    "many threads": (THREADS, "ok", "True\n", 5, 4),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory", "", 5, 4),
    "memory at once": ("x = bytearray(1 << 40)", "memory", "", 5, 2),
    "memory caught": ("try: x = bytearray(1 << 40)\nexcept MemoryError: print('caught')", "ok", "caught\n", 5, 2),
    "mmap": ("import mmap\nm = [mmap.mmap(-1, 1 << 28) for _ in range(64)]", "error memory", "", 5, 2),
    "memory in children": (EATERS, "memory", "", 8, 6),
    "deep C recursion": ("import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\n"
                         "import pickle\npickle.dumps(x)", "crash error memory", None, 8, 8),
    "output": ("while True: print('x' * 1000)", "output", None, 5, 3),
    "error output": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output", None, 5, 3),
    "output without newline": ("import os\nwhile True: os.write(1, bytes(1 << 20))", "output", None, 5, 3),
    "output from children": ("import os\nfor _ in range(5): os.fork()\nwhile True: os.write(2, b'x' * 4096)",
                             "output", None, 5, 4),
    "big file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "error", "", 5, 4),
    "many big files": ("for i in range(1000): open(str(i), 'wb').write(bytes(1 << 22))", "error", "", 5, 5),
    "many files": ("for i in range(10**6): open(str(i), 'w')", "error", None, 8, 8),
    "deep folders": ("import os\nfor i in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nprint('deep')",
                     "ok", "deep\n", 8, 8),
    "locked folders": ("import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.chmod('a/b', 0)\nos.chmod('a', 0)",
                       "ok", "", 5, 3),
    "removes its folder": ("import os, shutil\nshutil.rmtree(os.getcwd())\nprint(os.path.exists(__file__))",
                           "ok error", None, 5, 3),
    "its folder a link": ("import os\nd = os.getcwd()\nos.remove('main.py')\ntry:\n    os.rmdir(d)\n    os.symlink('/etc', d)\n"
                          "except OSError: pass", "ok", "", 5, 3),
    "odd names": ("open('\\udcff\\n;rm', 'w')\nopen('-rf', 'w')\nimport os\nos.mkfifo('pipe')\nos.symlink('/', 'root')",
                  "ok", "", 5, 3),
    "descriptors": ("import os\nf = []\ntry:\n    while len(f) < 5000: f.append(os.dup(0))\nexcept OSError: print('limited')",
                    "ok", "limited\n", 5, 3),
}


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_ends_in_time_and_leaves_nothing(sandbox, layers, name):
    skip_without_folders(name, layers)
    code, statuses, out, timeout, wall = HOSTILE[name]
    before = leftovers()
    start = time.monotonic()
    got = sandbox.run(code, timeout=timeout)
    seconds = time.monotonic() - start
    assert got.status in statuses.split(), got
    assert out is None or got.stdout == out
    assert seconds < wall, f"{seconds:.1f} s"
    assert len(got.stdout) <= 1 << 20 and len(got.stderr) <= 1 << 20, "output must be capped"
    assert leftovers() == before, "processes, temporary files, descriptors or shared memory were left behind"
    look = "import os\nprint(os.listdir(), "
    if layers["mount namespace"] == "":
        look += "[n for n in os.listdir('/tmp') + os.listdir('/dev/shm') if 'pytest' not in n]"
    look += ")"
    if layers["private /proc"] == "":
        look += "\nprint(len([n for n in os.listdir('/proc') if n.isdigit()]))"
    after = sandbox.run(look)
    assert after.status == "ok" and after.stdout.startswith("['main.py']"), after
    if layers["private /proc"] == "":
        assert after.stdout.endswith("\n2\n"), "only the server and the program itself are in the namespace"


def leftovers():
    """What a job could leave on this host: our descendants, temporary entries, descriptors."""
    mine = str(os.getpid())
    processes = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    servers = [line for line in processes.splitlines() if "main.py" in line]
    return (len([line for line in servers if line.split()[1] == mine]),
            sorted(os.listdir(tempfile.gettempdir())),
            len(os.listdir("/proc/self/fd")))


# ------------------------------------------------------------------------------------------ isolation

SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(*a):\n" \
          "    r = libc.syscall(*a)\n    print('open' if r != -1 else 'refused', ctypes.get_errno())\n"
numbers = {"ptrace": "101, 0, 0, 0, 0", "process_vm_readv": "310, 1, 0, 0, 0, 0, 0", "keyctl": "250, 0, -3, 0",
           "add_key": "248, b'user', b'x', b'y', 1, -3", "bpf": "321, 0, 0, 0", "io_uring_setup": "425, 1, 0",
           "unshare user": "272, 0x10000000", "unshare net": "272, 0x40000000", "mount": "165, 0, b'/tmp', b'tmpfs', 0, 0",
           "chroot": "161, b'/tmp'", "memfd_create": "319, b'x', 0", "shmget": "29, 0, 4096, 0o1666",
           "perf_event_open": "298, 0, 0, 0, 0, 0", "userfaultfd": "323, 0", "clone3": "435, 0, 0",
           "pidfd_getfd": "438, 0, 0, 0", "kexec": "246, 0, 0, 0, 0", "x32 getpid": "0x40000000 + 39",
           "open_by_handle_at": "304, 0, 0, 0", "clock_settime": "227, 0, 0", "reboot": "169, 0, 0, 0, 0",
           "personality": "135, 0x0040000", "clone into a user namespace": "56, 0x10000011, 0, 0, 0, 0"}
CLOSED = {          # each must print nothing that starts with "open"
    "the server's folder": "import os\nprint('open', os.readlink('/proc/1/cwd'))",
    "a file of this repository": f"print('open', open({os.path.abspath(__file__)!r}).read(9))",
    "this repository's modules": "import sandbox\nprint('open', sandbox)",
    "its server's modules": "import sitecustomize, jail\nprint('open', jail)",
    "the home folder": f"import os\nprint('open' if os.listdir({os.path.expanduser('~')!r}) != ['.pyenv'] else '')",
    "password hashes": "print('open', open('/etc/shadow').read(9))",
    "the environment": "import os\nprint('open' if 'HOST_SECRET' in os.environ else '')",
    "the server's environment": "print('open', open('/proc/1/environ').read())",
    "the server's memory": "print('open', open('/proc/1/mem', 'rb'))",
    "the server's descriptors": "import os\nprint('open', os.listdir('/proc/1/fd'))",
    "the server's pipes": "print('open', open('/proc/1/fd/1', 'wb'))",
    "other descriptors": "import os\nfor fd in range(3, 65536):\n    try: os.fstat(fd)\n    except OSError: continue\n"
                         "    print('open', fd)",
    "the interpreter's files": "import os\nprint('open', open(os.__file__, 'a'))",
    "a new file beside them": "import os\nprint('open', open(os.path.dirname(os.__file__) + '/new.py', 'w'))",
    "a device": "print('open', open('/dev/mem', 'rb'))",
    "the terminal": "print('open', open('/dev/tty', 'wb'))",
    "the kernel's settings": "print('open', open('/proc/sys/kernel/core_pattern', 'w'))",
    "the root folder": "open('/made', 'w')\nprint('open')",
    "a device node": "import os, stat\nos.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(7, 0))\nprint('open')",
    "root": "import os\nprint('open' if os.getuid() == 0 else '')\nos.setuid(0)\nprint('open')",
    "another user": "import os\nos.setuid(12345)\nprint('open')",
    "a higher limit": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))\nprint('open')",
    "a higher priority": "import os\nos.nice(-5)\nprint('open')",
    "capabilities": "for l in open('/proc/self/status'):\n    if l[:6] in ('CapEff', 'CapPrm', 'CapInh', 'CapAmb') and int(l[7:], 16): "
                    "print('open', l)\n    if l.startswith('NoNewPrivs') and '1' not in l: print('open', l)",
    "the network": "import socket\ns = socket.socket()\ns.settimeout(2)\ns.connect(('1.1.1.1', 53))\nprint('open')",
    "names": "import socket\nsocket.getaddrinfo('example.com', 80)\nprint('open')",
    "raw sockets": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\nprint('open')",
    "packet sockets": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nprint('open')",
    "vsock": "import socket\nsocket.socket(40, socket.SOCK_STREAM)\nprint('open')",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nprint('open')",
    "the host's name": f"import socket\nprint('open' if socket.gethostname() == {os.uname().nodename!r} else '')",
    "other processes": "import os\nfor p in os.listdir('/proc'):\n    if p.isdigit() and int(p) not in (1, os.getpid()): print('open', p)",
    "setuid programs": "import subprocess\nprint(subprocess.run(['su', '-c', 'echo open'], capture_output=True, text=True).stdout)",
} | {name: SYSCALL + f"call({arguments})" for name, arguments in numbers.items()}


@linux
@pytest.mark.parametrize("name", CLOSED)
def test_is_closed_to_a_program(sandbox, layers, name):
    missing = [layer for layer, reason in layers.items() if reason and not reason.startswith("not needed")]
    if missing:
        pytest.skip(f"this host has no {', '.join(missing)}")
    if name in numbers and os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    got = sandbox.run(CLOSED[name], timeout=5)
    assert "open" not in [line.split(" ")[0] for line in got.stdout.splitlines()], got
    assert got.status in ("ok", "error"), got


@linux
def test_host_services_are_out_of_reach(sandbox, layers):
    """A socket that listens on this host's loopback, and an abstract one, answer no program."""
    if layers["network namespace"] != "":
        pytest.skip("this host has no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0sandbox-test")
        abstract.listen()
        code = (f"import socket\nfor family, address in (2, {server.getsockname()!r}), (1, '\\0sandbox-test'):\n"
                "    try: socket.socket(family).connect(address)\n    except OSError as e: print('closed')")
        assert sandbox.run(code).stdout == "closed\nclosed\n"


@linux
@pytest.mark.parametrize("target", ["os.getppid()", "1", "-1", str(os.getpid())])
@pytest.mark.parametrize("number", [9, 15, 19])
def test_signals_reach_no_process_but_its_own(sandbox, target, number):
    """Neither the server, nor everything, nor the owner, whose process id the program may have guessed."""
    code = f"import os\ntry: os.kill({target}, {number})\nexcept OSError: pass\nprint('alive')"
    got = sandbox.run(code)
    assert got.status in ("ok", "crash", "lost"), got
    assert sandbox.run("print(1)").stdout == "1\n"


@linux
def test_nothing_passes_from_one_program_to_the_next(sandbox, layers):
    if layers["mount namespace"] != "":
        pytest.skip("this host has no mount namespace")
    places = ["/tmp/x", "/dev/shm/x", "x", "/var/tmp/x"]
    write = f"for p in {places}:\n    try: open(p, 'w').write('secret')\n    except OSError: pass\n"
    read = f"import os\nprint([p for p in {places} if os.path.exists(p)])"
    for _ in range(3):
        assert sandbox.run(write).status == "ok"
        assert sandbox.run(read).stdout == "[]\n"


# -------------------------------------------------------------------------------------------- tracing

CLAIMS = "import os, sys\nfor fd in range(3, 20000):\n    try: os.write(fd, b'ok 0 ValueError ' * 9)\n    except OSError: pass\n"
ENDINGS = {         # program: (ending, lines)
    "print(1)": (None, [1]),
    "": (None, []),
    "x = 1\nif x:\n    y = 2\nelse:\n    y = 3": (None, [1, 2, 3]),
    "def f():\n    return 1\nf()\nf()": (None, [1, 3, 2, 4]),
    "for i in range(3):\n    if i == 2:\n        print(i)": (None, [1, 2, 3]),
    "class A:\n    x = 1\n    def f(self):\n        pass\nA().f()": (None, [1, 2, 3, 5, 4]),
    "try:\n    1/0\nexcept ZeroDivisionError:\n    pass": (None, [1, 2, 3, 4]),
    "1/0": ("ZeroDivisionError", [1]),
    "x = [\n  1,\n  2][5]": ("IndexError", None),
    "class E(KeyError): pass\nraise E": ("E", [1, 2]),
    "def f(:": ("SyntaxError", []),
    "if 1:\nx": ("IndentationError", []),
    "x = '\udce9'": ("SyntaxError", []),
    "import sys\nsys.exit()": ("SystemExit", [1, 2]),
    "raise SystemExit(0)": ("SystemExit", [1]),
    "import sys\ntry:\n    sys.exit(3)\nfinally:\n    print(1)": ("SystemExit", [1, 2, 3, 5]),
    "try:\n    1/0\nfinally:\n    try:\n        [][0]\n    except IndexError:\n        pass":
        ("ZeroDivisionError", [1, 2, 4, 5, 6, 7]),
    "raise KeyboardInterrupt": ("KeyboardInterrupt", [1]),
    "def f(n):\n    f(n + 1)\nf(0)": ("RecursionError", [1, 3, 2]),
    "import threading\ndef f():\n    print(2)\nt = threading.Thread(target=f)\nt.start()\nt.join()": (None, None),
    "import os\nos._exit(0)": ("os._exit", []),
    "import os\nos.kill(os.getpid(), 9)": ("killed", []),
    "while True: pass": ("killed", []),
    "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', '1/0'])": ("os._exit", []),
    "import atexit\natexit.register(__import__('os')._exit, 0)": ("os._exit", []),
    "import atexit\natexit._clear()": ("os._exit", []),
    "import os\nif os.fork() == 0:\n    raise ValueError\nos.wait()\nraise KeyError": ("KeyError", [1, 2, 4, 5]),
    "import os\nif os.fork() == 0:\n    raise ValueError\nos.wait()\nos._exit(0)": ("os._exit", []),
    "import sys\nsys.last_type = sys.last_value = ValueError()\nsys.exit(1)": ("SystemExit", [1, 2, 3]),
    "import sys\nsys.excepthook = lambda *a: None\n1/0": ("ZeroDivisionError", [1, 2, 3]),
    "import sys\nsys.audit('sys.excepthook', 1, ValueError, 2, 3)\nsys.exit(1)": ("SystemExit", [1, 2, 3]),
    "exec(compile('\\n' * 8 + 'x = 1', __file__, 'exec'))": (None, [1]),
    CLAIMS + "os._exit(0)": ("os._exit", []),
    CLAIMS + "raise KeyError": ("KeyError", [1, 2, 3, 4, 5]),
    "import os\nos.closerange(3, 70000)\nprint(1)": ("os._exit", []),
}


@pytest.mark.parametrize("code", ENDINGS)
def test_trace_tells_ending_and_lines(sandbox, code):
    ending, lines = ENDINGS[code]
    [got] = sandbox.run_many([Job(code, trace=True, timeout=2)])
    assert got.ending == ending, got
    assert lines is None or got.lines == lines, got
    assert got.status != "lost"
    plain = sandbox.run(code, timeout=2)
    assert plain.ending is None and plain.lines is None, "only traced jobs report"
    assert (got.stdout, got.stderr, got.exit_code) == (plain.stdout, plain.stderr, plain.exit_code), \
        "tracing must not change what a program does"


def test_trace_names_builtin_bases(sandbox):
    [got] = sandbox.run_many([Job("class E(KeyError): pass\nclass IndexError(E): pass\nraise IndexError", trace=True)])
    assert got.ending == "IndexError" and got.ending_bases == ("KeyError", "LookupError", "Exception", "BaseException")


# ------------------------------------------------------------------------------------ the library itself

def test_batch_keeps_order_and_accepts_pairs():
    with Sandbox(workers=2) as sandbox:
        jobs = [(f"import time\ntime.sleep({(7 - i) / 100})\nprint({i}, input())", f"in {i}\n") for i in range(8)]
        assert [got.stdout for got in sandbox.run_many(jobs)] == [f"{i} in {i}\n" for i in range(8)]
        assert sandbox.run_many([]) == []


def test_hash_seed_acts_as_pythonhashseed(sandbox):
    code = "print(hash('a'), {'a', 'b', 'c'})"
    for seed in (0, 1, 4294967295):
        environment = {"PYTHONHASHSEED": str(seed), "PATH": "/usr/bin:/bin"}
        real = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
        assert sandbox.run_many([Job(code, hash_seed=seed)])[0].stdout == real


def test_files_lie_beside_the_program(sandbox):
    files = {"helper.py": "x = 1\n", "data/in put.txt": "héllo\r\n"}
    code = "import helper, os\nprint(helper.x, sorted(os.listdir()), open('data/in put.txt', newline='').read())"
    [got] = sandbox.run_many([Job(code, files=files)])
    assert got.stdout == "1 ['__pycache__', 'data', 'helper.py', 'main.py'] héllo\r\n\n", got


def test_large_input_and_output(sandbox):
    text = "0123456789abcde\n" * 60_000
    got = sandbox.run("import sys\nsys.stdout.write(sys.stdin.read())", text)
    assert got.stdout == text
    assert sandbox.run("print(1)", text * 4).stdout == "1\n", "a program need not read its input"
    assert sandbox.run("import os\nos.close(0)\nprint(2)", text).stdout == "2\n"


@pytest.mark.parametrize("make, error, words", [
    (lambda s: s.run(3), TypeError, "Job.code"),
    (lambda s: s.run(b"print(1)"), TypeError, "Job.code"),
    (lambda s: s.run("print(1)\0"), ValueError, "NUL"),
    (lambda s: s.run("'\ud800'"), ValueError, "surrogate"),
    (lambda s: s.run("print(1)", "\ud800"), ValueError, "surrogate"),
    (lambda s: s.run("print(1)", None), TypeError, "Job.stdin"),
    (lambda s: s.run("print(1)", timeout=-1), ValueError, "timeout"),
    (lambda s: s.run("print(1)", timeout=0), ValueError, "timeout"),
    (lambda s: s.run("print(1)", timeout=float("nan")), ValueError, "timeout"),
    (lambda s: s.run("x" * 50_000_000), ValueError, "limit"),
    (lambda s: s.run_many(["print(1)"]), TypeError, "pair"),
    (lambda s: s.run_many([Job("", hash_seed=-1)]), ValueError, "hash_seed"),
    (lambda s: s.run_many([Job("", files={"/etc/x": ""})]), ValueError, "relative"),
    (lambda s: s.run_many([Job("", files={"a/../../x": ""})]), ValueError, "relative"),
    (lambda s: s.run_many([Job("", files={"main.py": ""})]), ValueError, "main.py"),
    (lambda s: Sandbox(workers=0), ValueError, "workers"),
    (lambda s: Sandbox(timeout=0), ValueError, "timeout"),
    (lambda s: Sandbox(memory_mb=1), ValueError, "memory_mb"),
    (lambda s: Sandbox(isolation="some"), ValueError, "isolation"),
])
def test_bad_use_is_one_clear_error(sandbox, make, error, words):
    with pytest.raises(error, match=words) as caught:
        make(sandbox)
    assert "\n" not in str(caught.value)


def test_closed_sandbox_says_so():
    sandbox = Sandbox(workers=1)
    sandbox.run("print(1)")
    sandbox.close()
    sandbox.close()
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("print(1)")


def test_threads_share_a_sandbox(sandbox):
    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: sandbox.run(f"print({i})").stdout})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: f"{i}\n" for i in range(6)}


def test_works_after_the_thread_that_started_it_ended():
    with Sandbox(workers=1) as sandbox:
        thread = threading.Thread(target=sandbox.run, args=("print(1)",))
        thread.start()
        thread.join()
        assert sandbox.run("import os\nprint(os.getpid() < 100000)").status == "ok"


@linux
def test_killed_server_costs_no_result():
    with Sandbox(workers=1, timeout=10) as sandbox:
        sandbox.run("print(1)")
        server = sandbox.idle[0][0].process
        timer = threading.Timer(0.3, server.kill)
        timer.start()
        got = sandbox.run_many([Job(f"import time\ntime.sleep(0.1)\nprint({i})") for i in range(8)])
        timer.join()
        assert [g.stdout for g in got] == [f"{i}\n" for i in range(8)], "a job whose server died runs again"


@linux
def test_server_that_keeps_dying_is_lost_not_wrong(monkeypatch):
    with Sandbox(workers=1) as sandbox:
        sandbox.run("print(1)")
        send = type(sandbox.idle[0][0]).send

        def send_and_kill(server, *arguments):
            server.process.kill()
            server.process.wait()
            send(server, *arguments)
        monkeypatch.setattr("sandbox.Server.send", send_and_kill)
        assert sandbox.run("print(1)").status == "lost"
        monkeypatch.undo()
        assert sandbox.run("print(1)").stdout == "1\n", "and the sandbox goes on"


@linux
def test_nothing_outlives_a_killed_owner(tmp_path):
    """kill -9 of the owner in mid-run: its servers, its program and their files go with it."""
    code = ("import sys, tempfile\ntempfile.tempdir = sys.argv[2]\nsys.path.insert(0, sys.argv[1])\nimport sandbox\n"
            "s = sandbox.Sandbox(workers=2, timeout=60)\nprint('up', flush=True)\n"
            "s.run_many([('import os, time\\nos.fork()\\ntime.sleep(60)', '')] * 2)")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    owner = subprocess.Popen([sys.executable, "-c", code, root, str(tmp_path)], stdout=subprocess.PIPE)
    owner.stdout.readline()
    time.sleep(0.7)
    mine = [line for line in ps() if str(owner.pid) == line.split()[1]]
    assert len(mine) == 2, "two servers at work"
    owner.kill()
    owner.wait()
    owner.stdout.close()
    groups = {line.split()[0] for line in mine}
    deadline = time.monotonic() + 5
    while any(line.split()[2] in groups for line in ps()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [line for line in ps() if line.split()[2] in groups]
    assert os.listdir(tmp_path) == []


def ps():
    return subprocess.run(["ps", "-eo", "pid=,ppid=,sid=,args="], capture_output=True, text=True).stdout.splitlines()


def test_another_process_may_not_use_it(sandbox):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.run("print(1)")
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    assert b"belongs to" in os.read(reader, 1000)
    os.close(reader)
    assert sandbox.run("print(1)").stdout == "1\n"


def test_starts_quickly():
    start = time.monotonic()
    with Sandbox(workers=8) as sandbox:
        sandbox.run("print(1)")
    assert time.monotonic() - start < 2, "servers start when there is work for them, not before"


def test_sleepers_side_by_side():
    """A batch of programs that only wait costs a few time-outs, not one each."""
    with Sandbox(workers=1, timeout=0.5) as sandbox:
        start = time.monotonic()
        got = sandbox.run_many([("import time\ntime.sleep(60)", "")] * 32)
        assert {g.status for g in got} == {"timeout"}
        assert time.monotonic() - start < 4 * 0.5 + 3


def test_report_lists_every_layer(capsys):
    import sandbox as module
    done = subprocess.run([sys.executable, module.__file__, "--report"], capture_output=True, text=True)
    assert done.returncode == 0 and "Landlock" in done.stdout and "seccomp" in done.stdout, done
    assert all("active" in line or "unavailable" in line for line in done.stdout.splitlines())


@pytest.mark.slow
def test_soak_grows_nothing():
    """50,000 mixed programs: no growth of the owner's memory, descriptors, processes or temporary files."""
    programs = ["print(1)", "1/0", "import json\nprint(json.dumps([1]))", "import os\nos.fork()", "x = bytearray(1 << 40)",
                "open('/tmp/x', 'w').write('x' * 9999)", "import sys\nsys.exit(3)", "print('x' * 2_000_000)"]
    with Sandbox(timeout=5) as sandbox:
        sizes = []
        for round_ in range(10):
            for _ in range(50):
                got = sandbox.run_many([(programs[i % len(programs)], "") for i in range(100)])
                assert {g.status for g in got} <= {"ok", "error", "memory", "output"}
            pids = [str(os.getpid())] + [str(s.process.pid) for servers in sandbox.idle for s in servers.values()]
            pids += [p for pid in pids[1:] for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]
            pages = sum(int(open(f"/proc/{pid}/statm").read().split()[1]) for pid in pids)
            sizes.append((pages, leftovers(), [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]))
        assert sizes[-1][1:] == sizes[1][1:]
        assert sizes[-1][0] < 1.1 * sizes[1][0], "resident pages of the owner and its servers"
