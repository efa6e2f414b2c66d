"""The fork server: a Python interpreter stopped just before `python main.py`, forked once per job.

sandbox.py starts `python main.py` in an empty folder with a copy of this file on its path under the
name `sitecustomize`, so Python itself runs it as the last step of its start-up. The server never
leaves this file. A job's process, forked from it, does: it raises the ImportError that a missing
`sitecustomize` would have raised, no frame or module of ours is left, and the interpreter goes on to
run main.py exactly as it would have done. So tracebacks, flushing, atexit, threads, recursion depth
and `__main__` are not imitated, they are the real ones. (`-I` would be as tight but ignores
PYTHONHASHSEED and shows in sys.flags; here the environment and the folder are ours alone instead.)

One job at a time. A message is a line of integers, then the bytes they count:
    request   time-out in ms, trace, then the lengths of program, stdin, and each name and text of `files`
    reply     status, exit code, microseconds, then the lengths of stdout, stderr and the trace report
Standard library only, and only modules that leave no trace in what a program sees.
"""
import sys

FOUND_MODULES = set(sys.modules)        # what a program sees; everything imported below is hidden again
FOUND_PATHS = set(sys.path_importer_cache)
import atexit           # noqa: E402
import builtins         # noqa: E402
import ctypes           # noqa: E402
import gc               # noqa: E402
import os               # noqa: E402
import posix            # noqa: E402
import resource         # noqa: E402
import select           # noqa: E402
import time             # noqa: E402
import _signal          # noqa: E402
import _thread          # noqa: E402
import jail as jails    # noqa: E402

STATUSES = ("ok", "error", "timeout", "memory", "output", "crash", "lost")
OUTPUT_BYTES = 1 << 20          # of each stream; a run that writes more is ended
CHUNK = 65536                   # bytes read or written at once: what a pipe holds
TICK = 0.1                      # seconds between looks at a running job's memory
LOW_FDS = 64                    # the server's own descriptors are below this
BUILTIN_ERRORS = {value: name for name, value in vars(builtins).items()
                  if isinstance(value, type) and issubclass(value, BaseException)}


def read_exactly(fd, count):
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            os._exit(0)                             # the owner is gone
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_numbers(fd):
    line = b""
    while not line.endswith(b"\n"):
        line += read_exactly(fd, 1)
    return [int(number) for number in line.split()]


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def main():
    """Set up, then serve. Returns only in a job's process, about to become `python main.py`."""
    settings = {name: os.environ.pop(name) for name in ("SANDBOX_CONTROL", "SANDBOX_MEMORY_MB", "PYTHONPATH")}
    for name in settings:
        posix.environ.pop(name.encode(), None)
    control = int(settings["SANDBOX_CONTROL"])
    os.set_inheritable(control, False)
    sys.path.remove(settings["PYTHONPATH"])
    FOUND_PATHS.discard(settings["PYTHONPATH"])
    os.umask(0o022)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    owner = os.pidfd_open(os.getppid()) if hasattr(os, "pidfd_open") else None
    jail = jails.enter(os.getcwd(), int(settings["SANDBOX_MEMORY_MB"]))
    serve_in_child(jail)
    jails.settle(jail)
    make_folder(jail)
    report = "\n".join(f"{name}\t{reason}" for name, reason in jail.layers.items()).encode()
    write_all(control, b"%d\n" % len(report) + report)
    for name in set(sys.modules) - FOUND_MODULES:
        del sys.modules[name]
    for path in set(sys.path_importer_cache) - FOUND_PATHS:
        del sys.path_importer_cache[path]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(globals()))     # or we'd be a program's first garbage
    gc.collect()
    gc.disable()                # until a program runs: a collection here would only copy pages there
    gc.freeze()                 # a program's collections pass over all that is ours, but not over
    for thing in (sys.modules["__main__"], vars(sys.modules["__main__"])):       # what will be its own
        ctypes.pythonapi.PyObject_GC_UnTrack(ctypes.py_object(thing))
        ctypes.pythonapi.PyObject_GC_Track(ctypes.py_object(thing))
    learnt = run(jail, control, owner, 10.0, LEARN, [b"", b""])
    if learnt is None:
        return
    NORMAL_END.append(learnt[5])
    while True:
        numbers = read_numbers(control)
        parts = [read_exactly(control, length) for length in numbers[2:]]
        timeout, trace = numbers[0] / 1000, numbers[1]
        result = run(jail, control, owner, timeout, trace, parts)
        if result is None:
            return
        if trace and CHANGES_DEPTH and b"RecursionError" in parts[0] + result[4]:
            told = result[5]            # the trace function took a level of the stack: its streams are not
            result = run(jail, control, owner, timeout, 0, parts)       # those of the program alone
            if result is None:
                return
            result = *result[:5], told
        write_all(control, b"%d %d %d %d %d %d\n" % (*result[:3], *map(len, result[3:])) + b"".join(result[3:]))


