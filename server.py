"""The fork server: a Python interpreter stopped just before `python main.py`, forked once per job.

sandbox.py starts `python main.py` in an empty folder with a copy of this file on its path under the name
`sitecustomize`, so Python runs it as the last step of its start-up. The server never leaves this file. A job's
process, forked from it and prepared by harness.py, does: it raises the ImportError that a missing `sitecustomize`
would have raised, no frame or module of ours is left, and the interpreter goes on to run main.py as it would have
done. Tracebacks, flushing, atexit, threads, recursion depth and `__main__` are not imitated but real. (`-I` would be
as tight, but ignores PYTHONHASHSEED and shows in sys.flags; instead, environment and folder are ours alone.)

One job at a time. A message is a line of integers, then the bytes whose lengths end the line:
    request   time-out in ms, trace; program, stdin, then a name and a text for each of the files
    reply     status, exit code, microseconds; stdout, stderr, the trace report
"""
import sys

FOUND_MODULES, FOUND_PATHS = set(sys.modules), set(sys.path_importer_cache)     # all that a program may see
import _signal          # noqa: E402
import ctypes           # noqa: E402
import gc               # noqa: E402
import os               # noqa: E402
import resource         # noqa: E402
import select           # noqa: E402
import time             # noqa: E402
import harness          # noqa: E402
import jail as jails    # noqa: E402

OUTPUT_BYTES = 1 << 20          # of each stream; a run that writes more is ended
CHUNK = 65536                   # bytes moved at once: what a pipe holds
TICK = 0.1                      # seconds between looks at a running job's memory and processor time


def read_exactly(fd, count):
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            os._exit(0)                                     # the owner is gone
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_numbers(fd):
    line = b""
    while not line.endswith(b"\n"):
        line += read_exactly(fd, 1)
    return [int(number) for number in line.split()]


def main():
    """Set up, then serve. Returns only in a job's process, about to become `python main.py`."""
    settings = {name: os.environ.pop(name) for name in ("SANDBOX_CONTROL", "SANDBOX_MEMORY_MB", "PYTHONPATH")}
    sys.path.remove(settings["PYTHONPATH"])
    FOUND_PATHS.discard(settings["PYTHONPATH"])
    control = int(settings["SANDBOX_CONTROL"])
    os.set_inheritable(control, False)
    os.umask(0o022)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    owner = os.pidfd_open(os.getppid()) if hasattr(os, "pidfd_open") else None
    jail = jails.enter(os.getcwd(), int(settings["SANDBOX_MEMORY_MB"]))
    serve_in_child(jail)
    jails.settle(jail)
    vanish()
    learnt = run(jail, control, owner, 10.0, harness.LEARN, [b"", b""])
    if learnt is None:
        return
    harness.NORMAL_END.append(learnt[5])
    report = "\n".join(map("\t".join, jail.layers.items())).encode()
    harness.write_all(control, b"%d\n" % len(report) + report)
    while True:
        milliseconds, trace, *lengths = read_numbers(control)
        parts = [read_exactly(control, length) for length in lengths]
        result = run(jail, control, owner, milliseconds / 1000, trace, parts)
        if result and trace and not hasattr(sys, "monitoring") and b"RecursionError" in parts[0] + result[4]:
            told = result[5]            # Python 3.11's trace function takes a level of the program's stack,
            result = run(jail, control, owner, milliseconds / 1000, harness.PLAIN, parts)   # so see it without
            result = result and (*result[:5], told)
        if result is None:
            return
        harness.write_all(control, b"%s %d %d %d %d %d\n" % (*result[:3], *map(len, result[3:])) + b"".join(result[3:]))


def serve_in_child(jail):
    """Fork: the child serves (as the first process of its PID namespace); the parent waits for its end and then
    ends whatever it left, for hosts without that namespace."""
    try:
        jails.prctl(jails.PR_SET_CHILD_SUBREAPER, 1)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")                               # a host short of memory should take us first
    except OSError:
        pass
    pid = os.fork()
    if pid == 0:
        return
    os.closerange(0, harness.LOW_FDS)                               # the owner must see the server's end, not ours
    os.waitpid(pid, 0)
    end_processes(jail, None)
    if jail.scratch == [jail.folder]:
        jails.remove(jail.folder)
    os._exit(0)


def vanish():
    """Take all that is ours out of a program's sight, and out of its garbage collector's reach."""
    for name in set(sys.modules) - FOUND_MODULES:
        del sys.modules[name]
    for path in set(sys.path_importer_cache) - FOUND_PATHS - set(sys.path):
        del sys.path_importer_cache[path]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(globals()))     # or we would be a program's first garbage
    gc.collect()
    gc.disable()
    gc.freeze()
    for thing in sys.modules["__main__"], vars(sys.modules["__main__"]):        # but these will be the program's
        ctypes.pythonapi.PyObject_GC_UnTrack(ctypes.py_object(thing))
        ctypes.pythonapi.PyObject_GC_Track(ctypes.py_object(thing))


