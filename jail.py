"""The kernel's part of the sandbox: namespaces, mounts, Landlock, rlimits, seccomp, through ctypes.

`enter` runs once in a fresh fork server and takes what is a worker's: namespaces, a private /tmp and
/dev/shm, a Landlock ruleset, seccomp. `confine` runs in each job's process just before its
program and gives up the rest: identity, capabilities, limits. Every layer is tried on its own and
`Jail.layers` says of each "" (active) or why it isn't. Standard library only; imports anywhere, and
where there is no Linux the plain rlimits remain.

Sources: landlock(7), seccomp(2), capabilities(7), user_namespaces(7), mount_namespaces(7).
"""
import ctypes
import os
import platform
import resource
import struct
import sys

MB = 1 << 20
DISK_MB = 64            # all that a job may write: its folder, /tmp and /dev/shm, each
MAX_INODES = 16384      # files and folders in each of them
MAX_PROCESSES = 128     # processes and threads of one job
MAX_FILES = 256         # open descriptors of one process
LAYERS = ("user namespace", "mount namespace", "network namespace", "IPC namespace",
          "UTS namespace", "PID namespace", "private /proc", "uid drop", "no capabilities",
          "no_new_privs", "Landlock", "seccomp", "process limit", "parent-death signal",
          "subreaper")

# mount(2), prctl(2), unshare(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 24, 36, 38
NEW_NAMESPACES = {"mount namespace": 0x00020000, "UTS namespace": 0x04000000,
                  "IPC namespace": 0x08000000, "network namespace": 0x40000000,
                  "PID namespace": 0x20000000}
NEW_USER = 0x10000000
ANY_NEW_NAMESPACE = 0x7E020000          # the flags of clone(2)
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

# System calls that no job needs: name, number on x86_64, number on aarch64 (- where there is none).
# Left side: reach into other processes or the kernel. Right side (ENOSYS): memory that no limit counts.
DENIED = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_getfd 438 438,
add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280, perf_event_open 298 241,
userfaultfd 323 282, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428,
move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
mount_setattr 442 442, unshare 272 97, setns 308 268, init_module 175 105, finit_module 313 273,
delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, swapon 167 224,
swapoff 168 225, syslog 103 116, acct 163 89, settimeofday 164 170, clock_settime 227 112,
clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161, setdomainname 171 162, iopl 172 -,
ioperm 173 -, modify_ldt 154 -, quotactl 179 60, quotactl_fd 443 443, name_to_handle_at 303 264,
open_by_handle_at 304 265, fanotify_init 300 262, personality 135 92, vhangup 153 58, mbind 237 235,
set_mempolicy 238 237, migrate_pages 256 238, move_pages 279 239
"""
ABSENT = """
clone3 435 435, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186,
semget 64 190, mq_open 240 180
"""
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}   # column above, AUDIT_ARCH
CLONE, SOCKET, SOCKETPAIR, IOCTL = (56, 220), (41, 198), (53, 199), (16, 29)
TIOCSTI = 0x5412
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

READABLE = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime",
            "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/mime.types",
            "/etc/services", "/etc/protocols", "/etc/alternatives", "/etc/ssl", "/dev/random",
            "/dev/urandom")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full")

libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def call(name, *arguments):
    """Call a C function by name, or a system call by number; OSError where it returns -1."""
    if libc is None:
        raise OSError(ENOSYS, "this system is not Linux")
    if isinstance(name, int):
        function, arguments = libc.syscall, (ctypes.c_long(name), *arguments)
    else:
        function = getattr(libc, name)
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result = function(*wide)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def prctl(option, value=0):
    call("prctl", option, value, 0, 0, 0)


class Jail:
    """What `enter` set up: the folders to wipe after a job, and the objects that `confine` applies."""

    def __init__(self, folder, memory_mb):
        self.folder, self.memory_mb = folder, memory_mb
        self.layers = {name: "not tried" for name in LAYERS}
        self.scratch = [folder]         # folders emptied after every job
        self.kept = set()               # paths under them that stay: mount points of the interpreter
        self.uid = None                 # the identity a job takes, None: the server's own
        self.ruleset = None             # Landlock's, a descriptor

    def active(self, layer):
        return self.layers[layer] == ""

    def attempt(self, layer, function, *arguments):
        """Run one layer's set-up and note how it went; returns its result, None where it failed."""
        try:
            result = function(*arguments)
            self.layers[layer] = ""
            return result
        except (OSError, AttributeError, ValueError) as error:
            self.layers[layer] = str(error) or type(error).__name__