def serve_in_child(jail):
    """Fork: the child serves (as the first process of its PID namespace), the parent waits for its end
    and then ends whatever it left, for hosts without that namespace."""
    try:
        jails.prctl(jails.PR_SET_CHILD_SUBREAPER, 1)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")                       # a host short of memory should take us first
    except OSError:
        pass
    pid = os.fork()
    if pid == 0:
        return
    os.closerange(0, LOW_FDS)                       # the owner must see the server's end, not ours
    os.waitpid(pid, 0)
    end_processes(jail, None)
    if jail.scratch == [jail.folder]:
        wipe(jail.folder, ())
        os.rmdir(jail.folder)
    os._exit(0)


def make_folder(jail):
    """The empty folder that the next program runs in."""
    for folder in jail.scratch:
        if folder != jail.folder:
            os.chmod(folder, 0o1777)
    if not os.path.isdir(jail.folder):
        os.makedirs(jail.folder)
    os.chmod(jail.folder, 0o700)
    if jail.uid is not None:
        os.chown(jail.folder, jail.uid, jail.uid)


def run(jail, control, owner, timeout, trace, parts):
    """Run one job: (status, exit code, microseconds, stdout, stderr, trace report). None in the job's
    own process, which must now return."""
    make_folder(jail)
    pipes = [os.pipe() for _ in range(4)]           # stdin, stdout, stderr, the harness's report
    secret = os.urandom(16)                         # without it nothing on the report pipe counts
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        become_program(jail, pipes, timeout, trace, secret, parts)
        return None
    for fd in (pipes[0][0], pipes[1][1], pipes[2][1], pipes[3][1]):
        os.close(fd)
    job = Running(jail, pid, pipes, parts[1])
    status = job.wait(started + timeout, control, owner)
    seconds = time.monotonic() - started
    code = os.waitstatus_to_exitcode(end_processes(jail, pid, job.exit_status))
    out, err, told = job.finish()
    clean(jail)
    if not told.startswith(secret):
        status = "lost"                             # it never became the program
    elif status == "":
        status = natural_status(code, err)
    mark = secret + pid.to_bytes(4, "big")
    at = told.find(mark, 1)
    told = told[at + len(mark):] if trace and at > 0 else b""
    place = os.fsencode(jail.folder) + b"/"
    return STATUSES.index(status), code, int(seconds * 1e6), out.replace(place, b""), err.replace(place, b""), told


def natural_status(code, err):
    """The status of a run that no limit of ours ended."""
    if code == 0:
        return "ok"
    if code < 0:
        return "timeout" if code == -_signal.SIGXCPU else "crash"
    last_line = err.rstrip().rsplit(b"\n", 1)[-1]
    return "memory" if last_line.startswith(b"MemoryError") else "error"


