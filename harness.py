"""In a job's own process: become the program, and see how it ends.

`become_program` is called by the fork server (server.py) right after its fork. What it leaves behind is at most one
function given to atexit, the first and so the last to run: `leave`, which spares an ordinary program the slow
dismantling of its interpreter, or for a traced job the one that reports how main.py ended and which lines it ran.
The report exists only if control came back from the program's code: os._exit, a signal or a limit leave none.
"""
import _thread
import atexit
import builtins
import ctypes
import gc
import os
import resource
import sys

import jail as jails

LOW_FDS = 64                    # a server's own descriptors are below
PLAIN, TRACE, LEARN = 0, 1, 2   # what else a run is for; LEARN: the call stack of a normal end
NORMAL_END = []                 # what LEARN found
RETURNS = (83, 121)             # the opcodes RETURN_VALUE and (Python 3.12) RETURN_CONST
HOOKS = tuple(map(id, (sys.excepthook, sys.stdout, sys.stderr)))    # ids: a reference would keep a stream open
MRO = type.__dict__["__mro__"].__get__
NAME = type.__dict__["__name__"].__get__
# by their own names: IOError is another name of OSError
BUILTIN_ERRORS = {kind: kind.__name__ for kind in vars(builtins).values()
                  if BaseException in getattr(kind, "__mro__", ())}


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def become_program(jail, pipes, timeout, trace, secret, parts):
    """In the job's process: its streams, the jail, its files. A failure here is the sandbox's own."""
    try:
        for fd, end in enumerate((pipes[0][0], pipes[1][1], pipes[2][1])):
            os.dup2(end, fd)
        hidden = LOW_FDS
        if trace:                   # above the job's own limit, where no loop over descriptors looks
            room = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 16384) - 1024
            hidden = 1024 + int.from_bytes(os.urandom(4), "big") % max(1, room)
        report = os.dup2(pipes[3][1], hidden, inheritable=False)
        jails.confine(jail, int(timeout) + 2)
        os.chdir(jail.folder)
        for name, text in ((b"main.py", parts[0]), *zip(parts[2::2], parts[3::2])):
            os.makedirs(os.path.dirname(name) or b".", exist_ok=True)
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            write_all(fd, text)
            os.close(fd)
        os.closerange(3, LOW_FDS)
        gc.enable()
        write_all(report, secret)
        mark = secret + os.getpid().to_bytes(4, "big")
        if trace == TRACE:
            start_trace(report, mark, jail.folder + "/main.py")
        elif trace == LEARN:
            atexit.register(lambda: write_all(report, mark + call_stack()))
        else:
            os.close(report)
            atexit.register(leave)
    except BaseException:
        os._exit(1)


def call_stack():
    """The return addresses on the C stack: seen from atexit, from where Python is being ended."""
    addresses = (ctypes.c_void_p * 64)()
    return bytes(addresses)[:8 * jails.libc.backtrace(addresses, 64)] if hasattr(jails.libc, "backtrace") else b""


def leave():
    """Ending an interpreter costs more than most programs: where no one could tell the difference, exit at once;
    else let it do all it does."""
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
    """The exit code of a program whose end is an ordinary one, else None: SystemExit, a signal, threads, hooks."""
    hooks = tuple(map(id, (sys.excepthook, sys.stdout, sys.stderr)))
    if not NORMAL_END or call_stack() != NORMAL_END[0] or hooks != HOOKS or _thread._count():
        return None
    if "last_type" not in vars(sys):
        return 0
    frame = sys.last_traceback.tb_frame                     # main.py's own: did this exception end it?
    uncaught = frame.f_back is None and frame.f_code.co_code[frame.f_lasti] not in RETURNS
    return 1 if uncaught and not issubclass(sys.last_type, KeyboardInterrupt) else None


def has_finalizers():
    """Whether some object of the program may act when it is freed."""
    objects = gc.get_objects()                              # ours are frozen and not among them
    if len(objects) > 20000:
        return True                                         # to free them costs no more than to look
    acts = {}
    for thing in objects:
        kind = type(thing)
        if kind not in acts:
            acts[kind] = NAME(kind) == "weakref" or any("__del__" in vars(base) for base in MRO(kind))
        if acts[kind] and getattr(thing, "__callback__", True) is not None:
            return True
        if type in MRO(kind) and any("__del__" in vars(base) for base in MRO(thing)):
            return True
    return False


def start_trace(report, mark, path):
    """Have the interpreter note how main.py ends and the lines it visits, and report at the end."""
    pid, main_thread = os.getpid(), _thread.get_ident()
    codes = {}                                              # id -> (code object of main.py, its lines not yet seen)
    seen = {}                                               # line numbers, in order of first visit
    ending = ["SystemExit", "SystemExit", "BaseException"]  # name, builtin bases: until something else is known

    def collect(code):
        codes[id(code)] = code, {line for _, _, line in code.co_lines() if line}
        for constant in code.co_consts:
            if isinstance(constant, type(code)):
                collect(constant)

    def watch_uncaught(event, arguments):                   # no program can see or remove an audit hook
        if event == "sys.excepthook" and _thread.get_ident() == main_thread:
            if sys._getframe().f_back is None:              # it comes from the interpreter, not from the program
                mro = MRO(arguments[1])
                ending[:] = NAME(mro[0]), *(BUILTIN_ERRORS[base] for base in mro if base in BUILTIN_ERRORS)

    def tell():
        gc.unfreeze()
        try:
            if os.getpid() == pid:
                write_all(report, mark + f"{' '.join(ending)}\n{' '.join(map(str, seen))}".encode())
        except OSError:
            pass                                            # the program closed it: no report

    def is_main(code):
        return code.co_filename == path and code.co_name == "<module>"

    sys.addaudithook(watch_uncaught)
    atexit.register(tell)
    start = monitor if hasattr(sys, "monitoring") else settrace
    start(is_main, collect, codes, seen, ending)


def settrace(is_main, collect, codes, seen, ending):
    """Python 3.11: a trace function, in every thread."""
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
            codes[id(code)][1].discard(frame.f_lineno)
            frame.f_trace_lines = bool(codes[id(code)][1])
        elif event == "return" and code is root[0] and code.co_code[frame.f_lasti] in RETURNS:
            ending.clear()
        return step

    sys.settrace(enter)


def monitor(is_main, collect, codes, seen, ending):
    """Python 3.12: sys.monitoring, where a line once seen costs nothing more."""
    monitoring, events, tool = sys.monitoring, sys.monitoring.events, 4

    def enter(code, offset):
        if not codes and is_main(code):
            collect(code)
            for inner, _ in codes.values():
                monitoring.set_local_events(tool, inner, events.LINE)
            monitoring.set_local_events(tool, code, events.LINE | events.PY_RETURN)
            monitoring.set_events(tool, 0)
        return monitoring.DISABLE

    def line(code, number):
        if number:
            seen.setdefault(number)
        return monitoring.DISABLE

    monitoring.use_tool_id(tool, "lines")
    monitoring.register_callback(tool, events.PY_START, enter)
    monitoring.register_callback(tool, events.LINE, line)
    monitoring.register_callback(tool, events.PY_RETURN, lambda code, offset, value: ending.clear())
    monitoring.set_events(tool, events.PY_START)
