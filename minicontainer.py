#!/usr/bin/env python3
"""minicontainer: the container engine you can read.

    $ sudo python3 minicontainer.py run /bin/sh
    / # echo I am process $$ of $(hostname)
    I am process 1 of 3f0c2b7e9d41
    / # exit

A container is not a thing that the kernel knows.  It is an ordinary process that
was born with blinkers on (namespaces), on a leash (a control group), in a room of
its own (a root file system) and without most of root's powers (capabilities).
This file makes such processes, from the system calls up, with nothing but Python's
standard library.  `--explain` narrates every request it makes to the kernel.

      the host                                   the container
    ┌──────────────┐  clone3: eight namespaces  ┌────────────────────────────────┐
    │ run: parent  │ ─────────────────────────▶ │ init: the steps of BIRTH       │
    │   id maps    │                            │   mounts, /dev, pivot_root     │
    │   cgroup     │  "go"                      │   user, capabilities           │
    │   overlay    │ ─────────────────────────▶ │   execve ── your program,      │
    │   waits      │ ◀──────── exit status ──── │             process 1 inside   │
    └──────────────┘                            └────────────────────────────────┘

Contents (`grep -n '^# ══' minicontainer.py` finds each):

     1. THE DOORS            every request to the kernel, and its narration
     2. NAMESPACES           what a process can see
     3. CONTROL GROUPS       what it can use
     4. FILE SYSTEMS         what it can open
     5. PRIVILEGES           what it can do
     6. THE CONTAINER        all of it, in order, on one screen
     8. IMAGES               layers from tarballs; a root file system from nothing
    11. THE SHIM             its terminal, its signals, its end
    12. THE ENGINE           containers by name: run, exec, system prune
    15. THE CLASSROOM        a container in parts, and by hand
    16. COMMAND LINE         main

A chapter uses only what stands above it: cut the file after any of them, and what
is left still works.  (7, 9, 10, 13 and 14 are not written yet; see README.md.)

Vocabulary:
    rootfs   the directory that a container sees as /
    layer    a directory with part of a rootfs; overlay shows several as one
    digest   "sha256:" and 64 hex digits: a name that proves its content
    spec     an OCI config.json as a dict: all that chapter 6 needs to know
    step     a function that takes a Container and does one thing to the world
    place    a path of the container, found without leaving it, as a descriptor
    parent   the process on the host that starts a container and waits for it
    init     the container's first process, until it becomes your program
    pid      the host's number of a process, unless it is called inner_pid

Promises, each cited where it is kept and held by a test:
    (P1) One door: every request that makes or enters a container is in chapter 1.
    (P2) Nothing is loaded from the image: importing ends before its files appear.
    (P3) Files that matter are replaced by rename, never edited.
    (P4) A path of the container is never resolved by string from the host's side.
    (P5) What start did, the end undoes: after any error, and after kill -9 and
         `system prune`, the host is as it was.
    (P6) One birthplace: only chapter 6 makes containers.
    (P7) A container's root is nobody on the host, unless asked for in words.
"""
import _signal as signal  # what Python's own wraps in enums, at 5 ms a start

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while we are still being read

import ctypes
import errno
import fcntl
import os
import select
import stat
import struct
import sys
import time
from _json import encode_basestring as quote
from _json import encode_basestring_ascii as quote_ascii

# Only what every command needs is imported here, because every start pays for it;
# the rest (json, tarfile, hashlib …) is imported by the function that needs it.

# ══ 1. THE DOORS ══════════════════════════════════════════════════════════════════
#
# All that a container is, it is by the kernel's leave.  So every request that makes
# one goes through one of three functions,
#
#       syscall("mount", "proc", "/proc", "proc", MS_NOSUID, None, why="…")
#       write_file("/sys/fs/cgroup/…/memory.max", "67108864", why="…")
#       read_file("/proc/self/mountinfo", why="…")
#
# and all three go through one, request().  A door costs a few microseconds, and
# having only one buys four things: --explain can narrate, in order and from every
# process, what was asked, what was answered, how long it took and why it was asked;
# a test can record the sequence without being root; another can make the n-th
# request fail, for every n; and an error always knows which call it came from.
#
# There is no C library wrapper for half of these calls, so we use syscall(2), which
# takes a number and up to six words.  The numbers differ by processor: each chapter
# declares the calls it needs, with its number on x86_64 and on aarch64 and the names
# of its arguments.  An argument named like `MS_` is a set of flags, and is narrated
# as the names of the constants of this file that begin so.
#
# Man pages: syscall(2), syscalls(2), errno(3).

CALLS = {}  # name: (number on this machine, names of its arguments)
KERNEL_NAMES = ("x86_64", "aarch64")


def calls(**table):
    """Declare system calls: name = (number on x86_64, on aarch64, argument names)."""
    machine = os.uname().machine
    column = KERNEL_NAMES.index(machine) if machine in KERNEL_NAMES else 0
    for name, row in table.items():
        CALLS[name] = row[column], row[2].split()


class Fail(Exception):
    """What went wrong in words for the person, what to do about it, and exit code."""

    def __init__(self, message, hint="", code=125):
        super().__init__(message)
        self.message, self.hint, self.code = message, hint, code


class narration:
    """How --explain talks: kept by every process, inherited by every fork."""

    style = ""  # one of STYLES, or "" for silence
    who = "parent"  # who is talking
    fd = 2  # where to
    colour = False
    aside = ""  # what goes before a line that is not the narration's
    began = time.monotonic_ns()


SAID = set(os.environ.pop("MINICONTAINER_SAID", "").split("\n"))  # to the person


def say(message):
    """One line from us to the person, on standard error, and each only once."""
    if message not in SAID:
        SAID.add(message)
        text = f"minicontainer: {message}".replace("\n", f"\n{narration.aside}")
        print(narration.aside + text, file=sys.stderr, flush=True)


# PyDLL, unlike CDLL, keeps Python's global lock during the call.  Nothing else may
# run while clone3 below copies the process.
LIBC = ctypes.PyDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


class Place(str):
    """A path of the container that was opened safely: its name, and descriptor `fd`.

    It is printed as the name, but the kernel is given /proc/self/fd/N, which leads
    to what was opened, whatever the name means by now (P4).
    """

    fd = -1

    def close(self):
        """Give the descriptor back."""
        os.close(self.fd)


def c_argument(value):
    """The ctypes form of one argument of a system call."""
    if isinstance(value, Place):
        return ctypes.c_char_p(b"/proc/self/fd/%d" % value.fd)
    if isinstance(value, str):
        return os.fsencode(value)
    if isinstance(value, list):  # argv and envp end in a null pointer
        strings = [os.fsencode(item) for item in value]
        return (ctypes.c_char_p * (len(strings) + 1))(*strings)
    if isinstance(value, int):
        return ctypes.c_long(value)
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


def kernel(name, args):
    """What syscall(2) returns, or OSError.  Tests put their own function here."""
    result = LIBC.syscall(ctypes.c_long(CALLS[name][0]), *map(c_argument, args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def to_json(value):
    """A document as JSON; `import json` would cost every start 4 ms."""
    if isinstance(value, dict):
        pairs = [f"{quote_ascii(key)}: {to_json(item)}" for key, item in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    if isinstance(value, str):
        return quote_ascii(value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def from_json(text):
    """The document that JSON text means."""
    import json

    return json.loads(text)


def spell_flags(value, *prefixes):
    """The names of the flags in `value`: those constants of this file that begin
    with one of the prefixes."""
    names, left = [], value
    for name, flag in globals().items():
        if name.startswith(prefixes) and isinstance(flag, int) and flag:
            if flag == value:
                return name
            if flag & left == flag:
                names.append(name)
                left &= ~flag
    if left or not names:
        names.append(hex(left) if left else "0")
    return "|".join(names)


# Where a path argument starts from, and how a file is opened.
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
O_WRONLY, O_RDWR, O_NOCTTY, O_NONBLOCK = 1, 2, os.O_NOCTTY, os.O_NONBLOCK
O_DIRECTORY, O_PATH, O_CLOEXEC = os.O_DIRECTORY, os.O_PATH, os.O_CLOEXEC


def spell_one(value, word):
    """One argument, by the name that the call's declaration gives it."""
    if value is None:
        return "NULL"
    if isinstance(value, str):
        short = value if len(value) <= 200 else value[:197] + "…"
        return quote(short)
    if isinstance(value, list):
        return "[" + ", ".join(spell_one(item, "") for item in value) + "]"
    if word.endswith("_"):
        return spell_flags(value, *word.split("|"))
    if word == "mode":
        return f"0{value:o}" if value else "0"
    if word.endswith("dirfd") and value == AT_FDCWD:
        return "AT_FDCWD"
    if isinstance(value, ctypes.Array) and not isinstance(value[:], bytes):
        return spell_one(value[:], "")
    return str(value) if isinstance(value, (int, ctypes.Structure)) else "…"


def spell(name, args):
    """The request as a C programmer or strace would write it."""
    words = CALLS[name][1] if name in CALLS else ()
    spelled = [spell_one(value, words[i] if i < len(words) else "")
               for i, value in enumerate(args)]
    return f"{name}({', '.join(spelled)})"


STYLES = {}  # what --explain=STYLE may name: the function that makes the line


def style(*names):
    """Declare that the decorated function tells a request in the styles named: its
    line, or "" for a request that it has no words for."""
    def declare(function):
        STYLES.update(dict.fromkeys(names, function))
        return function
    return declare


def listing(args):
    """The lines of a program among the arguments, where somebody has written them."""
    return [text for value in args for text in getattr(value, "listing", ())]


@style("text", "bpf")  # bpf: with seccomp filters disassembled
def as_text(name, args, at, took, result, why):
    """A request as strace would show it, and why it was made."""
    grey, bold, red, end = (("\033[2m", "\033[1m", "\033[31m", "\033[0m")
                            if narration.colour else ("",) * 4)
    mark = red if result.startswith("-1") else bold
    line = (f"{grey}{at:9.3f} ms {took:8.3f} ms{end}  {narration.who:<7} "
            f"{mark}{spell(name, args)}{end} = {result}")
    line += f"  {grey}# {why}{end}" if why else ""
    return "\n    ".join([line, *listing(args)])


@style("json")
def as_json(name, args, at, took, result, why):
    """A request as an object on a line."""
    program = listing(args)
    return to_json({"at_ms": round(at, 3), "took_ms": round(took, 3),
                    "who": narration.who, "call": spell(name, args), "result": result,
                    "why": why, **({"program": program} if program else {})})


def narrate(name, args, began, result, why):
    """One line on the narration's descriptor, written at once so that lines of
    several processes never mix."""
    now = time.monotonic_ns()
    at, took = (began - narration.began) / 1e6, (now - began) / 1e6
    line = STYLES[narration.style](name, args, at, took, result, why)
    try:
        if line and (name, result) != ("clone3", "0"):  # the child: its parent told it
            os.write(narration.fd, line.encode("utf-8", "backslashreplace") + b"\n")
    except OSError:  # nobody listens any more: `| head`
        narration.style = ""


class Asked:
    """A request, spelled only if somebody reads it: most errors are expected."""

    def __init__(self, name, args):
        self.name, self.args = name, args

    def __repr__(self):
        return spell(self.name, self.args)


def request(name, args, ask, why):
    """ask(), narrated: the one function that all doors lead through (P1)."""
    if not narration.style:
        try:
            return ask()
        except OSError as error:
            error.filename = Asked(name, args)
            raise
    if name == "execve":  # never returns, so it is told first
        narrate(name, args, time.monotonic_ns(), "…", why)
    began, result = time.monotonic_ns(), "?"
    try:
        answer = ask()
        result = f"{len(answer)} bytes" if isinstance(answer, str) else str(answer)
        return answer
    except OSError as error:
        error.filename = Asked(name, args)
        result = f"-1 {errno.errorcode.get(error.errno, error.errno)}"
        result += f" ({error.strerror})"
        raise
    finally:
        narrate(name, args, began, result, why)


def syscall(name, *args, why=""):
    """Ask for a system call; its result, or an OSError that says what was asked."""
    return request(name, args, lambda: kernel(name, args), why)


calls(openat=(257, 56, "dirfd path O_ mode"))


def open_fd(path, flags, why=""):
    """A descriptor of a path of the host, closed by execve."""
    return syscall("openat", AT_FDCWD, path, flags | O_CLOEXEC, 0, why=why)


def write_file(path, text, why="", create=None):
    """Write `text` to a file at once; `create` is the mode of a file to be made.

    One write(2), because a file of /proc or a control group takes each as an order.
    An open descriptor will do for a path.
    """
    def ask():
        if isinstance(path, int):
            return os.write(path, os.fsencode(text))
        flags = os.O_WRONLY | os.O_CLOEXEC
        flags |= 0 if create is None else os.O_CREAT | os.O_TRUNC
        fd = os.open(path, flags, 0o600 if create is None else create)
        try:
            return os.write(fd, os.fsencode(text))
        finally:
            os.close(fd)
    return request("write", (path, text), ask, why)


def read_file(path, why=""):
    """The whole text of a (small) file."""
    def ask():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(fd, 1 << 16):
                parts.append(part)
            return os.fsdecode(b"".join(parts))
        finally:
            os.close(fd)
    return request("read", (path,), ask, why)


def start_narration(words):
    """Begin to narrate in the style `words`, on a copy of standard error that no
    container can inherit or replace."""
    narration.style = words
    narration.fd = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 100)
    narration.colour = os.isatty(2) and not os.environ.get("NO_COLOR")
    narration.aside = "# " if words == "sh" else ""


# A command is declared beside its meaning, with the options it takes; chapter 16
# builds the parser of the one that was asked for.
COMMANDS = {}  # words: (function, options)


def arg(*names, **how):
    """One option or operand, in argparse's words."""
    return names, how


def command(words, *options):
    """Declare that `words` on the command line call the decorated function."""
    def declare(function):
        COMMANDS[words] = function, options
        return function
    return declare


UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(text):
    """The bytes that Docker's "64m", "64MB" or "64MiB" means."""
    digits = text.rstrip("bBiIkKmMgGtT")
    unit = text[len(digits):].lower().removesuffix("b").removesuffix("i")
    if unit not in UNITS or not digits.replace(".", "", 1).isdecimal() or (
            len(digits) > 18):
        raise Fail(f"invalid size: {text!r}",
                   "a number and perhaps a unit b, k, m, g or t, as in 64m")
    return int(float(digits) * UNITS[unit])


def human(number):
    """Bytes as Docker writes them, to four digits: 67108864 is 64MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.4g}{unit}"
        number /= 1024


# What the steps of all chapters are given: one container, in one process.  Parent and
# init each have a copy, since init is a fork, and talk over two pipes in lines of JSON:
# init tells news and may ask for what only the parent can do, which is declared beside
# the step that asks; the parent answers with a line.

ANSWERS = {}  # what init may ask for: the parent's function that does it


def answers(question):
    """Declare the function that the parent calls when init asks `question`."""
    def declare(function):
        ANSWERS[question] = function
        return function
    return declare


class Container:
    """One container: the spec, and what parent or init holds of it while it lives."""

    def __init__(self, id, spec, directory, layers=()):
        self.id = id  # 64 hex digits; the first 12 are its short id
        self.spec = spec  # the OCI config.json, as a dict
        self.directory = directory  # on the host: config.json, upper, work, hosts …
        self.layers = layers  # directories of the host, bottom first
        self.workshop = ""  # an empty directory of the host, to mount the workshop on
        self.throw_away = False  # nothing it writes is kept: --rm
        self.wants_reaper = False  # --init: process 1 only reaps and forwards
        self.is_new = True  # False for what `exec` runs in a running one
        self.target = None  # then: the pidfd of the running one's process 1
        self.cgroup = None  # its Cgroup
        self.pid, self.pidfd = 0, -1  # process 1, or the program that `exec` runs
        self.status = None  # what waitpid said of it
        self.users = -1  # its user namespace, for the parent's id-mapped mounts
        self.sources = {}  # path inside: descriptor of the mount that goes there
        self.proc = -1  # the host's /proc, where a security label is written
        self.lock = -1  # keeps `system prune` away while we live
        self.home = None  # where the parent was before it opened the workshop
        self.root_fd = -1  # in init: the container's root, for openat2
        self.inner = []  # init's ends of the pipes that become its 0, 1 and 2
        self.outer = {}  # the parent's: "stdin", "stdout", "stderr", or "console"
        self.news, self.orders = (-1, -1), (-1, -1)  # pipes: init's, the parent's

    def open_pipes(self):
        """Both pipes, before init is forked; what it needs of the host's /proc too."""
        self.news, self.orders = os.pipe(), os.pipe()
        if {"apparmorProfile", "selinuxLabel"} & set(self.spec["process"]):
            self.proc = open_fd("/proc", O_PATH | O_DIRECTORY, "not the container's")

    # ── init's side ──

    def tell_parent(self, **news):
        """Send a line to the parent; BrokenPipeError if it is dead."""
        os.write(self.news[1], to_json(news).encode() + b"\n")

    def await_parent(self):
        """Wait for the parent's next line; if it is dead, so are we."""
        if not os.read(self.orders[0], 64):
            os._exit(125)

    def ask_parent(self, question, **details):
        """Have the parent do what only it can do, and wait until it is done."""
        self.tell_parent(ask=question, **details)
        self.await_parent()

    def report(self, fail):
        """Tell the parent what went wrong: the words of a Fail."""
        self.tell_parent(fail=[fail.message, fail.hint, fail.code])

    # ── the parent's side ──

    def answer(self, word):
        """Send a line to init; that it has died is told by what it said before."""
        for fd in (self.news[1], self.orders[0], *self.inner):
            if fd >= 0:
                os.close(fd)  # init's ends, or we would never see the end of its
        self.news, self.orders = (self.news[0], -1), (-1, self.orders[1])
        self.inner = []
        try:
            os.write(self.orders[1], word.encode() + b"\n")
        except BrokenPipeError:
            pass

    def listen(self):
        """Do what init asks for until its program runs; a Fail if it never does."""
        runs, buffered = False, b""
        while part := os.read(self.news[0], 1 << 16):
            buffered += part
            while b"\n" in buffered:
                line, _, buffered = buffered.partition(b"\n")
                runs = runs or line == b"{}"  # no news is good news
                news = from_json(line) if line != b"{}" else {}
                if "fail" in news:
                    raise Fail(*news["fail"])
                if "ask" in news:
                    ANSWERS[news.pop("ask")](self, **news)
                    self.answer("done")
        if not runs:
            raise Fail("the container's first process died before it became your "
                       "program", "was it killed, or out of memory? see `dmesg`")

    def wait(self):
        """Reap the process; its exit code, with 128 + n for signal n."""
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else 128 - code

    def close(self):
        """Give back every descriptor."""
        held = [self.pidfd, self.users, self.proc, *self.sources.values(),
                *self.inner, *self.outer.values(), *self.news, *self.orders]
        self.pidfd = self.users = self.proc = -1
        self.sources, self.outer, self.inner = {}, {}, []
        self.news, self.orders = (-1, -1), (-1, -1)
        for fd in held:
            if fd >= 0:
                os.close(fd)

# ══ 2. NAMESPACES ═════════════════════════════════════════════════════════════════
#
# A namespace is a pair of blinkers: the processes that share one share a view of
# one kind of thing, and see nothing of the others' things.  Linux has eight kinds:
#
#       user     ids and what root may do     uts   the host name
#       mount    the tree of files            ipc   System V and POSIX queues
#       pid      process numbers              net   interfaces, addresses, ports
#       cgroup   the root of the cgroup tree  time  the uptime clocks
#
# Each is a file in /proc/PID/ns; two processes are in the same one if those files
# have the same inode.  Three calls deal with them: clone3 makes a process in new
# ones, unshare moves the caller to new ones, setns moves it to existing ones.
#
# The user namespace is the strongest wall.  It maps a range of ids: root inside is,
# say, 1879048192 outside, who owns nothing and may do nothing on the host (P7).  All
# the other namespaces made in the same call belong to it, so inside, that nobody is
# root over them: it may mount, set the host name, bring up interfaces.  The kernel
# takes the maps once, from a privileged process outside: our parent.
#
# Trap: namespaces are copied as they are at the time of the call.  The mount and the
# cgroup namespace must show what the parent has yet to build, so init unshares those
# two later (chapter 4), and only six are made at birth.
#
# Man pages: namespaces(7), user_namespaces(7), pid_namespaces(7), clone(2), setns(2).

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP = 0x80, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
CLONE_PIDFD, CLONE_PARENT, CLONE_INTO_CGROUP = 0x1000, 0x8000, 0x200000000
SIOCSIFFLAGS = 0x8914

calls(
    clone3=(435, 435, "args size"),
    clone=(56, 220, "CLONE_ stack parent_tid child_tid tls"),
    unshare=(272, 97, "CLONE_"),
    setns=(308, 268, "fd CLONE_"),
    pidfd_open=(434, 434, "pid flags"),
    sethostname=(170, 161, "name length"),
    setdomainname=(171, 162, "name length"),
    socket=(41, 198, "family type protocol"),
    ioctl=(16, 29, "fd request argument"),
)

NAMESPACES = {  # the name in a spec: (flag, file in /proc/PID/ns, what it holds)
    "user": (CLONE_NEWUSER, "user", "ids, capabilities"),
    "mount": (CLONE_NEWNS, "mnt", "the tree of files"),
    "pid": (CLONE_NEWPID, "pid", "process numbers"),
    "uts": (CLONE_NEWUTS, "uts", "host and domain name"),
    "ipc": (CLONE_NEWIPC, "ipc", "queues, semaphores, shared memory"),
    "network": (CLONE_NEWNET, "net", "interfaces, routes, ports"),
    "cgroup": (CLONE_NEWCGROUP, "cgroup", "the root of the cgroup tree"),
    "time": (CLONE_NEWTIME, "time", "uptime clocks"),
}
LATER = CLONE_NEWNS | CLONE_NEWCGROUP  # what init unshares itself, see the trap

NAMESPACE_OPTIONS = (
    arg("--userns", choices=["host"], help="host: root inside is root outside"),
    arg("--pid", choices=["host"], help="host: see and signal the host's processes"),
    arg("--network", "--net", choices=["none", "host"], default="none",
        help="none: a loopback interface only; host: the host's network"),
    arg("--uts", choices=["host"], help="host: the host's name"),
    arg("--ipc", choices=["host"], help="host: the host's System V IPC and queues"),
    arg("--cgroupns", choices=["host", "private"], help="host: show the host's tree"),
    arg("-h", "--hostname", metavar="NAME", help="the host name inside"),
    arg("--domainname", metavar="NAME", help="the NIS domain name inside"),
    arg("--sysctl", metavar="KEY=VALUE", action="append", default=[],
        help="a setting of its own network or IPC namespace"),
)


def namespaces_spec(options):
    """The spec's list of namespaces: all eight but those that an option keeps the
    host's, and those that this kernel does not have, which is announced."""
    shared = {"user": options.userns, "pid": options.pid, "network": options.network,
              "uts": options.uts, "ipc": options.ipc, "cgroup": options.cgroupns}
    wanted = [kind for kind in NAMESPACES if shared.get(kind) != "host"]
    have = os.listdir("/proc/self/ns")
    for kind in [k for k in wanted if NAMESPACES[k][1] not in have]:
        say(f"this kernel has no {kind} namespaces: the container shares the "
            f"host's {NAMESPACES[kind][2]}")
        wanted.remove(kind)
    if options.uts == "host" and (options.hostname or options.domainname):
        raise Fail("--hostname and --domainname cannot be set with --uts host",
                   "leave one of them out: the name would be the host's")
    return [{"type": kind} for kind in wanted]


SYSCTLS = "net.", "kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."


def sysctl_spec(options, namespaces):
    """The spec's form of --sysctl: settings of namespaces that the container owns."""
    settings, own = {}, [namespace["type"] for namespace in namespaces]
    for text in options.sysctl:
        name, equals, value = text.partition("=")
        name = name.replace("/", ".")
        kind = "network" if name.startswith("net.") else "ipc"
        if not equals or not name.startswith(SYSCTLS):
            raise Fail(f"--sysctl {text}: sysctl {name!r} is not allowed",
                       f"KEY=VALUE with a key of a namespace: {'*, '.join(SYSCTLS)}*")
        if kind not in own:
            raise Fail(f"--sysctl {text}: not allowed in the host's {kind} namespace",
                       f"leave out --{kind} host, or set it on the host")
        settings[name] = value
    return settings


def namespace_flags(spec):
    """The CLONE_NEW… flags of the new namespaces that the spec asks for."""
    flags = 0
    for namespace in spec["linux"]["namespaces"]:
        flags |= NAMESPACES[namespace["type"]][0]
    return flags


class clone_args(ctypes.Structure):
    """struct clone_args of <linux/sched.h>, 88 bytes."""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack",
        "stack_size", "tls", "set_tid", "set_tid_size", "cgroup")]

    def __str__(self):
        signal_name = "SIGCHLD" if self.exit_signal else "0"
        return ("{.flags = " + spell_flags(self.flags, "CLONE_")
                + f", .exit_signal = {signal_name}" + "}")


def clone3(flags, cgroup_fd=-1, why=""):
    """Fork into new namespaces: (pid, pidfd), with pid 0 in the child.

    Without a stack of its own the child is a copy of its caller, as after fork(2).
    Python must know: the three PyOS calls put its locks in order on both sides.
    Caller must be single-threaded.  `cgroup_fd`, a v2 directory, is where the child
    is born.  Where clone3 is refused (ENOSYS: a seccomp filter around us), the older
    clone does the same but for the time namespace and the cgroup.
    """
    pidfd, python = ctypes.c_int(-1), ctypes.pythonapi
    args = clone_args(flags=flags | CLONE_PIDFD, exit_signal=signal.SIGCHLD,
                      pidfd=ctypes.addressof(pidfd))
    if flags & CLONE_PARENT:  # then the parent's signal counts, and pidfd is unused
        args.flags, args.exit_signal = flags, 0
    if cgroup_fd >= 0:
        args.flags, args.cgroup = args.flags | CLONE_INTO_CGROUP, cgroup_fd
    python.PyOS_BeforeFork()
    pid = -1
    try:
        pid = syscall("clone3", args, ctypes.sizeof(args), why=why)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        old = args.flags & 0xFFFFFF00 | args.exit_signal  # without _NEWTIME, _INTO_
        pid = syscall("clone", old, None, ctypes.byref(pidfd), None, None,
                      why="clone3 is refused here: no time namespace, then")
        if pid and cgroup_fd >= 0:
            write_file(f"/proc/self/fd/{cgroup_fd}/cgroup.procs", str(pid))
    finally:
        if pid == 0:
            python.PyOS_AfterFork_Child()
        else:
            python.PyOS_AfterFork_Parent()
    return pid, pidfd.value


def map_ids(c):
    """Outside: give a new user namespace its ids, before anything is done in it.

    The kernel takes each file once, and maps that are not the writer's own only from
    a writer with CAP_SETUID over the parent namespace: the host's root.
    """
    if not namespace_flags(c.spec) & CLONE_NEWUSER:
        return
    for file, key in (("uid_map", "uidMappings"), ("gid_map", "gidMappings")):
        lines = [f"{m['containerID']} {m['hostID']} {m['size']}"
                 for m in c.spec["linux"][key]]
        write_file(f"/proc/{c.pid}/{file}", "\n".join(lines),
                   why="root inside is this id outside, who owns nothing there")
    c.users = open_fd(f"/proc/{c.pid}/ns/user", os.O_RDONLY, "for id-mapped mounts")


def join_namespaces(c):
    """Step of `exec`: into all of a running container's namespaces, at once.

    To be in a pid namespace takes being born there, hence the second fork; with
    CLONE_PARENT the newborn is the waiting parent's child, and we are done.
    """
    flags = namespace_flags(c.spec) | CLONE_NEWNS
    syscall("setns", c.target, flags, why="all namespaces of its process 1")
    pid, _ = clone3(CLONE_PARENT, why="born in the container's pid namespace")
    if pid:
        c.tell_parent(ask="follow", pid=pid)
        os._exit(0)
    c.await_parent()
    c.root_fd = open_fd("/", O_PATH | O_DIRECTORY, "the container's root")


@answers("follow")
def follow(c, pid):
    """Outside: from now on wait for the process that was born inside."""
    os.waitpid(c.pid, 0)
    os.close(c.pidfd)
    c.pid, c.pidfd = pid, syscall("pidfd_open", pid, 0, why="the program, for us")


def kill_and_wait(c):
    """Outside: end init, and with it its whole pid namespace."""
    if c.pid > 0 and c.status is None:
        os.kill(c.pid, signal.SIGKILL)
        c.wait()


def set_names(c):
    """Step: the host and domain name, in the UTS namespace that is ours alone."""
    for call, name in (("sethostname", c.spec.get("hostname")),
                       ("setdomainname", c.spec.get("domainname"))):
        if name:
            syscall(call, name, len(os.fsencode(name)), why="what `hostname` shows")


def loopback_up(c):
    """Step: bring up the loopback interface, down in every new network namespace."""
    AF_INET, SOCK_DGRAM, IFF_UP = 2, 0x80002, 1  # CLOEXEC'd
    if not namespace_flags(c.spec) & CLONE_NEWNET:
        return
    fd = syscall("socket", AF_INET, SOCK_DGRAM, 0, why="any socket will do for ioctl")
    ifreq = ctypes.create_string_buffer(struct.pack("16sh", b"lo", IFF_UP), 40)
    syscall("ioctl", fd, SIOCSIFFLAGS, ifreq, why="127.0.0.1 works: lo is up")
    os.close(fd)


def set_sysctls(c):
    """Step: --sysctl, through the host's /proc, which shows whoever looks the settings
    of his own namespaces; what the image or a volume has at /proc is never written."""
    for name, value in c.spec["linux"].get("sysctl", {}).items():
        try:
            write_file(f"/proc/sys/{name.replace('.', '/')}", value, why="--sysctl")
        except OSError as error:
            raise Fail(f"--sysctl {name}={value}: {error.strerror}",
                       "is the name right, and the value within bounds? Some kernels "
                       "leave it to the host's root: --userns host") from None


def namespaces_of(pid):
    """{kind: inode} of the namespaces that a process is in."""
    found = {}
    for kind, (_, file, _) in NAMESPACES.items():
        try:
            found[kind] = os.stat(f"/proc/{pid}/ns/{file}").st_ino
        except FileNotFoundError:
            if not os.path.exists(f"/proc/{pid}"):
                raise Fail(f"no such process: {pid}", "see `ps -e`", 1) from None
    return found


def a_process_of_the_host():
    """A process in the first namespaces: kthreadd, a thread of the kernel's own; in
    a container around us, where it is not to be seen, that container's process 1."""
    try:
        return 2 if read_file("/proc/2/comm") == "kthreadd\n" else 1
    except FileNotFoundError:
        return 1


@command("ns", arg("pid", nargs="?", metavar="PID", help="default: this process"))
def ns_command(options):
    """What a process is isolated from: its namespaces beside the host's."""
    pid = options.pid or "self"
    if pid != "self" and not pid.isdecimal():
        raise Fail(f"not a process number: {pid!r}", "see `ps -e`", 1)
    try:
        mine, host = namespaces_of(pid), {}
        try:
            host = namespaces_of(a_process_of_the_host())
        except PermissionError:
            say("only root may see which namespaces are the host's")
        lines = [f"{'NAMESPACE':10} {'INODE':>11} {'HOST':>11}  ISOLATES"]
        for kind, inode in mine.items():
            other = host.get(kind, "?")
            what = NAMESPACES[kind][2] if other not in (inode, "?") else "-"
            lines.append(f"{kind:10} {inode:>11} {other:>11}  {what}")
        for title, file in (("uid map", "uid_map"), ("gid map", "gid_map")):
            for row in read_file(f"/proc/{pid}/{file}").splitlines():
                inside, outside, count = map(int, row.split())
                lines.append(f"{title}: {inside}-{inside + count - 1} inside is "
                             f"{outside}-{outside + count - 1} outside")
        for row in read_file(f"/proc/{pid}/status").splitlines():
            if row.startswith("NSpid:"):
                lines.append("pid, from the host's namespace to the innermost: "
                             + " → ".join(row.split()[1:]))
    except PermissionError as error:
        raise Fail(f"{error.filename}: {error.strerror}",
                   "only root may look at another user's process", 1) from None
    print("\n".join(lines))

# ══ 3. CONTROL GROUPS ═════════════════════════════════════════════════════════════
#
# Namespaces limit what a process sees; a control group limits what it uses.  It is a
# directory in /sys/fs/cgroup: mkdir makes one, a number written to cgroup.procs moves
# a process into it, its children are born there, rmdir removes it.  Controllers put
# files into it, and four jobs are done through those files:
#
#       limit    memory.max  cpu.max  pids.max  io.max  cpuset.cpus
#       weigh    cpu.weight  io.weight             (a share, when there is a rush)
#       measure  memory.current  cpu.stat  io.stat  memory.events
#       control  cgroup.freeze  cgroup.kill        (everything inside, at once)
#
# That is version 2: one tree, a controller works in a directory if the parent names
# it in cgroup.subtree_control.  In version 1 every controller is a tree of its own,
# mounted somewhere, with other file names.  One table below says both, version 2
# first; "hybrid" (v1 controllers beside an empty v2 tree) is version 1 to us.
#
# Each container has one group of that tree, minicontainer-ID, next to the root: no
# group of ours stands between, so there is nothing to share or leave behind.  What
# stays is that the root of a version 2 tree passes its controllers down.
#
# Not here: control of devices.  Ours do not need it, because every file system of
# a container is mounted nodev (chapter 4), so that a device node in it is inert, and
# what --device gives for reading only cannot be opened for more.
#
# Man pages: cgroups(7); the kernel's Documentation/admin-guide/cgroup-v2.rst.

CGROUP_ROOT = "/sys/fs/cgroup"
IMPLIED = "minicontainer.implied"  # annotation: the limits that nobody asked for

V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "blkio", "pids", "freezer")