class Running:
    """A running job seen from the server: its process and its streams."""

    def __init__(self, jail, pid, pipes, stdin_data):
        self.memory_mb, self.pid, self.exit_status = jail.memory_mb, pid, None
        self.stdin, self.stdin_data = pipes[0][1], memoryview(stdin_data)
        self.output = {pipe[0]: b"" for pipe in pipes[1:]}
        for fd in (self.stdin, *self.output):
            os.set_blocking(fd, False)
        self.process = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        self.feed()

    def feed(self):
        """Give the program's stdin what it takes now, and close it after the last byte."""
        try:
            while self.stdin_data:
                self.stdin_data = self.stdin_data[os.write(self.stdin, self.stdin_data[:CHUNK]):]
        except BlockingIOError:
            return
        except BrokenPipeError:
            pass
        os.close(self.stdin)
        self.stdin = None

    def reap(self):
        """Collect the children that have ended: the program, and orphans that became ours."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.pid:
                    self.exit_status = ended[1]
        except ChildProcessError:
            pass

    def wait(self, deadline, control, owner):
        """Serve the streams until the program ends or meets a limit; returns that limit, or ""."""
        poll = select.poll()
        for fd in (*self.output, self.process, owner):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        if self.stdin is not None:
            poll.register(self.stdin, select.POLLOUT)
        poll.register(control, 0)                           # only that the owner hung up
        tick, told = time.monotonic() + TICK, False
        while self.exit_status is None:
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            pause = 0.002 if self.process is None else min(deadline, tick) - now
            for fd, _ in poll.poll(max(1, pause * 1000)):
                if fd in (control, owner):
                    os._exit(0)                             # and the namespace ends with its first process
                elif fd == self.process:
                    self.reap()
                elif fd == self.stdin:
                    self.feed()
                    if self.stdin is None:
                        poll.unregister(fd)
                elif fd in self.output:
                    chunk = os.read(fd, CHUNK)
                    self.output[fd] += chunk
                    if not chunk:
                        poll.unregister(fd)
                    elif len(self.output[fd]) > OUTPUT_BYTES:
                        return "output"
            if self.process is None or time.monotonic() >= tick:
                self.reap()
                if not told and self.exit_status is None and processor_seconds(self.pid) < TICK / 5:
                    write_all(control, b"waiting\n")        # the owner may run another job meanwhile
                    told = True
                tick = time.monotonic() + TICK
                if unshared_mb() > self.memory_mb:
                    return "memory"
        return ""

    def finish(self):
        """What the pipes still hold, now that nobody is left to write; closes everything."""
        for fd in self.output:
            try:
                while len(self.output[fd]) <= OUTPUT_BYTES and (chunk := os.read(fd, CHUNK)):
                    self.output[fd] += chunk
            except BlockingIOError:
                pass
        for fd in (self.stdin, self.process, *self.output):
            if fd is not None:
                os.close(fd)
        return [data[:OUTPUT_BYTES] for data in self.output.values()]


def processor_seconds(pid):
    try:
        return time.clock_gettime(~pid << 3 | 2)            # the clock of that process's processor time
    except OSError:
        return TICK


def unshared_mb():
    """Memory that the job's processes hold and do not share, in MiB."""
    pages, waiting = 0, ["thread-self"]
    while waiting:
        pid = waiting.pop()
        waiting += children(pid)
        try:
            with open(f"/proc/{pid}/statm") as file:
                fields = file.read().split()
            pages += int(fields[1]) - int(fields[2]) if pid != "thread-self" else 0
        except OSError:
            pass
    return pages * resource.getpagesize() / (1 << 20)


def end_processes(jail, pid, exit_status=None):
    """Kill and collect all that a job started; returns its program's wait status. In our own PID
    namespace one call reaches every process at once; elsewhere the job's group, then, since orphans
    become the children of this subreaper, our children until none is left."""
    alone = os.getpid() == 1 and jail.active("PID namespace")
    if pid is not None and not alone:
        kill(-pid)
        if exit_status is None:
            kill(pid)
    while True:
        for child in [-1] if alone else children():
            kill(int(child))
        try:
            ended, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return exit_status
        if ended == pid:
            exit_status = status