def enter(folder, memory_mb):
    """Take a worker's namespaces and make its private folders. Call once, single-threaded, then fork:
    with a PID namespace the child is its first process.

    `folder`: where main.py will be; under a mount namespace it exists only there. Returns a Jail.
    """
    jail = Jail(folder, memory_mb)
    if os.geteuid() == 0:
        jail.uid = 1_000_000_000 + os.getpid()     # nobody else's: its process count is its own
    uid, gid = os.geteuid(), os.getegid()
    plain = False                                  # namespaces without a user namespace: as real root
    if uid == 0:
        plain = jail.attempt("mount namespace", call, "unshare", NEW_NAMESPACES["mount namespace"]) == 0
    if plain:
        jail.layers["user namespace"] = "not needed: root has the capabilities itself"
    else:
        jail.attempt("user namespace", new_user_namespace, uid, gid)
    for layer, flag in NEW_NAMESPACES.items():
        if not (plain and layer == "mount namespace"):
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
    """The folders that Python itself is read from, without those inside another."""
    roots = {os.path.realpath(path) for path in
             (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix,
              os.path.dirname(os.__file__), os.path.dirname(os.path.realpath(sys.executable)))}
    roots.discard("/")
    return sorted(r for r in roots if not any(r.startswith(other + "/") for other in roots))


def private_folders(jail):
    """Cover the shared scratch folders with empty tmpfs of limited size, and any folder on the way to
    the interpreter that a job's uid could not pass (a 0700 home) with one that holds nothing else."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    covers = {path: "1777" for path in (os.path.dirname(jail.folder), "/tmp", "/dev/shm")
              if os.path.isdir(path)}
    roots = interpreter_folders()
    for root in roots if jail.uid is not None else ():
        while root != "/":
            if not os.stat(root).st_mode & 0o001:
                covers[root] = "755"
            root = os.path.dirname(root)
    for path in sorted(covers):
        if any(covers[other] == "1777" and path.startswith(other + "/") for other in covers):
            del covers[path]                        # lies in another private folder
    for path, mode in sorted(covers.items()):
        os.makedirs(path, exist_ok=True)
        inside = [root for root in roots if root.startswith(path + "/") or root == path]
        held = [(root, os.open(root, os.O_PATH)) for root in inside]
        options = f"size={DISK_MB}m,nr_inodes={MAX_INODES},mode={mode}".encode()
        call("mount", b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)
        for root, fd in held:
            bind_read_only(fd, root)
            jail.kept.add(root)
    jail.scratch = [path for path, mode in covers.items() if mode == "1777"]


def bind_read_only(fd, path):
    os.makedirs(path, exist_ok=True)
    call("mount", f"/proc/self/fd/{fd}".encode(), path.encode(), None, MS_BIND | MS_REC, None)
    locked = os.statvfs(fd).f_flag & (MS_NOSUID | MS_NODEV | 8)      # flags a user namespace may not clear
    os.close(fd)
    call("mount", None, path.encode(), None, MS_BIND | MS_REMOUNT | MS_RDONLY | locked, None)


def bring_up_loopback():
    """A new network namespace has only `lo`, down; programs talk to themselves over 127.0.0.1."""
    fd = call("socket", 2, 1, 0)
    try:
        call("ioctl", fd, 0x8914, struct.pack("16sH22x", b"lo", 1))    # SIOCSIFFLAGS, IFF_UP
    finally:
        os.close(fd)


def settle(jail):
    """The second half of the set-up, in the process that will fork the jobs."""
    if jail.active("PID namespace") and jail.active("mount namespace"):
        jail.attempt("private /proc", call, "mount", b"proc", b"/proc", b"proc", 14, None)
        try:    # or the next job could not bind a port that the last one used
            with open("/proc/sys/net/ipv4/tcp_max_tw_buckets", "w") as file:
                file.write("0")
        except OSError:
            pass
    else:
        jail.layers["private /proc"] = "needs PID and mount namespaces"
    jail.attempt("parent-death signal", prctl, PR_SET_PDEATHSIG, 9)
    jail.attempt("subreaper", prctl, PR_SET_CHILD_SUBREAPER, 1)
    jail.attempt("no_new_privs", prctl, PR_SET_NO_NEW_PRIVS, 1)
    jail.ruleset = jail.attempt("Landlock", landlock_ruleset, jail)
    if os.geteuid() != 0:
        jail.layers["uid drop"] = "not needed: not root"
    probe(jail)
    jail.attempt("seccomp", install_seccomp)        # here already: a fork server needs no such call either


def probe(jail):
    """Try the per-job layers in a process that is thrown away, so that a job never meets a surprise."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            confine(jail, 10, note=jail.attempt)
            jail.attempt("process limit", fork_once, jail)
            text = "\n".join(f"{name}\t{reason}" for name, reason in jail.layers.items())
            os.write(writer, text.encode())
        finally:
            os._exit(0)
    os.close(writer)
    text = b""
    while chunk := os.read(reader, 65536):
        text += chunk
    os.close(reader)
    os.waitpid(pid, 0)
    for line in text.decode().splitlines():
        name, _, reason = line.partition("\t")
        jail.layers[name] = reason
    if not jail.active("uid drop"):
        jail.uid = None
    if not jail.active("Landlock"):
        jail.ruleset = None