def cgroup_trees():
    """{controller: mount point} of version 1, or {} where there is only version 2."""
    if os.path.exists(f"{CGROUP_ROOT}/cgroup.controllers"):
        return {}
    trees = {}
    mounts = read_file("/proc/self/mountinfo", why="where the v1 trees are")
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, super_options = right.split(" ", 2)
        if kind == "cgroup":
            for controller in super_options.split(","):
                if controller in V1_CONTROLLERS:
                    trees[controller] = left.split()[4]
    return trees


THROTTLES = [(way, unit, f"throttle{way.title()}{unit.upper()}Device")
             for way in ("read", "write") for unit in ("bps", "iops")]

CGROUP_OPTIONS = (
    arg("-m", "--memory", metavar="BYTES", help="memory limit (64m)"),
    arg("--memory-swap", metavar="BYTES", help="memory plus swap; -1: no limit"),
    arg("--memory-reservation", metavar="BYTES", help="memory kept from reclaim"),
    arg("--cpus", metavar="N", help="processors' worth of time (1.5)"),
    arg("-c", "--cpu-shares", metavar="N", help="weight among others (1024)"),
    arg("--cpuset-cpus", metavar="LIST", help="processors to run on (0-2,5)"),
    arg("--cpuset-mems", metavar="LIST", help="memory nodes to use"),
    arg("--pids-limit", metavar="N", help="processes and threads; -1: no limit"),
    arg("--blkio-weight", metavar="N", help="share of the disk, 10 to 1000"),
    *(arg(f"--device-{way}-{unit}", metavar="DEVICE:RATE", action="append", default=[],
          help=f"limit {way}s, in {'bytes' if unit == 'bps' else 'requests'} a second")
      for way, unit, _ in THROTTLES),
)


def whole(option, text, low, high=1 << 62, base=10):
    """The integer that an option's text means, within its bounds."""
    try:
        number = int(text, base)
        if low <= number <= high:
            return number
    except ValueError:
        pass
    bounds = f"from {low} to {high}" if high < 1 << 62 else f"from {low} on"
    raise Fail(f"invalid value for {option}: {text!r}", "an octal number from 0 to "
               f"{high:o}" if base == 8 else f"a whole number {bounds}")


def throttle(option, text):
    """One rule of a block device: "/dev/sda:1mb" as major, minor and rate."""
    path, _, rate = text.rpartition(":")
    try:
        status = os.stat(path)
    except OSError as error:
        raise Fail(f"{option} {text}: {error.strerror}: {path!r}",
                   "DEVICE:RATE, as in /dev/sda:1mb") from None
    if not stat.S_ISBLK(status.st_mode):
        raise Fail(f"{option} {text}: {path} is not a block device", "see `lsblk`")
    return {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev),
            "rate": size(rate)}


def resources_spec(o):
    """linux.resources of the spec, as the options ask; sizes in bytes."""
    memory, cpu, pids, block = {}, {}, {}, {}
    if o.memory:
        memory["limit"] = size(o.memory)
        if memory["limit"] < 6 << 20:
            raise Fail(f"--memory {o.memory} is too small", "6m is the least")
        memory["swap"] = 2 * memory["limit"]  # Docker's: as much swap as memory
    if o.memory_swap:
        if "limit" not in memory:
            raise Fail("--memory-swap without --memory", "set --memory as well")
        memory["swap"] = -1 if o.memory_swap == "-1" else size(o.memory_swap)
        if -1 < memory["swap"] < memory["limit"]:
            raise Fail("--memory-swap is less than --memory",
                       "it counts memory and swap together")
    if o.memory_reservation:
        memory["reservation"] = size(o.memory_reservation)
        if memory["reservation"] > memory.get("limit", memory["reservation"]):
            raise Fail("--memory-reservation is more than --memory", "make it less")
    if o.cpus:
        try:
            quota = round(float(o.cpus) * 100_000)
        except (ValueError, OverflowError):
            quota = 0
        if not 1000 <= quota <= 100_000 * os.cpu_count():
            raise Fail(f"invalid value for --cpus: {o.cpus!r}",
                       f"a number from 0.01 to {os.cpu_count()}, the host's")
        cpu.update(quota=quota, period=100_000)
    if o.cpu_shares and o.cpu_shares != "0":
        cpu["shares"] = whole("--cpu-shares", o.cpu_shares, 2, 262144)
    for key, value in (("cpus", o.cpuset_cpus), ("mems", o.cpuset_mems)):
        if value:
            cpu[key] = value
    if o.pids_limit and o.pids_limit not in ("-1", "0"):
        pids["limit"] = whole("--pids-limit", o.pids_limit, 1)
    if o.blkio_weight:
        block["weight"] = whole("--blkio-weight", o.blkio_weight, 10, 1000)
    for way, unit, key in THROTTLES:
        if asked := getattr(o, f"device_{way}_{unit}"):
            block[key] = [throttle(f"--device-{way}-{unit}", text) for text in asked]
    found = {"memory": memory, "cpu": cpu, "pids": pids, "blockIO": block}
    return {name: value for name, value in found.items() if value}


def swap_only(spec):
    """What version 2 wants to know: swap without the memory that OCI adds to it."""
    memory = spec["memory"]
    return "max" if memory["swap"] < 0 else memory["swap"] - memory.get("limit", 0)


def cpu_weight(spec):
    """Shares 2 to 262144 (1024 is normal) as a weight 1 to 10000."""
    return 1 + (spec["cpu"]["shares"] - 2) * 9999 // 262142


def io_weight(spec):
    """Docker's 10 to 1000 as version 2's 1 to 10000."""
    return 1 + (spec["blockIO"]["weight"] - 10) * 9999 // 990


def bandwidth(spec):
    """Quota and period in microseconds, as cpu.max takes them."""
    return f"{spec['cpu'].get('quota', 'max')} {spec['cpu'].get('period', 100_000)}"


def rules(key, word=""):
    """A function of the spec: its list of throttles, one line for each device."""
    return lambda spec: [f"{d['major']}:{d['minor']} {word}{d['rate']}"
                         for d in spec["blockIO"][key]]


# What the spec says, and the file of which controller says so to the kernel: in
# version 2, then in version 1.  A value is the spec's own, or a function of the spec;
# of several files the first that is there is taken.  Order matters once: in version 1
# memory+swap may not be below memory, so memory is first.
LIMITS = (
    # in the spec           controller   files of v2, files of v1: {name: value}
    ("memory limit", "memory", {"memory.max": None}, {"memory.limit_in_bytes": None}),
    ("memory swap", "memory", {"memory.swap.max": swap_only},
     {"memory.memsw.limit_in_bytes": None}),
    ("memory reservation", "memory", {"memory.low": None},
     {"memory.soft_limit_in_bytes": None}),
    ("cpu shares", "cpu", {"cpu.weight": cpu_weight}, {"cpu.shares": None}),
    ("cpu period", "cpu", {"cpu.max": bandwidth}, {"cpu.cfs_period_us": None}),
    ("cpu quota", "cpu", {"cpu.max": bandwidth}, {"cpu.cfs_quota_us": None}),
    ("cpu cpus", "cpuset", {"cpuset.cpus": None}, {"cpuset.cpus": None}),
    ("cpu mems", "cpuset", {"cpuset.mems": None}, {"cpuset.mems": None}),
    ("pids limit", "pids", {"pids.max": None}, {"pids.max": None}),
    ("blockIO weight", "blkio", {"io.bfq.weight": None, "io.weight": io_weight},
     {"blkio.bfq.weight": None, "blkio.weight": None}),
    *((f"blockIO {key}", "blkio", {"io.max": rules(key, f"{way[0]}{unit}=")},
       {f"blkio.throttle.{way}_{unit}_device": rules(key)})
      for way, unit, key in THROTTLES),
)


def io_sum(text, word):
    """The numbers that follow `word` in a table of devices, added up."""
    return sum(int(line.split(word)[1].split()[0])
               for line in text.splitlines() if word in line)


def removed(directory):
    """Whether rmdir of a group has worked; a dying process keeps it for a moment."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def wait_for(condition, seconds=10):
    """Return when condition() holds.  For the few things that the kernel finishes
    later and tells nobody about; nothing else here polls."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Fail("the kernel has not finished after 10 seconds",
                       "is a process stuck? see `ps -eo pid,stat,wchan`")
        time.sleep(0.0005)


class Cgroup:
    """The control group of one container, in whichever version the host has."""

    def __init__(self, path, trees=None):
        self.path = path.strip("/")  # below each tree's root
        self.birth_fd = -1  # version 2: the directory, for CLONE_INTO_CGROUP
        self.task_fds = []  # version 1: the open `tasks` file of each tree
        self.trees = cgroup_trees() if trees is None else trees

    def directory(self, controller=""):
        """Where the group is, in the tree of a version 1 controller or of version 2."""
        root = self.trees.get(controller) if self.trees else CGROUP_ROOT
        return f"{root}/{self.path}" if root else None

    def directories(self):
        """All directories that make up the group: one, or one for each v1 tree."""
        if not self.trees:
            return [self.directory()]
        return sorted({self.directory(name) for name in self.trees})

    def read(self, file, controller=""):
        """The text of one of the group's files, or "" where there is no such file."""
        directory = self.directory(controller)
        try:
            return read_file(f"{directory}/{file}") if directory else ""
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                return ""
            raise

    def table(self, file, controller=""):
        """A file of `key number` lines as a dict."""
        rows = [line.split() for line in self.read(file, controller).splitlines()]
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}

    def number(self, file, controller=""):
        """A file of one number; None where there is none, or no limit ("max")."""
        text = self.read(file, controller).strip()
        return int(text) if text.isdecimal() and int(text) < 1 << 62 else None

    def exists(self):
        """Whether any directory of the group is there."""
        return any(map(os.path.isdir, self.directories()))

    def create(self, resources, implied=()):
        """Make the group and set the limits in it.  Processes come in later.

        What is only `implied` by another limit is not asked of a host without it.
        """
        if not self.trees:
            self.enable_controllers()
        for directory in self.directories():
            syscall("mkdirat", AT_FDCWD, directory, 0o755, why="a new control group")
        if "cpuset" in self.trees:  # a v1 cpuset refuses processes while it is empty
            for file in ("cpuset.cpus", "cpuset.mems"):
                parent = os.path.dirname(self.directory("cpuset"))
                write_file(f"{self.directory('cpuset')}/{file}",
                           read_file(f"{parent}/{file}"),
                           why="a v1 cpuset starts empty")
        for row in LIMITS:
            section, key = row[0].split()
            if key in resources.get(section, {}):
                self.limit(row, resources, implied)

    def enable_controllers(self):
        """Have the root of the version 2 tree pass its controllers down, for good; one
        that it cannot is missed when a limit asks for it."""
        have = read_file(f"{CGROUP_ROOT}/cgroup.controllers").split()
        on = read_file(f"{CGROUP_ROOT}/cgroup.subtree_control").split()
        for name in ("memory", "cpu", "cpuset", "io", "pids"):
            if name in have and name not in on:
                try:
                    write_file(f"{CGROUP_ROOT}/cgroup.subtree_control", f"+{name}",
                               why="let groups below the root use this controller")
                except (PermissionError, FileNotFoundError):
                    say(f"the {name} controller cannot be enabled in {CGROUP_ROOT}")

    def limit(self, row, resources, implied):
        """Write one limit; a Fail that names the controller where there is none."""
        what, controller, v2, v1 = row
        (section, key), forms = what.split(), v1 if self.trees else v2
        value, directory = resources[section][key], self.directory(controller)
        file = next((name for name in forms
                     if directory and os.path.exists(f"{directory}/{name}")), None)
        if file is None:
            if what in implied:
                say(f"this host cannot limit {what}: limited without it")
                return
            raise Fail(f"this host cannot set {section}.{key}: its {controller} "
                       f"controller has no {' or '.join(forms)}",
                       "leave the option out, or enable the controller in the kernel")
        lines = forms[file](resources) if forms[file] else value
        for line in lines if isinstance(lines, list) else [lines]:
            try:
                write_file(f"{directory}/{file}", str(line), why=f"limit: {what}")
            except OSError as error:
                raise Fail(f"the kernel refuses {what} {line!r}: {error.strerror} "
                           f"({controller} controller, {file})",
                           "is the value within what the host has?") from None

    def open_doors(self):
        """Open what a process needs to be born in the group, or to enter it."""
        if not self.trees:
            self.birth_fd = open_fd(self.directory(), O_PATH, "to be born in")
        for directory in self.directories() if self.trees else ():
            self.task_fds.append(open_fd(f"{directory}/tasks", O_WRONLY,
                                         "for init, who may not open it"))

    def pids(self):
        """The processes in the group and in the groups below it."""
        found, start = set(), self.directory("freezer") or self.directories()[0]
        for top, _, files in os.walk(start):
            if "cgroup.procs" in files:
                try:
                    found.update(read_file(f"{top}/cgroup.procs").split())
                except OSError as error:  # the group has just been removed
                    if error.errno not in (errno.ENOENT, errno.ENODEV):
                        raise
        return sorted(map(int, found))

    def freeze(self, frozen=True):
        """Stop everything in the group where it stands, or let it go on; returns
        when that is so."""
        if self.trees:
            file, want = f"{self.directory('freezer')}/freezer.state", "FROZEN"
            write_file(file, want if frozen else "THAWED", why="freeze or thaw, v1")
            wait_for(lambda: (read_file(file).strip() == want) == frozen)
        else:
            write_file(f"{self.directory()}/cgroup.freeze", str(int(frozen)),
                       why="freeze or thaw everything in the group")
            wait_for(lambda: self.table("cgroup.events")["frozen"] == int(frozen))

    def kill(self):
        """Kill everything in the group at once, frozen or not; returns when it is
        empty, or gone."""
        try:
            if self.trees or not os.path.exists(f"{self.directory()}/cgroup.kill"):
                while self.pids():  # frozen, none can fork; killed, they die thawed
                    self.freeze()
                    for pid in self.pids():
                        try:
                            os.kill(pid, signal.SIGKILL)
                        except ProcessLookupError:  # it had been killed before
                            pass
                    self.freeze(False)
            else:
                write_file(f"{self.directory()}/cgroup.kill", "1", why="all at once")
                wait_for(lambda: not self.table("cgroup.events")["populated"])
        except (FileNotFoundError, KeyError):
            if self.exists():
                raise

    def remove(self):
        """Kill what is left in the group, and remove it."""
        self.kill()
        for fd in (self.birth_fd, *self.task_fds):
            if fd >= 0:
                os.close(fd)
        self.birth_fd, self.task_fds = -1, []
        for directory in self.directories():
            for top, _, _ in os.walk(directory, topdown=False):
                wait_for(lambda top=top: removed(top))

    def measure(self):
        """What the group has used, in bytes and microseconds, and where it hit a
        limit; None where this host does not count something."""
        if self.trees:
            return self.measure_v1()
        cpu, events = self.table("cpu.stat"), self.table("memory.events")
        return {
            "cpu_usec": cpu.get("usage_usec"),
            "cpu_throttled_usec": cpu.get("throttled_usec"),
            "memory": self.number("memory.current"),
            "memory_peak": self.number("memory.peak"),
            "memory_limit": self.number("memory.max"),
            "pids": self.number("pids.current"),
            "pids_limit": self.number("pids.max"),
            "io_read": io_sum(self.read("io.stat"), "rbytes="),
            "io_written": io_sum(self.read("io.stat"), "wbytes="),
            "oom_kills": events.get("oom_kill"),
            "pressure": {kind: text.partition("\n")[0]
                         for kind in ("cpu", "memory", "io")
                         if (text := self.read(f"{kind}.pressure"))},
        }

    def measure_v1(self):
        """measure(), from the files of version 1."""
        stat_, usage = self.table("cpu.stat", "cpu"), self.number
        io = self.read("blkio.throttle.io_service_bytes_recursive", "blkio")
        nsec, throttled = usage("cpuacct.usage", "cpuacct"), stat_.get("throttled_time")
        return {
            "cpu_usec": None if nsec is None else nsec // 1000,
            "cpu_throttled_usec": None if throttled is None else throttled // 1000,
            "memory": usage("memory.usage_in_bytes", "memory"),
            "memory_peak": usage("memory.max_usage_in_bytes", "memory"),
            "memory_limit": usage("memory.limit_in_bytes", "memory"),
            "pids": usage("pids.current", "pids"),
            "pids_limit": usage("pids.max", "pids"),
            "io_read": io_sum(io, "Read "),
            "io_written": io_sum(io, "Write "),
            "oom_kills": self.table("memory.oom_control", "memory").get("oom_kill"),
            "pressure": {},
        }


calls(mkdirat=(258, 34, "dirfd path mode"))


def show_stats(used):
    """What a container has used, as lines for the person."""
    def show(key, form=str):
        return "-" if used[key] is None else form(used[key])

    def seconds(microseconds):
        return f"{microseconds / 1e6:.3f} s"

    yield (f"cpu     {show('cpu_usec', seconds)}, "
           f"throttled {show('cpu_throttled_usec', seconds)}")
    yield (f"memory  {show('memory', human)}, peak {show('memory_peak', human)}, "
           f"limit {show('memory_limit', human)}, OOM kills {show('oom_kills')}")
    yield f"pids    {show('pids')}, limit {show('pids_limit')}"
    yield f"io      read {show('io_read', human)}, written {show('io_written', human)}"
    for kind, line in used["pressure"].items():
        yield f"{kind} pressure: {line}"


def make_cgroup(c):
    """Outside: the container's control group, limits and all, still empty."""
    c.cgroup = Cgroup(c.spec["linux"]["cgroupsPath"])
    implied = c.spec.get("annotations", {}).get(IMPLIED, "").split(",")
    c.cgroup.create(c.spec["linux"].get("resources", {}), implied)
    c.cgroup.open_doors()


def join_cgroup(c):
    """Step: into the groups of version 1; in version 2, init was born there.

    It says "0", itself, to the files that the parent opened for it: to move another
    process the kernel would stop every fork on the machine, which takes it 10 ms.
    """
    for fd in c.cgroup.task_fds:
        write_file(fd, "0", why="from here on it is counted and limited")


def remove_cgroup(c):
    """Outside: kill whatever is left of the container, and remove its group."""
    if c.cgroup:
        c.cgroup.remove()

