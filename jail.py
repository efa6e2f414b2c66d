"""The kernel's part of the sandbox: namespaces, mounts, Landlock, rlimits, seccomp, through ctypes.

`enter` runs once in a fresh fork server and takes what is a worker's: namespaces, private /tmp and /dev/shm;
`settle` follows in the process that will fork the jobs: /proc, seccomp, a Landlock ruleset. `confine` runs in each
job's process just before its program and gives up the rest: identity, capabilities, limits, files. Every layer is
tried by itself; `Jail.layers` says of each "" (active) or why it isn't. Standard library only; where there is no
Linux the plain rlimits remain.

Sources: landlock(7), seccomp(2), capabilities(7), user_namespaces(7), mount_namespaces(7), pid_namespaces(7).
"""
import ctypes
import os
import platform
import resource
import struct
import sys

MB = 1 << 20
DISK_MB = 64            # what a job may write: one file, and under a mount namespace each private folder as a whole
MAX_INODES = 16384      # files and folders in a private folder
MAX_PROCESSES = 128     # processes and threads of one job
MAX_FILES = 256         # open descriptors of one process

# unshare(2), mount(2), prctl(2), errno
NEW_USER, NEW_ANY = 0x10000000, 0x7E020000
NAMESPACES = {"mount namespace": 0x00020000, "network namespace": 0x40000000, "IPC namespace": 0x08000000,
              "UTS namespace": 0x04000000, "PID namespace": 0x20000000}
LAYERS = ("user namespace", *NAMESPACES, "private /proc", "uid drop", "process limit", "no capabilities",
          "no_new_privs", "Landlock", "seccomp", "parent-death signal", "subreaper")
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

# System calls no program needs: name, number on x86_64, number on aarch64. REFUSED (EPERM) reach into the kernel or
# other processes; ABSENT (ENOSYS, so that libraries fall back) hold memory or do work that no limit counts.
REFUSED = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_getfd 438 438,
add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429,
fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, unshare 272 97,
setns 308 268, init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104,
kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225, syslog 103 116, acct 163 89,
settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161,
setdomainname 171 162, quotactl 179 60, quotactl_fd 443 443, name_to_handle_at 303 264, open_by_handle_at 304 265,
fanotify_init 300 262, personality 135 92, vhangup 153 58, mbind 237 235, set_mempolicy 238 237,
migrate_pages 256 238, move_pages 279 239"""
ABSENT = """
clone3 435 435, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, memfd_create 319 279,
memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186, semget 64 190, mq_open 240 180"""
CLONE, SOCKET, SOCKETPAIR, IOCTL, TIOCSTI = (56, 220), (41, 198), (53, 199), (16, 29), 0x5412
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}         # column above, AUDIT_ARCH of seccomp
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446                    # Landlock's calls, the same everywhere

READABLE = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/dev/random", "/dev/urandom",
            *("/etc/" + name for name in ("ld.so.cache", "localtime", "passwd", "group", "nsswitch.conf", "hosts",
                                          "mime.types", "services", "protocols", "alternatives", "ssl")))
DEVICES = ("/dev/null", "/dev/zero", "/dev/full")

libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def call(name, *arguments):
    """Call a C function by name or a system call by number; OSError where it returns -1."""
    if libc is None:
        raise OSError(ENOSYS, "this system is not Linux")
    if isinstance(name, int):
        name, arguments = "syscall", (name, *arguments)
    wide = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(libc, name)(*wide)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option, value):
    call("prctl", option, value, 0, 0, 0)


class Jail:
    """What `enter` and `settle` set up, for `confine` to apply and for the server to clean."""

    def __init__(self, folder, memory_mb):
        self.folder, self.memory_mb = folder, memory_mb
        self.layers = {name: "not tried" for name in LAYERS}
        self.scratch = [folder]         # the folders that a job may write, emptied after it
        self.kept = set()               # what stays in them: mount points of the interpreter
        self.uid = None                 # the identity a job takes; None: it keeps the server's
        self.ruleset = None             # Landlock's, a descriptor

    def active(self, layer):
        return self.layers[layer] == ""

    def attempt(self, layer, function, *arguments):
        """Set up one layer and note how it went; returns the function's result, None where it failed."""
        try:
            result = function(*arguments)
            self.layers[layer] = ""
            return result
        except (OSError, AttributeError, ValueError) as error:
            self.layers[layer] = getattr(error, "strerror", None) or str(error)