def kill(pid):
    try:
        os.kill(pid, _signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def children(pid="thread-self"):
    """The process ids of a process's children, as /proc names them; ours by default."""
    path = "/proc/thread-self/children" if pid == "thread-self" else f"/proc/{pid}/task/{pid}/children"
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []


def clean(jail):
    for folder in jail.scratch:
        wipe(folder, jail.kept)


def wipe(folder, kept):
    """Empty a folder, but for the mount points in `kept`."""
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        if any(keep.startswith(path + "/") for keep in kept):
            wipe(path, kept)
        elif path not in kept:
            remove(path)


def remove(path):
    """Remove a file or a tree. Inner folders first move up beside `path`: no depth is too deep."""
    folders, count = [path], 0
    while folders:
        folder = folders.pop()
        try:
            os.unlink(folder)
            continue
        except (IsADirectoryError, PermissionError):        # Linux, macOS
            os.chmod(folder, 0o700)
        for name in os.listdir(folder):
            inner = f"{folder}/{name}"
            try:
                os.unlink(inner)
            except (IsADirectoryError, PermissionError):
                os.chmod(inner, 0o700)
                count += 1
                os.rename(inner, f"{path}.{count}")
                folders.append(f"{path}.{count}")
        os.rmdir(folder)


def become_program(jail, pipes, timeout, trace, secret, parts):
    """In the job's process: its streams, the jail, its files. A failure here is the sandbox's own."""
    try:
        for fd, end in enumerate((pipes[0][0], pipes[1][1], pipes[2][1])):
            os.dup2(end, fd)
        hidden = LOW_FDS
        if trace:               # above the job's own limit, where no loop over descriptors looks
            room = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 16384) - 1024
            hidden = 1024 + int.from_bytes(os.urandom(4), "big") % max(1, room)
        report = os.dup2(pipes[3][1], hidden, inheritable=False)
        jails.confine(jail, int(timeout) + 2)
        os.chdir(jail.folder)
        for name, text in ((b"main.py", parts[0]), *zip(parts[2::2], parts[3::2])):
            if os.path.dirname(name):
                os.makedirs(os.path.dirname(name), exist_ok=True)
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            write_all(fd, text)
            os.close(fd)
        os.closerange(3, LOW_FDS)
        gc.enable()
        write_all(report, secret)
        if trace == TRACE:
            start_trace(report, secret, jail.folder + "/main.py")
        elif trace == LEARN:
            atexit.register(lambda: write_all(report, secret + os.getpid().to_bytes(4, "big") + call_stack()))
        else:
            os.close(report)
            atexit.register(leave)
    except BaseException:
        os._exit(1)


def call_stack():
    """The return addresses on the C stack: from where Python is being ended, seen from atexit."""
    addresses = (ctypes.c_void_p * 64)()
    return bytes(addresses)[:8 * backtrace(addresses, 64)] if backtrace else b""


def leave():
    """The last function that atexit calls. Ending an interpreter costs more than most programs: where
    no one could tell the difference, exit at once; else let it do all it does."""
    try:
        code = exit_code()
        if code is not None and not has_finalizers():
            sys.stdout.flush()
            sys.stderr.flush()
            jails.libc.fflush(None)
            os._exit(code)
    except BaseException:
        pass
    gc.unfreeze()


def exit_code():
    """The exit code of a program whose end is an ordinary one, else None (SystemExit, a signal, …)."""
    if call_stack() not in NORMAL_END or _thread._count() or HOOKS != tuple(
            map(id, (sys.excepthook, sys.stdout, sys.stderr))):
        return None
    if "last_type" not in vars(sys):
        return 0
    frame = sys.last_traceback.tb_frame             # main.py's own: did it end by this exception?
    if issubclass(sys.last_type, KeyboardInterrupt) or frame.f_back is not None \
            or frame.f_code.co_code[frame.f_lasti] in RETURNS:
        return None
    return 1


def has_finalizers():
    """Whether some object of the program may act when it is freed."""
    objects = gc.get_objects()                      # ours are frozen and not among them
    if len(objects) > 20000:
        return True                                 # freeing them costs no more than this look
    known = {}
    for thing in objects:
        kind = type(thing)
        if kind not in known:
            known[kind] = any("__del__" in vars(base) for base in MRO(kind)) or kind.__name__ == "weakref"
        if known[kind] and getattr(thing, "__callback__", True) is not None:
            return True
        if type in MRO(kind) and any("__del__" in vars(base) for base in MRO(thing)):
            return True
    return False