# ══ 4. FILE SYSTEMS ═══════════════════════════════════════════════════════════════
#
# A container's root is an overlay: read-only layers, shared by all who use them, and
# on top a directory of its own that takes what it changes.
#
#          upper    (this container's)      /etc/motd changed, /tmp/x new
#        ─ layer 1  (shared, read-only)     /usr/bin/python3
#        ─ layer 0  (shared, read-only)     /bin/sh  /etc/motd
#        ═ rootfs                           all of it, the topmost wins
#
# It takes two to build it, because of the user namespace.  The parent, real root,
# opens a workshop: a mount namespace of its own, copied from the host's, with an
# empty tmpfs in it as working directory.  There it attaches each layer through an
# id-mapped mount (an owner 0 on disk is the container's root, so that one copy on
# disk serves every range of ids) and mounts the overlay.  Init was cloned into the
# workshop and now copies that namespace for itself; the parent goes home, and the
# workshop lives on only as the container's.  Nothing was ever mounted on the host,
# so whatever dies, and however, no mount is left behind (P5).
#
# In its copy init mounts /proc, /sys and /dev, attaches volumes, hides what tells too
# much about the host, and pivots: rootfs becomes /, and the host's tree falls away.
#
# Two rules keep an image from fooling us.  Its paths are opened with openat2 and
# RESOLVE_IN_ROOT, as if we were inside already, and mounted on by descriptor (P4).
# And every mount is nodev except the few devices that we bind from the host's /dev,
# and those that were asked for: the parent makes nodes of these in the workshop, that
# belong to the container's root as the host's belong to the host's.
#
# A volume's source is opened on the host before the workshop is, so that "shared"
# still means shared with the host; everything in the workshop is a slave of the host's
# mounts (an unmount there comes through) and never the other way around.
#
# Man pages: mount(2), mount_namespaces(7), open_tree(2), mount_setattr(2),
# pivot_root(2), openat2(2); the kernel's Documentation/filesystems/overlayfs.rst.

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_REMOUNT, MS_NOATIME, MS_NODIRATIME = 16, 32, 1024, 2048
MS_BIND, MS_REC, MS_UNBINDABLE, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 17, 1 << 18
MS_SLAVE, MS_SHARED, MS_RELATIME, MS_STRICTATIME = 1 << 19, 1 << 20, 1 << 21, 1 << 24
MNT_DETACH = 2
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 4, 0x40
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MOUNT_ATTR_NOEXEC, MOUNT_ATTR_IDMAP = 8, 0x100000
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 2, 4
RESOLVE_BENEATH, RESOLVE_IN_ROOT = 8, 16
TIOCSPTLCK, TIOCGPTPEER, TIOCSCTTY = 0x40045431, 0x5441, 0x540E

calls(
    mount=(165, 40, "source target type MS_ data"),
    umount2=(166, 39, "target MNT_"),
    pivot_root=(155, 41, "new_root put_old"),
    open_tree=(428, 428, "dirfd path OPEN_TREE_|AT_"),
    move_mount=(429, 429, "dirfd path to_dirfd to_path MOVE_MOUNT_"),
    mount_setattr=(442, 442, "dirfd path AT_ attr size"),
    openat2=(437, 437, "dirfd path how size"),
    mknodat=(259, 33, "dirfd path mode dev"),
    pidfd_getfd=(438, 438, "pidfd fd flags"),
    symlinkat=(266, 36, "target dirfd path"),
    chdir=(80, 49, "path"),
    fchdir=(81, 50, "fd"),
    fchownat=(260, 54, "dirfd path owner group AT_"),
    fchmodat=(268, 53, "dirfd path mode"),
)

OPTION_WORDS = {
    "ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS, "noatime": MS_NOATIME, "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME, "strictatime": MS_STRICTATIME,
    "bind": MS_BIND, "rbind": MS_BIND | MS_REC,
}
CLEARING_WORDS = {"rw": MS_RDONLY, "suid": MS_NOSUID, "exec": MS_NOEXEC,
                  "async": MS_SYNCHRONOUS, "atime": MS_NOATIME}
NEUTRAL_WORDS = ("idmap", "defaults", "nocopy", "z", "Z", "consistent", "cached",
                 "delegated", "dev")  # "dev": no device works but those we bind
TMPFS_WORDS = ("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "huge")
PROPAGATIONS = {
    "private": MS_PRIVATE, "rprivate": MS_REC | MS_PRIVATE,
    "slave": MS_SLAVE, "rslave": MS_REC | MS_SLAVE,
    "shared": MS_SHARED, "rshared": MS_REC | MS_SHARED,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_REC | MS_UNBINDABLE,
}
MASKED_PATHS = [  # Docker's list: they tell about, or reach, the host
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
    "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware"]
READONLY_PATHS = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                  "/proc/sysrq-trigger"]
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

MOUNT_OPTIONS = (
    arg("--read-only", action="store_true", help="mount the root file system so"),
    arg("-v", "--volume", metavar="SRC:DST[:OPTIONS]", action="append", default=[],
        help="show a file or directory of the host; options as ro, rshared"),
    arg("--mount", metavar="KEY=VALUE,…", action="append", default=[],
        help="type=bind|tmpfs,source=…,target=…,readonly"),
    arg("--tmpfs", metavar="DST[:OPTIONS]", action="append", default=[],
        help="an empty directory in memory"),
    arg("--shm-size", metavar="BYTES", help="size of /dev/shm (64m)"),
    arg("--device", metavar="HOST[:INSIDE[:rwm]]", action="append", default=[],
        help="give it a device, or a directory of devices, of the host"),
)


class open_how(ctypes.Structure):
    """struct open_how of <linux/openat2.h>."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]

    def __str__(self):
        return ("{.flags = " + spell_flags(self.flags, "O_") + ", .resolve = "
                + spell_flags(self.resolve, "RESOLVE_") + "}")


class mount_attr(ctypes.Structure):
    """struct mount_attr of <linux/mount.h>."""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        "attr_set", "attr_clr", "propagation", "userns_fd")]

    def __str__(self):
        spelled = [".attr_set = " + spell_flags(self.attr_set, "MOUNT_ATTR_")]
        if self.propagation:
            spelled.append(".propagation = " + spell_flags(self.propagation, "MS_"))
        return "{" + ", ".join(spelled) + "}"


# ── the spec: what the options mean ──


def masked_paths():
    """All that is hidden: the list, and what each processor tells of its heat."""
    top = "/sys/devices/system/cpu"
    heat = [f"{top}/{cpu}/thermal_throttle" for cpu in sorted(os.listdir(top))]
    return MASKED_PATHS + [path for path in heat if os.path.isdir(path)]


def check_target(option, target):
    """Refuse a mount's target that is not an absolute path below /."""
    if not target.startswith("/") or os.path.normpath(target) in ("/", "//"):
        raise Fail(f"{option}: invalid target {target!r}",
                   "an absolute path inside the container, and not / itself")


def bind_mount(option, source, target, words):
    """A bind mount in the spec's form, its words checked."""
    check_target(option, target)
    for word in words:
        if not any(word in known for known in (OPTION_WORDS, CLEARING_WORDS,
                                               PROPAGATIONS, NEUTRAL_WORDS)):
            raise Fail(f"{option}: unknown option {word!r}",
                       "ro, rw, rprivate, rslave, rshared, nosuid, noexec …")
    return {"destination": "/" + os.path.normpath(target).lstrip("/"), "type": "bind",
            "source": os.path.abspath(source),
            "options": ["rbind", "nodev", "idmap", *words]}


def volume_mount(text):
    """The mount that Docker's -v SRC:DST[:OPTIONS] means."""
    source, _, rest = text.partition(":")
    target, _, words = rest.partition(":")
    if not source.startswith("/"):
        what = f"-v {text}: " + ("named volumes do not exist yet" if target
                                 else "anonymous volumes do not exist yet")
        raise Fail(what, "name a directory of the host: -v /SRC:/DST")
    if not target:
        raise Fail(f"-v {text}: no target", "-v /SRC:/DST[:ro]")
    return bind_mount(f"-v {text}", source, target, words.split(",") if words else [])


def tmpfs_mount(option, target, words):
    """A tmpfs in the spec's form, with Docker's defaults."""
    check_target(option, target)
    words = words.split(",") if words else []
    for word in words:
        if not any(word.partition("=")[0] in known for known in (
                OPTION_WORDS, CLEARING_WORDS, NEUTRAL_WORDS, TMPFS_WORDS)):
            raise Fail(f"{option}: unknown option {word!r}",
                       "size=64m, mode=1777, ro, exec …")
    return {"destination": "/" + os.path.normpath(target).lstrip("/"), "type": "tmpfs",
            "source": "tmpfs", "options": ["nosuid", "nodev", "noexec", *words]}


def long_mount(text):
    """The mount that Docker's --mount key=value,… means."""
    keys, words = {}, []
    names = {"src": "source", "dst": "target", "destination": "target",
             "ro": "readonly", "propagation": "bind-propagation"}
    for part in text.split(","):
        key, _, value = part.partition("=")
        keys[names.get(key, key)] = value
    unknown = set(keys) - {"type", "source", "target", "readonly", "bind-propagation",
                           "tmpfs-size", "tmpfs-mode"}
    if unknown:
        raise Fail(f"--mount {text}: unknown key {min(unknown)!r}",
                   "type, source, target, readonly, bind-propagation, tmpfs-size, "
                   "tmpfs-mode")
    kind, target = keys.get("type", "volume"), keys.get("target", "")
    if keys.get("readonly", "false").lower() in ("", "true", "1"):
        words.append("ro")
    if kind == "tmpfs":
        if "tmpfs-size" in keys:
            words.append(f"size={size(keys['tmpfs-size'])}")
        words.append(f"mode={keys.get('tmpfs-mode', '1777')}")
        return tmpfs_mount(f"--mount {text}", target, ",".join(words))
    if kind != "bind":
        raise Fail(f"--mount {text}: type {kind!r} does not exist yet",
                   "type=bind or type=tmpfs")
    if not os.path.isabs(keys.get("source", "")):
        raise Fail(f"--mount {text}: the source must be absolute", "source=/…")
    if not os.path.lexists(keys["source"]):
        raise Fail(f"--mount {text}: bind source path does not exist: "
                   f"{keys['source']}", "make it first; only -v makes it for you")
    if "bind-propagation" in keys:
        words.append(keys["bind-propagation"])
    return bind_mount(f"--mount {text}", keys["source"], target, words)


def device_nodes(source, target):
    """(path inside, status) of a device, or of all that is below a directory but the
    terminals and what else every container has of its own."""
    if not os.path.isdir(source):
        yield target, os.stat(source)
    for top, directories, files in os.walk(source):
        directories[:] = sorted(set(directories) - {"pts", "shm", "mqueue"})
        for name in sorted(set(files) - {"console", "ptmx", *DEVICES}):
            yield f"{target}{top[len(source):]}/{name}", os.lstat(f"{top}/{name}")


def devices_spec(options):
    """The spec's devices: what --device names, and with --privileged all there are."""
    found, kinds = {}, {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}
    for text in ["/dev"] * options.privileged + options.device:
        parts, what = text.split(":"), f"--device {text}"
        short = len(parts) == 2 and not set(parts[1]) - set("rwm")  # HOST:rwm
        access = parts.pop() if short or len(parts) > 2 else "rwm"
        if len(parts) > 2 or not access or set(access) - set("rwm"):
            raise Fail(f"{what}: bad mode specified: {access!r}", "HOST[:INSIDE[:rwm]]")
        for path in parts:
            check_target(what, path)
        if not {"r", "w"} <= set(access) and options.userns == "host":
            raise Fail(f"{what}: root of the host's user namespace cannot be kept to "
                       f"{access!r}", "give it rwm, or leave out what makes it root")
        try:
            source, target = parts[0].rstrip("/"), os.path.normpath(parts[-1])
            nodes = {path: status for path, status in device_nodes(source, target)
                     if stat.S_IFMT(status.st_mode) in kinds}
        except OSError as error:
            raise Fail(f"{what}: {error.strerror}", "see `ls -l /dev`") from None
        if not nodes:
            raise Fail(f"{what}: not a device node", "see `ls -l /dev`")
        for path, status in nodes.items():
            major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
            found[path] = {
                "path": path, "type": kinds[stat.S_IFMT(status.st_mode)],
                "major": major, "minor": minor, "uid": status.st_uid,
                "gid": status.st_gid, "fileMode": stat.S_IMODE(status.st_mode),
                "access": access}
    return list(found.values())


def mounts_spec(options):
    """The spec's mounts: those that every container has, then the volumes asked for.

    Three file systems show what a namespace holds, and a user namespace may mount
    one only if it owns that namespace; shared with the host, the host's is shown.
    """
    quiet = ["nosuid", "noexec", "nodev"]
    own_users = options.userns != "host"
    read_only = [] if options.privileged else ["ro"]

    def special(kind, path, shared, words, host=None):
        if shared == "host" and own_users:
            return {"destination": path, "type": "bind", "source": host or path,
                    "options": ["bind", *words]}
        return {"destination": path, "type": kind, "source": kind, "options": words}

    mounts = [
        special("proc", "/proc", options.pid, quiet),
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "nodev", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620",
                     "gid=5"]},
        special("sysfs", "/sys", options.network, quiet + read_only),
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
         "options": quiet + read_only},
    ]
    if options.ipc != "host" or os.path.isdir("/dev/mqueue"):
        mounts.append(special("mqueue", "/dev/mqueue", options.ipc, quiet))
    shm_size = size(options.shm_size or "0")
    if options.ipc == "host":
        if shm_size:
            raise Fail("--shm-size with --ipc host", "that /dev/shm is the host's")
        mounts.append({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
                       "options": ["rbind", *quiet]})
    else:
        mounts.append({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                       "options": [*quiet, "mode=1777",
                                   f"size={shm_size or 64 << 20}"]})
    asked = [volume_mount(text) for text in options.volume]
    asked += [long_mount(text) for text in options.mount]
    asked += [tmpfs_mount(f"--tmpfs {text}", *text.partition(":")[::2])
              for text in options.tmpfs]
    places = [mount["destination"] for mount in asked]
    for place in places:
        if places.count(place) > 1:
            raise Fail(f"Duplicate mount point: {place}", "mount one thing there")
    mounts = [m for m in mounts if m["destination"] not in places] + asked
    for mount in mounts if options.privileged else ():
        if mount["type"] in ("bind", "tmpfs") and "nodev" in mount["options"]:
            mount["options"].remove("nodev")  # as in Docker's: a new node there works
    return sorted(mounts, key=lambda m: m["destination"].count("/"))  # outer first


# ── the parent's part: sources, the workshop, the overlay ──


class CannotMapIds(Fail):
    """This kernel or file system has no id-mapped mounts."""


def take_sources(c):
    """Outside: open the source of each bind mount, where the host still is."""
    for mount in c.spec["mounts"]:
        if mount["type"] == "bind":
            flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
            if not os.path.lexists(mount["source"]):
                os.makedirs(mount["source"], exist_ok=True)  # -v makes it, as Docker's
            deep = AT_RECURSIVE if "rbind" in mount["options"] else 0
            c.sources[mount["destination"]] = syscall(
                "open_tree", AT_FDCWD, mount["source"], flags | deep,
                why=f"a copy of this mount, to be {mount['destination']}")


def open_workshop(c):
    """Outside: a mount namespace to build in, with an empty tmpfs as directory."""
    c.home = (open_fd("/proc/self/ns/mnt", os.O_RDONLY, "to find home again"),
              open_fd(".", O_PATH))
    syscall("unshare", CLONE_NEWNS, why="a copy of the host's mounts to build in")
    syscall("mount", None, "/", None, MS_REC | MS_SLAVE, None,
            why="nothing mounted from here on shows on the host")
    syscall("mount", "workshop", c.workshop, "tmpfs", MS_NODEV, "mode=755",
            why="an empty place that vanishes with the namespace")
    syscall("chdir", c.workshop, why="short names, and init inherits the directory")


def leave_workshop(c):
    """Outside: the parent goes back to where it came from."""
    if c.home:
        namespace, directory = c.home
        syscall("setns", namespace, CLONE_NEWNS, why="the parent goes home")
        syscall("fchdir", directory)
        c.home = None
        os.close(namespace)
        os.close(directory)


def remount(tree, attributes, propagation):
    """What set_attributes does, by mount(2), for kernels before 5.12."""
    say("this kernel has no mount_setattr: what is mounted below something read-only "
        "stays writable")
    place = Place(os.readlink(f"/proc/self/fd/{tree}"))
    place.fd = tree
    kept = os.fstatvfs(tree).f_flag & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    syscall("mount", None, place, None, MS_REMOUNT | MS_BIND | attributes | kept, None)
    if propagation:
        syscall("mount", None, place, None, MS_REC | propagation, None)


def set_attributes(tree, attributes, propagation=0, users=-1, what="",
                   deep=AT_RECURSIVE):
    """Change the mount at a descriptor and those below it; `users` is a user namespace
    through whose map it is to be seen."""
    attr = mount_attr(attr_set=attributes | (MOUNT_ATTR_IDMAP if users >= 0 else 0),
                      propagation=propagation, userns_fd=max(users, 0))
    try:
        syscall("mount_setattr", tree, "", AT_EMPTY_PATH | deep, attr,
                ctypes.sizeof(attr), why=f"how {what} is seen from inside")
    except OSError as error:
        if users >= 0 and error.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM,
                                          errno.EOPNOTSUPP):
            raise CannotMapIds(
                f"{what}: its file system cannot be id-mapped by this kernel") from None
        if error.errno != errno.ENOSYS:
            raise
        remount(tree, attributes, propagation)


def check_shared(mount):
    """Refuse to show as shared what the host does not share."""
    source, best = os.path.realpath(mount["source"]), ("", "")
    for line in read_file("/proc/self/mountinfo", why="shared?").splitlines():
        fields = line.split()
        point = fields[4]
        for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"),
                                   ("\\134", "\\")):
            point = point.replace(escaped, character)
        if os.path.commonpath((point, source)) == point and len(point) >= len(best[0]):
            best = point, fields[6]
    if not best[1].startswith(("shared:", "master:")):
        raise Fail(f"{mount['source']} is on {best[0]}, which is not a shared mount",
                   f"mount --make-rshared {best[0]}")


def prepare_sources(c):
    """Outside: what root owns in a source is to be the container's root's."""
    for mount in c.spec["mounts"]:
        if mount["type"] == "bind":
            if "shared" in mount["options"] or "rshared" in mount["options"]:
                check_shared(mount)
            if "idmap" in mount["options"] and c.users >= 0:
                set_attributes(c.sources[mount["destination"]], 0, 0, c.users,
                               mount["source"])


def shifted_id(id, base):
    """Where an owner's id lies in the range from `base` on; beyond it, nobody's."""
    return base + min(id, 65534) if base else id


def make_nodes(c):
    """Outside: nodes for the devices in the spec, on a file system that is not nodev.

    The host's own would not do: to the container's root they are files of nobody, for
    whom it has no rights.  Where it shall not read, or not write, that is just what
    is needed: a node of the host's root, who alone could change its mode.
    """
    devices, ids = c.spec["linux"].get("devices"), c.spec["linux"].get("uidMappings")
    if not devices:
        return
    base = ids[0]["hostID"] if ids else 0
    syscall("mkdirat", AT_FDCWD, "devices", 0o755)
    syscall("mount", "devices", "devices", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755",
            why="the one place for nodes that work, out of the container's reach")
    for number, device in enumerate(devices):
        path, mode = f"devices/{number}", device["fileMode"]
        owner, group = (shifted_id(device[key], base) for key in ("uid", "gid"))
        bits = 4 * ("r" in device["access"]) + 2 * ("w" in device["access"])
        if bits != 6:
            owner, group, mode = 0, base, bits << 3 | mode & bits
        syscall("mknodat", AT_FDCWD, path,
                stat.S_IFBLK if device["type"] == "b" else stat.S_IFCHR,
                os.makedev(device["major"], device["minor"]), why=device["path"])
        syscall("fchownat", AT_FDCWD, path, owner, group, 0)
        syscall("fchmodat", AT_FDCWD, path, mode, why="whatever our umask is")


def attach(path, name, attributes, users):
    """Outside: a directory of the host as `name` in the workshop, seen through the map
    of `users` unless that is -1."""
    syscall("mkdirat", AT_FDCWD, name, 0o755)
    tree = syscall("open_tree", AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC,
                   why="not yet anywhere")
    if users >= 0:  # only what is not attached yet can be id-mapped
        set_attributes(tree, 0, MS_PRIVATE, users, path)
    syscall("move_mount", tree, "", AT_FDCWD, name, MOVE_MOUNT_F_EMPTY_PATH,
            why="attached in the workshop")
    if attributes:  # only what is attached can be remounted by an older kernel
        set_attributes(tree, attributes, MS_PRIVATE, what=path)
    os.close(tree)


def build_rootfs(c):
    """Outside: all layers as one file system, the directory `rootfs` of the workshop.

    Names are short because mount(2) takes one page of options: with `0`, `1`, … for
    layers, hundreds of them fit, and no path needs its commas and colons escaped.
    """
    if not c.layers:  # --storage-driver vfs: there is a copy, with the owners it needs
        attach(f"{c.directory}/rootfs", "rootfs", MOUNT_ATTR_NODEV, -1)
        return
    for number, layer in enumerate(c.layers):
        attach(layer, str(number), 0, c.users)
    for name in ("changes", "rootfs"):
        syscall("mkdirat", AT_FDCWD, name, 0o755)
    syscall("mount", c.directory, "changes", None, MS_BIND, None,
            why="upper and work directory must be on one mount")
    lower = ":".join(map(str, reversed(range(len(c.layers)))))
    options = f"lowerdir={lower},upperdir=changes/upper,workdir=changes/work"
    if c.throw_away:
        options += ",volatile"  # not synced to disk at the end: it is removed then
    syscall("mount", "overlay", "rootfs", "overlay", MS_NODEV, options,
            why="layers below, changes on top; device nodes in it are inert")


# ── init's part: the steps of BIRTH that mount ──


def own_the_mounts(c):
    """Step: a copy of the workshop that only this container sees or changes."""
    flags = namespace_flags(c.spec) & LATER
    syscall("unshare", flags, why="mounts of our own; our cgroup becomes the root of "
            "the tree")
    syscall("mount", None, "/", None, MS_REC | MS_PRIVATE, None,
            why="nothing from here on reaches the host, or comes from there")


def hold_rootfs(c):
    """Step: make the rootfs a mount of our own, which pivot_root asks for."""
    syscall("mount", "rootfs", "rootfs", None, MS_BIND | MS_REC, None,
            why="a mount copied from the workshop is locked; this one is ours")
    c.root_fd = open_fd("rootfs", O_PATH | O_DIRECTORY, "paths inside start here")


def open_inside(c, path, flags=os.O_PATH):
    """A descriptor of a path of the container, resolved as if / were its root (P4)."""
    how = open_how(flags=flags | os.O_CLOEXEC,
                   resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    for left in reversed(range(128)):
        try:
            return syscall("openat2", c.root_fd, path, how, ctypes.sizeof(how))
        except BlockingIOError:  # a rename, anywhere, while there was a ".." on the way
            if not left:
                raise


def inside(c, path, make="", links=0):
    """The Place of a path of the container; `make` "dir" or "file" if it is missing,
    also where a symlink leads to what is missing."""
    place = Place(path)
    try:
        place.fd = open_inside(c, path)
    except FileNotFoundError:
        if not make:
            raise
        above = inside(c, os.path.dirname(path), "dir", links)
        name = os.path.basename(path)
        try:
            if make == "dir":
                syscall("mkdirat", above.fd, name, 0o755, why="a place to mount on")
            else:
                syscall("mknodat", above.fd, name, stat.S_IFREG | 0o644, 0,
                        why="a file to mount on")
        except FileExistsError:  # a symlink, then
            if links == 40:
                raise
            target = os.readlink(name, dir_fd=above.fd).rstrip("/") or "/"
            return inside(c, os.path.join(os.path.dirname(path), target), make,
                          links + 1)
        finally:
            above.close()
        place.fd = open_inside(c, path)
    return place


def attach_source(c, mount):
    """Put a source that the parent took at its place, read-only, private … as asked."""
    path = mount["destination"]
    tree, attributes, propagation = c.sources[path], 0, 0
    is_directory = stat.S_ISDIR(os.fstat(tree).st_mode)
    place = inside(c, path, "dir" if is_directory else "file")
    if is_directory != stat.S_ISDIR(os.fstat(place.fd).st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), f"mount on {path}")
    syscall("move_mount", tree, "", place.fd, "",
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
            why=f"the volume appears at {path}")
    place.close()
    for word in mount["options"]:
        attributes |= OPTION_WORDS.get(word, 0) & 15  # as MOUNT_ATTR_ are
        attributes &= ~CLEARING_WORDS.get(word, 0)
        propagation |= PROPAGATIONS.get(word, 0) & ~MS_REC
    if propagation & MS_SHARED:
        propagation = 0  # it is shared, or it had been refused
    else:
        # trap: where / is shared, a copy of /proc is the host's peer, and what we hide
        # in ours would be hidden on the host; hence private unless asked for
        propagation = propagation or MS_PRIVATE
    set_attributes(tree, attributes, propagation, what=path)


def mount_cgroup(c, path, flags):
    """The container's own cgroup as the root of the tree, in the host's layout."""
    place = inside(c, path, "dir")
    if not namespace_flags(c.spec) & CLONE_NEWCGROUP:
        syscall("mount", CGROUP_ROOT, place, None, MS_BIND | MS_REC, None,
                why="--cgroupns host: the host's whole tree")
    elif not c.cgroup.trees:
        syscall("mount", "cgroup", place, "cgroup2", flags & ~MS_RDONLY, None,
                why="its own cgroup looks like the root")
    else:
        syscall("mount", "cgroup", place, "tmpfs", flags & ~MS_RDONLY, "mode=755",
                why="v1: a directory for each tree")
        for point in sorted(set(c.cgroup.trees.values())):
            names = [n for n, at in c.cgroup.trees.items() if at == point]
            tree = inside(c, f"{path}/{os.path.basename(point)}", "dir")
            syscall("mount", "cgroup", tree, "cgroup", flags & ~MS_RDONLY,
                    ",".join(names), why="its own cgroup looks like the root")
            tree.close()
    place.close()
    if flags & MS_RDONLY:
        place = inside(c, path)
        set_attributes(place.fd, MOUNT_ATTR_RDONLY, what=path)
        place.close()


def mount_all(c):
    """Step: everything in the spec's mounts, in its order."""
    for mount in c.spec["mounts"]:
        flags, data = 0, []
        for word in mount["options"]:
            if word in OPTION_WORDS:
                flags |= OPTION_WORDS[word]
            elif word in CLEARING_WORDS:
                flags &= ~CLEARING_WORDS[word]
            elif word not in NEUTRAL_WORDS and word not in PROPAGATIONS:
                data.append(word)
        if mount["type"] == "bind":
            attach_source(c, mount)
        elif mount["type"] == "cgroup":
            mount_cgroup(c, mount["destination"], flags)
        else:
            place = inside(c, mount["destination"], "dir")
            syscall("mount", mount["source"], place, mount["type"], flags,
                    ",".join(data), why=f"the container's own {mount['destination']}")
            place.close()