def enter(folder, memory_mb):
    """Take a worker's namespaces and make its private folders. Call it single-threaded, then fork: under a PID
    namespace the child is its first process.

    `folder`: where main.py will be; under a mount namespace it will exist there alone. Returns a Jail.
    """
    jail = Jail(folder, memory_mb)
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        jail.uid = 1_000_000_000 + os.getpid()          # nobody else's, so that its process count is its own
        jail.attempt("mount namespace", call, "unshare", NAMESPACES["mount namespace"])
    if jail.active("mount namespace"):
        jail.layers["user namespace"] = "not needed: root has the capabilities itself"
    else:
        jail.attempt("user namespace", new_user_namespace, uid, gid)
    for layer, flag in NAMESPACES.items():
        if not jail.active(layer):
            jail.attempt(layer, call, "unshare", flag)
    if jail.active("mount namespace"):
        jail.attempt("mount namespace", private_folders, jail)
    if jail.active("network namespace"):
        jail.attempt("network namespace", bring_up_loopback)
    if jail.active("UTS namespace"):
        jail.attempt("UTS namespace", call, "sethostname", b"sandbox", 7)
    return jail


def new_user_namespace(uid, gid):
    call("unshare", NEW_USER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def interpreter_folders():
    """The folders that Python itself is read from, without those that lie in another."""
    roots = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix,
                                                 os.path.dirname(os.__file__), os.path.dirname(sys.executable))}
    return sorted(root for root in roots if not any(root.startswith(other + "/") for other in roots) and root != "/")


