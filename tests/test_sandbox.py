"""The sandbox: faithful to `python main.py`, and not to be harmed. `python -m pytest tests/test_sandbox.py`

Three parts: programs whose bytes must equal a real interpreter's, hostile programs by class, and the
library's own conduct (time-outs, batches, bad use, lost servers).
"""
import builtins
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from sandbox import Execution, Job, Sandbox

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs the Linux layers")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1, timeout=10) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def layers(sandbox):
    return sandbox.report()


def real_python(code, stdin=""):
    """(stdout, stderr, exit code) of `python main.py` in an empty folder, that folder's prefix removed."""
    with tempfile.TemporaryDirectory() as folder:
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
    "modules": "import sys\nprint(sorted(sys.modules))",
    "hooks": "import sys\nprint(sys.meta_path, sys.path_hooks, sys.gettrace(), sys.getprofile())\n"
             "print(len(sys.path_importer_cache))",
    "collect": "import gc\nprint(gc.collect(), gc.isenabled(), gc.get_freeze_count())",
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


@pytest.mark.parametrize("name", FAITHFUL)
def test_bytes_equal_real_python(sandbox, name):
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
    look = "import os\nprint(os.listdir(), [n for n in os.listdir('/tmp') + os.listdir('/dev/shm') if 'sandbox' not in n])"
    if layers["private /proc"] == "":
        look += "\nprint(len([n for n in os.listdir('/proc') if n.isdigit()]))"
    after = sandbox.run(look)
    assert after.status == "ok" and after.stdout.startswith("['main.py'] ["), after
    if layers["private /proc"] == "":
        assert after.stdout.endswith("\n2\n"), "only the server and the program itself are in the namespace"


def leftovers():
    """What a job could leave on this host: our descendants, temporary entries, descriptors."""
    mine = str(os.getpid())
    processes = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    servers = [line for line in processes.splitlines() if "main.py" in line]
    return (len([line for line in servers if line.split()[1] == mine]),
            sorted(n for n in os.listdir(tempfile.gettempdir()) if n.startswith("sandbox_")),
            len(os.listdir("/proc/self/fd")))