def existing(c, paths):
    """The Places of those paths that the container has, each open for its turn."""
    for path in paths:
        try:
            place = inside(c, path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield place
        place.close()


def keep_nodes(c, paths):
    """Where there is no user namespace, and root inside owns the host's nodes that are
    at these paths: see that they keep their owner and mode.

    A read-only mount does that, and does not stop anybody from writing to a device.
    """
    if not namespace_flags(c.spec) & CLONE_NEWUSER:
        for place in existing(c, paths):
            set_attributes(place.fd, MOUNT_ATTR_RDONLY, what=place)


def make_devices(c):
    """Step: the few devices that every program expects, bound from the host's /dev, and
    those asked for; a volume on /dev is left as it is but for these."""
    nodes = [(f"/dev/{name}", f"/dev/{name}") for name in DEVICES]
    nodes = [] if "/dev" in c.sources else nodes
    nodes += [(f"devices/{number}", device["path"])
              for number, device in enumerate(c.spec["linux"].get("devices", ()))]
    for source, path in nodes:
        place = inside(c, path, "file")
        syscall("mount", source, place, None, MS_BIND, None,
                why="made outside: a user namespace may not make any")
        place.close()
    if "/dev" in c.sources:
        return
    keep_nodes(c, [f"/dev/{name}" for name in DEVICES])
    dev = inside(c, "/dev")
    for target, name in (("/proc/self/fd", "fd"), ("/proc/self/fd/0", "stdin"),
                         ("/proc/self/fd/1", "stdout"), ("/proc/self/fd/2", "stderr"),
                         ("pts/ptmx", "ptmx")):
        syscall("symlinkat", target, dev.fd, name)
    dev.close()


def open_console(c):
    """Step: a pseudo-terminal from the container's own /dev/pts, for -t.

    The program gets the terminal end as descriptors 0, 1, 2 and as /dev/console; the
    parent takes the other end out of us with pidfd_getfd, told the number by a line.
    """
    if not c.spec["process"].get("terminal"):
        return
    master = open_inside(c, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    syscall("ioctl", master, TIOCSPTLCK, ctypes.byref(ctypes.c_int(0)),
            why="unlock the other end")
    terminal = Place("/dev/pts/N")
    terminal.fd = syscall("ioctl", master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY,
                          why="the terminal itself, without a path")
    if c.is_new:
        place = inside(c, "/dev/console", "file")
        syscall("mount", terminal, place, None, MS_BIND, None, why="/dev/console is it")
        place.close()
    c.ask_parent("console", fd=master)
    os.close(master)
    syscall("ioctl", terminal.fd, TIOCSCTTY, 0, why="Ctrl-C there signals us")
    for number in (0, 1, 2):
        os.dup2(terminal.fd, number)
    terminal.close()


@answers("console")
def take_console(c, fd):
    """Outside: init's end of its new terminal becomes ours."""
    c.outer["console"] = syscall("pidfd_getfd", c.pidfd, fd, 0,
                                 why="the outer end of the terminal")
    os.set_blocking(c.outer["console"], False)  # it takes no more than it has room for


def open_stdio(c):
    """Outside: pipes for standard input, output and error, unless it gets a terminal.

    The caller's own descriptors stay outside: a program must not change the modes of
    a terminal of the host, or reopen its files through /dev/stdout.
    """
    if c.spec["process"].get("terminal"):
        return
    for name in ("stdin", "stdout", "stderr"):
        pair = os.pipe() if name == "stdin" else os.pipe()[::-1]
        os.fchmod(pair[0], 0o666)  # whoever it runs as may open /dev/stdout
        c.inner.append(pair[0])
        c.outer[name] = pair[1]


def take_stdio(c):
    """Step: those pipes become descriptors 0, 1 and 2."""
    for number, fd in enumerate(c.inner):
        os.dup2(fd, number)


def mask_paths(c):
    """Step: hide what tells too much, and make read-only what is dangerous to write."""
    for place in existing(c, c.spec["linux"].get("maskedPaths", ())):
        if stat.S_ISDIR(os.fstat(place.fd).st_mode):
            syscall("mount", "tmpfs", place, "tmpfs", MS_RDONLY | MS_NODEV, None,
                    why="hidden: an empty directory")
        else:
            syscall("mount", "/dev/null", place, None, MS_BIND, None,
                    why="hidden: an empty file, the host's own null device")
    keep_nodes(c, c.spec["linux"].get("maskedPaths", ()))
    paths = c.spec["linux"].get("readonlyPaths", ())
    for place in existing(c, paths):
        syscall("mount", place, place, None, MS_BIND | MS_REC, None,
                why="a mount of its own, so that it can be read-only")
    for place in existing(c, paths):
        set_attributes(place.fd, MOUNT_ATTR_RDONLY, what=place)


def pivot(c):
    """Step: the rootfs becomes /, and the host's tree is let go.

    pivot_root(".", ".") stacks the old root on the new one, so that no directory is
    needed to put it in, and "." is then the old one.
    """
    syscall("fchdir", c.root_fd)
    syscall("pivot_root", ".", ".", why="the container's files become /")
    syscall("umount2", ".", MNT_DETACH, why="the host's tree falls away")
    syscall("chdir", "/", why="into the new root")
    os.close(c.root_fd)
    c.root_fd = open_fd("/", O_PATH | O_DIRECTORY, "the container's root")


def seal_root(c):
    """Step: --read-only, now that every place to mount on has been made."""
    if c.spec["root"].get("readonly"):
        set_attributes(c.root_fd, MOUNT_ATTR_RDONLY, what="/", deep=0)

# ══ 5. PRIVILEGES ═════════════════════════════════════════════════════════════════
#
# Root's power comes in some forty pieces, the capabilities, and a process carries
# five sets of them:
#
#       bounding     what it can ever have again
#       permitted    what it may switch on         effective  what is switched on
#       inheritable, ambient                       what survives execve for non-root
#
# Docker leaves a container's root fourteen, and so do we, unless --cap-add, --cap-drop
# or --privileged say otherwise; inheritable and ambient stay empty, so that a program
# run as another user has none at all.  With a user namespace even these fourteen count
# only over what belongs to the container.
#
# Order is everything here.  Groups are set before the user, because a plain user may
# not; the bounding set shrinks first, because that needs CAP_SETPCAP; the user
# changes before the last capabilities go, because that needs CAP_SETUID; and
# no_new_privs, a promise that execve never adds power (no setuid, no file
# capabilities), comes when nothing more has to be gained.
#
# Names of users are those of the image, read by our own parser, for two reasons: the
# C library would load the image's NSS modules as root (P2), and a name means in the
# container what the container's /etc/passwd says, not the host's.
#
# Man pages: capabilities(7), credentials(7), seccomp(2), prctl(2), passwd(5),
# keyctl(2).

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAPBSET_DROP = 1, 4, 8, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
KEYCTL_JOIN_SESSION_KEYRING = 1
SECCOMP_SET_MODE_FILTER = 1

calls(
    prctl=(157, 167, "PR_ arg2 arg3 arg4 arg5"),
    capget=(125, 90, "header data"),
    capset=(126, 91, "header data"),
    setgroups=(116, 159, "count groups"),
    setresuid=(117, 147, "ruid euid suid"),
    setresgid=(119, 149, "rgid egid sgid"),
    fchown=(93, 55, "fd owner group"),
    umask=(95, 166, "mode"),
    setsid=(112, 157, ""),
    keyctl=(250, 219, "KEYCTL_ arg2"),
    prlimit64=(302, 261, "pid resource new old"),
    seccomp=(317, 277, "SECCOMP_ flags program"),
    close_range=(436, 436, "first last flags"),
    execve=(59, 221, "path argv envp"),
)

CAPABILITIES = tuple("CAP_" + name for name in """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP
    LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK
    IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT
    SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE
    AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND
    AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split())  # by their numbers, from 0
DOCKER_CAPABILITIES = ["CAP_" + name for name in """
    CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP
    NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE""".split()]
RLIMITS = ("cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile",
           "memlock", "as", "locks", "sigpending", "msgqueue", "nice", "rtprio",
           "rttime")  # by their numbers, from 0
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PROCESS_OPTIONS = (
    arg("-i", "--interactive", action="store_true", help="keep standard input open"),
    arg("-t", "--tty", action="store_true", help="give it a terminal"),
    arg("-e", "--env", metavar="NAME[=VALUE]", action="append", default=[],
        help="set a variable, or pass on the host's"),
    arg("--env-file", metavar="FILE", action="append", default=[],
        help="variables from a file, a line each"),
    arg("-w", "--workdir", metavar="DIR", default="", help="directory to start in"),
    arg("-u", "--user", metavar="USER[:GROUP]", default="", help="names or numbers"),
    arg("--group-add", metavar="GROUP", action="append", default=[],
        help="one more group"),
)
PRIVILEGED = arg("--privileged", action="store_true",
                 help="every capability; to `run`: root inside is root outside")
PRIVILEGE_OPTIONS = (
    PRIVILEGED,
    arg("--cap-add", metavar="NAME", action="append", default=[],
        help="one more capability, or ALL"),
    arg("--cap-drop", metavar="NAME", action="append", default=[],
        help="one capability less, or ALL"),
    arg("--ulimit", metavar="NAME=SOFT[:HARD]", action="append", default=[],
        help="a resource limit of setrlimit(2), as nofile=1024"),
    arg("--oom-score-adj", metavar="N", help="likelier (1000) to be killed when memory "
        "is short, or never (-1000)"),
    arg("--umask", metavar="MODE", default="0022", help="what new files are denied"),
    arg("--security-opt", metavar="KEY=VALUE", action="append", default=[],
        help="seccomp=FILE|unconfined, no-new-privileges, systempaths=unconfined, "
             "apparmor=PROFILE, label=…"),
)
ANYTHING = ("…",)
SECURITY_OPTIONS = {  # the key, and what it may be
    "no-new-privileges": ("true", "false"), "systempaths": ("unconfined",),
    "apparmor": ANYTHING, "label": ANYTHING, "seccomp": ANYTHING,
}

# ── the spec ──


def env_lines(name):
    """The lines of an --env-file that are not empty or a comment."""
    try:
        with open(name, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise Fail(f"--env-file {name}: {error.strerror}", "a text file") from None
    return [line.lstrip() for line in lines
            if line.strip() and not line.lstrip().startswith("#")]


def process_spec(options, args, like=None):
    """The spec's process: the program, its variables, where it starts and as whom;
    what no option says is as in the process `like`."""
    if options.workdir and not options.workdir.startswith("/"):
        raise Fail(f"the working directory {options.workdir!r} is invalid",
                   "it needs to be an absolute path")
    like = like or {"env": [f"PATH={DEFAULT_PATH}"], "cwd": "/", "user": {}}
    env = dict(line.split("=", 1) for line in like["env"])
    if options.tty:
        env["TERM"] = "xterm"
    lines = [(line, name) for name in options.env_file for line in env_lines(name)]
    for line, origin in lines + [(line, "-e") for line in options.env]:
        name, equals, value = line.partition("=")
        if not name or "\0" in line or (origin != "-e" and " " in name):
            raise Fail(f"{origin}: invalid environment variable: {line!r}",
                       "NAME=VALUE, or NAME to pass on the host's")
        if equals or name in os.environ:
            env[name] = value if equals else os.environ[name]
    return {
        "terminal": options.tty, "args": args, "cwd": options.workdir or like["cwd"],
        "env": [f"{name}={value}" for name, value in env.items()],
        "user": {**like["user"], "uid": 0, "gid": 0, "groupnames": options.group_add,
                 "username": options.user or like["user"].get("username", "")},
    }


def rlimit_spec(text):
    """The spec's form of --ulimit nofile=1024:2048."""
    name, _, limits = text.partition("=")
    soft, _, hard = limits.partition(":")
    if name not in RLIMITS:
        raise Fail(f"--ulimit {text}: no such limit: {name!r}", ", ".join(RLIMITS))
    try:
        low, high = int(soft), int(hard or soft)
    except ValueError:
        raise Fail(f"--ulimit {text}: not a number", f"{name}=SOFT[:HARD]") from None
    if high != -1 and (low > high or low == -1):
        raise Fail(f"--ulimit {text}: the soft limit is above the hard one",
                   f"{name}=SOFT:HARD, -1 for none")
    return {"type": f"RLIMIT_{name.upper()}", "soft": low, "hard": high}


def available_capabilities(own_users):
    """The capabilities that there are to give: in a user namespace all that this kernel
    knows, else those that we have ourselves."""
    last = int(read_file("/proc/sys/kernel/cap_last_cap"))
    ours = read_file("/proc/self/status").partition("CapBnd:")[2].split()[0]
    have = -1 if own_users else int(ours, 16)
    return [name for number, name in enumerate(CAPABILITIES[:last + 1])
            if have >> number & 1]


def capability_names(option, texts):
    """The kernel's names of the capabilities in an option; ALL stays as it is."""
    names = ["ALL" if text.upper() == "ALL" else "CAP_"
             + text.upper().removeprefix("CAP_") for text in texts]
    for name in names:
        if name not in (*CAPABILITIES, "ALL"):
            raise Fail(f"invalid {option}: unknown capability: {name!r}",
                       "a name from capabilities(7), or ALL")
    return names


def capability_sets(names):
    """The spec's five sets for a root who is to have the capabilities named."""
    names = [name for name in CAPABILITIES if name in names]
    return {"bounding": names, "effective": names, "permitted": names,
            "inheritable": [], "ambient": []}


def capabilities_spec(options):
    """The spec's sets as the options ask; ALL first, then names, as Docker does it."""
    add, drop = (set(capability_names(option, texts)) for option, texts in (
        ("--cap-add", options.cap_add), ("--cap-drop", options.cap_drop)))
    names = set() if "ALL" in drop else {*DOCKER_CAPABILITIES} - drop
    if add or options.privileged:
        there = {*available_capabilities(options.userns != "host")}
        for name in add - there - {"ALL"}:
            raise Fail(f"--cap-add: not supported by your kernel or not available in "
                       f"the current environment: {name!r}", "see `capsh --print`")
        names = names | add if "ALL" not in add else there - drop
        names = there if options.privileged else names
    return capability_sets(names)


def security_options(options):
    """{key: its values} of --security-opt; Docker takes KEY=VALUE and KEY:VALUE."""
    found = {key: [] for key in SECURITY_OPTIONS}
    for text in options.security_opt:
        key, _, value = text.partition("=" if "=" in text else ":")
        value = value or ("true" if key == "no-new-privileges" else "")
        known = SECURITY_OPTIONS.get(key, ())
        if not value or (known is not ANYTHING and value not in known):
            raise Fail(f"--security-opt {text}: unknown option",
                       ", ".join(f"{key}={'|'.join(known)}"
                                 for key, known in SECURITY_OPTIONS.items()))
        found[key].append(value)
    return found


def labels_spec(security):
    """What AppArmor and SELinux are to hold the program to, if that was asked for."""
    found = {}
    if security["apparmor"]:
        found["apparmorProfile"] = security["apparmor"][-1]
    label = {"user": "system_u", "role": "system_r", "type": "container_t",
             "level": "s0"}
    for text in security["label"] if "disable" not in security["label"] else ():
        key, _, value = text.partition(":")
        if key not in label or not value:
            raise Fail(f"--security-opt label={text}: bad label option",
                       "label=disable, or user:, role:, type: or level: and a name")
        label[key] = value
        found["selinuxLabel"] = ":".join(label.values())
    return found


def privileges_spec(options):
    """The parts of the spec's process that say what it may do."""
    security, found = security_options(options), {}
    if options.oom_score_adj:
        found["oomScoreAdj"] = whole("--oom-score-adj", options.oom_score_adj, -1000,
                                     1000)
    return {"capabilities": capabilities_spec(options),
            "noNewPrivileges": security["no-new-privileges"][-1:] == ["true"],
            "rlimits": [rlimit_spec(text) for text in options.ulimit],
            **labels_spec(security), **found}


# ── seccomp: the system calls it may make ──
#
# Capabilities say over what root has power; seccomp says which system calls there are
# at all.  A filter is a program for the kernel's small BPF machine: before each call it
# is given the number, the architecture and the six arguments (their words, not what
# they point to), and its answer is to go on, to fail with an error, or to kill.  It
# cannot loop and must be quick, since every call of the program pays for it.  So ours
# is a tree: Docker's default is 67 ranges of numbers, and at most 7 comparisons find
# the right one where a list would take four hundred.  The architecture comes first,
# because a number means another call in another one: who calls by a 32-bit gate is
# killed, as everything it asks would be refused, exit too; x32's calls, and those that
# are newer than the profile, are answered as a kernel without them does, ENOSYS.
#
# A filter stays, and its children have it too.  Installing one takes CAP_SYS_ADMIN or
# no_new_privs, lest a setuid program be fooled by calls that fail.  We want it last,
# so that a profile need not allow what we have to do; hence one capability is kept
# to the end, and execve itself drops it (see set_capabilities).

# All calls by name, in the order of their numbers from 0, and those that have the same
# number on every machine, from 424.  A dot is a number that means nothing.
CALL_NAMES = {"x86_64": """
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk
    rt_sigaction rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv writev access
    pipe select sched_yield mremap msync mincore madvise shmget shmat shmctl dup dup2
    pause nanosleep getitimer alarm setitimer getpid sendfile socket connect accept
    sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername
    socketpair setsockopt getsockopt clone fork vfork execve exit wait4 kill uname
    semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock fsync fdatasync
    truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink
    symlink readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit
    getrusage sysinfo times ptrace getuid syslog getgid setuid setgid geteuid getegid
    setpgid getppid getpgrp setsid setreuid setregid getgroups setgroups setresuid
    getresuid setresgid getresgid getpgid setfsuid setfsgid getsid capget capset
    rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime mknod
    uselib personality ustat statfs fstatfs sysfs getpriority setpriority sched_setparam
    sched_getparam sched_setscheduler sched_getscheduler sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval mlock munlock mlockall munlockall
    vhangup modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex setrlimit chroot
    sync acct settimeofday mount umount2 swapon swapoff reboot sethostname setdomainname
    iopl ioperm create_module init_module delete_module get_kernel_syms query_module
    quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead
    setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr
    flistxattr removexattr lremovexattr fremovexattr tkill time futex sched_setaffinity
    sched_getaffinity set_thread_area io_setup io_destroy io_getevents io_submit
    io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old epoll_wait_old
    remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64
    timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime
    clock_gettime clock_getres clock_nanosleep exit_group epoll_wait epoll_ctl tgkill
    utimes vserver mbind set_mempolicy get_mempolicy mq_open mq_unlink mq_timedsend
    mq_timedreceive mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl
    ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages
    openat mkdirat mknodat fchownat futimesat newfstatat unlinkat renameat linkat
    symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list
    get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait
    signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4
    signalfd4 eventfd2 epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev
    rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init fanotify_mark prlimit64
    name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg setns getcpu
    process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr
    renameat2 seccomp getrandom memfd_create kexec_file_load bpf execveat userfaultfd
    membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc
    pkey_free statx io_pgetevents rseq uretprobe""",
    "aarch64": """
    io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr
    getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
    lremovexattr fremovexattr getcwd lookup_dcookie eventfd2 epoll_create1 epoll_ctl
    epoll_pwait dup dup3 fcntl inotify_init1 inotify_add_watch inotify_rm_watch ioctl
    ioprio_set ioprio_get flock mknodat mkdirat unlinkat symlinkat linkat renameat
    umount2 mount pivot_root nfsservctl statfs fstatfs truncate ftruncate fallocate
    faccessat chdir fchdir chroot fchmod fchmodat fchownat fchown openat close vhangup
    pipe2 quotactl getdents64 lseek read write readv writev pread64 pwrite64 preadv
    pwritev sendfile pselect6 ppoll signalfd4 vmsplice splice tee readlinkat newfstatat
    fstat sync fsync fdatasync sync_file_range timerfd_create timerfd_settime
    timerfd_gettime utimensat acct capget capset personality exit exit_group waitid
    set_tid_address unshare futex set_robust_list get_robust_list nanosleep getitimer
    setitimer kexec_load init_module delete_module timer_create timer_gettime
    timer_getoverrun timer_settime timer_delete clock_settime clock_gettime clock_getres
    clock_nanosleep syslog ptrace sched_setparam sched_setscheduler sched_getscheduler
    sched_getparam sched_setaffinity sched_getaffinity sched_yield
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval restart_syscall
    kill tkill tgkill sigaltstack rt_sigsuspend rt_sigaction rt_sigprocmask
    rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigreturn setpriority getpriority
    reboot setregid setgid setreuid setuid setresuid getresuid setresgid getresgid
    setfsuid setfsgid times setpgid getpgid getsid setsid getgroups setgroups uname
    sethostname setdomainname getrlimit setrlimit getrusage umask prctl getcpu
    gettimeofday settimeofday adjtimex getpid getppid getuid geteuid getgid getegid
    gettid sysinfo mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify
    mq_getsetattr msgget msgctl msgrcv msgsnd semget semctl semtimedop semop shmget
    shmctl shmat shmdt socket socketpair bind listen accept connect getsockname
    getpeername sendto recvfrom setsockopt getsockopt shutdown sendmsg recvmsg readahead
    brk munmap mremap add_key request_key keyctl clone execve mmap fadvise64 swapon
    swapoff mprotect msync mlock munlock mlockall munlockall mincore madvise
    remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages
    rt_tgsigqueueinfo perf_event_open accept4 recvmmsg . . . . . . . . . . . . . . . .
    wait4 prlimit64 fanotify_init fanotify_mark name_to_handle_at open_by_handle_at
    clock_adjtime syncfs setns sendmmsg process_vm_readv process_vm_writev kcmp
    finit_module sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create
    bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2
    pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq kexec_file_load"""}
NEWER_CALL_NAMES = """
    pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree
    move_mount fsopen fsconfig fsmount fspick pidfd_open clone3 close_range openat2
    pidfd_getfd faccessat2 process_madvise epoll_pwait2 mount_setattr quotactl_fd
    landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
    process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2
    map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount
    lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat
    listxattrat removexattrat"""

# Docker's default allows every call there is, but for those of the next three tables.
FORBIDDEN_CALLS = """
    uselib ustat sysfs pivot_root _sysctl swapon swapoff create_module get_kernel_syms
    query_module nfsservctl getpmsg putpmsg afs_syscall tuxcall security vserver
    kexec_load kexec_file_load add_key request_key keyctl migrate_pages move_pages
    userfaultfd io_uring_setup io_uring_enter io_uring_register"""
CALLS_OF_CAPABILITIES = {  # allowed to a container that has the capability
    "SYS_ADMIN": """bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick
        lookup_dcookie lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount
        mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd
        setdomainname sethostname setns syslog umount2 unshare""",
    "SYS_MODULE": "delete_module init_module finit_module", "SYS_PACCT": "acct",
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise", "SYS_RAWIO": "iopl ioperm",
    "SYS_TIME": "settimeofday clock_settime", "SYS_TTY_CONFIG": "vhangup",
    "SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "DAC_READ_SEARCH": "open_by_handle_at", "SYS_BOOT": "reboot",
    "SYS_CHROOT": "chroot", "SYSLOG": "syslog", "BPF": "bpf",
    "PERFMON": "perf_event_open",
}
CALLS_OF_ARGUMENTS = (  # allowed with such a first argument
    ("socket", "LT", 38), ("socket", "EQ", 39), ("socket", "GT", 40),  # no ALG, VSOCK
    *(("personality", "EQ", value) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)),
    ("clone", "MASKED_EQ", sum(row[0] for row in NAMESPACES.values()) - CLONE_NEWTIME),
)

BPF_LOAD, BPF_AND, BPF_RETURN, BPF_JUMP = 0x20, 0x54, 0x06, 0x05
BPF_EQ, BPF_GT, BPF_GE = 0x15, 0x25, 0x35
MACHINES = {  # AUDIT_ARCH_…, and Docker's name
    "x86_64": (0xC000003E, "amd64"), "aarch64": (0xC00000B7, "arm64")}
ACTIONS = {  # what a filter returns, <linux/seccomp.h>
    "SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0, "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x30000, "SCMP_ACT_ERRNO": 0x50000, "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_ALLOW": 0x7FFF0000}
OPERATORS = {  # what to compare for, and whether it should not be so
    "SCMP_CMP_EQ": (BPF_EQ, False), "SCMP_CMP_NE": (BPF_EQ, True),
    "SCMP_CMP_GT": (BPF_GT, False), "SCMP_CMP_LE": (BPF_GT, True),
    "SCMP_CMP_GE": (BPF_GE, False), "SCMP_CMP_LT": (BPF_GE, True),
    "SCMP_CMP_MASKED_EQ": (BPF_EQ, False)}
FILTER_FLAGS = tuple(f"SECCOMP_FILTER_FLAG_{name}" for name in (
    "TSYNC", "LOG", "SPEC_ALLOW"))  # by their bits, from 1
WHEN = {"arches": [str], "caps": [str], "minKernel": str}
PROFILE_FORM = {  # a type, a range, words of which it is one, a list, an object
    "defaultAction": tuple(ACTIONS), "defaultErrnoRet": range(4096),
    "flags": [FILTER_FLAGS], "syscalls": [{
        "name": str, "names": [str], "includes": WHEN, "excludes": WHEN,
        "action": tuple(ACTIONS), "errnoRet": range(4096), "args": [{
            "index": range(6), "op": tuple(OPERATORS),
            "value": range(1 << 64), "valueTwo": range(1 << 64)}]}]}


def call_numbers(machine):
    """{name: number} of all system calls of a machine."""
    rows = [*enumerate(CALL_NAMES[machine].split()),
            *enumerate(NEWER_CALL_NAMES.split(), 424)]
    return {name: number for number, name in rows if name != "."}


def builtin_profile(machine):
    """What Docker lets a container do, in the form of Docker's profiles."""
    def allow(names, **when):
        return {"names": names, "action": "SCMP_ACT_ALLOW", **when}

    taken = {*FORBIDDEN_CALLS.split(), *(name for name, *_ in CALLS_OF_ARGUMENTS),
             *" ".join(CALLS_OF_CAPABILITIES.values()).split()}
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        allow([name for name in call_numbers(machine) if name not in taken]),
        *(allow(names.split(), includes={"caps": [f"CAP_{capability}"]})
          for capability, names in CALLS_OF_CAPABILITIES.items()),
        *(allow([name], args=[{"index": 0, "op": f"SCMP_CMP_{op}", "value": value}])
          for name, op, value in CALLS_OF_ARGUMENTS),
        # a filter cannot see the flags of clone3, and a C library then tries clone
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS,
         "excludes": {"caps": ["CAP_SYS_ADMIN"]}}]}