def private_folders(jail):
    """Cover the shared scratch folders with empty ones of limited size, and any folder on the way to the interpreter
    that a job's own uid could not pass (a 0700 home) with one that holds nothing else."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    covers = {path: "1777" for path in (os.path.dirname(jail.folder), "/tmp", "/dev/shm") if os.path.isdir(path)}
    roots = interpreter_folders()
    for root in roots if jail.uid is not None else ():
        while root != "/":
            if not os.stat(root).st_mode & 0o001:
                covers[root] = "755"
            root = os.path.dirname(root)
    for path in sorted(covers):
        if any(covers[other] == "1777" and path.startswith(other + "/") for other in covers):
            del covers[path]                            # it lies in another private folder
    for path, mode in sorted(covers.items()):
        os.makedirs(path, exist_ok=True)
        held = [(root, os.open(root, os.O_PATH)) for root in roots if f"{root}/".startswith(path + "/")]
        options = f"size={DISK_MB}m,nr_inodes={MAX_INODES},mode={mode}".encode()
        call("mount", b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)
        for root, fd in held:
            bind_read_only(fd, root)
            jail.kept.add(root)
    jail.scratch = [path for path, mode in covers.items() if mode == "1777"]


def bind_read_only(fd, path):
    os.makedirs(path, exist_ok=True)
    call("mount", f"/proc/self/fd/{fd}".encode(), path.encode(), None, MS_BIND | MS_REC, None)
    locked = os.statvfs(fd).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)     # a user namespace may not clear these
    os.close(fd)
    call("mount", None, path.encode(), None, MS_BIND | MS_REMOUNT | MS_RDONLY | locked, None)


def bring_up_loopback():
    """A new network namespace has only `lo`, and that down; programs may talk to themselves over it."""
    fd = call("socket", 2, 1, 0)
    call("ioctl", fd, 0x8914, struct.pack("16sH22x", b"lo", 1))             # SIOCSIFFLAGS, IFF_UP
    os.close(fd)


def settle(jail):
    """The second half of the set-up, in the process that will fork the jobs."""
    if jail.active("PID namespace") and jail.active("mount namespace"):
        jail.attempt("private /proc", call, "mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
        try:        # or a program could not bind the port that the one before it used
            with open("/proc/sys/net/ipv4/tcp_max_tw_buckets", "w") as file:
                file.write("0")
        except OSError:
            pass
    else:
        jail.layers["private /proc"] = "needs PID and mount namespaces"
    jail.attempt("parent-death signal", prctl, PR_SET_PDEATHSIG, 9)
    if jail.active("parent-death signal"):
        prctl(PR_SET_DUMPABLE, 0)                       # keeps a job of the same uid out of our /proc folder
    jail.attempt("subreaper", prctl, PR_SET_CHILD_SUBREAPER, 1)
    jail.attempt("no_new_privs", prctl, PR_SET_NO_NEW_PRIVS, 1)
    jail.ruleset = jail.attempt("Landlock", landlock_ruleset, jail)
    if jail.uid is None:
        jail.layers["uid drop"] = "not needed: not root"
    probe(jail)
    jail.attempt("seccomp", install_seccomp)            # here already: no fork server needs these calls either


def probe(jail):
    """Try the per-job layers in a process that is thrown away, so that no job meets a surprise."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            confine(jail, 10, apply=jail.attempt)
            if jail.active("process limit") and os.fork() == 0:     # an older kernel counts others' processes, too
                os._exit(0)
        except OSError as error:
            jail.layers["process limit"] = str(error)
        finally:
            os.write(writer, "\n".join(map("\t".join, jail.layers.items())).encode())
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    jail.layers.update(line.split("\t") for line in os.read(reader, 65536).decode().split("\n"))
    os.close(reader)
    if not jail.active("uid drop"):
        jail.uid = None
    if not jail.active("Landlock"):
        jail.ruleset = None