def fork_once(jail):
    if not jail.active("process limit"):
        raise OSError(EPERM, jail.layers["process limit"])
    if os.fork() == 0:              # refused where an older kernel counts the user's other processes too
        os._exit(0)


def apply_layer(layer, function, *arguments):
    """How `confine` runs a layer that the probe found to work: a failure now is the sandbox's."""
    function(*arguments)


def confine(jail, seconds, note=apply_layer):
    """Give up everything a program must not have. The order matters: limits while still privileged,
    then identity, capabilities, the death signal (a change of identity clears it), Landlock."""
    os.setsid()
    for kind, value in (("CPU", seconds), ("FSIZE", DISK_MB * MB), ("NOFILE", MAX_FILES), ("CORE", 1),
                        ("AS", jail.memory_mb * MB)):   # a core limit of 1 also stops core_pattern pipes
        set_limit(kind, value)
    if jail.uid is not None:
        note("uid drop", drop_identity, jail)
    if jail.active("process limit") or note is not apply_layer:
        note("process limit", limit_processes, jail)
    if jail.layers["no capabilities"] in ("", "not tried"):
        note("no capabilities", drop_capabilities)
    if jail.active("parent-death signal"):
        prctl(PR_SET_DUMPABLE, 1)           # a change of identity cleared it: /proc/self would be root's
        prctl(PR_SET_PDEATHSIG, 9)
    if jail.ruleset is not None:
        note("Landlock", call, LANDLOCK_RESTRICT_SELF, jail.ruleset, 0)


def set_limit(kind, value):
    limit = getattr(resource, "RLIMIT_" + kind, None)
    if limit is None:
        raise OSError(ENOSYS, "this system has no such limit")
    hard = resource.getrlimit(limit)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(limit, (value, value))
    except (OSError, ValueError):
        if kind != "AS":                    # macOS refuses an address-space limit
            raise