def check_form(value, form, place):
    """Refuse what is not of a form like PROFILE_FORM, naming its place."""
    if isinstance(form, type):
        good, wanted = isinstance(value, form), "text"
    elif isinstance(form, range):
        good, wanted = type(value) is int and value in form, f"0 to {form.stop - 1}"
    elif isinstance(form, tuple):
        good, wanted = value in form, f"one of {', '.join(form)}"
    else:
        good = isinstance(value, type(form))
        wanted = "an object" if isinstance(form, dict) else "a list"
    if not good:
        raise Fail(f"{place}: {value!r:.60} is not possible", f"wanted: {wanted}")
    for number, item in enumerate(value if isinstance(form, list) else ()):
        check_form(item, form[0], f"{place}[{number}]")
    for key in form if isinstance(form, dict) else ():
        if value.get(key) is not None or isinstance(form[key], tuple):
            check_form(value.get(key), form[key], f"{place}.{key}")


def kernel_version(text):
    """(major, minor) of a version like 6.1.0-18-amd64."""
    try:
        return tuple(int(part) for part in text.partition("-")[0].split(".")[:2])
    except ValueError:
        raise Fail(f"the seccomp profile's minKernel {text!r} is no version",
                   "a number like 4.8") from None


def oci_profile(profile, capabilities, machine, release):
    """A profile of Docker's as the spec's linux.seccomp: what it says of this machine,
    this kernel, and a container with these capabilities."""
    def facts(when):
        if when.get("arches"):
            yield MACHINES[machine][1] in when["arches"]
        if when.get("minKernel"):
            yield kernel_version(release) >= kernel_version(when["minKernel"])
        yield from (name in capabilities for name in when.get("caps") or ())

    def parts(of, *keys):
        return {key: of[key] for key in keys if of.get(key) is not None}

    rules_ = [
        {"names": rule.get("names") or [rule.get("name")],
         **parts(rule, "action", "errnoRet", "args")}
        for rule in profile.get("syscalls") or ()
        if all(facts(rule.get("includes") or {}))
        and not any(facts(rule.get("excludes") or {}))]
    return {**parts(profile, "defaultAction", "defaultErrnoRet", "flags"),
            "architectures": [f"SCMP_ARCH_{machine.upper()}"], "syscalls": rules_}


def seccomp_answer(action, number):
    """The word with which a filter answers: an action, and an error's number."""
    takes_number = action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
    return ACTIONS[action] | (errno.EPERM if number is None else number) * takes_number


def seccomp_rules(profile, numbers):
    """({number of a call: [(tests of arguments, answer), …]}, the answer to others).

    The first rule whose tests all hold counts.  As libseccomp has it, a rule without
    tests outdoes those with; as runc has it, two tests of one argument are two rules.
    """
    found, default = {}, seccomp_answer(profile["defaultAction"],
                                        profile.get("defaultErrnoRet"))
    for rule in profile["syscalls"]:
        answer = seccomp_answer(rule["action"], rule.get("errnoRet"))
        tests = [(test.get("index") or 0, test["op"], test.get("value") or 0,
                  test.get("valueTwo") or 0) for test in rule.get("args") or ()]
        twice = len({index for index, *_ in tests}) < len(tests)
        ways = [([test], answer) for test in tests] if twice else [(tests, answer)]
        for number in map(numbers.get, rule["names"] if answer != default else ()):
            have = found.get(number, [])
            if number is not None and (not have or have[-1][0]):
                found[number] = have + ways if tests else ways
    return found, default


def bpf_test(test, otherwise):
    """Instructions that test an argument: behind them it holds, `otherwise` further
    it does not.  An argument has 64 bits and BPF 32, so it takes two looks."""
    index, operator, value, other = test
    code, negated = OPERATORS[operator]
    masked = operator == "SCMP_CMP_MASKED_EQ"
    mask, wanted = (value, other & value) if masked else (0, value)
    yes, no = (otherwise, 0) if negated else (0, otherwise)
    high, low = ([(BPF_LOAD, 0, 0, at + 8 * index)]
                 + [(BPF_AND, 0, 0, mask >> shift & 0xFFFFFFFF)] * masked
                 for at, shift in ((20, 32), (16, 0)))
    low += [(code, yes, no, wanted & 0xFFFFFFFF)]
    if code != BPF_EQ:
        high += [(BPF_GT, 1 + len(low) + yes, 0, wanted >> 32)]
    return [*high, (BPF_EQ, 0, len(low) + no, wanted >> 32), *low]


def bpf_answer(rules_, default):
    """Instructions that answer a call: by the first rule whose tests hold."""
    program = [(BPF_RETURN, 0, 0, default)]
    for tests, answer in reversed(rules_):
        block = [(BPF_RETURN, 0, 0, answer)]
        for test in reversed(tests):
            block = bpf_test(test, len(block)) + block
        program = block + program if tests else block
    return program


def bpf_tree(ranges):
    """Instructions that find the answer to a number: in which half is its range?"""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = bpf_tree(ranges[:middle]), bpf_tree(ranges[middle:])
    jump = [(BPF_GE, len(below), 0, ranges[middle][0])]
    if len(below) > 255:  # further than a conditional jump reaches
        jump = [(BPF_GE, 0, 1, ranges[middle][0]), (BPF_JUMP, 0, 0, len(below))]
    return jump + below + above


def seccomp_program(profile, machine):
    """A linux.seccomp as a filter: instructions (code, jump if so, jump if not, k)."""
    numbers = call_numbers(machine)
    rules_, default = seccomp_rules(profile, numbers)
    named = {numbers[name] for rule in profile["syscalls"] for name in rule["names"]
             if name in numbers}
    mild = profile["defaultAction"] in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG",
                                        "SCMP_ACT_TRACE")
    unknown = 0x40000000 if mild or not named else max(named) + 1  # x32, or too new
    ranges, last = [], None
    for number in sorted({0, *rules_, *(number + 1 for number in rules_)} - {unknown}):
        if not ranges or rules_.get(number) != last:
            last = rules_.get(number)
            ranges.append((number, bpf_answer(last or (), default)))
    enosys = [(BPF_RETURN, 0, 0, ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS)]
    program = [(BPF_LOAD, 0, 0, 4), (BPF_EQ, 1, 0, MACHINES[machine][0]),
               (BPF_RETURN, 0, 0, ACTIONS["SCMP_ACT_KILL_PROCESS"]),
               (BPF_LOAD, 0, 0, 0), *bpf_tree([*ranges, (unknown, enosys)])]
    if len(program) > 4096:
        raise Fail(f"the seccomp profile makes a filter of {len(program)} instructions",
                   "the kernel takes 4096: fewer rules, or simpler ones")
    return program


def disassemble(program, machine):
    """A filter as lines to read, each with its label."""
    names = {number: f" ({name})" for name, number in call_numbers(machine).items()}
    signs = {BPF_EQ: "==", BPF_GT: ">", BPF_GE: ">="}
    actions = {value: name for name, value in ACTIONS.items()}
    lines, what = [], "number"
    for at, (code, yes, no, k) in enumerate(program, 1):  # jumps count from the next
        if code == BPF_LOAD:
            what = {0: "number", 4: "arch"}.get(
                k, f"arg{k // 8 - 2}.{'high' if k % 8 else 'low'}")
            text = f"load {what}"
        elif code == BPF_AND:
            text = f"and {k:#x}"
        elif code == BPF_JUMP:
            text = f"goto L{at + k}"
        elif code == BPF_RETURN:
            what = "number"  # so it is where the next branch of the tree begins
            text = f"return {actions[k & 0xFFFF0000].removeprefix('SCMP_ACT_')} "
            text += errno.errorcode.get(k & 0xFFFF, "")
        else:
            value = machine if what == "arch" else hex(k)
            value = f"{k}{names.get(k, '')}" if what == "number" else value
            text = f"if {what} {signs[code]} {value} goto L{at + yes}, else L{at + no}"
        lines.append(f"{f'L{at - 1}:':6}{text}".rstrip())
    return lines


def seccomp_spec(options, capabilities):
    """The part of the spec's `linux` that --security-opt seccomp=… means."""
    usual = "unconfined" if options.privileged else "builtin"
    word = [usual, *security_options(options)["seccomp"]][-1]
    machine, release = os.uname().machine, os.uname().release
    if word == "unconfined":
        return {}
    if word == "builtin":
        return {"seccomp": oci_profile(builtin_profile(machine), capabilities, machine,
                                       release)}
    try:
        profile = from_json(read_file(word))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON: {error}"
        raise Fail(f"--security-opt seccomp={word}: {reason}", "a file like Docker's "
                   "profiles or the OCI's; or `unconfined`, `builtin`") from None
    check_form(profile, PROFILE_FORM, f"{word}: profile")
    profile = oci_profile(profile, capabilities, machine, release)
    seccomp_program(profile, machine)  # what it refuses is refused before we begin
    return {"seccomp": profile}


class sock_fprog(ctypes.Structure):
    """struct sock_fprog of <linux/filter.h>: a program for the kernel."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    def __str__(self):
        return f"{{.len = {self.len}}}"


# ── the interpreter ──


def seal_interpreter(spec):
    """Where root inside is root outside, start anew in an interpreter that he cannot
    write to; returns in that one, or where there is no need.

    An image whose program begins with #!/proc/self/exe, or who may look at us through
    /proc/1/exe, holds the file that we run: the host's own python3.  On a mount that
    is read-only and attached nowhere, nobody inside can change it, its mode or owner.
    subtle: a fork runs the same file, so it takes an execve; only those pay for it
    who have no user namespace, in which its owner is nobody.
    """
    sealed = os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY
    if sealed or namespace_flags(spec) & CLONE_NEWUSER:
        return
    directory, name = os.path.split(os.readlink("/proc/self/exe"))
    attr = mount_attr(attr_set=MOUNT_ATTR_RDONLY)
    try:
        tree = syscall("open_tree", AT_FDCWD, directory, OPEN_TREE_CLONE
                       | OPEN_TREE_CLOEXEC | AT_RECURSIVE, why="attached nowhere")
        syscall("mount_setattr", tree, "", AT_EMPTY_PATH | AT_RECURSIVE, attr,
                ctypes.sizeof(attr), why="root inside is root outside, but not here")
    except OSError as error:  # before Linux 5.12
        if error.errno != errno.ENOSYS:
            raise
        say("this kernel cannot seal this machine's Python: root inside can write to "
            "it, through /proc/self/exe")
        return
    os.environ["MINICONTAINER_SAID"] = "\n".join(SAID)
    syscall("execve", f"/proc/self/fd/{tree}/{name}", sys.orig_argv,
            ctypes.c_void_p.in_dll(LIBC, "environ"),
            why="start anew, in an interpreter that nobody can write to")


# ── steps ──


def no_more_imports(c):
    """Step: close Python's import machinery for good (P2)."""
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path.clear()


def hide_memory(c=None):
    """Step: nobody in the container may look into this process through /proc.

    A change of ids may undo it (fs.suid_dumpable), so it is said again after each."""
    syscall("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0,
            why="our memory, our descriptors and our interpreter are the host's")


def wait_for_go(c):
    """Step: let the parent do its part first.

    What it alone should hold is closed before: its lock must be free when it is dead,
    and its ends of the pipes, or we would never see that it is.
    """
    for fd in (c.lock, c.news[0], c.orders[1], *c.outer.values(), *(c.home or ())):
        if fd >= 0:
            os.close(fd)
    c.lock, c.outer, c.home = -1, {}, None
    c.news, c.orders = (-1, c.news[1]), (c.orders[0], -1)
    c.await_parent()


def set_ids(uid, gid, groups):
    """Become a user for good: real, effective and saved ids, and just these groups."""
    array = (ctypes.c_uint32 * len(groups))(*groups)
    syscall("setgroups", len(groups), array, why=f"groups {groups}")
    syscall("setresgid", gid, gid, gid)
    syscall("setresuid", uid, uid, uid, why=f"it runs as {uid}:{gid}")
    hide_memory()


def become_root(c):
    """Step: root of the user namespace; until the maps were there it was nobody."""
    set_ids(0, 0, [])


def new_session(c):
    """Step: a session, and a session keyring, of its own."""
    syscall("setsid", why="no terminal of the host is ours: no TIOCSTI, no Ctrl-C")
    try:
        syscall("keyctl", KEYCTL_JOIN_SESSION_KEYRING, f"_ses.{c.id}",
                why="root's keys stay outside")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EDQUOT):
            raise
        say(f"no session keyring of its own: {error.strerror}")


def image_table(c, path):
    """The lines of one of the image's files as lists of fields, or [] if it is none.

    Only a plain file is read: a FIFO or a device there must not stop or feed us.
    """
    try:
        fd = open_inside(c, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        text = os.read(fd, 1 << 20).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)
    return [line.split(":") for line in text.splitlines()]


def look_up(rows, text, what, fields):
    """The row of a passwd or group table that a name or number means, or None for a
    number that is not in it."""
    file = "passwd" if what == "user" else what
    for row in rows:
        if len(row) >= fields and row[0] == text and row[2].isdecimal():
            return row
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 31):
        raise Fail(f"unable to find {what} {text}: no matching entries in {file} file",
                   f"a name from the image's own files, or a number for any {what}")
    for row in rows:
        if len(row) >= fields and row[2] == text:
            return row
    return None


def find_user(c):
    """Step: what --user and --group-add mean by the image's own files; also HOME."""
    user = c.spec["process"]["user"]
    if "username" not in user:
        return
    name, _, group = user["username"].partition(":")
    groups = image_table(c, "/etc/group")
    row = look_up(image_table(c, "/etc/passwd"), name or "0", "user", 4)
    user["uid"] = int(row[2]) if row else int(name or 0)
    user["gid"] = int(row[3]) if row and row[3].isdecimal() else 0
    extra = []
    if group:
        found = look_up(groups, group, "group", 3)
        user["gid"] = int(found[2]) if found else int(group)
    elif row:
        extra = [int(g[2]) for g in groups if len(g) >= 4 and g[2].isdecimal()
                 and row[0] in g[3].split(",")]
    for text in user.get("groupnames", ()):
        found = look_up(groups, text, "group", 3)
        extra.append(int(found[2]) if found else int(text))
    user["additionalGids"] = sorted({user["gid"], *extra})
    count = sum(m["size"] for m in c.spec["linux"].get("uidMappings", ())) or 1 << 31
    if max(user["uid"], *user["additionalGids"]) >= count:
        raise Fail(f"user {user['uid']} with groups {user['additionalGids']}: beyond "
                   f"the container's {count} ids", "a smaller number, or --userns host")
    env = c.spec["process"]["env"]
    if not any(line.startswith("HOME=") for line in env):
        env.append(f"HOME={row[5] if row and len(row) > 5 and row[5] else '/'}")


def enter_cwd(c):
    """Step: the working directory, found inside, so that it cannot be the host's."""
    cwd = c.spec["process"]["cwd"]
    try:
        place = inside(c, cwd)
        syscall("fchdir", place.fd, why="--workdir")
    except OSError as error:
        code = 127 if error.errno == errno.ENOENT else 126
        raise Fail(f"working directory {cwd}: {error.strerror}",
                   "a directory of the image; -w names another", code) from None
    place.close()


def drop_bounding(c):
    """Step: what leaves the bounding set cannot come back, whatever is executed."""
    keep = c.spec["process"]["capabilities"]["bounding"]
    for number in range(64):  # more than we have names for: kernels gain some
        name = CAPABILITIES[number] if number < len(CAPABILITIES) else "later one"
        if name not in keep:
            try:
                syscall("prctl", PR_CAPBSET_DROP, number, 0, 0, 0, why=f"no {name}")
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # an older kernel: it has neither this one nor the next


@answers("rlimits")
def set_rlimits(c):
    """Outside: resource limits, by the host's root, who may also raise them; and how
    dear it is to the OOM killer."""
    score = c.spec["process"].get("oomScoreAdj")
    try:
        if score is not None:
            write_file(f"/proc/{c.pid}/oom_score_adj", str(score), why="and its heirs")
    except PermissionError:
        raise Fail(f"--oom-score-adj {score} is less than this machine lets even root "
                   "set", "lowering it takes CAP_SYS_RESOURCE") from None
    for limit in c.spec["process"].get("rlimits", ()):
        name = limit["type"].removeprefix("RLIMIT_").lower()
        pair = (ctypes.c_uint64 * 2)(limit["soft"] % 2**64, limit["hard"] % 2**64)
        try:
            syscall("prlimit64", c.pid, RLIMITS.index(name), pair, None,
                    why=f"--ulimit {name}")
        except PermissionError:
            raise Fail(f"--ulimit {name}={limit['soft']}:{limit['hard']} is more than "
                       "this machine lets even root set",
                       "raising a hard limit takes CAP_SYS_RESOURCE; see "
                       "`ulimit -a`") from None


def ask_for_rlimits(c):
    """Step: have them set so late that they bind the program and not our own work."""
    if c.spec["process"].get("rlimits") or "oomScoreAdj" in c.spec["process"]:
        c.ask_parent("rlimits")


def become_user(c):
    """Step: the user it runs as, who also owns the terminal.

    What may be done is not yet given up with the user: see set_capabilities."""
    user = c.spec["process"]["user"]
    if c.spec["process"].get("terminal"):
        syscall("fchown", 0, user["uid"], 0xFFFFFFFF, why="the terminal is its own")
    syscall("umask", user.get("umask", 0o022), why="Docker's mask for new files")
    syscall("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0, why="one is needed until execve")
    set_ids(user["uid"], user["gid"], user.get("additionalGids", []))


def set_capabilities(c):
    """Step: the other four sets; only root has any of them to keep.

    And, until execve, CAP_SYS_ADMIN: install_seccomp needs it unless nothing can be
    gained any more.  Execve makes new sets of the bounding and the inheritable one, so
    that it takes it away without a call that a filter could refuse."""
    process, last = c.spec["process"], []
    sets = process["capabilities"] if process["user"]["uid"] == 0 else {}
    if c.spec["linux"].get("seccomp") and not process.get("noNewPrivileges"):
        last = ["CAP_SYS_ADMIN"]
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    data = (ctypes.c_uint32 * 6)()  # low words of three sets, then their high words
    syscall("capget", header, data, why="what may be kept")
    have = data[1] | data[4] << 32
    words = []
    for name, more in (("effective", last), ("permitted", last), ("inheritable", [])):
        bits = sum(1 << CAPABILITIES.index(cap) for cap in {*sets.get(name, ()), *more})
        words.append(bits & have)
    data[:] = [*(word & 0xFFFFFFFF for word in words), *(word >> 32 for word in words)]
    syscall("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0,
            why="no program inherits any")
    syscall("capset", header, data, why="just these, from here on")


def no_new_privileges(c):
    """Step: from here on execve never adds privileges."""
    if c.spec["process"].get("noNewPrivileges"):
        syscall("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0,
                why="setuid programs and file capabilities count for nothing")


def die_with_parent(c):
    """Step: a container of the foreground does not outlive the one who waits for it.

    The kernel forgets this wish whenever a process changes its user, hence so late;
    and if the parent died before, telling it that we are about to run fails.
    """
    syscall("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0,
            why="if the parent is killed, so are we")
    c.tell_parent()


def close_descriptors(c):
    """Step: the program gets 0, 1 and 2, and nothing else of ours.

    subtle: execve closes too, but looks the program up before: one that is named
    /proc/self/fd/5/../../bin/sh, or asks for it with #!, would be the host's, if 5 were
    a directory of the host.  What stays open until then leads nowhere.
    """
    low = 3
    for kept in sorted({c.news[1], c.orders[0], narration.fd, c.proc, 0x7FFFFFFF}):
        if kept > low:
            try:
                syscall("close_range", low, kept - 1, 0, why="all but what we need")
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                os.closerange(low, min(kept, 1 << 20))  # Linux before 5.9
        low = max(low, kept + 1)


def install_seccomp(c):
    """Step: from here on the kernel asks a program of ours about every call."""
    profile = c.spec["linux"].get("seccomp")
    if not profile:
        return
    machine = os.uname().machine
    program = seccomp_program(profile, machine)
    filter_ = sock_fprog(len(program), b"".join(
        struct.pack("=HBBI", *instruction) for instruction in program))
    if narration.style in ("bpf", "json"):
        filter_.listing = disassemble(program, machine)
    flags = sum(1 << FILTER_FLAGS.index(flag) for flag in profile.get("flags", ()))
    try:
        syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, filter_,
                why="which calls may be made, for good, by it and its children")
    except OSError as error:
        raise Fail(f"the kernel takes no seccomp filter: {error.strerror}",
                   "--security-opt seccomp=unconfined does without") from None


# ── the program ──


def become_reaper(c):
    """Step: with --init, stay behind as process 1: reap orphans, forward signals, end
    when the program ends.  The program is a child, and goes on with the next step."""
    if not c.wants_reaper:
        return
    program = os.fork()
    if program == 0:
        return
    c.spec["process"]["noNewPrivileges"] = True  # it executes nothing, so it may lose
    for step in (no_new_privileges, set_capabilities, install_seccomp):  # all at once
        step(c)
    narration.style = ""  # its descriptor goes with the others
    syscall("close_range", 3, 0x7FFFFFFF, 0, why="nothing of the host's stays open")
    every = signal.valid_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, every)
    while True:
        told = signal.sigwaitinfo(every)
        while told.si_signo == signal.SIGCHLD:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                os._exit(125)
            if pid == program:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
            if pid == 0:
                break
        if told.si_signo != signal.SIGCHLD and told.si_code <= 0:
            os.kill(program, told.si_signo)  # the terminal's own reach it without us


def label_program(c):
    """Step: have AppArmor or SELinux hold to its rules what we are about to execute.

    It counts for the process that writes it, so this is later than every fork; and it
    is written through the host's /proc, because the container's can be a trap.
    """
    for key, module, file, order in (
            ("apparmorProfile", "AppArmor", "apparmor/exec", "exec "),
            ("selinuxLabel", "SELinux", "exec", "")):
        if key not in c.spec["process"]:
            continue
        label, how = c.spec["process"][key], open_how(
            flags=O_RDWR | O_CLOEXEC, resolve=RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
        try:
            fd = syscall("openat2", c.proc, f"self/attr/{file}", how,
                         ctypes.sizeof(how), why="ours, whatever pid we have there")
            write_file(fd, order + label, why="from the next execve on")
            if not order and b":" not in os.pread(fd, 4096, 0):
                raise OSError(errno.EINVAL, "it has no policy, and knows no label")
        except OSError as error:
            if label == "unconfined" and error.errno in (errno.ENOENT, errno.EINVAL):
                continue  # so it is, where there is no AppArmor
            raise Fail(f"{module} does not know {label!r}: {error.strerror}",
                       f"is it loaded, and {module} in /sys/kernel/security/lsm?"
                       ) from None
    if c.proc >= 0:
        os.close(c.proc)  # it leads to the host; see close_descriptors


# Execve resets handlers but keeps what is ignored: by Python, a shell or nohup.
OFTEN_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT,
                 signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGTSTP,
                 signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)


def open_program(path):
    """The first bytes of a program, where its headers are."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.pread(fd, 1 << 16, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


ELF_MACHINES = {3: "i386", 8: "mips", 20: "powerpc", 21: "ppc64", 22: "s390x",
                40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64",
                258: "loongarch64"}


def elf_machine(head):
    """The machine that an ELF file is for, as uname names it; "" if it is no ELF."""
    if head[:4] != b"\x7fELF":
        return ""
    order = "<" if head[5] == 1 else ">"
    number = struct.unpack_from(order + "H", head, 18)[0]
    return ELF_MACHINES.get(number, f"machine {number}")


def elf_segments(head):
    """(type, offset in the file, address, size in the file) of each program header of
    a 64-bit ELF file; elf(5)."""
    if head[:5] != b"\x7fELF\x02":
        return []
    order = "<" if head[5] == 1 else ">"
    start = struct.unpack_from(order + "Q", head, 32)[0]
    length, count = struct.unpack_from(order + "HH", head, 54)
    return [(kind, offset, address, size_) for kind, _, offset, address, _, size_ in (
        struct.unpack_from(order + "IIQQQQ", head, start + length * i)
        for i in range(count))]


def interpreter_of(head):
    """The interpreter that a script's #! line or an ELF file asks for; or ""."""
    if head[:2] == b"#!":
        words = head[2:256].split(b"\n")[0].split()
        return os.fsdecode(words[0]) if words else ""
    PT_INTERP = 3
    for kind, offset, _, length in elf_segments(head):
        if kind == PT_INTERP:
            return os.fsdecode(head[offset:offset + length].rstrip(b"\0"))
    return ""


def reset_signals(c):
    """Step: the program finds no signal ignored or blocked."""
    for number in OFTEN_IGNORED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def execute(c):
    """Step: the last, this process becomes the program."""
    process = c.spec["process"]
    name, args, env = process["args"][0], process["args"], process["env"]
    paths = [name] if "/" in name else [
        f"{directory or '.'}/{name}" for line in env if line.startswith("PATH=")
        for directory in line[5:].split(":")]
    refused = None
    for path in paths:
        try:
            syscall("execve", path, args, env, why="the container's program")
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            if not missing or os.path.lexists(path):
                refused = refused or error
    if refused:
        raise refused
    if "/" in name:
        raise Fail(f"exec {name}: no such file or directory",
                   "the program must be in the image; is the path right?", 127)
    raise Fail(f"exec {name!r}: executable file not found in $PATH",
               "name it with its path, or set PATH with -e", 127)


# ── what an error means ──


def exec_refused(error):
    """A program that is there but was not executed: why not."""
    path = error.filename.args[0]
    if os.path.isdir(path):
        return Fail(f"exec {path}: is a directory", "name a program", 126)
    if error.errno == errno.EACCES:
        return Fail(f"exec {path}: permission denied",
                    f"is it executable (chmod +x {path}), for this user?", 126)
    try:
        head = open_program(path)
        machine, interpreter = elf_machine(head), interpreter_of(head)
    except (OSError, ValueError, struct.error):
        machine = interpreter = ""
    if machine and machine != os.uname().machine:
        return Fail(f"exec {path}: a program for {machine}, but this machine is "
                    f"{os.uname().machine}", "use an image for this architecture", 126)
    if error.errno == errno.ENOENT and interpreter:
        return Fail(f"exec {path}: the file exists, but its interpreter {interpreter} "
                    "does not", "add it to the image, or use a static program", 127)
    if error.errno == errno.ENOENT:
        return Fail(f"exec {path}: a link to nothing", "the image is incomplete", 127)
    if error.errno == errno.ENOEXEC:
        return Fail(f"exec {path}: exec format error", "neither a program for this "
                    "machine nor a script that begins with #!", 126)
    return Fail(f"exec {path}: {error.strerror}", "", 126)