def start_trace(report, secret, path):
    """Have the interpreter note how main.py ends and the lines it visits. The report is written by the
    first function given to atexit, so the last to run: only if main.py's code came back to Python."""
    pid, main_thread = os.getpid(), _thread.get_ident()
    codes = {}                  # id -> (code object of main.py itself, its lines not visited yet)
    seen = {}                   # line numbers in order of first visit
    ending = ["SystemExit", "SystemExit", "BaseException"]        # until something else is known

    def collect(code):
        codes[id(code)] = code, {line for _, _, line in code.co_lines() if line}
        for constant in code.co_consts:
            if isinstance(constant, type(code)):
                collect(constant)

    def watch_uncaught(event, arguments):
        if event == "sys.excepthook" and _thread.get_ident() == main_thread:
            if sys._getframe().f_back is None:      # from the interpreter, not from the program
                mro = type.__dict__["__mro__"].__get__(arguments[1])
                ending[:] = [type.__dict__["__name__"].__get__(mro[0])]
                ending.extend(BUILTIN_ERRORS[base] for base in mro if base in BUILTIN_ERRORS)

    def tell():
        gc.unfreeze()
        if os.getpid() == pid:
            text = " ".join(ending) + "\n" + " ".join(map(str, seen))
            try:
                write_all(report, secret + pid.to_bytes(4, "big") + text.encode())
            except OSError:
                pass                                # the program closed or flooded it: no report

    def is_main(code):
        return code.co_filename == path and code.co_name == "<module>"

    sys.addaudithook(watch_uncaught)
    atexit.register(tell)
    start = monitor if hasattr(sys, "monitoring") else settrace
    start(is_main, collect, codes, seen, ending)


def settrace(is_main, collect, codes, seen, ending):
    """Python 3.11: the classic trace function, in every thread."""
    root = []

    def enter(frame, event, arg):
        code = frame.f_code
        if not root and frame.f_back is None and is_main(code):
            root.append(code)
            collect(code)
        if id(code) not in codes:
            return None
        threading = sys.modules.get("threading")
        if threading is not None and threading._trace_hook is None:
            threading._trace_hook = enter
        return step if codes[id(code)][1] or code is root[0] else None

    def step(frame, event, arg):
        code = frame.f_code
        if event == "line" and frame.f_lineno:
            seen.setdefault(frame.f_lineno)
            left = codes[id(code)][1]
            left.discard(frame.f_lineno)
            frame.f_trace_lines = bool(left)
        elif event == "return" and code is root[0] and code.co_code[frame.f_lasti] in RETURNS:
            ending.clear()
        return step

    sys.settrace(enter)


def monitor(is_main, collect, codes, seen, ending):
    """Python 3.12: sys.monitoring, where a line once seen costs nothing more."""
    tool, events = 4, sys.monitoring.events

    def enter(code, offset):
        if not codes and is_main(code):
            collect(code)
            for inner, _ in codes.values():
                sys.monitoring.set_local_events(tool, inner, events.LINE)
            sys.monitoring.set_local_events(tool, code, events.LINE | events.PY_RETURN)
            sys.monitoring.set_events(tool, 0)
        return sys.monitoring.DISABLE

    def line(code, number):
        if number:
            seen.setdefault(number)
        return sys.monitoring.DISABLE

    def left(code, offset, value):
        ending.clear()

    sys.monitoring.use_tool_id(tool, "lines")
    for event, function in ((events.PY_START, enter), (events.LINE, line), (events.PY_RETURN, left)):
        sys.monitoring.register_callback(tool, event, function)
    sys.monitoring.set_events(tool, events.PY_START)


TRACE, LEARN = 1, 2             # what to do beside running a program
NORMAL_END = []                 # the call stack of a normal end
RETURNS = (83, 121)             # the opcodes RETURN_VALUE and (from Python 3.12 on) RETURN_CONST
HOOKS = tuple(map(id, (sys.excepthook, sys.stdout, sys.stderr)))     # a reference would keep them open
MRO = type.__dict__["__mro__"].__get__
backtrace = getattr(jails.libc, "backtrace", None)
CHANGES_DEPTH = not hasattr(sys, "monitoring")


try:
    main()
except BaseException:
    sys.excepthook(*sys.exc_info())
    os._exit(1)
raise ImportError("the program goes on without this module", name="sitecustomize")