def confine(jail, seconds, apply=lambda layer, function, *arguments: function(*arguments)):
    """Give up everything that a program must not have. The order matters: limits while still privileged, then
    identity, capabilities, the death signal (a change of identity clears it), files."""
    os.setsid()
    for kind, value in (("CPU", seconds), ("FSIZE", DISK_MB * MB), ("NOFILE", MAX_FILES), ("AS", jail.memory_mb * MB),
                        ("CORE", 1)):                   # 1: no core_pattern pipe either
        set_limit(kind, value)
    if jail.uid is not None:
        apply("uid drop", drop_identity, jail)
    if jail.layers["process limit"] in ("", "not tried"):
        apply("process limit", limit_processes, jail)
    if jail.layers["no capabilities"] in ("", "not tried"):
        apply("no capabilities", call, "capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    if jail.active("parent-death signal"):
        prctl(PR_SET_DUMPABLE, 1)                       # or its own /proc folder is root's
        prctl(PR_SET_PDEATHSIG, 9)
    if jail.ruleset is not None:
        apply("Landlock", call, RESTRICT_SELF, jail.ruleset, 0)


def set_limit(kind, value):
    limit = getattr(resource, "RLIMIT_" + kind)
    hard = resource.getrlimit(limit)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(limit, (value, value))
    except (OSError, ValueError):
        if kind != "AS":                                # macOS knows no limit of the address space
            raise


def limit_processes(jail):
    """The kernel counts a user's processes, so a job needs a count of its own."""
    if os.getuid() != jail.uid and not jail.active("user namespace"):
        raise OSError(EPERM, "needs a uid or a user namespace of its own")
    set_limit("NPROC", MAX_PROCESSES)


def drop_identity(jail):
    os.setgroups([])
    os.setgid(jail.uid)
    os.setuid(jail.uid)
    os.listdir(os.path.dirname(os.__file__))            # an identity that can't read Python itself won't do


def landlock_ruleset(jail):
    """A ruleset (a descriptor): read Python and the system's libraries, write the scratch folders, nothing else."""
    abi = call(CREATE_RULESET, None, 0, 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network = 3 if not jail.active("network namespace") else 0
    attributes = struct.pack("QQQ", rights, network, 3)             # 3: abstract sockets and signals stay within
    ruleset = call(CREATE_RULESET, attributes, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    read, write = 0b1101, rights & ~(1 << 6 | 1 << 11)              # execute, read; all but device nodes
    rules = [(path, read) for path in (*READABLE, *interpreter_folders())] + [(path, 0b110) for path in DEVICES]
    rules += [(path, write) for path in jail.scratch] + [("/proc", read | 2)] * jail.active("private /proc")
    for path, allowed in rules:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            allowed &= rights if os.path.isdir(path) else 0b111 | 1 << 14
            call(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
            os.close(fd)
    return ruleset


def install_seccomp():
    """Refuse the calls listed above, here and in all children: a BPF program over struct seccomp_data."""
    if platform.machine() not in MACHINES:
        raise OSError(ENOSYS, f"no system-call numbers for {platform.machine()}")
    column, audit_arch = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, done = 0x20, 0x15, 0x35, 0x45, 0x06
    fail, allow, number, first, second = 0x00050000, 0x7FFF0000, 0, 16, 24  # return values; offsets of what is loaded
    code = [(load, 0, 0, 4), (equal, 1, 0, audit_arch), (done, 0, 0, fail | ENOSYS), (load, 0, 0, number)]
    if column == 0:                                                         # the x32 calls, another way in
        code += [(at_least, 0, 1, 0x40000000), (done, 0, 0, fail | ENOSYS)]
    for text, error in ((REFUSED, EPERM), (ABSENT, ENOSYS)):
        for entry in text.split(","):
            code += [(equal, 0, 1, int(entry.split()[1 + column])), (done, 0, 0, fail | error)]
    code += [(equal, 0, 3, CLONE[column]), (load, 0, 0, first), (any_bit, 0, 1, NEW_ANY), (done, 0, 0, fail | EPERM),
             (load, 0, 0, number), (equal, 0, 3, IOCTL[column]), (load, 0, 0, second), (equal, 0, 1, TIOCSTI),
             (done, 0, 0, fail | EPERM), (load, 0, 0, number)]
    for name in (SOCKET, SOCKETPAIR):                                       # AF_UNIX, AF_INET, AF_INET6 alone
        code += [(equal, 0, 6, name[column]), (load, 0, 0, first), (equal, 3, 0, 1), (equal, 2, 0, 2),
                 (equal, 1, 0, 10), (done, 0, 0, fail | EAFNOSUPPORT), (load, 0, 0, number)]
    code.append((done, 0, 0, allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(code), ctypes.addressof(program)), 0, 0)


def wipe(folder, kept=()):
    """Empty a folder, but for the mount points in `kept`."""
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        if any(keep.startswith(path + "/") for keep in kept):
            wipe(path, kept)
        elif path not in kept:
            remove(path)


def remove(path):
    """Remove a file or a tree. Inner folders first move up beside `path`, so that no depth is too deep."""
    paths, count = [path], 0
    while paths:
        top = paths.pop()
        try:
            os.unlink(top)
            continue
        except (IsADirectoryError, PermissionError):                # Linux's and macOS's word for a folder
            os.chmod(top, 0o700)
        for name in os.listdir(top):
            inner = f"{top}/{name}"
            try:
                os.unlink(inner)
            except (IsADirectoryError, PermissionError):
                os.chmod(inner, 0o700)
                count += 1
                os.rename(inner, f"{path}.{count}")
                paths.append(f"{path}.{count}")
        os.rmdir(top)