def refused_to_root(error):
    """EPERM although we are root: the power that is missing, or the switch."""
    status = dict(line.split(":\t", 1)
                  for line in read_file("/proc/self/status").splitlines())
    missing = [name for number, name in enumerate(CAPABILITIES)
               if name in ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETFCAP")
               and not int(status["CapEff"], 16) >> number & 1]
    around = "is there a container around us? It needs docker's --privileged"
    if missing:
        return f"we lack {', '.join(missing)}: {around}"
    for file, bad in (("kernel/apparmor_restrict_unprivileged_userns", "1"),
                      ("kernel/unprivileged_userns_clone", "0"),
                      ("user/max_user_namespaces", "0"),
                      ("user/max_mnt_namespaces", "0")):
        path = f"/proc/sys/{file}"
        if os.path.exists(path) and read_file(path).strip() == bad:
            return f"the sysctl {file.replace('/', '.')} is {bad}; or --userns host"
    if status.get("Seccomp", "0").strip() != "0":
        return f"a seccomp filter is upon us: {around}"
    return around if len(read_file("/proc/self/uid_map").split()[2]) < 10 else ""


def shared_mounts(_):
    """EINVAL of pivot_root: the mount that is shared, or the root that cannot move."""
    for line in read_file("/proc/self/mountinfo").splitlines():
        if " shared:" in line:
            point = line.split()[4]
            return f"{point} is a shared mount: mount --make-rprivate {point}"
    return "is the host's / its initial ramfs? That one cannot be pivoted away"


def holders(error):
    """EBUSY: what is mounted on or below the path, and who is in it."""
    words = getattr(error.filename, "args", (error.filename,))
    path = next((w for w in words if isinstance(w, str) and w.startswith("/")), None)
    found = []
    for line in read_file("/proc/self/mountinfo").splitlines() if path else ():
        if f"{line.split()[4]}/".startswith(f"{path}/"):
            found.append(f"the mount at {line.split()[4]}")
    for pid in filter(str.isdecimal, os.listdir("/proc") if path else ()):
        try:
            links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root",
                     *(f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))]
            if any(f"{os.readlink(link)}/".startswith(f"{path}/") for link in links):
                name = read_file(f"/proc/{pid}/comm").strip()
                found.append(f"process {pid} ({name})")
        except OSError:  # it has just ended
            continue
    return f"held by {', '.join(found[:5])}" if found else ""


# Which call (any, if none is named), which errors, and what a person can do: words, a
# function of the error that finds them, or one that says all.  The first that has an
# answer is taken.
ADVICE = (
    ("execve", (), exec_refused),
    ("pivot_root", (errno.EINVAL,), shared_mounts),
    ("clone3 clone unshare", (errno.ENOSPC, errno.EUSERS),
     "the sysctls user.max_*_namespaces allow no more here; or --userns host"),
    ("", (errno.ENOTDIR,), "what the image has there is in the way: a directory goes "
     "on a directory, a file on a file"),
    ("mount", (errno.ENODEV,), "the kernel lacks this file system: is there a module?"),
    ("", (errno.EPERM, errno.EACCES), refused_to_root),
    ("", (errno.EBUSY,), holders),
    ("", (errno.ENOSPC, errno.EDQUOT), "the disk is full: see `df -h` and `df -i`"),
    ("", (errno.EROFS,), "the file system is read-only: see `findmnt`"),
    ("", (errno.EMFILE, errno.ENFILE), "too many open files: see `ulimit -n`"),
    ("", (errno.ENOMEM, errno.EAGAIN), "no memory or processes left: see `free`, "
                                       "`ulimit -u` and the cgroup around us"),
)


def diagnose(error, step=""):
    """Any exception as a Fail, with what can be done about it."""
    if isinstance(error, Fail):
        return error
    if not isinstance(error, OSError):
        return Fail(f"internal error: {step} {error!r}",
                    "please report it, with what you did")
    hint = f"while taking the step {step}" if step else ""
    name = getattr(error.filename, "name", "")
    for calls_, codes, advice in ADVICE:
        if (not calls_ or name in calls_.split()) and error.errno in (codes or
                                                                      (error.errno,)):
            found = advice if isinstance(advice, str) else advice(error)
            if isinstance(found, Fail):
                return found
            if found:
                hint = found
                break
    return Fail(f"{error.filename or step or 'error'}: {error.strerror or error}", hint)

# ══ 6. THE CONTAINER ══════════════════════════════════════════════════════════════
#
# Everything above, in order.  A container is started by two processes that take
# turns: the parent, who is root of the host, and init, who becomes the program.
#
#       parent  BEFORE            clone3        OUTSIDE                waits
#                 │                 │              │ "go"                ▲
#       init      ·                 └─ waits ──────┴─ BIRTH ── execve ───┘
#
# Each is a tuple of steps, and the comment on a step says why it stands where it
# does.  A new feature is a function in a chapter above and a line here, never an `if`
# in the middle.  All that a step knows is the Container and the spec in it.
#
# They talk over two pipes.  Init's is closed by a successful execve, so that the end
# of it is the good news; bad news is a line of JSON that ends up in the person's
# terminal.  The parent's carries "go" and answers; its end means that it is dead.

BEFORE = (              # the parent, before there is another process
    make_cgroup,        # first: init may be born in it
    open_stdio,         # its ends are inherited
    take_sources,       # while our mounts are still the host's
    open_workshop,      # and now they are not
)
OUTSIDE = (             # the parent, while init waits
    map_ids,            # first: all that belongs to root inside needs to know who it is
    prepare_sources,    # needs the id maps
    make_nodes,         # needs the id maps
    build_rootfs,       # needs the id maps; last, because init copies it all at "go"
)
BIRTH = (               # init, from "go" until it is your program
    no_more_imports,    # from here on Python's library path may lie inside the image
    hide_memory,        # before anything of the container runs that could look
    wait_for_go,        # the ids and the rootfs are there after it
    join_cgroup,        # before it uses what should be counted
    become_root,        # of the user namespace: all that follows needs its powers
    new_session,        # before there is a terminal to belong to it
    own_the_mounts,     # before the first mount: nothing may leak to the host
    hold_rootfs,        # pivot needs it to be a mount point of ours
    mount_all,          # /proc, /sys, /dev, volumes: in the spec's order
    make_devices,       # in the /dev that was just mounted
    open_console,       # from the /dev/pts that was just mounted
    take_stdio,         # if there is no terminal
    set_names, loopback_up,  # any time will do: each has a namespace of its own
    set_sysctls,        # while the host's /proc is there
    mask_paths,         # after all mounts that could lie on top of a mask
    pivot,              # after every step that needs a path of the host
    seal_root,          # after every step that makes a place to mount on
    *(TAIL := (         # what `exec` does too
        find_user,      # names mean what the image says: its files are / now
        enter_cwd,      # while we may still enter every directory
        drop_bounding,  # needs CAP_SETPCAP, so before the user changes
        ask_for_rlimits,  # as late as may be: they bind us too
        become_user,    # groups, then user
        set_capabilities,  # what is left of them after that
        no_new_privileges,  # nothing is to be gained any more
        close_descriptors,  # before a program is looked up that could name them
        die_with_parent,  # forgotten whenever a user changes, so after that
        become_reaper,  # with --init: process 1 stays behind, its child goes on
        label_program,  # counts for this process alone, so after the last fork
        reset_signals, install_seccomp,  # nothing but execve after it
        execute,        # and it is your program
    )),
)
JOIN = (no_more_imports, hide_memory, wait_for_go, join_cgroup, join_namespaces,
        become_root, new_session, open_console, take_stdio, *TAIL)


def init(c, steps):
    """Take the steps and become the program; never returns."""
    try:
        for step in steps:
            step(c)
    except Exception as error:
        c.report(diagnose(error, step.__name__))
    finally:
        os._exit(125)


def end(c):
    """Undo all that start did: the processes, the cgroup, the workshop (P5)."""
    failed = None
    for undo in (leave_workshop, kill_and_wait, remove_cgroup, Container.close):
        for last in (False, True):  # the kernel may refuse once
            try:
                undo(c)
                break
            except (OSError, Fail) as error:  # the others are undone all the same
                failed = error if last else failed
    if failed:
        raise failed


def start(c, before=BEFORE, outside=OUTSIDE, birth=BIRTH):
    """Make the container that c.spec describes; returns when its program runs.

    After an error all that was made has been undone, and the error is the caller's.
    """
    try:
        c.open_pipes()
        for step in before:
            step(c)
        flags = namespace_flags(c.spec) & ~LATER
        c.pid, c.pidfd = clone3(flags, c.cgroup.birth_fd, why="the container's init")
        if c.pid == 0:
            narration.who = "init"
            init(c, birth)
        for step in outside:
            step(c)
        c.answer("go")
        leave_workshop(c)
        c.listen()
    except BaseException:
        end(c)
        raise


def enter(c, running):
    """Run c's process in the namespaces of c.target and in the cgroup `running`;
    returns when it runs.  After an error it is gone."""
    try:
        c.open_pipes()
        open_stdio(c)
        c.cgroup = running
        c.cgroup.open_doors()
        c.pid, c.pidfd = clone3(0, c.cgroup.birth_fd, why="a process to go in")
        if c.pid == 0:
            narration.who = "exec"
            init(c, JOIN)
        c.answer("go")
        c.listen()
    except BaseException:
        kill_and_wait(c)
        raise

# ══ 8. IMAGES ═════════════════════════════════════════════════════════════════════
#
# A layer is a tarball on its way, and a directory at rest.  It is unpacked once, under
# the digest of the tarball, and every container that uses it sees that directory
# through an id-mapped mount: owners, modes and setuid bits on disk are the image's own.
#
# A tarball is hostile until shown otherwise: names with "..", a symlink and then a
# file written through it, a hard link to outside.  So Python's tarfile only reads the
# headers and the data for us; what it names is made here, below a descriptor of the
# layer, with openat2 and RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS.  And as few kilobytes
# can mean a petabyte of zeros, of entries or of headers, each of the three is bounded.
#
# A layer can also take away.  An entry `.wh.NAME` says that NAME of the layers below
# is gone, `.wh..wh..opq` that its directory hides all of them; overlay says the same
# with a character device 0,0 and with an attribute, so that is what they become.
#
# The default root file system needs no tarball and no network: it is made of what the
# host has, a static busybox or else its shell and common tools with the libraries that
# their headers ask for.  We read those headers ourselves: ldd would run the program.
#
# Man pages: tar(5), elf(5), ld.so(8); the OCI image specification, "layer.md".

calls(
    unlinkat=(263, 35, "dirfd path flags"),
    linkat=(265, 37, "olddirfd oldpath newdirfd newpath AT_"),
)

STORE = os.path.abspath(os.environ.get("MINICONTAINER_ROOT")
                        or "/var/lib/minicontainer")


def store(*names):
    """A path in the store, its directory made if need be.

    Only root may look in: a layer has setuid programs that the host never asked for.
    """
    path = os.path.join(STORE, *names)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    return path


def remove_tree(path):
    """Remove a directory and all that is in it, however deep, without recursion.

    Each pass moves the grandchildren up to the top and removes the emptied children,
    so no path is longer than two names and no symlink is ever followed.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    serial, mark = 0, f".removed-{os.urandom(8).hex()}"
    try:
        while entries := list(os.scandir(top)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=top)
                    continue
                child = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY
                                | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
                for grandchild in list(os.scandir(child)):
                    if grandchild.is_dir(follow_symlinks=False):
                        serial += 1
                        os.rename(grandchild.name, f"{mark}-{serial}",
                                  src_dir_fd=child, dst_dir_fd=top)
                    else:
                        os.unlink(grandchild.name, dir_fd=child)
                os.close(child)
                os.rmdir(entry.name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)


def new_directory(parent, make):
    """make(path) in a fresh directory of the store that is removed if it fails.

    An unfinished one is named .new-… and is never looked at by anybody but prune.
    """
    path = store(parent, f".new-{os.getpid()}-{os.urandom(4).hex()}")
    os.mkdir(path, 0o755)
    try:
        make(path)
    except BaseException:
        remove_tree(path)
        raise
    return path


def publish(path, name):
    """Give a finished directory its name in the store, all at once (P3); the loser of
    a race finds that the same has been made already."""
    target = os.path.join(os.path.dirname(path), name)
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        remove_tree(path)
    return target


# ── layers from tarballs ──


def open_beneath(top, path, flags=os.O_RDONLY | os.O_DIRECTORY):
    """A descriptor of a path below `top`, reached through no symlink."""
    how = open_how(flags=flags | os.O_CLOEXEC | os.O_NOFOLLOW,
                   resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    return syscall("openat2", top, path, how, ctypes.sizeof(how))


def open_parent(top, path):
    """(descriptor of the directory that a member goes into, its name there).

    What is missing on the way is made; what is in the way and is no directory is
    replaced by one, as a later entry replaces an earlier one."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Fail(f"the tarball has a name that leads out of it: {path!r}",
                   "it is damaged or hostile: do not use it")
    fd = os.dup(top)
    for part in parts[:-1]:
        try:
            below = open_beneath(fd, part)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                os.unlink(part, dir_fd=fd)
            elif error.errno != errno.ENOENT:
                raise
            os.mkdir(part, 0o755, dir_fd=fd)
            below = open_beneath(fd, part)
        os.close(fd)
        fd = below
    return fd, parts[-1] if parts else "."


def exists_at(parent, name):
    """Whether a directory has an entry of this name, be it a dangling symlink."""
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
        return True
    except FileNotFoundError:
        return False


def clear_the_way(parent, name, for_directory):
    """Remove an earlier entry of this name, unless a directory meets a directory."""
    if exists_at(parent, name):
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=parent)
        elif not for_directory:
            remove_tree(f"/proc/self/fd/{parent}/{name}")


def whiteout(parent, name):
    """Turn a `.wh.` entry into what overlay understands."""
    if name == ".wh..wh..opq":
        os.setxattr(parent, "trusted.overlay.opaque", b"y")
    else:
        if name[4:] in ("", ".", ".."):
            raise Fail(f"the tarball has a whiteout of {name[4:]!r}",
                       "it is damaged or hostile: do not use it")
        clear_the_way(parent, name[4:], False)
        os.mknod(name[4:], stat.S_IFCHR, 0, dir_fd=parent)


def write_member(tar, member, parent, name):
    """The data of a file; a hole in it stays a hole."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                 | os.O_CLOEXEC, 0o600, dir_fd=parent)
    with tar.extractfile(member) as data, open(fd, "wb") as file:
        while part := data.read(1 << 20):
            if part.count(0) == len(part):
                file.seek(len(part), os.SEEK_CUR)
            else:
                file.write(part)
        file.truncate(member.size)


def member_times(member):
    """(access, modification) times in nanoseconds, from the decimals as they stand."""
    seconds, _, decimals = str(member.pax_headers.get("mtime", member.mtime)
                               ).partition(".")
    return (int(seconds) * 10**9 + int(f"{decimals:0<9.9}"),) * 2


def set_metadata(member, parent, name):
    """Owner, mode, extended attributes and times, in the order that keeps them all:
    a chown clears setuid and file capabilities."""
    os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
    path = f"/proc/self/fd/{parent}/{name}"
    if not member.issym():
        os.chmod(name, member.mode & 0o7777, dir_fd=parent)
        for key, value in member.pax_headers.items():
            if key.startswith("SCHILY.xattr."):
                os.setxattr(path, key.removeprefix("SCHILY.xattr."),
                            value.encode("utf-8", "surrogateescape"),
                            follow_symlinks=False)
    if not member.isdir():
        os.utime(name, ns=member_times(member), dir_fd=parent, follow_symlinks=False)


def unpack_member(tar, member, top, times):
    """Make one entry of a tarball below `top`; its kind may replace an earlier kind."""
    parent, name = open_parent(top, member.name)
    try:
        if name.startswith(".wh."):
            whiteout(parent, name)
            return
        if name != ".":
            clear_the_way(parent, name, member.isdir())
        if member.isdir():
            if name != "." and not exists_at(parent, name):
                os.mkdir(name, 0o700, dir_fd=parent)
            times.append((member.name.strip("/") or ".", member_times(member)))
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.islnk():
            source, old = open_parent(top, member.linkname)
            os.link(old, name, src_dir_fd=source, dst_dir_fd=parent,
                    follow_symlinks=False)
            os.close(source)
            return
        elif member.ischr() or member.isblk() or member.isfifo():
            kind = (stat.S_IFCHR if member.ischr() else
                    stat.S_IFBLK if member.isblk() else stat.S_IFIFO)
            os.mknod(name, kind | 0o600, os.makedev(member.devmajor, member.devminor),
                     dir_fd=parent)
        elif member.isfile():
            write_member(tar, member, parent, name)
        else:
            return
        set_metadata(member, parent, name)
    finally:
        os.close(parent)


def unpack_named(path, tar, member, top, times):
    """unpack_member(), whose errors name the tarball and the entry."""
    try:
        unpack_member(tar, member, top, times)
    except (ValueError, OverflowError) as error:
        raise Fail(f"{path}: {member.name!r}: {error}",
                   "the tarball is damaged") from None
    except OSError as error:
        if error.errno is None:  # the decompressor's
            raise
        raise Fail(f"{path}: {member.name!r}: {error.strerror}",
                   "is the disk full, or the tarball damaged?") from None


def set_times(top, times):
    """Set the times of directories; last, since making files in them changes them."""
    for directory, when in reversed(times):
        try:
            handle = open_beneath(top, directory)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            continue  # a later entry has replaced it
        os.utime(handle, ns=when)
        os.close(handle)


LAYER_ENTRIES = 1_000_000  # more take $MINICONTAINER_LAYER_ENTRIES
HEADER_BYTES = 1 << 20  # of one entry: tarfile takes them into memory whole


class Meter:
    """A tarball's stream, that gives no more bytes than `left` says."""

    def __init__(self, path):
        import bz2
        import gzip
        import lzma

        with open(path, "rb") as file:
            head = file.read(512)
        known = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
        opener = open if head[257:262] == b"ustar" else known.get(head[:2], open)
        self.path, self.file, self.left = path, opener(path, "rb"), HEADER_BYTES

    def read(self, count):
        """Read, if it is within what is left."""
        self.left -= count
        if self.left < 0:
            raise Fail(f"{self.path}: not a tarball, or a damaged one: more than "
                       f"{human(HEADER_BYTES)} of headers for one entry",
                       "it is damaged or hostile: do not use it")
        return self.file.read(count)

    def __getattr__(self, name):
        return getattr(self.file, name)


def members(tar):
    """The entries of a tarball, one after the other, while they stay within bounds."""
    path, room = tar.fileobj.path, os.statvfs(STORE)
    most = size(os.environ.get("MINICONTAINER_LAYER_BYTES")
                or f"{room.f_bavail * room.f_frsize}")  # all the same: it has to fit
    entries = whole("$MINICONTAINER_LAYER_ENTRIES", os.environ.get(
        "MINICONTAINER_LAYER_ENTRIES") or f"{LAYER_ENTRIES}", 1)
    total = count = 0
    while member := tar.next():
        tar.members.clear()  # it would keep every one
        total, count = total + member.size, count + 1
        for over, what in ((total > most, f"unpacks to more than {human(most)}"),
                           (count > entries, f"has more than {entries} entries"),
                           (len(tar.pax_headers) > 100, "has 100 global headers")):
            if over:
                raise Fail(f"{path}: the tarball {what}",
                           "the bounds are MINICONTAINER_LAYER_BYTES (what is free on "
                           "the disk) and MINICONTAINER_LAYER_ENTRIES (a million)")
        tar.fileobj.left = member.size + HEADER_BYTES
        yield member
        tar.fileobj.left = HEADER_BYTES


def unpack(path, top):
    """Unpack a tarball (plain, gz, xz or bz2) as a layer into the directory `top`."""
    import lzma
    import tarfile
    import zlib

    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    times = []
    try:
        with tarfile.TarFile(fileobj=Meter(path), errorlevel=2) as tar:
            for member in members(tar):
                unpack_named(path, tar, member, fd, times)
            tar.fileobj.seek(tar.offset)  # at a bad header tarfile just stops
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it does not end as a tarball does")
            tar.fileobj.left = 1 << 30
            while tar.fileobj.read(1 << 20):
                pass  # gzip and xz have their checksum at the very end
        set_times(fd, times)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError,
            IndexError, RecursionError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0].rstrip(":")
        raise Fail(f"{path}: not a tarball, or a damaged one: {reason}",
                   "a .tar, plain or compressed with gzip, xz or bzip2; "
                   "fetch it again?") from None
    except OSError as error:
        if error.filename:
            raise
        raise Fail(f"{path}: not a tarball, or a damaged one: {error}",
                   "fetch it again?") from None
    finally:
        os.close(fd)


def layer_of(path):
    """The directory of a --rootfs: itself, or where its tarball is unpacked."""
    if os.path.isdir(path):
        return os.path.realpath(path)
    if not os.path.exists(path):
        raise Fail(f"--rootfs {path}: no such file or directory",
                   "a directory or a tarball; ./rootfs-fetch.sh gets a real one")
    if not os.path.isfile(path):
        raise Fail(f"--rootfs {path}: neither a directory nor a tarball", "")
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    target = store("layers", digest.hexdigest())
    if os.path.isdir(target):
        return target
    return publish(new_directory("layers", lambda top: unpack(path, top)),
                   digest.hexdigest())


# ── layers as a copy ──


def shifted(name, value, base):
    """The value of an extended attribute with `base` added to the ids in it."""
    if base and name == "security.capability":  # version 3: it counts for one root only
        magic, root = struct.unpack("<I16xI", value[:24].ljust(24, b"\0"))
        return struct.pack("<I16sI", magic & 0xFFFFFF | 3 << 24, value[4:20],
                           root + base)
    if name.startswith("system.posix_acl_"):  # tags 2 and 8 are a user's, a group's
        return value[:4] + b"".join(
            struct.pack("<HHI", tag, bits, id + base if tag in (2, 8) else id)
            for tag, bits, id in struct.iter_unpack("<HHI", value[4:]))
    return value