def make_folder(jail):
    """The empty folder that the next program runs in."""
    for folder in jail.scratch:
        if folder != jail.folder:
            os.chmod(folder, 0o1777)
    os.makedirs(jail.folder, exist_ok=True)
    os.chmod(jail.folder, 0o700)
    if jail.uid is not None:
        os.chown(jail.folder, jail.uid, jail.uid)


def run(jail, control, owner, timeout, trace, parts):
    """Run one job: (status, exit code, microseconds, stdout, stderr, trace report). None in the job's own process,
    which must now return."""
    make_folder(jail)
    pipes = [os.pipe() for _ in range(4)]                   # stdin, stdout, stderr, the harness's report
    secret = os.urandom(16)                                 # without it nothing on the report pipe counts
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        return harness.become_program(jail, pipes, timeout, trace, secret, parts)
    for fd in (pipes[0][0], pipes[1][1], pipes[2][1], pipes[3][1]):
        os.close(fd)
    job = Running(pid, pipes, parts[1])
    status = job.wait(started + timeout, jail.memory_mb, control, owner)
    microseconds = int(1e6 * (time.monotonic() - started))
    code = os.waitstatus_to_exitcode(end_processes(jail, pid, job.exit_status))
    out, err, told = job.finish()
    for folder in jail.scratch:
        jails.wipe(folder, jail.kept)
    if not told.startswith(secret):
        status = "lost"                                     # it never became the program
    elif status is None and code < 0:
        status = "timeout" if code == -_signal.SIGXCPU else "crash"
    elif status is None:
        out_of_memory = code == 1 and err.rstrip().rsplit(b"\n", 1)[-1].startswith(b"MemoryError")
        status = "memory" if out_of_memory else "error" if code else "ok"
    mark = secret + pid.to_bytes(4, "big")
    at = told.find(mark, 1)
    if at > 0:
        told = told[at + len(mark):]
    else:                                                   # control never came back from the program
        told = b"os._exit\n" if status in ("ok", "error") else b"killed\n"
    place = os.fsencode(jail.folder) + b"/"
    return status.encode(), code, microseconds, out.replace(place, b""), err.replace(place, b""), told


class Running:
    """A running job seen from the server: its process and its streams."""

    def __init__(self, pid, pipes, stdin_data):
        self.pid, self.exit_status = pid, None
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

    def wait(self, deadline, memory_mb, control, owner):
        """Serve the streams until the program ends or meets a limit; returns that limit's status, or None."""
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
            for fd, _ in poll.poll(2 if self.process is None else max(1, 1000 * (min(deadline, tick) - now))):
                if fd in (control, owner):
                    os._exit(0)                             # and the namespace ends with its first process
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
            self.reap()
            if time.monotonic() >= tick and self.exit_status is None:
                tick = time.monotonic() + TICK
                if unshared_mb() > memory_mb:
                    return "memory"
                if not told and waits(self.pid):
                    harness.write_all(control, b"waiting\n")        # the owner may run another job meanwhile
                    told = True

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


def waits(pid):
    """Whether a process sleeps and has used little of the processor; one that only lacks its turn does not wait."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(") ")[2][0]
        return state != "R" and time.clock_gettime(~pid << 3 | 2) < TICK / 5     # its clock of processor time
    except OSError:
        return False


def unshared_mb():
    """Memory that all processes of the job hold and do not share, in MiB."""
    pages, pids = 0, children()
    for pid in pids:                                        # grows while we walk it
        pids += children(f"{pid}/task/{pid}")
        try:
            with open(f"/proc/{pid}/statm") as file:
                fields = file.read().split()
            pages += int(fields[1]) - int(fields[2])
        except OSError:
            pass
    return pages * resource.getpagesize() / (1 << 20)


def children(of="thread-self"):
    """Process ids, as /proc names them."""
    try:
        with open(f"/proc/{of}/children") as file:
            return file.read().split()
    except OSError:
        return []


def end_processes(jail, pid, exit_status=None):
    """Kill and collect all that a job started; returns its program's wait status. In our own PID namespace one call
    reaches every process at once; elsewhere the job's group, then, since orphans become the children of this
    subreaper, our children until none is left."""
    alone = os.getpid() == 1 and jail.active("PID namespace")
    targets = [-1] if alone else [-pid, pid] if exit_status is None and pid else [-pid] if pid else []
    while True:
        for target in targets if alone else targets + children():
            try:
                os.kill(int(target), _signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        try:
            ended, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return exit_status
        if ended == pid:
            exit_status = status
        targets = targets[:1] if alone else []


try:
    main()
except BaseException:
    sys.excepthook(*sys.exc_info())
    os._exit(1)
raise ImportError("the program goes on without this module", name="sitecustomize")