def limit_processes(jail):
    """The kernel counts a user's processes, so a job needs a count of its own: an identity or a user
    namespace of its own."""
    if os.getuid() != jail.uid and not jail.active("user namespace"):
        raise OSError(EPERM, "needs a uid or a user namespace of its own")
    set_limit("NPROC", MAX_PROCESSES)


def drop_identity(jail):
    os.setgroups([])
    os.setgid(jail.uid)
    os.setuid(jail.uid)
    os.listdir(os.path.dirname(os.__file__))    # refuse an identity that cannot read Python itself


def drop_capabilities():
    header = struct.pack("Ii", 0x20080522, 0)                   # version 3, this process
    call("capset", header, bytes(24))


def landlock_ruleset(jail):
    """A ruleset (its descriptor): read Python and the system's libraries, write the private folders."""
    abi = call(LANDLOCK_CREATE_RULESET, None, 0, 1)
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network = 3 if abi >= 4 and not jail.active("network namespace") else 0
    scoped = 3 if abi >= 6 else 0           # abstract sockets and signals stay within the job
    attributes = struct.pack("QQQ", everything, network, scoped)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = call(LANDLOCK_CREATE_RULESET, attributes, size, 0)
    read = 0b1101                           # execute, read files, read folders
    rules = [(path, read) for path in (*READABLE, *interpreter_folders())]
    rules += [(path, 0b110) for path in DEVICES]
    rules += [(path, everything & ~(1 << 6 | 1 << 11)) for path in jail.scratch]      # no device nodes
    if jail.active("private /proc"):
        rules.append(("/proc", 0b1110))
    for path, rights in rules:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            if not os.path.isdir(path):
                rights &= 0b111 | 1 << 14
            call(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights & everything, fd), 0)
            os.close(fd)
    return ruleset


def install_seccomp():
    """Refuse the calls listed above and namespaces made by clone, here and in all children: a BPF
    program over struct seccomp_data."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(ENOSYS, f"no system-call numbers for {machine}")
    column, audit_arch = ARCHITECTURES[machine]
    load, equal, greater, set_bits, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    fail, allow = 0x00050000, 0x7FFF0000                        # SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW
    code = [(load, 0, 0, 4), (equal, 1, 0, audit_arch), (ret, 0, 0, fail | ENOSYS), (load, 0, 0, 0)]
    if machine == "x86_64":                                     # the x32 calls, another way in
        code += [(greater, 0, 1, 0x40000000), (ret, 0, 0, fail | ENOSYS)]
    for text, error in ((DENIED, EPERM), (ABSENT, ENOSYS)):
        for entry in text.split(","):
            number = entry.split()[column]
            if number != "-":
                code += [(equal, 0, 1, int(number)), (ret, 0, 0, fail | error)]
    low_word = lambda argument: 16 + 8 * argument               # offset in struct seccomp_data
    code += [(equal, 0, 3, CLONE[column - 1]), (load, 0, 0, low_word(0)),
             (set_bits, 0, 1, ANY_NEW_NAMESPACE), (ret, 0, 0, fail | EPERM),
             (load, 0, 0, 0)]
    code += [(equal, 0, 3, IOCTL[column - 1]), (load, 0, 0, low_word(1)),
             (equal, 0, 1, TIOCSTI), (ret, 0, 0, fail | EPERM), (load, 0, 0, 0)]
    for number in (SOCKET[column - 1], SOCKETPAIR[column - 1]):  # AF_UNIX, AF_INET and AF_INET6 alone
        code += [(equal, 0, 6, number), (load, 0, 0, low_word(0)), (equal, 3, 0, 1), (equal, 2, 0, 2),
                 (equal, 1, 0, 10), (ret, 0, 0, fail | EAFNOSUPPORT), (load, 0, 0, 0)]
    code.append((ret, 0, 0, allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = struct.pack("HP", len(code), ctypes.addressof(program))            # struct sock_fprog
    call("prctl", PR_SET_SECCOMP, 2, header, 0, 0)