def layer_entries(layer, base):
    """(tarball, entry) for all that is in a layer, as unpack_member() takes them, with
    owners from `base` on; outer first, and nothing that is mounted in it."""
    import io
    import tarfile

    tar = tarfile.TarFile(fileobj=io.BytesIO(), mode="w")  # knows hard links, types
    tree = syscall("open_tree", AT_FDCWD, layer, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
    for top, directories, files, fd in os.fwalk(".", dir_fd=tree):
        for name in ["."] * (top == ".") + directories + files:
            path = f"/proc/self/fd/{fd}/{name}"
            entry = tar.gettarinfo(path, os.path.normpath(f"{top}/{name}"))
            if entry is None:  # a socket, that nobody listens at any more
                continue
            when = os.lstat(path).st_mtime_ns
            entry.pax_headers = {"mtime": f"{when // 10**9}.{when % 10**9:09}"}
            entry.uid, entry.gid = (shifted_id(id, base)
                                    for id in (entry.uid, entry.gid))
            for key in () if entry.issym() else os.listxattr(path):
                value = shifted(key, os.getxattr(path, key), base)
                entry.pax_headers[f"SCHILY.xattr.{key}"] = value.decode(
                    "utf-8", "surrogateescape")
            tar.extractfile = lambda _, path=path: open(path, "rb")
            yield tar, entry
    os.close(tree)


def copy_layers(layers, top, base):
    """Fill a directory with what an overlay of the layers would show, with owners from
    `base` on: for hosts without overlay, at the price of time and disk."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for layer in layers:
        times = []
        for tar, entry in layer_entries(layer, base):
            gone = entry.ischr() and entry.devmajor == entry.devminor == 0
            if entry.pax_headers.pop("SCHILY.xattr.trusted.overlay.opaque", gone):
                parent, name = open_parent(fd, entry.name)
                clear_the_way(parent, name, False)
                os.close(parent)
            if not gone:
                unpack_named(layer, tar, entry, fd, times)
        set_times(fd, times)
    os.close(fd)


# ── a root file system from nothing ──

TOOLS = """sh bash ls cat cp mv rm mkdir rmdir ln chmod chown id whoami ps kill sleep
    echo env printf true false test head tail cut tr sort uniq wc grep sed awk find
    xargs readlink dd df du mount umount hostname uname date stat touch tty stty free
    top nproc dirname basename seq tee yes less vi ip ping""".split()
HOST_ROOTFS_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
                  "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
}


def copy_in(source, top, target):
    """Copy one file of the host into a root file system, times and mode too."""
    import shutil

    os.makedirs(os.path.dirname(top + target), exist_ok=True)
    if not os.path.exists(top + target):
        shutil.copy2(os.path.realpath(source), top + target)


def library_directories():
    """What /etc/ld.so.conf says, and the directories that are always searched."""
    import glob

    found, files = [], ["/etc/ld.so.conf"]
    for file in files:  # grows while we read it
        try:
            lines = read_file(file).splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            if line.startswith("include "):
                files.extend(sorted(glob.glob(line.split()[1])))
            elif line.startswith("/"):
                found.append(line.strip())
    triplet = f"{os.uname().machine}-linux-gnu"
    return [*found, f"/lib/{triplet}", f"/usr/lib/{triplet}", "/lib64", "/usr/lib64",
            "/lib", "/usr/lib", *glob.glob("/lib/*-linux-musl*")]


def find_library(name, first, machine):
    """Where the dynamic linker would find a library for `machine`; "" if nowhere."""
    for directory in [*first, *library_directories()]:
        path = f"{directory}/{name}"
        if os.path.isfile(path) and elf_machine(open_program(path)) == machine:
            return os.path.normpath(path)
    return ""


def libraries_of(path):
    """The paths of the libraries that an ELF file names in its dynamic section."""
    PT_LOAD, PT_DYNAMIC = 1, 2
    DT_NEEDED, DT_STRTAB, DT_RPATH, DT_RUNPATH = 1, 5, 15, 29
    with open(path, "rb") as file:
        data = file.read()
    if not any(kind == PT_DYNAMIC for kind, *_ in elf_segments(data)):
        return []
    segments, values = elf_segments(data), {}
    order = "<" if data[5] == 1 else ">"
    for kind, offset, _, length in segments:
        if kind == PT_DYNAMIC:
            for tag, value in struct.iter_unpack(order + "qQ",
                                                 data[offset:offset + length]):
                values.setdefault(tag, []).append(value)
    strings = next(offset + values[DT_STRTAB][0] - address
                   for kind, offset, address, length in segments if kind == PT_LOAD
                   and address <= values[DT_STRTAB][0] < address + length)

    def text(tag):
        return [os.fsdecode(data[strings + at:data.index(b"\0", strings + at)])
                for at in values.get(tag, ())]

    own = [directory.replace("$ORIGIN", os.path.dirname(os.path.realpath(path)))
           for joined in text(DT_RUNPATH) + text(DT_RPATH)
           for directory in joined.split(":")]
    return [found for name in text(DT_NEEDED)
            if (found := find_library(name, own, elf_machine(data)))]


def copy_program(path, top, target):
    """Copy a program, its interpreter, and every library that these ask for."""
    copy_in(path, top, target)
    interpreter = interpreter_of(open_program(os.path.realpath(path)))
    if interpreter and os.path.exists(interpreter):
        if not os.path.exists(top + interpreter):
            copy_program(interpreter, top, interpreter)
    for library in libraries_of(path):
        if not os.path.exists(top + library):
            copy_program(library, top, library)


def make_host_rootfs(top):
    """Fill a directory with a root file system of the host's own programs."""
    import shutil

    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var/tmp"):
        os.makedirs(f"{top}/{name}", exist_ok=True)
    for name in ("tmp", "var/tmp"):
        os.chmod(f"{top}/{name}", 0o1777)
    os.chmod(f"{top}/root", 0o700)
    for name, text in HOST_ROOTFS_FILES.items():
        write_file(f"{top}/{name}", text, create=0o644)
    busybox = shutil.which("busybox")
    if busybox and elf_segments(open_program(busybox)) and (
            not interpreter_of(open_program(busybox))):
        import subprocess

        copy_in(busybox, top, "/bin/busybox")
        applets = subprocess.run([busybox, "--list"], capture_output=True, text=True)
        for applet in applets.stdout.split():
            if not os.path.lexists(f"{top}/bin/{applet}"):
                os.symlink("busybox", f"{top}/bin/{applet}")
        return
    for tool in TOOLS:
        if path := shutil.which(tool, path=DEFAULT_PATH):
            copy_program(path, top, f"/bin/{tool}")
    if not os.path.exists(f"{top}/bin/sh"):
        raise Fail("this host has no shell to make a root file system of",
                   "./rootfs-fetch.sh, or --rootfs DIR")


def default_rootfs():
    """The directory of the default root file system; made from the host's own files
    if there is none yet."""
    default = store("rootfs", "default")
    if not os.path.isdir(default):
        made = new_directory("rootfs", make_host_rootfs)
        publish(made, "host")
        link = f"{default}.{os.getpid()}"
        os.symlink("host", link)
        os.replace(link, default)
        say(f"no root file system yet: made one from this host's own programs in "
            f"{STORE}/rootfs/host; ./rootfs-fetch.sh gets a real one (Alpine)")
    return os.path.realpath(default)

# ══ 11. THE SHIM ══════════════════════════════════════════════════════════════════
#
# Somebody has to stay with a container while it lives: pass on what is typed and what
# is shown, hand it the signals that were meant for it, and be there when it ends.
#
#       keyboard ──▶ stdin ──▶ ┌────────┐ ──▶ console ┄┄▶ /dev/pts/0 ──▶ program
#       screen   ◀── stdout ◀─ │ parent │ ◀── console ◀┄┄ /dev/pts/0 ◀──    │
#       Ctrl-C, kill ────────▶ └────────┘ ◀────────── SIGCHLD ───────────────┘
#
# With -t there is a terminal in between, else three pipes; both are streams of bytes.
# A signal that arrives at any moment is awkward; one that is read from a descriptor
# is a message like the others.  So the parent blocks signals before there is anything
# to lose, and reads them from a signalfd in the same poll() as the streams.
#
# With -t the caller's terminal is made raw, so that Ctrl-C and Ctrl-Z are bytes that
# reach the container's terminal, which turns them into signals inside.  It has to be
# put back whatever happens, even if the parent is killed with -9; so a second process
# that does nothing else waits for that.
#
# Man pages: pty(7), signalfd(2), termios(3), poll(2).

calls(signalfd4=(289, 74, "fd mask size flags"))

# All signals but those that stop us, cannot be held, or are a mistake of our own.
WATCHED = signal.valid_signals() - {getattr(signal, f"SIG{name}") for name in (
    "KILL STOP TSTP TTIN TTOU PIPE URG SEGV BUS FPE ILL ABRT SYS").split()}


def hold_signals():
    """From here on signals wait to be read: nothing below can be interrupted."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, we would hear of no end
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)


class raw_terminal:
    """A context in which the terminal at `fd` passes every byte on as it is."""

    def __init__(self, fd):
        self.fd = fd

    def __enter__(self):
        import termios
        import tty

        self.termios, self.saved = termios, termios.tcgetattr(self.fd)
        read_end, self.alive = os.pipe()
        self.guard = os.fork()
        if self.guard == 0:  # the guard: puts the terminal back if we cannot
            os.setpgid(0, 0)  # Ctrl-C and a shell's hang-up are not for us
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            os.close(self.alive)
            os.closerange(3, read_end)
            os.closerange(read_end + 1, 1 << 20)
            if os.read(read_end, 1) == b"":
                termios.tcsetattr(self.fd, termios.TCSANOW, self.saved)
            os._exit(0)
        os.close(read_end)
        tty.setraw(self.fd)

    def __exit__(self, *_):
        self.termios.tcsetattr(self.fd, self.termios.TCSADRAIN, self.saved)
        os.write(self.alive, b"!")
        os.close(self.alive)
        os.waitpid(self.guard, 0)


class Stream:
    """Bytes on their way from one descriptor to another."""

    def __init__(self, c, source, sink, ours, last=b""):
        self.c, self.source, self.sink = c, source, sink
        self.ours = ours  # the name in c.outer of the end that is the container's
        self.last = last  # what tells the sink that it was all
        self.data, self.ended = b"", False  # read, not yet written

    def awaited(self):
        """(descriptor, event) of poll() that lets it move on."""
        if self.data:
            return self.sink, select.POLLOUT
        return self.source, select.POLLIN

    def move(self):
        """Read some, or write some of what was read; at the end, close our side."""
        try:
            if self.data:  # no more than a pipe that is ready takes without waiting
                self.data = self.data[os.write(self.sink, self.data[:4096]):]
            elif part := os.read(self.source, 1 << 16):
                self.data = part
            else:
                self.data, self.last, self.ended = self.last, b"", not self.last
        except BlockingIOError:
            return
        except OSError:  # EIO: a terminal that nobody has open; EPIPE: nobody reads
            self.ended = True
        shared = self.ours == "console" and not (self.data and self.sink == 1)
        if self.ended and self.ours in self.c.outer and not shared:
            os.close(self.c.outer.pop(self.ours))  # the program hears of it: SIGHUP


def copy_window_size(c):
    """Tell the container's terminal, if it has one, how large ours is."""
    import termios

    for fd in (0, 1, 2):
        if "console" in c.outer and os.isatty(fd):
            size_ = fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(c.outer["console"], termios.TIOCSWINSZ, size_)
            return


class Attendant:
    """Who stays with a container that runs in the foreground, until it ends."""

    def __init__(self, c, interactive):
        self.c, self.interrupts = c, 0
        if "console" in c.outer:
            console = c.outer["console"]
            self.inputs = [Stream(c, 0, console, "console", b"\x04")]  # typed Ctrl-D
            self.outputs = [Stream(c, console, 1, "console")]
        else:
            self.inputs = [Stream(c, 0, c.outer["stdin"], "stdin")]
            self.outputs = [Stream(c, c.outer[name], number, name)
                            for number, name in ((1, "stdout"), (2, "stderr"))]
        if not interactive:
            self.inputs = []
            if "stdin" in c.outer:
                os.close(c.outer.pop("stdin"))

    def stay(self):
        """Pass on bytes and signals until the container has ended and all that it
        wrote is out; its exit code."""
        mask = sum(1 << (number - 1) for number in WATCHED)
        signals = syscall("signalfd4", -1, ctypes.byref(ctypes.c_uint64(mask)), 8,
                          os.O_CLOEXEC | os.O_NONBLOCK, why="signals become messages")
        try:
            while self.once(signals):
                pass
        finally:
            os.close(signals)
        return self.c.wait()

    def once(self, signals):
        """One turn: wait for something, and do it; False when there is nothing left."""
        over = self.c.status is not None
        if over and self.interrupts >= 3:
            return False
        streams = [s for s in (self.outputs if over else self.inputs + self.outputs)
                   if not s.ended and s.ours in self.c.outer]
        poll, wanted = select.poll(), {signals: select.POLLIN}
        for fd, event in map(Stream.awaited, streams):
            wanted[fd] = wanted.get(fd, 0) | event  # a console may be in two streams
        for fd, events in wanted.items():
            poll.register(fd, events)
        pending = any(stream.data for stream in streams)
        ready = dict(poll.poll(0 if over and not pending else None))
        if signals in ready:
            self.take_signals(signals)
        trouble = select.POLLHUP | select.POLLERR | select.POLLNVAL
        moved = [s for s in streams
                 if ready.get(s.awaited()[0], 0) & (s.awaited()[1] | trouble)]
        for stream in moved:
            stream.move()
        return not over or moved or pending

    def take_signals(self, signals):
        """Forward a signal, follow the window's size, or notice the end."""
        number = struct.unpack_from("I", os.read(signals, 128))[0]  # signalfd_siginfo
        if number == signal.SIGCHLD and self.c.status is None:
            pid, status = os.waitpid(self.c.pid, os.WNOHANG)
            self.c.status = status if pid else None
        elif number == signal.SIGWINCH:
            copy_window_size(self.c)
        elif number != signal.SIGCHLD:
            self.forward(number)

    def forward(self, number):
        """Pass a signal on; process 1 may ignore it, so a third Ctrl-C kills."""
        if signal.getsignal(number) == signal.SIG_IGN:  # nohup, or a shell's `&`
            return
        if number in (signal.SIGINT, signal.SIGTERM):
            self.interrupts += 1
            if self.interrupts == 3:
                say("got 3 SIGTERM/SIGINTs, forcefully exiting")
                number = signal.SIGKILL
        if self.c.status is None:
            os.kill(self.c.pid, number)


def attend(c, interactive):
    """Stay with a started container in the foreground; its exit code."""
    attendant = Attendant(c, interactive)
    if "console" in c.outer:
        copy_window_size(c)
        if interactive:
            with raw_terminal(0):
                return attendant.stay()
    return attendant.stay()

# ══ 12. THE ENGINE ════════════════════════════════════════════════════════════════
#
# What Docker's daemon does for one container, in the process of the one who asked: give
# it an id, a directory and a range of user ids; write the spec that chapter 6 obeys;
# make the three files of /etc that a host knows better than an image; start it, stay
# with it, and clear up.
#
#       /var/lib/minicontainer/            (or $MINICONTAINER_ROOT)
#           rootfs/default                 what `run` uses when no other is named
#           layers/DIGEST/                 tarballs, unpacked
#           ids/SLOT                       a range of 65536 ids: a link to its owner
#           containers/ID/config.json      the spec
#                         state.json       the pid of process 1, while it runs
#                         upper/  work/    what the container changed
#                         rootfs/          or, with vfs, all that it has
#                         hosts hostname resolv.conf
#           workshop/                      always empty, here; see chapter 4
#
# A container's directory is locked (flock) by the process that stays with it.  The
# kernel drops the lock when that process dies, whatever it died of; so "the lock can be
# had" means "nobody looks after it", and `system prune` may clear it away.

CONTAINER_IDS = 0x70000000, 65536, 4093  # first id, ids each, ranges: below 2**31

RUN_OPTIONS = (
    arg("--rootfs", metavar="X", action="append", default=[],
        help="a directory or tarball to use; repeat it for layers, bottom first"),
    arg("--rm", action="store_true", help="remove the container when it ends"),
    arg("--init", action="store_true", help="a small process 1 that reaps orphans"),
    arg("--stats-at-exit", action="store_true", help="print what it used"),
    arg("--storage-driver", choices=["overlay", "vfs"], default="overlay",
        help="vfs: copy the layers, where there is no overlay"),
    arg("--stop-after", metavar="STEP", help="a shell in the half-made container; see "
        "`steps` for what there is"),
    arg("--without", metavar="STEP,…", action="append", default=[],
        help="leave out walls: seccomp, userns, mask_paths …"),
)


def need_root():
    """Refuse, in words, to begin what only root can finish."""
    if os.geteuid() != 0:
        python = "python3 " * sys.argv[0].endswith(".py")
        raise Fail("only root can make containers", f"sudo {python}{sys.argv[0]} …")


def lock(path, how):
    """An open, locked descriptor of a directory, or None if it is somebody else's."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
        return fd
    except BlockingIOError:
        os.close(fd)
        return None


def take_ids(id):
    """A range of user ids that no other container has: the first of them."""
    base, count, slots = CONTAINER_IDS
    taken = set(os.listdir(os.path.dirname(store("ids", "x"))))
    for slot in range(slots):
        if str(slot) not in taken:
            try:
                os.symlink(id, store("ids", str(slot)))
                return base + slot * count
            except FileExistsError:
                pass
    raise Fail(f"all {slots} ranges of user ids are taken",
               "remove containers that have ended: system prune")


def host_resolv_conf():
    """The host's resolv.conf; the one behind it where a local stub is named."""
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            text = read_file(path)
        except FileNotFoundError:
            continue
        if "nameserver 127.0.0.53" not in text:
            return text
    return ""


def etc_files(c, network):
    """{name: text} of the files that Docker puts into every container's /etc."""
    name = c.spec.get("hostname") or os.uname().nodename
    resolv = host_resolv_conf()
    if network == "host":
        return {"hostname": name + "\n", "hosts": read_file("/etc/hosts"),
                "resolv.conf": resolv}
    local = ("nameserver 127.", "nameserver ::1")  # not to be reached from inside
    lines = [line for line in resolv.splitlines()
             if not " ".join(line.split()).startswith(local)]
    return {
        "hostname": name + "\n",
        "hosts": "127.0.0.1\tlocalhost\n"
                 "::1\tlocalhost ip6-localhost ip6-loopback\n"
                 "fe00::\tip6-localnet\nff00::\tip6-mcastprefix\n"
                 "ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
        "resolv.conf": "".join(line + "\n" for line in lines),
    }


def make_spec(options, id, args):
    """The OCI runtime spec of a container, as the options describe it."""
    if options.privileged:
        options.userns = "host"  # asked for in words (P7)
    namespaces = namespaces_spec(options)
    bare = options.privileged or security_options(options)["systempaths"]
    privileges = privileges_spec(options)
    spec = {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": options.read_only},
        "mounts": mounts_spec(options),
        "process": {**process_spec(options, args), **privileges},
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": f"/minicontainer-{id}",
            "resources": resources_spec(options),
            "devices": devices_spec(options),
            "sysctl": sysctl_spec(options, namespaces),
            "maskedPaths": [] if bare else masked_paths(),
            "readonlyPaths": [] if bare else READONLY_PATHS,
            **seccomp_spec(options, privileges["capabilities"]["bounding"]),
        },
    }
    spec["process"]["user"]["umask"] = whole("--umask", options.umask, 0, 0o777, 8)
    if options.uts != "host":
        spec["hostname"] = options.hostname or id[:12]
        spec["domainname"] = options.domainname or ""
        for name in (spec["hostname"], spec["domainname"]):
            if len(os.fsencode(name)) > 64 or not name.isprintable() or " " in name:
                raise Fail(f"invalid host or domain name: {name!r}",
                           "at most 64 characters, none of them a space")
        spec["process"]["env"].insert(1, f"HOSTNAME={spec['hostname']}")
    if options.memory and not options.memory_swap:
        spec["annotations"] = {IMPLIED: "memory swap"}
    return spec


def save(path, document):
    """Replace a JSON file, so that a reader sees the old one or the new one (P3)."""
    write_file(f"{path}.new", to_json(document), create=0o600)
    os.rename(f"{path}.new", path)


def free_ids(still):
    """Give back the ranges of ids whose container's id is not one that still(id)."""
    for slot in os.listdir(os.path.dirname(store("ids", "x"))):
        try:
            if not still(os.readlink(store("ids", slot))):
                os.unlink(store("ids", slot))
        except FileNotFoundError:  # its owner has just done the same
            pass


def remove(c):
    """Remove a container that has ended, and free its ids; once will do."""
    if c.lock < 0:
        return
    free_ids(lambda id: id != c.id)
    remove_tree(c.directory)
    os.close(c.lock)
    c.lock = -1


def make_directory(path, owner, mode):
    """Make a directory of the host for a container, owned by its root."""
    syscall("mkdirat", AT_FDCWD, path, mode, why="a place for what is this container's")
    if owner:
        syscall("fchownat", AT_FDCWD, path, owner, owner, 0, why="its root's")


def create(options, layers, args):
    """A container that has everything but a life: its directory, spec and ids."""
    id = os.urandom(32).hex()
    spec = make_spec(options, id, args)
    seal_interpreter(spec)
    hold_signals()
    directory = store("containers", id)
    guard = lock(os.path.dirname(directory), fcntl.LOCK_SH)  # prune waits for us
    try:
        make_directory(directory, 0, 0o711)
        c = Container(id, spec, directory, layers)
        c.lock = lock(directory, fcntl.LOCK_EX)
    finally:
        os.close(guard)
    try:
        base = 0
        if namespace_flags(spec) & CLONE_NEWUSER:
            base = take_ids(id)
            maps = [{"containerID": 0, "hostID": base, "size": CONTAINER_IDS[1]}]
            spec["linux"].update(uidMappings=maps, gidMappings=maps)
        c.throw_away = options.rm
        c.wants_reaper, c.workshop = options.init, store("workshop", "")
        copied = options.storage_driver == "vfs"
        for name in ("rootfs",) if copied else ("upper", "work"):
            make_directory(f"{directory}/{name}", base, 0o755)
        if copied:
            copy_layers(layers, f"{directory}/rootfs", base)
            c.layers = ()
        else:
            syscall("fchmodat", AT_FDCWD, f"{directory}/upper",
                    stat.S_IMODE(os.stat(layers[-1]).st_mode), why="as / of the image")
        for name, text in etc_files(c, options.network).items():
            write_file(f"{directory}/{name}", text, f"to be /etc/{name}", 0o644)
            syscall("fchownat", AT_FDCWD, f"{directory}/{name}", base, base, 0)
            if not any(m["destination"] == f"/etc/{name}" for m in spec["mounts"]):
                spec["mounts"].append({
                    "destination": f"/etc/{name}", "type": "bind",
                    "source": f"{directory}/{name}",
                    "options": ["bind", *(["ro"] if options.read_only else [])]})
        save(f"{directory}/config.json", spec)
    except BaseException:
        remove(c)
        raise
    return c


def check_terminal(options):
    """Refuse -it without a terminal."""
    if options.tty and options.interactive and not os.isatty(0):
        raise Fail("the input device is not a TTY", "leave out -t", 1)


def at_a_terminal():
    """Whether a person's terminal is our input and output, and we are in front."""
    try:
        return os.isatty(1) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # no terminal, or not the one that controls us
        return False


def choose(options):
    """(layers, arguments) of what `run` was asked to run."""
    args = options.words or ["/bin/sh"] * bool(options.stop_after)
    if options.rootfs:
        return [layer_of(path) for path in options.rootfs], args
    if not args[0].startswith("/"):
        raise Fail(f"unable to find image {args[0]!r}: images do not exist yet",
                   "a command of the default root file system begins with /, as in "
                   "run /bin/sh; --rootfs uses another one")
    return [default_rootfs()], args


# What --without may leave out: a step that others do not build on, or a namespace.
WALLS = (no_more_imports, hide_memory, join_cgroup, new_session, make_devices,
         set_names, loopback_up, mask_paths, pivot, seal_root, drop_bounding,
         become_user, set_capabilities, no_new_privileges, close_descriptors,
         label_program, reset_signals, install_seccomp)
NAMESPACE_WALLS = {"userns": "userns", "pidns": "pid", "netns": "network",
                   "utsns": "uts", "ipcns": "ipc", "cgroupns": "cgroupns"}
SHELL = take_stdio, die_with_parent, reset_signals, execute  # what one takes at least


def leave_out_walls(options):
    """The steps that --without names, by their whole name or its last word; the
    namespaces that it names are made the host's."""
    steps, names = set(), [name for text in options.without for name in text.split(",")]
    for name in names:
        found = [step for step in WALLS
                 if name in (step.__name__, step.__name__.rpartition("_")[2])]
        if name in NAMESPACE_WALLS:
            setattr(options, NAMESPACE_WALLS[name], "host")
        elif not found:
            raise Fail(f"--without {name}: no such wall", ", ".join(
                [*NAMESPACE_WALLS, *(step.__name__ for step in WALLS)]))
        steps.update(found)
    if names:
        say(f"without {', '.join(names)}: a container with a wall missing")
    return steps


def choose_steps(options):
    """(BEFORE, OUTSIDE, BIRTH) without what --without names, and no further than
    --stop-after; then the program is a shell, wherever init stands."""
    missing = leave_out_walls(options)
    before, outside, birth = ([step for step in steps if step not in missing]
                              for steps in (BEFORE, OUTSIDE, BIRTH))
    if options.stop_after:
        go = birth.index(wait_for_go) + 1
        taken = [*before, *birth[:go], *outside, *birth[go:]]
        names = [step.__name__ for step in taken]
        if options.stop_after not in names:
            raise Fail(f"--stop-after {options.stop_after}: no such step",
                       "see `minicontainer steps`")
        stop = names.index(options.stop_after) + 1
        say(f"stopped after {options.stop_after}; next is "
            + (names[stop:] or ["nothing"])[0])
        del taken[stop:]
        before = [step for step in before if step in taken or step == open_stdio]
        outside = [step for step in outside if step in taken]
        birth = [step for step in birth if step in taken or step in SHELL]
    return before, outside, birth


def report_end(c, options, code, used):
    """What a person should know about how it ended."""
    if used["oom_kills"]:
        limit = used["memory_limit"]
        what = "the container" if code == 137 else "a process of the container"
        where = f"its memory limit of {human(limit)}" if limit else "the host's memory"
        say(f"the kernel's OOM killer ended {what}: {where} was not enough")
    if options.stats_at_exit:
        for line in show_stats(used):
            print(line, file=sys.stderr)


@command("run", *RUN_OPTIONS, *PROCESS_OPTIONS, *NAMESPACE_OPTIONS, *CGROUP_OPTIONS,
         *MOUNT_OPTIONS, *PRIVILEGE_OPTIONS,
         arg("words", nargs="A*", metavar="COMMAND", help="program and arguments"))
def run_command(options):
    """Run a command in a new container."""
    if not options.words and not options.stop_after:
        raise Fail("COMMAND is missing", options.hint)
    need_root()
    check_terminal(options)
    layers, args = choose(options)
    if not (options.tty or options.interactive) and at_a_terminal():
        options.tty = options.interactive = True  # whoever sits at one wants -it
    steps = choose_steps(options)
    if options.tty and open_console not in steps[-1]:
        options.tty = False
        args += ["-i", "+m"] * (not options.words)  # --stop-after: a prompt even so
    c = create(options, layers, args)
    try:
        try:
            start(c, *steps)
        except CannotMapIds as error:
            if narration.style == "sh":  # half of another script has been told
                raise Fail(error.message, "--userns host does without") from None
            say(f"{error.message}: using the host's user namespace (root inside is "
                "root outside)")
            remove(c)
            options.userns = "host"
            c = create(options, layers, args)  # starts anew, sealed, and comes by again
            start(c, *steps)
        save(f"{c.directory}/state.json", {"pid": c.pid})
        code = attend(c, options.interactive)
        used = c.cgroup.measure()
    except BaseException:
        end(c)
        remove(c)
        raise
    end(c)
    report_end(c, options, code, used)
    if options.rm:
        remove(c)
    return code


def find_container(name):
    """(id, directory) of the container whose id begins with `name`."""
    ids = [id for id in os.listdir(os.path.dirname(store("containers", "x")))
           if name and id.startswith(name)]
    if len(ids) != 1:
        raise Fail(f"no such container: {name}" if not ids else
                   f"multiple IDs found with provided prefix: {name}",
                   "its id, or the beginning of it, is its host name")
    return ids[0], store("containers", ids[0])


@command("exec", *PROCESS_OPTIONS, PRIVILEGED,
         arg("container", metavar="CONTAINER", help="its id, or the beginning of it"),
         arg("words", nargs="A...", metavar="COMMAND", help="program and arguments"))
def exec_command(options):
    """Run a command in a running container."""
    need_root()
    check_terminal(options)
    id, directory = find_container(options.container)
    spec = from_json(read_file(f"{directory}/config.json"))
    try:
        pid = from_json(read_file(f"{directory}/state.json"))["pid"]
        target = syscall("pidfd_open", pid, 0, why="its process 1")
        if f"minicontainer-{id}" not in read_file(f"/proc/{pid}/cgroup"):
            raise ProcessLookupError
    except (FileNotFoundError, ProcessLookupError):
        raise Fail(f"container {id[:12]} is not running", "it has ended", 1) from None
    seal_interpreter(spec)
    hold_signals()
    process = {**spec["process"],
               **process_spec(options, options.words, spec["process"])}
    if options.privileged:
        process["capabilities"] = capability_sets(available_capabilities(
            bool(namespace_flags(spec) & CLONE_NEWUSER)))
    c = Container(id, {**spec, "process": process}, directory)
    c.is_new, c.target = False, target
    enter(c, Cgroup(spec["linux"]["cgroupsPath"]))
    try:
        return attend(c, options.interactive)
    finally:
        c.close()


