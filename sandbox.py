"""Run hostile programs, many, fast, with the output of `python main.py` byte for byte:

    with Sandbox() as sandbox:
        execution = sandbox.run("print(input())", stdin="hello\\n")

CodeBoost (arXiv 2508.05242) executes every snippet and completion through bash, in the training user's own files,
environment and network. Here fork servers (server.py) run one job at a time each, jailed (jail.py): a job costs a fork,
not an interpreter's start, and nothing outlives it. Servers start when there is work and die with their owner.

Not covered: bugs of the kernel; side channels; locks on the interpreter's own files, which two jobs may both read; an
earlier job's bytes in a server's freed memory; whatever a layer that `--report` names as missing would have stopped
(without a mount namespace, the folder's total size). A traced program that rewrites its interpreter could forge its
trace, though not its output or exit code. On Python 3.11 the trace takes a level of the stack: a program that mentions
RecursionError is run again without it for its output.
"""
import argparse
import contextlib
import itertools
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

MAX_BYTES = 16 << 20    # of a program, its stdin, a file
GRACE = 10.0            # seconds past a job's time-out after which its server counts as hung
ATTEMPTS = 2            # a job whose server died is run again once, then it is lost
SEEDS_PER_WORKER = 3    # hash seeds whose servers a worker keeps warm
MAX_ASIDE = 32          # jobs that may wait or hang beside those at work
WAITING = b"waiting\n"  # a server's word that its job uses no processor


@dataclass
class Job:
    """A program and what it is given."""
    code: str
    stdin: str = ""
    files: dict | None = None       # relative name -> text, written beside main.py
    timeout: float | None = None    # seconds of wall clock; None: the sandbox's
    hash_seed: int = 0              # acts as PYTHONHASHSEED
    trace: bool = False             # fill Execution.ending, .ending_bases and .lines


@dataclass
class Execution:
    """What a program did. Both streams are UTF-8 with surrogateescape, without the job folder's name."""
    stdout: str
    stderr: str
    exit_code: int                  # subprocess's: -n for signal n
    status: str                     # ok error timeout memory output crash lost
    seconds: float                  # wall clock, from the fork to the end
    ending: str | None = None       # traced: an exception's type, None after a normal end; where control never came
    #                                 back: "os._exit" (it left by itself), "killed" (by a signal or a limit)
    ending_bases: tuple = ()        # traced: the builtin exception types among its bases, itself included
    lines: list | None = None       # traced: line numbers of main.py in order of first visit


def check_job(job):
    """A Job from a Job or a (code, stdin) pair; TypeError or ValueError naming what is wrong."""
    if not isinstance(job, Job):
        if not isinstance(job, tuple) or len(job) != 2:
            raise TypeError(f"a job is a Job or a (code, stdin) pair, not {type(job).__name__}")
        job = Job(*job)
    check_text("Job.code", job.code)
    check_text("Job.stdin", job.stdin)
    if "\0" in job.code:
        raise ValueError("Job.code holds a NUL byte, which no Python program may: drop the program")
    if not isinstance(job.hash_seed, int) or not 0 <= job.hash_seed < 2 ** 32:
        raise ValueError(f"Job.hash_seed must be an integer from 0 to 4294967295, not {job.hash_seed!r}")
    if job.timeout is not None:
        check_positive("Job.timeout", job.timeout)
    for name, text in (job.files or {}).items():
        check_text("a name in Job.files", name)
        check_text(f"Job.files[{name!r}]", text)
        if name in ("", "main.py") or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"Job.files name {name!r} must be relative, without '..', and not main.py")
    return job


def check_text(name, text):
    if not isinstance(text, str):
        raise TypeError(f"{name} must be str, not {type(text).__name__}")
    try:
        size = len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a lone surrogate at position {error.start}: it has no bytes") from None
    if size > MAX_BYTES:
        raise ValueError(f"{name} has {size:,} bytes; the limit is {MAX_BYTES:,}")


def check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86400:
        raise ValueError(f"{name} must be a number of seconds above 0, at most 86400, not {value!r}")