@command("system prune")
def system_prune_command(options):
    """Remove all containers that have ended, and what killed commands left behind."""
    need_root()
    guard = lock(os.path.dirname(store("containers", "x")), fcntl.LOCK_EX)
    alive, failed = set(), None
    for id in os.listdir(os.path.dirname(store("containers", "x"))):
        try:
            held = lock(store("containers", id), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if held is None:
                alive.add(id)
                continue
            Cgroup(f"/minicontainer-{id}").remove()
            remove_tree(store("containers", id))
            os.close(held)
            print(id)
        except FileNotFoundError:  # a run --rm has just ended
            continue
        except (OSError, Fail) as error:  # the others are cleared all the same
            alive.add(id)
            failed = error
    free_ids(lambda id: id in alive)
    for parent in ("layers", "rootfs"):
        top = os.path.dirname(store(parent, "x"))
        for name in os.listdir(top):
            maker = name.split("-")[1] if name.startswith(".new-") else ""
            if maker and not os.path.exists(f"/proc/{maker}"):
                remove_tree(f"{top}/{name}")
    os.close(guard)
    if failed:
        raise failed

# ══ 15. THE CLASSROOM ═════════════════════════════════════════════════════════════
#
# Nothing about a container is magic, and what was put together above can be taken apart
# again by whoever wants to see what a part is good for:
#
#       steps                    the steps of chapter 6, and why each stands where it is
#       run --stop-after STEP    a shell in the half-made container
#       run --without STEP,…     a container with a wall missing
#       run --explain=sh         the same container by hand: a shell script
#
# The script is the narration in other words: a line for each request that a program of
# the command line can make too.  A shell differs from a process of ours in three ways.
# It changes its namespaces only by becoming another shell, so there are three, each in
# the text of the one before.  A second process holds the user namespace while its maps
# are written.  And when / is the container's, the host's programs are still there under
# ".", the old root, and are run by their own loader; the last of them, capsh, becomes
# the container's program.
#
# It is for reading and for trying, with images that are trusted: a shell resolves the
# names in an image by string (P4).  It shares no volume with the host, and no program
# takes a seccomp filter from it.
#
# Man pages: unshare(1), nsenter(1), mount(8), pivot_root(8), capsh(1), ld.so(8).

FIRST_SHELL = """\
#!/bin/sh
# What `minicontainer run` asked of the kernel, by hand.  Save it; as root: sh FILE
set -eu
code=0
exec 5<&0  # where the container's input is, as each shell below reads its own text"""
SECOND_SHELL = """\
unshare --mount --propagation slave sh -eu <<'END OF WORKSHOP' || code=$?
code=0
in_new_namespace() {
    until [ "$(readlink "/proc/$1/ns/user")" != "$(readlink /proc/self/ns/user)" ]; do
        sleep 0.01
    done
}
layer() {  # a directory, with the container's root (its id is $3) where root is on disk
    mount --bind -o "X-mount.idmap=/proc/$users/ns/user" "$1" "$2"
    if [ "$(stat -c %u "$2")" != "$3" ]; then  # mount(8) maps ids since 2.39
        umount "$2"
        cp -a "$1/." "$2"
        chown -hR "$3:$3" "$2"
    fi
}"""
THIRD_SHELL = """\
sh -eu <<'END OF INIT' || code=$?
read_only() {  # a mount, and all below it
    findmnt -rno TARGET -R "$1" | while read -r at; do
        mount -o remount,bind,ro "$at"
    done
}"""
UNSHARE_WORDS = {"network": "net"}  # where unshare(1) has another word than the OCI


def host_programs(names):
    """({name: its path under "."}, what starts them there) for programs of the host
    when another tree is /: the loader and the libraries that ELF headers name."""
    import shutil

    found = {name: shutil.which(name, path=DEFAULT_PATH) for name in names}
    for name in (name for name, path in found.items() if not path):
        raise Fail(f"--explain=sh: there is no {name} on this machine for the script",
                   "apt-get install util-linux libcap2-bin coreutils")
    files = list(map(os.path.realpath, found.values()))
    for file in files:  # grows while we read it
        files += {*map(os.path.realpath, libraries_of(file))} - {*files}
    loaders = {os.path.realpath(loader) for file in files[:len(found)]
               if (loader := interpreter_of(open_program(file)))}
    top = ":".join(sorted({f".{os.path.dirname(file)}" for file in files[len(found):]}))
    return ({name: f"$host .{file}" for name, file in zip(found, files, strict=False)},
            "".join(f".{loader} --library-path {top}" for loader in loaders))


class ByHand:
    """The script so far: a method for each call that a shell has words for.

    It is named as the call, takes its arguments, and returns lines, or none where the
    call is only noted.  Parent and init each go on with a copy of their own.
    """

    def __init__(self):
        import shlex

        self.quote = shlex.quote
        self.result = 0  # of the call that is told
        self.made = []  # directories of the host
        self.groups = []  # its control groups: their lists of processes
        self.trees = {}  # descriptor of a mount that is nowhere yet: (source, mapped)
        self.born, self.base = 0, 0  # init's namespaces, and its root's id
        self.pivoted = self.ended = False
        self.dropped, self.more, self.cwd = [], [], "/"  # for capsh
        self.ids = 0, 0, []
        self.host, self.loader = host_programs(
            ("umount", "mount", "prlimit", "env", "capsh"))

    def path(self, value, dirfd=AT_FDCWD):
        """What a string, a Place or a descriptor stands for, as seen from here."""
        if dirfd != AT_FDCWD:
            return f"{self.path(dirfd)}/{self.quote(value)}"
        if isinstance(value, str) and not isinstance(value, Place):
            return self.quote(value)
        fd = value if isinstance(value, int) else value.fd
        path = os.readlink(f"/proc/self/fd/{fd}")
        return self.quote(path.removeprefix(os.getcwd() + "/"))

    # ── files ──

    def mkdirat(self, dirfd, path, mode):
        first = not self.made and f"{FIRST_SHELL}\nexport id={os.path.basename(path)}\n"
        if dirfd == AT_FDCWD and path.startswith("/"):
            self.made.append(path)
        return f"{first or ''}mkdir -m {mode:o} {self.path(path, dirfd)}"

    def mknodat(self, dirfd, path, mode, dev):
        at = self.path(path, dirfd)
        if stat.S_ISREG(mode):
            return f"touch {at}"
        return (f"mknod {at} {'b' if stat.S_ISBLK(mode) else 'c'} "
                f"{os.major(dev)} {os.minor(dev)}")

    def symlinkat(self, target, dirfd, path):
        return f"ln -s {target} {self.path(path, dirfd)}"

    def fchownat(self, dirfd, path, owner, group, flags):
        return f"chown {owner}:{group} {self.path(path)}"

    def fchmodat(self, dirfd, path, mode):
        return f"chmod {mode:o} {self.path(path)}"

    def write(self, path, text):
        top, _, file = str(path).rpartition("/")
        of_process = top.removeprefix("/proc/").isdecimal()
        if file.endswith(".new") or not (of_process or not self.ended and (
                top in self.made or top.startswith(("/proc/sys", CGROUP_ROOT)))):
            return ""  # a record of ours, or what it has an open descriptor of
        if file == "uid_map":
            self.base = int(text.split()[1])
        if of_process:
            path = f"/proc/{'$users' if file.endswith('_map') else 'self'}/{file}"
        tell = "printf '%s\\n'" if "\\" in text else "echo"
        return f"{tell} {self.quote(text.rstrip())} > {path}"

    # ── mounts ──

    def open_tree(self, dirfd, path, flags):
        self.trees[self.result] = path, False

    def mount_setattr(self, fd, path, flags, attr, size):
        words = ",".join(word for word, bit in OPTION_WORDS.items()
                         if attr.attr_set & bit & 15)
        if attr.attr_set & MOUNT_ATTR_IDMAP:
            source, _ = self.trees[fd]
            self.trees[fd] = source, True
            if not attr.propagation:  # a volume: it has been put down already
                return ("mount --rbind -o X-mount.idmap=/proc/$users/ns/user "
                        f"{self.quote(source)} volume-{fd}")
        elif words == "ro" and flags & AT_RECURSIVE:
            return f"read_only {self.path(fd)}"
        elif words:
            mount = self.host["mount"] if self.pivoted else "mount"
            return f"{mount} -o remount,bind,{words} {self.path(fd)}"

    def move_mount(self, tree, path, to_dirfd, to_path, flags):
        source, mapped = self.trees[tree]
        if to_dirfd != AT_FDCWD:
            return f"mount --rbind volume-{tree} {self.path(to_dirfd)}"
        if mapped:
            return f"layer {self.quote(source)} {to_path} {self.base}"
        return f"mount --bind {self.quote(source)} {to_path}"

    def mount(self, source, target, type, flags, data):
        for word, bits in PROPAGATIONS.items():
            if flags == bits:
                return f"mount --make-{word} {self.path(target)}"
        words = [word for word, bit in OPTION_WORDS.items() if flags & bit]
        if flags & MS_BIND and not flags & MS_REMOUNT:
            return (f"mount --{'rbind' if flags & MS_REC else 'bind'} "
                    f"{self.path(source)} {self.path(target)}")
        words += ["remount"] * bool(flags & MS_REMOUNT) + [data] * bool(data)
        options = f"-o {self.quote(','.join(words) or 'rw')}"
        kind = f" -t {type} {self.path(source)}" if type else ""
        return f"mount {options}{kind} {self.path(target)}"

    def fchdir(self, fd):
        if self.pivoted:
            self.cwd = os.readlink(f"/proc/self/fd/{fd}")
        elif narration.who == "init":
            return f"cd {self.path(fd)}"

    def chdir(self, path):
        return "" if self.pivoted else f"cd {path}"

    def pivot_root(self, new_root, put_old):
        self.pivoted = True
        return ("pivot_root . .\n"
                "cd -P /..  # the old root lies on top of the new one\n"
                f'host="{self.loader}"')

    def umount2(self, target, flags):
        return f"{self.host['umount']} --no-canonicalize --lazy ."

    # ── processes ──

    def openat(self, dirfd, path, flags, mode):
        if path.endswith("/tasks"):
            self.groups.append(path)
        elif path in self.made:
            self.groups.append(f"{path}/cgroup.procs")

    def unshare(self, flags):
        if narration.who == "parent":
            return SECOND_SHELL
        kinds = [UNSHARE_WORDS.get(kind, kind) for kind, row in NAMESPACES.items()
                 if (self.born | flags) & row[0] and kind != "user"]
        users = "nsenter --user=/proc/$users/ns/user --setuid 0 --setgid 0 "
        return (users * bool(self.born & CLONE_NEWUSER)
                + f"unshare --{' --'.join(kinds)} --fork --kill-child {THIRD_SHELL}")

    def clone3(self, args, size):
        return self.clone(args.flags)

    def clone(self, flags, *_):
        self.born = flags
        lines = [f"echo $$ > {self.quote(group)}" for group in self.groups]
        for fd, (source, _) in self.trees.items():
            lines += [f"{'mkdir' if os.path.isdir(source) else 'touch'} volume-{fd}",
                      f"mount --rbind {self.quote(source)} volume-{fd}"]
        if flags & CLONE_NEWUSER:
            lines += ["unshare --user sleep 1000000 &", "users=$!",
                      "trap 'kill $users; wait $users 2>/dev/null || :' EXIT",
                      "in_new_namespace $users"]
        return "\n".join(lines)

    def setns(self, fd, flags):
        self.ended = True  # the parent goes home: what it does now is for us alone

    def sethostname(self, name, length):
        return f"hostname {self.quote(name)}"

    def setdomainname(self, name, length):
        return f"domainname {self.quote(name)}"

    def ioctl(self, fd, request, argument):
        return "ip link set lo up" if request == SIOCSIFFLAGS else ""

    # ── privileges ──

    def setgroups(self, count, groups):
        self.ids = *self.ids[:2], groups[:count]

    def setresgid(self, gid, *_):
        self.ids = self.ids[0], gid, self.ids[2]

    def setresuid(self, uid, *_):
        self.ids = uid, *self.ids[1:]

    def umask(self, mode):
        return f"umask {mode:04o}"

    def prctl(self, option, value, *_):
        if option == PR_CAPBSET_DROP:
            self.dropped.append(CAPABILITIES[value].lower())
        elif option == PR_SET_NO_NEW_PRIVS:
            self.more = ["--no-new-privs"]

    def prlimit64(self, pid, resource, new, old):
        low, high = (value if value < 1 << 63 else "unlimited" for value in new)
        return f"{self.host['prlimit']} --pid $$ --{RLIMITS[resource]}={low}:{high}"

    def seccomp(self, operation, flags, program):
        return f"# a filter of {program.len} instructions, that no shell can install"

    def execve(self, path, argv, envp):
        if not os.path.lexists(path) or self.ended:
            return ""
        self.ended = True  # whatever comes of it
        uid, gid, groups = self.ids
        program = [f"--shell={path}", "--", *argv[1:]]
        if self.cwd != "/":
            program = ["--shell=/bin/sh", "--", "-c", 'cd "$0" && exec "$@"', self.cwd,
                       path, *argv[1:]]
        drop = [f"--drop={','.join(self.dropped)}"] * bool(self.dropped)
        words = ["--chroot=/", *drop, f"--groups={','.join(map(str, groups))}",
                 f"--gid={gid}", f"--uid={uid}", *self.more, *program]
        lines = [f"exec {self.host['env']} -i {' '.join(map(self.quote, envp))} \\",
                 f"    {self.host['capsh']} \\",
                 f"    {' '.join(map(self.quote, words))} <&5 5<&-",
                 "END OF INIT", "exit $code", "END OF WORKSHOP"]
        lines += [f"{'rmdir' if top.startswith(CGROUP_ROOT) else 'rm -r'} {top}"
                  for top in self.made if os.path.dirname(top) not in self.made]
        return "\n".join([*lines, "exit $code"])


BY_HAND = []  # the script of this process, once it has begun


@style("sh")
def as_shell(name, args, at, took, result, why):
    """A request as the line of a shell script, if it has one."""
    if not BY_HAND:
        narration.style = ""  # what it takes is not told
        BY_HAND.append(ByHand())
        narration.style = "sh"
    hand, tell = BY_HAND[0], getattr(BY_HAND[0], name, None)
    if not tell or not (result.isdecimal() or name == "execve") or not (
            hand.made or name == "mkdirat"):  # it begins with the container's directory
        return ""
    hand.result = int(result) if result.isdecimal() else 0
    lines, id = tell(*args) or "", os.path.basename(hand.made[0])
    why = f"  # {why}" * bool(lines and why and "\n" not in lines)
    return lines.replace(id, "$id").replace("id=$id", f"id={id}") + why


def why_each(tuple_name):
    """(name, why it stands there) of each step in a tuple of chapter 6, out of its own
    text: the comment on a line is about the last step on it."""
    text = read_file(__file__).partition(f"\n{tuple_name} = (")[2].partition("\n)\n")[0]
    for line in text.splitlines()[1:]:
        code, _, comment = line.partition("#")
        for name in code.replace("*(TAIL := (", "").replace(")", "").split(","):
            if name := name.strip():
                yield name, comment.strip()


@command("steps")
def steps_command(options):
    """The steps of a container's birth, and why each stands where it does."""
    for tuple_name, who in (("BEFORE", "the parent, before there is another process"),
                            ("OUTSIDE", "the parent, while init waits for it"),
                            ("BIRTH", "init, until it has become the program")):
        print(f"{tuple_name}: {who}")
        for name, why in why_each(tuple_name):
            print(f"  {name:18} {why}")

# ══ 16. COMMAND LINE ══════════════════════════════════════════════════════════════
#
# Every command was declared beside its meaning; here the one that was asked for gets
# its parser, and everything that can go wrong ends in one place: a line that says what,
# a hint that says what to do, and Docker's exit code.


# ── on the PATH ──
#
# Of a start as a file, more than half is spent compiling it; `python3 -m minicontainer`
# keeps the bytecode.  A launcher loads what `install` compiled, and leaves out what a
# start pays for and has no use of: looking for site-packages (-S), the environment's
# PYTHON… (-I), the locale (utf8), and collecting garbage, of which there is hardly any.
# "Unchecked" bytecode is not compared with the file, so that a start never compiles,
# whoever it is for: a change takes `install`.

LAUNCHER = """\
#!{python} -ISXutf8
# minicontainer install: runs the bytecode of the file named here
import gc; gc.set_threshold(100_000); __file__ = {file!r}
exec(type(__loader__)("__main__", __file__).get_code("__main__"))
"""
PREFIX_OPTION = arg("--prefix", metavar="DIR", default="/usr/local",
                    help="files go to DIR/bin and DIR/lib (default: /usr/local)")


def installed(prefix):
    """What `install` puts under a prefix: the file, its bytecode, a record of the
    directories that were made for them, and the launchers."""
    import importlib.util

    top = os.path.abspath(prefix)
    file = f"{top}/lib/minicontainer/minicontainer.py"
    return [file, importlib.util.cache_from_source(file), f"{file[:-3]}.directories",
            f"{top}/bin/minicontainer", f"{top}/bin/minirunc"]


def check_ours(paths):
    """Refuse to replace or remove a file that `install` has not written."""
    for path in filter(os.path.lexists, paths):
        with open(path, "rb") as file:
            begin = file.read(500)
        if not any(mark in begin for mark in (b"# minicontainer install:",
                                              b'"""minicontainer: the container')):
            raise Fail(f"{path} was not made by `minicontainer install`",
                       "move it away, or name another --prefix", 1)


def take_away(files, directories):
    """Remove files, and those of the directories that are empty then."""
    for path in filter(os.path.lexists, files):
        os.unlink(path)
    for path in sorted(directories, reverse=True):
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)


@command("install", PREFIX_OPTION)
def install_command(options):
    """Put minicontainer and minirunc on the PATH, compiled."""
    import pathlib
    import py_compile
    import shutil

    python = os.path.realpath("/proc/self/exe")  # what a link or a shim has led to
    file, bytecode, record, *launchers = paths = installed(options.prefix)
    text = LAUNCHER.format(python=python, file=file)
    if text.index("\n") > 254 or any(map(str.isspace, python)):
        raise Fail(f"the kernel takes no #! line with {python!r}",
                   "use a Python with a shorter path, without spaces", 1)
    unchecked, made = py_compile.PycInvalidationMode.UNCHECKED_HASH, set()
    try:
        check_ours([file, *launchers])
        made.update(str(top) for path in paths for top in pathlib.Path(path).parents
                    if not top.exists())
        for path in paths:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copyfile(__file__, f"{file}.new")
        py_compile.compile(f"{file}.new", f"{bytecode}.new", file, doraise=True,
                           invalidation_mode=unchecked)
        earlier = read_file(record).splitlines() if os.path.exists(record) else []
        write_file(f"{record}.new", "\n".join([*earlier, *made]), create=0o644)
        for path in launchers:
            write_file(f"{path}.new", text, create=0o755)
        for path in paths:  # a start in this moment finds the old one or the new (P3)
            os.replace(f"{path}.new", path)
            print(f"installed {path}")
    except PermissionError as error:
        raise Fail(f"{error.filename}: {error.strerror}",
                   "sudo, or --prefix with a directory of your own", 1) from None
    finally:
        take_away([f"{path}.new" for path in paths], made)


@command("uninstall", PREFIX_OPTION)
def uninstall_command(options):
    """Remove what `install` has put under a prefix, and nothing else."""
    file, bytecode, record, *launchers = installed(options.prefix)
    if not os.path.exists(record):
        raise Fail(f"nothing is installed under {options.prefix}",
                   "--prefix as it was given to `install`", 1)
    check_ours([file, *launchers])
    cache = os.path.dirname(bytecode)
    names = os.listdir(cache) if os.path.isdir(cache) else []
    files = list(filter(os.path.lexists, (
        *launchers, *(f"{cache}/{name}" for name in names
                      if name.startswith("minicontainer.")), file, record)))
    take_away(files, read_file(record).splitlines())
    print("\n".join(f"removed {path}" for path in files))


# ── the words of the command line ──

COMMON_OPTIONS = (
    arg("--explain", optional="text", choices=list(STYLES), metavar="STYLE",
        help="narrate every request to the kernel; bpf: disassemble filters; json; sh: "
             "print `run` as a shell script"),
    arg("--help", action="store_true", help="show this"),
)


class Options:
    """What the command line says: an attribute for each option and operand."""


def usage():
    """What `minicontainer --help` prints."""
    lines = ["Usage: minicontainer [--explain] COMMAND [OPTIONS]", "",
             "The container engine you can read.", "", "Commands:"]
    lines += [f"  {words:14} {function.__doc__.splitlines()[0]}"
              for words, (function, _) in COMMANDS.items()]
    return "\n".join([*lines, "", "minicontainer COMMAND --help tells more."])


def command_usage(words):
    """What `minicontainer COMMAND --help` prints."""
    function, declared = COMMANDS[words]
    head, rows = f"Usage: minicontainer {words} [OPTIONS]", []
    for names, how in (*declared, *COMMON_OPTIONS):
        value = how.get("metavar") or "|".join(how.get("choices", ()))
        if names[0].startswith("-"):
            row = ", ".join(names) + (f"[={value}]" if "optional" in how else
                                      f" {value}" if value else "")
        else:
            row = value
            head += f" [{value}]" if how.get("nargs") in ("?", "*") else f" {value}"
            head += " [ARG...]" if how.get("nargs", "").startswith("A") else ""
        rows.append(f"  {row:34} {how['help']}" if len(row) < 34 else
                    f"  {row}\n{'':37}{how['help']}")
    return "\n".join([head, "", function.__doc__.splitlines()[0], "", *rows])


def take_option(options, flags, word, left):
    """Set what one word of the command line asks for; its value may be the next."""
    name, equals, value = word.partition("=")
    if not word.startswith("--"):
        name, value = word[:2], word[2:].removeprefix("=")
        equals = value
        if value and flags.get(name, ("", {}))[1].get("action") == "store_true":
            left.insert(0, f"-{value}")  # -it is -i -t
            equals = value = ""
    if name not in flags:
        raise Fail(f"unknown shorthand flag: {name[1:]!r} in {word}"
                   if name[:2] != "--" else f"unknown flag: {name}", options.hint)
    attribute, how = flags[name]
    if how.get("action") == "store_true":
        meanings = {"": True, "true": True, "1": True, "false": False, "0": False}
        if value not in meanings:
            raise Fail(f"invalid argument {value!r} for {name}", "true or false")
        setattr(options, attribute, meanings[value])
        return
    if "optional" in how:
        value = value if equals else how["optional"]
    elif not equals:
        if not left:
            raise Fail(f"flag needs an argument: {name}", options.hint)
        value = left.pop(0)
    if value not in how.get("choices", (value,)):
        raise Fail(f"invalid argument {value!r} for {name}",
                   "one of: " + ", ".join(how["choices"]))
    if how.get("action") == "append":
        getattr(options, attribute).append(value)
    else:
        setattr(options, attribute, value)


def take_operands(options, operands, given):
    """Give each operand its share of the words that are no options."""
    for name, how in operands:
        many = how.get("nargs") in ("A...", "A*", "+", "*")
        if not given and how.get("nargs") not in ("?", "*", "A*"):
            raise Fail(f"{how['metavar']} is missing", options.hint)
        if given:
            setattr(options, name, given if many else given[0])
            given = [] if many else given[1:]
    if given:
        raise Fail(f"one operand too many: {given[0]!r}", options.hint)


def parse(words, argv):
    """(function, options) of a command line, as Docker reads one.

    argparse would do, were it not for 12 ms at every start.  Options and operands mix,
    but where an operand is a command, all that follows it belongs to that command.
    """
    function, declared = COMMANDS[words]
    options, flags, operands, given = Options(), {}, [], []
    options.hint = f"see `minicontainer {words} --help`"
    for names, how in (*declared, *COMMON_OPTIONS):
        name = max(names[:2], key=len).lstrip("-").replace("-", "_")
        empty = False if how.get("action") == "store_true" else None
        default = how.get("default", empty)
        setattr(options, name, default[:] if default == [] else default)
        if names[0].startswith("-"):
            flags.update(dict.fromkeys(names, (name, how)))
        else:
            operands.append((name, how))
    runs = any(how.get("nargs", "").startswith("A") for _, how in operands)
    left = list(argv)
    while left:
        word = left.pop(0)
        if word.startswith("-") and word not in ("-", "--"):
            take_option(options, flags, word, left)
            continue
        given += [word] if word != "--" else []
        if word == "--" or runs:
            given += left
            break
    if options.help:
        return (lambda options: print(command_usage(words))), options
    take_operands(options, operands, given)
    return function, options


def dispatch(argv):
    """Do what the command line asks; its exit code."""
    if os.path.basename(sys.argv[0]) == "minirunc":
        raise Fail("the OCI runtime is chapter 7, which is not written yet",
                   "`minicontainer run` makes containers", 1)
    style = os.environ.get("MINICONTAINER_EXPLAIN", "").lower()
    style = style if style in STYLES else "text" if style else ""
    while argv and argv[0].startswith("--explain"):
        style = argv.pop(0).partition("=")[2] or "text"
    if not argv or argv[0] in ("help", "--help", "-h"):
        print(usage())
        return 0
    words = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
    if words not in COMMANDS:
        raise Fail(f"{words!r} is not a minicontainer command",
                   "see `minicontainer --help`", 1)
    if os.uname().machine not in KERNEL_NAMES:
        raise Fail(f"the system calls of {os.uname().machine} are not known here",
                   f"known are {' and '.join(KERNEL_NAMES)}")
    function, options = parse(words, argv[len(words.split()):])
    style = options.explain or style
    if style not in ("", *STYLES):
        raise Fail(f"invalid argument {style!r} for --explain",
                   "one of: " + ", ".join(STYLES))
    if style == "sh" and words != "run":
        raise Fail("--explain=sh prints the script of a `run`, and of nothing else",
                   "--explain tells about any command")
    if style:
        start_narration(style)
    return function(options) or 0


def stop(number, _):
    """A signal while there is something to undo: unwind, as after an error."""
    raise SystemExit(128 + number)


def main(argv=None):
    """Run one command line; its exit code.  No traceback ever reaches the person."""
    os.umask(0o022)  # what we make is as readable as it is meant to be
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        while (fd := os.open("/dev/null", os.O_RDWR)) < 3:
            pass  # the caller had closed it, and anything of ours could land there
        os.close(fd)
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        fail = diagnose(error)
        say(f"{fail.message}" + (f"\n  hint: {fail.hint}" if fail.hint else ""))
        return fail.code
    except SystemExit as stopped:  # stop()
        say("interrupted: what had been begun was undone\n  hint: just run it again")
        return stopped.code


def console():
    """The whole process, as a launcher starts it: main, and a quick end."""
    code = main()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # nobody reads it
        code = code or 125
    os._exit(code)  # taking the interpreter down in order would cost 10 ms


if __name__ == "__main__":
    console()