class Server:
    """One fork server: its process and the socket to it."""

    def __init__(self, hash_seed, memory_mb):
        self.hash_seed, self.buffer = hash_seed, bytearray()
        self.process = self.layers = None
        boot = tempfile.mkdtemp(prefix="sandbox_boot_")
        folder = tempfile.mkdtemp(prefix="sandbox_")
        self.socket, theirs = socket.socketpair()
        try:
            here = os.path.dirname(os.path.abspath(__file__))
            for name, copy in (("server", "sitecustomize"), ("harness", "harness"), ("jail", "jail")):
                shutil.copyfile(os.path.join(here, f"{name}.py"), os.path.join(boot, f"{copy}.py"))
            environment = {
                "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "PYTHONPATH": boot,
                "PYTHONHASHSEED": str(hash_seed), "OPENBLAS_NUM_THREADS": "1",      # its threads' memory counts, too
                "SANDBOX_CONTROL": str(theirs.fileno()), "SANDBOX_MEMORY_MB": str(memory_mb)}
            self.process = subprocess.Popen(
                [sys.executable, "main.py"], cwd=folder, env=environment, pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
            theirs.close()                      # or its end would go unnoticed
            self.process.stdin.close()
            self.layers = self.greeting()
        finally:
            theirs.close()
            shutil.rmtree(boot, ignore_errors=True)
            if self.layers is None or self.layers["mount namespace"] == "":
                shutil.rmtree(folder, ignore_errors=True)       # the server has its own under that name
            if self.layers is None:
                self.close()

    def greeting(self):
        """The server's first message: each layer of the jail and why it is missing, or ""."""
        self.socket.settimeout(60)
        with self.socket.makefile("rb") as stream:
            text = stream.read(int(stream.readline() or 0)).decode()
        if not text:
            raise RuntimeError(f"the sandbox's server did not start: {self.process.stderr.read().decode()}")
        return dict(line.split("\t") for line in text.split("\n"))

    def send(self, index, job, timeout, attempt):
        """Have it run a job."""
        texts = [job.code, job.stdin, *(text for item in (job.files or {}).items() for text in item)]
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        numbers = [int(timeout * 1000), int(job.trace), *map(len, parts)]
        self.index, self.attempt, self.started = index, attempt, time.monotonic()
        self.waits = self.aside = False         # it uses no processor; it no longer counts as at work
        self.deadline = self.started + 2 * timeout + GRACE              # a traced job may run twice
        with contextlib.suppress(OSError):      # a dead server shows when we listen
            self.socket.sendall(" ".join(map(str, numbers)).encode() + b"\n" + b"".join(parts))

    def receive(self, trace):
        """Read what there is: an Execution once the reply is whole, None before; OSError: it died."""
        chunk = self.socket.recv(1 << 20)
        if not chunk:
            raise OSError("the server closed its socket")
        self.buffer += chunk
        while self.buffer.startswith(WAITING):
            self.waits = True
            del self.buffer[:len(WAITING)]
        head, newline, _ = self.buffer.partition(b"\n")
        if not newline:
            return None
        status, code, micros, *lengths = head.decode().split()
        ends = list(itertools.accumulate(map(int, lengths), initial=len(head) + 1))
        if len(self.buffer) < ends[-1]:
            return None
        texts = [self.buffer[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise(ends)]
        self.buffer.clear()
        execution = Execution(texts[0], texts[1], int(code), status, int(micros) / 1e6)
        if trace:
            names, _, lines = texts[2].partition("\n")
            execution.ending, *bases = names.split() or [None]
            execution.ending_bases, execution.lines = tuple(bases), [int(number) for number in lines.split()]
        return execution

    def close(self):
        self.socket.close()
        if self.process is not None:
            with self.process:                  # leaving this waits for it and closes its pipes
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(2)        # without its socket the server ends, then its parent cleans up
                self.process.kill()


class Sandbox:
    """A pool of fork servers. Calls from several threads take turns.

    workers: jobs at work at once, by default one per core; timeout: seconds of wall clock a job; memory_mb: of one
    process's address space, and of what all its processes hold together; isolation: "auto" uses the layers that the
    host allows, "strict" raises RuntimeError where one that it needs is missing.
    """

    def __init__(self, workers=None, timeout=5.0, memory_mb=512, isolation="auto"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = cores if workers is None else workers
        for name, value, least in (("workers", workers, 1), ("memory_mb", memory_mb, 64)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        check_positive("timeout", timeout)
        if isolation not in ("auto", "strict"):
            raise ValueError(f'isolation must be "auto" or "strict", not {isolation!r}')
        self.workers, self.timeout, self.memory_mb, self.isolation = workers, timeout, memory_mb, isolation
        self.lock, self.pid, self.closed = threading.Lock(), os.getpid(), False
        self.idle = [{} for _ in range(workers)]        # each worker's warm servers by hash seed
        if isolation == "strict":
            self.report()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """End every server and whatever it runs."""
        self.closed = True
        if os.getpid() == self.pid:
            with self.lock:
                self.close_workers(0)

    close = __exit__

    def close_workers(self, keep):
        """End the servers of all workers but the first `keep`."""
        while len(self.idle) > keep:
            for server in self.idle.pop().values():
                server.close()

    def report(self):
        """Each layer of the jail: "" where it is active, else why it is not."""
        with self.lock:
            return self.server(self.idle[0], 0).layers

    def run(self, code, stdin="", timeout=None):
        return self.run_many([Job(code, stdin, timeout=timeout)])[0]

    def run_many(self, jobs):
        """Run Jobs or (code, stdin) pairs in parallel; returns their Executions in the same order."""
        jobs = [check_job(job) for job in jobs]
        if self.closed or os.getpid() != self.pid:
            why = "is closed" if self.closed else "belongs to the process that made it"
            raise RuntimeError(f"this sandbox {why}: make a new one here")
        with self.lock:
            return Batch(self, jobs).run() if jobs else []

    def server(self, servers, hash_seed):
        """A worker's server for a hash seed, started where it has none."""
        if hash_seed not in servers:
            while len(servers) >= SEEDS_PER_WORKER:
                servers.pop(next(iter(servers))).close()
            server = Server(hash_seed, self.memory_mb)
            missing = [f"{name} ({reason})" for name, reason in server.layers.items()
                       if reason and not reason.startswith("not needed")]
            if self.isolation == "strict" and missing:
                server.close()
                raise RuntimeError(f"isolation='strict', but this host lacks: {'; '.join(missing)}")
            servers[hash_seed] = server
        return servers[hash_seed]


class Batch:
    """One call of run_many. As many jobs are at work at once as there are workers; a job that waits (sleeps, reads) or
    takes far longer than the others is set aside: it goes on, and another starts beside it."""

    def __init__(self, sandbox, jobs):
        self.sandbox, self.jobs, self.results = sandbox, jobs, [None] * len(jobs)
        self.waiting, self.at_work = [(index, 1) for index in reversed(range(len(jobs)))], 0
        self.ended, self.ended_seconds = 0, 0.0         # of jobs that ended by themselves
        self.selector = selectors.DefaultSelector()     # of servers with a job
        self.running = self.selector.get_map()

    def run(self):
        workers = self.sandbox.workers
        try:
            while self.waiting or self.running:
                while self.waiting and self.at_work < workers and len(self.running) < workers + MAX_ASIDE:
                    self.start(*self.waiting.pop())
                for key, _ in self.selector.select(0.05 if self.waiting else 1.0):
                    self.hear(*key.data)
                self.look_at_clock()
        finally:
            for servers, server in [key.data for key in self.running.values()]:     # interrupted
                self.release(servers, server)
                servers.pop(server.hash_seed).close()
            self.selector.close()
            self.sandbox.close_workers(workers)         # those beyond were added beside jobs set aside
        return self.results

    def start(self, index, attempt):
        job = self.jobs[index]
        self.sandbox.idle = self.sandbox.idle or [{}]
        server = self.sandbox.server(self.sandbox.idle[-1], job.hash_seed)
        servers = self.sandbox.idle.pop()
        self.selector.register(server.socket, selectors.EVENT_READ, (servers, server))
        self.at_work += 1
        server.send(index, job, job.timeout or self.sandbox.timeout, attempt)

    def set_aside(self, server):
        self.at_work -= not server.aside
        server.aside = True

    def look_at_clock(self):
        now = time.monotonic()
        usual = self.ended_seconds / self.ended if self.ended else float("inf")
        for servers, server in [key.data for key in self.running.values()]:
            timeout = self.jobs[server.index].timeout or self.sandbox.timeout
            if now > server.deadline:
                self.fail(servers, server)
            elif now - server.started > min(timeout / 2, max(0.25, 5 * usual)):
                self.set_aside(server)

    def hear(self, servers, server):
        try:
            execution = server.receive(self.jobs[server.index].trace)
        except (OSError, ValueError):
            return self.fail(servers, server)
        if server.waits:
            self.set_aside(server)
        if execution is not None:
            self.settle(servers, server, execution)

    def fail(self, servers, server):
        """The server died or hangs."""
        self.settle(servers, server, Execution("", "the sandbox's server died", -9, "lost", 0.0))
        servers.pop(server.hash_seed).close()

    def release(self, servers, server):
        self.set_aside(server)
        self.selector.unregister(server.socket)
        self.sandbox.idle.append(servers)

    def settle(self, servers, server, execution):
        self.release(servers, server)
        if execution.status == "lost" and server.attempt < ATTEMPTS:
            self.waiting.append((server.index, server.attempt + 1))
        else:
            self.results[server.index] = execution
        if execution.status not in ("lost", "timeout"):
            self.ended, self.ended_seconds = self.ended + 1, self.ended_seconds + execution.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", required=True, help="print which layers this host allows")
    parser.parse_args()
    with Sandbox(workers=1) as sandbox:
        for layer, reason in sandbox.report().items():
            print(f"{layer:22}{'unavailable: ' * bool(reason)}{reason or 'active'}")


if __name__ == "__main__":
    main()
