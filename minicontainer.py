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
     7. THE OCI RUNTIME      what runc does: for podman, containerd and their like
     8. IMAGES               what is packed, named and kept; layers from tarballs
     9. REGISTRY             how images come and go
    10. NETWORK              how containers reach each other, and the world
    11. THE SHIM             its terminal, its log, its signals, its end
    12. THE ENGINE           containers by name: run, ps, logs, stop, exec …
    13. BUILD                images as a Dockerfile says
    15. THE CLASSROOM        a container in parts, and by hand
    16. COMMAND LINE         main

A chapter uses only what stands above it: cut the file after any of them, and what
is left still works.  (14 is not written yet; see README.md.)

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

import _struct as struct  # all that struct.py does is pass it on
import codecs
import errno
import fcntl
import os
import select
import stat
import sys
import time
from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_PYTHONAPI, FUNCFLAG_USE_ERRNO
from _ctypes import Array, CFuncPtr, Structure, _SimpleCData
from _ctypes import addressof, byref, dlopen, dlsym, get_errno, sizeof
from _json import encode_basestring as quote
from _json import encode_basestring_ascii as quote_ascii
from _json import make_scanner

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


class NoSuch(Fail):
    """What was named is not there."""


class ends_with:
    """A context whose failures have another exit code than they would have elsewhere:
    125 tells that a container was to be started, and was not."""

    def __init__(self, code):
        self.code = code

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, Fail):
            error.code = self.code


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
    """One line from us to the person, on standard error, and each only once.

    It may quote a file's name, or a registry: a terminal must not obey what that says.
    """
    if message not in SAID:
        SAID.add(message)
        message = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1]
                          for c in message)
        lines = f"minicontainer: {message}".splitlines()
        if narration.style == "json":
            lines = [f'{{"say": {quote_ascii(message)}}}']
        print("\n".join(narration.aside + line for line in lines), file=sys.stderr,
              flush=True)


# C's types and functions, from the module below Python's `ctypes`, whose own import
# would cost every start 4 ms.  The letters are those of `struct`, "z" a string's.

c_char, c_int, c_long, c_ushort, c_uint32, c_uint64, c_char_p, c_void_p = (
    type(_SimpleCData)(name, (_SimpleCData,), {"_type_": letter}) for name, letter in (
        ("c_char", "c"), ("c_int", "i"), ("c_long", "l"), ("c_ushort", "H"),
        ("c_uint32", "I"), ("c_uint64", "L"), ("c_char_p", "z"), ("c_void_p", "P")))
OURSELVES = dlopen(None, 0)  # the C library, and Python's own


class Function(CFuncPtr):
    """A function of C.

    FUNCFLAG_PYTHONAPI: Python's global lock is kept during the call.  Nothing else may
    run while clone3 below copies the process.
    """

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI | FUNCFLAG_USE_ERRNO
    _restype_ = c_long


def c_function(name):
    """The function of C's library, or of Python's, that is called so."""
    return Function(dlsym(OURSELVES, name))


def c_buffer(content, size=0):
    """Memory that the kernel may write to: the bytes, and zeros up to `size`."""
    content = content.ljust(size, b"\0")
    return (c_char * len(content)).from_buffer_copy(content)


C_SYSCALL = c_function("syscall")


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
    """The form for C of one argument of a system call."""
    if isinstance(value, int):  # most are
        return c_long(value)
    if isinstance(value, Place):
        return c_char_p(b"/proc/self/fd/%d" % value.fd)
    if isinstance(value, str):
        return os.fsencode(value)
    if isinstance(value, list):  # argv and envp end in a null pointer
        strings = [os.fsencode(item) for item in value]
        return (c_char_p * (len(strings) + 1))(*strings)
    return byref(value) if isinstance(value, Structure) else value


def kernel(name, args):
    """What syscall(2) returns, or OSError.  Tests put their own function here."""
    result = C_SYSCALL(c_long(CALLS[name][0]), *map(c_argument, args))
    if result < 0:
        code = get_errno()
        raise OSError(code, os.strerror(code))
    return result


def to_json(value):
    """A document as JSON in ASCII, without blanks, as Go's; `import json` would cost
    every start 4 ms."""
    if isinstance(value, dict):
        pairs = [f"{quote_ascii(key)}:{to_json(item)}" for key, item in value.items()]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(to_json, value)) + "]"
    if isinstance(value, str):
        return quote_ascii(value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


class json_words:
    """What json.loads takes for granted."""

    strict, memo, parse_float, parse_int = True, {}, float, int
    object_hook = object_pairs_hook = parse_constant = None


def from_json(text):
    """The document that JSON text means, without `import json` where all is well."""
    text = text.decode() if isinstance(text, bytes) else text
    try:
        document, end = make_scanner(json_words)(text, 0)
        if not text[end:].strip():
            return document
    except (StopIteration, SystemError, TypeError, ValueError):
        pass
    import json

    return json.loads(text)  # or its words for what is wrong


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
    if isinstance(value, Array) and not isinstance(value[:], bytes):
        return spell_one(value[:], "")
    return str(value) if isinstance(value, (int, Structure)) else "…"


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


class about:
    """A context whose errors also say what the request was about, in words.

    The door knows what was asked of the kernel; for what the person had asked it takes
    one who has read the options.
    """

    def __init__(self, words):
        self.words = words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, OSError):
            error.about = f"{self.words}: "


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


def lines_of(path, why=""):
    """The lines of one of the kernel's files.

    subtle: a name in one may have in it what Python's own splitlines() and split() take
    for the end of a line or for a blank; so rows are split at " ", too."""
    return [line for line in read_file(path, why=why).split("\n") if line]


def sync(path):
    """Return when the disk has a file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save(path, document, lasting=False, room=0):
    """Replace a JSON file, so that a reader sees the old one or the new one (P3); what
    is `lasting` survives a power cut.  There is `room` for so many bytes more."""
    text = to_json(document) + " " * room
    if write_file(f"{path}.new", text, create=0o600) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if lasting:
        sync(f"{path}.new")
    os.rename(f"{path}.new", path)
    if lasting:
        sync(os.path.dirname(path))


def start_narration(words):
    """Begin to narrate in the style `words`, on a copy of standard error that no
    container can inherit or replace."""
    narration.style = words
    narration.fd = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 100)
    narration.colour = os.isatty(2) and not os.environ.get("NO_COLOR")
    narration.aside = "# " if words == "sh" else ""


class Options:
    """What the command line says: an attribute for each option and operand."""

    like, notes = None, {}  # what the image of a `run` adds: process, annotations


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


def fields_of(text):
    """What stands between commas; what has one in it stands in quotes, as in CSV."""
    if '"' not in text:
        return text.split(",")
    import csv

    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise Fail(f"{text!r}: {error}", """as in 'type=bind,"source=/a,b",target=/c'"""
                   ) from None


SPANS = {"ns": 1, "us": 1000, "µs": 1000, "ms": 10 ** 6, "s": 10 ** 9,
         "m": 60 * 10 ** 9, "h": 3600 * 10 ** 9}


def nanoseconds(option, text, code=125):
    """A span of time as Go writes it, 1m30s, in nanoseconds."""
    import re

    parts = re.findall(r"([\d.]+)(ns|us|µs|ms|s|m|h)", text)
    try:
        if text == "0" or parts and "".join(map("".join, parts)) == text:
            return sum(round(float(count) * SPANS[unit]) for count, unit in parts)
    except ValueError:
        pass
    raise Fail(f"invalid date or duration {text!r} for {option}",
               "as in 2026-01-31T12:00:00Z, 1m30s or 500ms", code)


def timestamp(moment):
    """A Unix time in nanoseconds as RFC 3339 has it, in UTC."""
    seconds, rest = divmod(moment, 10 ** 9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09}Z"


def rfc3339(moment=None):
    """The same, or now, as Go writes it: without zeros at its end."""
    text = timestamp(time.time_ns() if moment is None else moment)
    return text[:-1].rstrip("0").rstrip(".") + "Z"


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

NOT_YET = "no program yet"  # init's name behind a seccomp filter, until execve
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
        self.record = ""  # chapter 7: the directory of its record
        self.fifos = []  # and two FIFOs there, between create and start
        self.preserved = 0  # descriptors from 3 on that the program gets, too
        self.is_new = True  # False for what `exec` runs in a running one
        self.target = None  # then: the pidfd of the running one's process 1
        self.cgroup = None  # its Cgroup
        self.pid, self.pidfd = 0, -1  # process 1, or the program that `exec` runs
        self.status = None  # what waitpid said of it
        self.users = -1  # its user namespace, for the parent's id-mapped mounts
        self.sources = {}  # path inside: descriptor of the mount that goes there
        self.proc = -1  # the host's /proc, where a security label is written
        self.lock = -1  # keeps `system prune` away while we live
        self.home = []  # where the parent was before: (namespace, flag), (".", 0)
        self.root_fd = -1  # in init: the container's root, for openat2
        self.inner = []  # init's ends of the pipes that become its 0, 1 and 2
        self.outer = {}  # the parent's: "stdin", "stdout", "stderr", or "console"
        self.guard = 0  # a process of the parent's, see set_guard
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
        if self.ended_unheard():
            raise Fail("the program was not executed, and the seccomp profile lets "
                       "nobody say why",
                       "it has to allow at least execve, write and exit_group", 126)

    def ended_unheard(self):
        """Whether init has given up behind a seccomp filter that let it not say so.

        subtle: execve closes the pipe a moment before it changes the name, which the
        dead keep.
        """
        if not self.pid or self.wants_reaper or not self.spec["linux"].get("seccomp"):
            return False
        dead = None
        while read_file(f"/proc/{self.pid}/comm") == f"{NOT_YET}\n":
            if dead:
                return True
            dead = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return False

    def wait(self):
        """Reap the process; its exit code, with 128 + n for signal n."""
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else 128 - code

    def close(self):
        """Give back every descriptor."""
        held = [self.pidfd, self.users, self.proc, *self.sources.values(),
                *self.inner, *self.outer.values(), *self.news, *self.orders,
                *self.fifos]
        self.pidfd = self.users = self.proc = -1
        self.sources, self.outer, self.inner, self.fifos = {}, {}, [], []
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
    pidfd_send_signal=(424, 424, "pidfd SIG info flags"),
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
CLOCKS = "monotonic", "boottime"  # that a time namespace can shift

NAMESPACE_OPTIONS = (
    arg("--userns", choices=["host"], help="host: root inside is root outside"),
    arg("--pid", choices=["host"], help="host: see and signal the host's processes"),
    arg("--network", "--net", metavar="NAME", default="", once="start it, and then "
        "`network connect` it to the others",
        help="one of `network ls`; none: a loopback interface only; host: the host's; "
             "container:NAME: that one's"),
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


class rootless:
    """What is known of an ordinary user who runs us; nothing of this is for root."""

    uid = 0  # his id on the host; 0: we are root of the host
    fd = -1  # the file `users` of his store, locked for as long as we live
    maps = {}  # "uid", "gid": the rows of the engine's map, the inner side twice
    group = ""  # the control group, of version 2, that is his to divide; "": none


def namespace_flags(spec):
    """The CLONE_NEW… flags of the namespaces that the container does not share with
    the host."""
    flags = 0
    for namespace in spec["linux"]["namespaces"]:
        flags |= NAMESPACES[namespace["type"]][0]
    return flags


def joined(spec):
    """{flag: path} of those that are there already, as the file at a path."""
    return {NAMESPACES[namespace["type"]][0]: namespace["path"]
            for namespace in spec["linux"]["namespaces"] if namespace.get("path")}


def new_namespaces(spec):
    """The flags of those that are made for it."""
    return namespace_flags(spec) & ~sum(joined(spec))


def birth_flags(spec):
    """What init is cloned with: not what it unshares later, which is everything if it
    has to be in somebody's user namespace first, to own it."""
    if CLONE_NEWUSER in joined(spec):
        return 0
    later = LATER | (CLONE_NEWTIME if spec["linux"].get("timeOffsets") else 0)
    return new_namespaces(spec) & ~later


class clone_args(Structure):
    """struct clone_args of <linux/sched.h>, 88 bytes."""

    _fields_ = [(name, c_uint64) for name in (
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
    pidfd = c_int(-1)
    before, in_child, in_parent = map(c_function, (
        "PyOS_BeforeFork", "PyOS_AfterFork_Child", "PyOS_AfterFork_Parent"))
    args = clone_args(flags=flags | CLONE_PIDFD, exit_signal=signal.SIGCHLD,
                      pidfd=addressof(pidfd))
    if flags & CLONE_PARENT:  # then the parent's signal counts, and pidfd is unused
        args.flags, args.exit_signal = flags, 0
    if cgroup_fd >= 0:
        args.flags, args.cgroup = args.flags | CLONE_INTO_CGROUP, cgroup_fd
    before()
    pid = -1
    try:
        pid = syscall("clone3", args, sizeof(args), why=why)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        old = args.flags & 0xFFFFFF00 | args.exit_signal  # without _NEWTIME, _INTO_
        pid = syscall("clone", old, None, byref(pidfd), None, None,
                      why="clone3 is refused here: no time namespace, then")
        if pid and cgroup_fd >= 0:
            write_file(f"/proc/self/fd/{cgroup_fd}/cgroup.procs", str(pid))
    finally:
        (in_parent if pid else in_child)()
    return pid, pidfd.value


def write_maps(pid, uids, gids):
    """Give the new user namespace of a process its ids; a descriptor of it.

    The kernel takes each file once, and maps that are not the writer's own only from
    a writer with CAP_SETUID over the parent namespace: the host's root.
    """
    for file, rows in (("uid_map", uids), ("gid_map", gids)):
        lines = [f"{m['containerID']} {m['hostID']} {m['size']}" for m in rows]
        write_file(f"/proc/{pid}/{file}", "\n".join(lines),
                   why="root inside is this id outside, who owns nothing there")
    return open_fd(f"/proc/{pid}/ns/user", os.O_RDONLY, "for id-mapped mounts")


def map_ids(c):
    """Outside: give a new user namespace its ids, before anything is done in it."""
    if new_namespaces(c.spec) & CLONE_NEWUSER:
        linux = c.spec["linux"]
        c.users = write_maps(c.pid, linux["uidMappings"], linux["gidMappings"])
        if rootless.uid:  # the ids are those of the engine, and there is nothing to map
            os.close(c.users)
            c.users = -1


def user_namespace(uids, gids):
    """A descriptor of a user namespace with these maps, and nobody in it."""
    stays, goes = os.pipe()
    pid, pidfd = clone3(CLONE_NEWUSER, why="somebody has to be in it, for a moment")
    if pid == 0:
        os.close(goes)
        os.read(stays, 1)
        os._exit(0)
    try:
        return write_maps(pid, uids, gids)
    finally:
        for fd in (stays, goes, pidfd):
            os.close(fd)
        os.waitpid(pid, 0)


def visit_namespaces(c):
    """Outside: into the namespaces that the spec names by path, for init to be born
    in; the way back is kept for leave_workshop."""
    for flag, path in joined(c.spec).items():
        try:
            fd = open_fd(path, os.O_RDONLY, "a namespace that is there already")
            if flag == CLONE_NEWUSER:  # one that only init goes to, see join_users
                c.users = fd
                continue
            name = next(file for bit, file, _ in NAMESPACES.values() if bit == flag)
            c.home.append((open_fd(f"/proc/self/ns/{name}", os.O_RDONLY), flag))
            syscall("setns", fd, flag, why=f"init is to be in {path}")
            os.close(fd)
        except OSError as error:
            raise Fail(f"linux.namespaces: {path}: {error.strerror}",
                       "is it such a namespace, as in /proc/PID/ns?") from None


def be_born_again(c):
    """To be in a pid namespace takes being born there, hence a second fork; with
    CLONE_PARENT the newborn is the waiting parent's child, and we are done."""
    pid, _ = clone3(CLONE_PARENT, why="born in the container's pid namespace")
    if pid:
        c.tell_parent(ask="follow", pid=pid)
        os._exit(0)
    c.await_parent()


def join_users(c):
    """Step: into a user namespace that is there already; all that is new shall be
    owned by it, and is therefore made now."""
    if CLONE_NEWUSER in joined(c.spec):
        syscall("setns", c.users, CLONE_NEWUSER, why="somebody's user namespace")
        syscall("unshare", new_namespaces(c.spec) & ~LATER, why="owned by that one")
        be_born_again(c)


@answers("clocks")
def set_offsets(c):
    """Outside: by how much the clocks of init's next time namespace are off."""
    lines = [f"{clock} {offset.get('secs') or 0} {offset.get('nanosecs') or 0}"
             for clock, offset in c.spec["linux"]["timeOffsets"].items()]
    write_file(f"/proc/{c.pid}/timens_offsets", "\n".join(lines),
               why="taken only while nobody is in it")


def shift_clocks(c):
    """Step: a time namespace whose clocks are off by what the spec says.

    The kernel makes such a namespace for the children of the one who asks, so that
    its clocks can be set before it has anybody in it; then we go there ourselves.
    """
    if c.spec["linux"].get("timeOffsets"):
        syscall("unshare", CLONE_NEWTIME, why="for our children; we are still outside")
        c.ask_parent("clocks")
        fd = open_fd("/proc/self/ns/time_for_children", os.O_RDONLY)
        syscall("setns", fd, CLONE_NEWTIME, why="now its clocks are ours")
        os.close(fd)


def goes_in_late(c):
    """Whether `exec` is born in the pid namespace only when it is in all the others.

    An ordinary user's engine has no way back from there.  And where root inside is
    root outside, who has CAP_SYS_PTRACE opens whoever is seen, hidden or not: through
    one that is not yet in the other namespaces it would reach the host."""
    return rootless.uid or not namespace_flags(c.spec) & CLONE_NEWUSER


def join_namespaces(c):
    """Step of `exec`: into a running container's namespaces, at once; mostly it has
    been born in that of process numbers."""
    flags = namespace_flags(c.spec) | CLONE_NEWNS
    late = flags & CLONE_NEWPID and goes_in_late(c)
    syscall("setns", c.target, flags if late else flags & ~CLONE_NEWPID,
            why="all namespaces of its process 1")
    if late:
        be_born_again(c)
    c.root_fd = open_fd("/", O_PATH | O_DIRECTORY, "the container's root")


@answers("follow")
def follow(c, pid):
    """Outside: from now on wait for the process that was born inside."""
    os.waitpid(c.pid, 0)
    os.close(c.pidfd)
    c.pid, c.pidfd = pid, syscall("pidfd_open", pid, 0, why="the program, for us")


def signal_by(pidfd, number, why):
    """Send a signal by a pidfd, to who may have ended."""
    try:
        syscall("pidfd_send_signal", pidfd, number, None, 0, why=why)
    except ProcessLookupError:
        pass


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
    if not new_namespaces(c.spec) & CLONE_NEWNET:
        return
    fd = syscall("socket", AF_INET, SOCK_DGRAM, 0, why="any socket will do for ioctl")
    ifreq = c_buffer(struct.pack("16sh", b"lo", IFF_UP), 40)
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
            for row in lines_of(f"/proc/{pid}/{file}"):
                inside, outside, count = map(int, row.split())
                lines.append(f"{title}: {inside}-{inside + count - 1} inside is "
                             f"{outside}-{outside + count - 1} outside")
        for row in lines_of(f"/proc/{pid}/status"):
            if row.startswith("NSpid:"):
                lines.append("pid, from the host's namespace to the innermost: "
                             + " → ".join(row.split()[1:]))
    except PermissionError as error:
        raise Fail(f"{error.filename}: {error.strerror}",
                   "only root may look at another user's process", 1) from None
    print("\n".join(lines))


# ── without root ──
#
# Whoever is not root of the host can be root of a user namespace of his own: the kernel
# lets anybody make one.  So for an ordinary user the whole engine first goes there, and
# into a mount namespace that belongs to it, and from then on takes the same steps as
# root does, with what that root may:
#
#       the host       user 1000 "ann"      100000 … 165535, hers by /etc/subuid
#       the engine       0                       1 … 65536
#       a container      0                       1 … 65536
#
# Anybody may map one id, his own.  To have more, which files of an image belong to, and
# services run as, takes newuidmap and newgidmap: setuid programs of the host's (package
# uidmap) that map what root has granted.  Without them root is the only user inside.
#
# Each container has a user namespace of its own below that one, so that its root has no
# power over what the engine owns; with the same ids, as only the host's root may mount
# a file system of the host with ids that are mapped, and a volume shall belong to who
# is root inside.  So that root may do to the host what its user may, and nothing more.
#
# Only who is in the engine's namespace, or owns it, may signal a container, join it,
# and remove files of its other ids.  It is there while somebody is in it, such as a
# shim, and a later command has to come to the same one.  The file `users` of the store
# shows where that is: all who are inside have a lock on it, and the kernel tells who.
#
#       as for root                        not, or not as for root
#       run create start exec stop rm …    networks of bridges, --explain=sh, minirunc
#       images, registries, build          limits, pause, stats, --pid host: only with a
#       volumes, -v, --privileged              control group of his own to divide
#       --network none, host               --network container:NAME; -p: only with pasta
#       --network pasta, slirp4netns       --device: with the rights that the node gives
#                                              him; nodes that an image brings: left out
#
# His own control group is one of version 2 that he may write to and that has no process
# in it, at or above ours: `systemd-run --user --scope` starts a command in such one.
#
# Trap: what root's engine hides from who is inside, the memory and descriptors of one
# who is on his way in, the kernel would hide from this engine as well (hide_memory).
#
# Man pages: user_namespaces(7), newuidmap(1), subuid(5), fcntl(2) on F_GETLK.


def on_path(name):
    """Where a program of the host's is; "" if it is not installed."""
    paths = [f"{top}/{name}" for top in (*os.get_exec_path(), "/usr/sbin", "/sbin")]
    return next((path for path in paths if os.access(path, os.X_OK)), "")


def granted(file, uid):
    """[first, count] of each range that /etc/subuid or subgid grants to a user."""
    try:
        import pwd

        names = {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:  # a user without a name
        names = {str(uid)}
    rows = read_file(file).splitlines() if os.path.exists(file) else []
    cells = [row.split(":") for row in rows]
    return [list(map(int, numbers)) for name, *numbers in cells if name in names
            and len(numbers) == 2 and all(map(str.isdecimal, numbers))]


def map_from_outside(pid, uid, gid, grants):
    """In a process outside: have newuidmap and newgidmap write both maps of `pid`; its
    exit code."""
    for kind, own in (("uid", uid), ("gid", gid)):
        words, inner = [on_path(f"new{kind}map"), str(pid), "0", str(own), "1"], 1
        for first, count in grants[kind]:
            words += [str(inner), str(first), str(count)]
            inner += count
        if code := os.spawnv(os.P_WAIT, words[0], words):
            return code
    return 0


def make_users():
    """Go to a new user namespace, as its root, with all ids that may be had."""
    pid, uid, gid = os.getpid(), os.getuid(), os.getgid()
    grants = {kind: granted(f"/etc/sub{kind}", uid) for kind in ("uid", "gid")}
    many = all(grants.values()) and on_path("newuidmap") and on_path("newgidmap")
    stays, goes = os.pipe()
    helper = os.fork() if many else 0
    if many and not helper:
        os.close(goes)
        os._exit(os.read(stays, 1) != b"!" or map_from_outside(pid, uid, gid, grants))
    syscall("unshare", CLONE_NEWUSER | CLONE_NEWNS, why="root in here, nowhere else")
    if many:
        os.write(goes, b"!")
        if os.waitpid(helper, 0)[1]:
            raise Fail("newuidmap or newgidmap has refused the ids that /etc/subuid "
                       "and /etc/subgid grant", "what it says is above; are they "
                       "setuid, and the ranges nobody else's?")
    else:
        write_file("/proc/self/setgroups", "deny", why="the price of the next line: "
                   "who is kept out by a group may not leave it")
        for kind, own in (("uid", uid), ("gid", gid)):
            write_file(f"/proc/self/{kind}_map", f"0 {own} 1", why="the one id that "
                       "anybody may map is his own")
    os.close(stays)
    os.close(goes)


def visit_users(fd):
    """Go to the user namespace that a process of ours is in, and be root there; the
    mounts are our own."""
    syscall("setns", fd, CLONE_NEWUSER, why="who has made it may come in")
    os.close(fd)
    syscall("unshare", CLONE_NEWNS, why="mounts that root in here may change")


def look_at_maps():
    """Take note of the ids that there are in the engine's user namespace."""
    for kind in ("uid", "gid"):
        rows = [row.split() for row in lines_of(f"/proc/self/{kind}_map")]
        rootless.maps[kind] = [{"containerID": int(row[0]), "hostID": int(row[0]),
                                "size": int(row[2])} for row in rows]


def has_one_id():
    """Whether root is the only user that there can be inside."""
    return rootless.uid and min(sum(row["size"] for row in rows)
                                for rows in rootless.maps.values()) == 1


def say_one_id():
    """Tell, once, what an ordinary user's containers lack."""
    if has_one_id():
        say("only one id is yours, so root is the only user inside: files of others "
            "are root's, and -u, su and services with users of their own fail\n"
            "  hint: the package uidmap, and as root: usermod "
            "--add-subuids 100000-165535 --add-subgids 100000-165535 USER")


def born(pid):
    """When a process began, in clock ticks; 0: there is none.  With its number, it is
    nobody else."""
    try:
        return int(read_file(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


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
# Control of devices is for those who come with a spec of their own (chapter 7).  Ours
# do not need it, because every file system of a container is mounted nodev (chapter
# 4), so that a device node in it is inert, and what --device gives for reading only
# cannot be opened for more.  Version 1 has a file for it; in version 2 the group gets
# a small eBPF program, which the kernel asks at each open and mknod.
#
# Man pages: cgroups(7); the kernel's Documentation/admin-guide/cgroup-v2.rst.

CGROUP_ROOT = "/sys/fs/cgroup"
IMPLIED = "minicontainer.implied"  # annotation: the limits that nobody asked for
OF_HIS_OWN = ("with control groups of version 2, `systemd-run --user --scope …` is "
              "where you have one; or leave it out, or sudo")

V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "blkio", "pids", "freezer",
                  "devices")
SELDOM = {"hugepageLimits": ("hugetlb",), "network": ("net_cls", "net_prio")}


def cgroup_trees(resources=()):
    """{controller: mount point} of version 1, or {} where there is only version 2; the
    seldom used ones only if the spec's resources need them."""
    if os.path.exists(f"{CGROUP_ROOT}/cgroup.controllers"):
        return {}
    trees, wanted = {}, set(V1_CONTROLLERS).union(
        *(names for key, names in SELDOM.items() if key in resources))
    for line in lines_of("/proc/self/mountinfo", why="where the v1 trees are"):
        left, _, right = line.partition(" - ")
        kind, _, super_options = right.split(" ", 2)
        if kind == "cgroup":
            for controller in super_options.split(","):
                if controller in wanted:
                    trees[controller] = left.split()[4]
    return trees


THROTTLES = [(way, unit, f"throttle{way.title()}{word}Device")
             for way in ("read", "write")
             for unit, word in (("bps", "Bps"), ("iops", "IOPS"))]

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
    if not path:
        raise Fail(f"{option}: bad format: {text}", "DEVICE:RATE, as in /dev/sda:1mb")
    try:
        status = os.stat(path)
    except OSError as error:
        raise Fail(f"{option} {text}: {error.strerror}: {path!r}",
                   "DEVICE:RATE, as in /dev/sda:1mb") from None
    if not stat.S_ISBLK(status.st_mode):
        raise Fail(f"{option} {text}: {path} is not a block device", "see `lsblk`")
    return {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev),
            "rate": size(rate) if option.endswith("bps") else whole(option, rate, 0)}


def resources_spec(o):
    """linux.resources of the spec, as the options ask; sizes in bytes."""
    memory, cpu, pids, block = {}, {}, {}, {}
    for what, text in (("limit", o.memory), ("reservation", o.memory_reservation)):
        if text and 0 < size(text) < 6 << 20:
            raise Fail(f"Minimum memory {what} allowed is 6MB, and not {text}",
                       "a program and its files in memory take as much")
    if o.memory and size(o.memory):
        memory["limit"] = size(o.memory)
        memory["swap"] = 2 * memory["limit"]  # Docker's: as much swap as memory
    if (o.memory_swap or "0") != "0":  # as to Docker, 0 is as if it were not there
        memory["swap"] = -1 if o.memory_swap == "-1" else size(o.memory_swap)
        if -1 < memory["swap"] and "limit" not in memory:
            raise Fail("--memory-swap without --memory", "set --memory as well")
        if -1 < memory["swap"] < memory["limit"]:
            raise Fail("--memory-swap is less than --memory",
                       "it counts memory and swap together")
    if o.memory_reservation:
        memory["reservation"] = size(o.memory_reservation)
        if memory["reservation"] > memory.get("limit", memory["reservation"]):
            raise Fail("--memory-reservation is more than --memory", "make it less")
    if o.cpus:
        try:
            cpus = float(o.cpus)
        except ValueError:
            raise Fail(f"invalid argument {o.cpus!r} for --cpus",
                       "a number of processors, as 1.5") from None
        there = os.cpu_count()
        if cpus and not 0.01 <= cpus <= there:
            raise Fail(f"Range of CPUs is from 0.01 to {there}.00, as there are only "
                       f"{there} CPUs available: not {o.cpus}", "0 is no limit")
        if cpus:
            cpu.update(quota=round(cpus * 100_000), period=100_000)
    if o.cpu_shares and o.cpu_shares != "0":
        cpu["shares"] = whole("--cpu-shares", o.cpu_shares, 2, 262144)
    for key, value in (("cpus", o.cpuset_cpus), ("mems", o.cpuset_mems)):
        if value:
            cpu[key] = value
    if o.pids_limit and o.pids_limit not in ("-1", "0"):
        pids["limit"] = whole("--pids-limit", o.pids_limit, 1)
    if o.blkio_weight and o.blkio_weight != "0":
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
    quota = spec["cpu"].get("quota", -1)
    return f"{quota if quota > 0 else 'max'} {spec['cpu'].get('period', 100_000)}"


def at_most(section, key):
    """A function of the spec: its number, or "max" where that is below 0."""
    return lambda spec: "max" if spec[section][key] < 0 else spec[section][key]


def rules(key, word=""):
    """A function of the spec: its list of throttles, one line for each device."""
    return lambda spec: [f"{d['major']}:{d['minor']} {word}{d['rate']}"
                         for d in spec["blockIO"][key]]


def weights(spec):
    """The weight of each block device that has one of its own."""
    return [f"{d['major']}:{d['minor']} {d['weight']}"
            for d in spec["blockIO"]["weightDevice"]]


def interface_priorities(spec):
    """The priority of what is sent, for each interface."""
    return [f"{p['name']} {p['priority']}" for p in spec["network"]["priorities"]]


# What the spec says, and the file of which controller says so to the kernel: in
# version 2, then in version 1.  A value is the spec's own, or a function of the spec;
# of several files the first that is there is taken.  Order matters once: in version 1
# memory+swap may not be below memory, so memory is first.
LIMITS = (
    # in the spec           controller   files of v2, files of v1: {name: value}
    ("memory limit", "memory", {"memory.max": at_most("memory", "limit")},
     {"memory.limit_in_bytes": None}),
    ("memory swap", "memory", {"memory.swap.max": swap_only},
     {"memory.memsw.limit_in_bytes": None}),
    ("memory reservation", "memory", {"memory.low": at_most("memory", "reservation")},
     {"memory.soft_limit_in_bytes": None}),
    ("memory swappiness", "memory", {}, {"memory.swappiness": None}),
    ("memory kernelTCP", "memory", {}, {"memory.kmem.tcp.limit_in_bytes": None}),
    ("memory disableOOMKiller", "memory", {}, {"memory.oom_control": lambda spec: "1"}),
    ("cpu shares", "cpu", {"cpu.weight": cpu_weight}, {"cpu.shares": None}),
    ("cpu period", "cpu", {"cpu.max": bandwidth}, {"cpu.cfs_period_us": None}),
    ("cpu quota", "cpu", {"cpu.max": bandwidth}, {"cpu.cfs_quota_us": None}),
    ("cpu cpus", "cpuset", {"cpuset.cpus": None}, {"cpuset.cpus": None}),
    ("cpu mems", "cpuset", {"cpuset.mems": None}, {"cpuset.mems": None}),
    ("cpu burst", "cpu", {"cpu.max.burst": None}, {"cpu.cfs_burst_us": None}),
    ("cpu idle", "cpu", {"cpu.idle": None}, {"cpu.idle": None}),
    ("cpu realtimePeriod", "cpu", {}, {"cpu.rt_period_us": None}),
    ("cpu realtimeRuntime", "cpu", {}, {"cpu.rt_runtime_us": None}),
    ("pids limit", "pids", {"pids.max": at_most("pids", "limit")},
     {"pids.max": at_most("pids", "limit")}),
    ("blockIO weight", "blkio", {"io.bfq.weight": None, "io.weight": io_weight},
     {"blkio.bfq.weight": None, "blkio.weight": None}),
    ("blockIO weightDevice", "blkio", {"io.bfq.weight": weights},
     {"blkio.bfq.weight_device": weights, "blkio.weight_device": weights}),
    ("network classID", "net_cls", {}, {"net_cls.classid": None}),
    ("network priorities", "net_prio", {},
     {"net_prio.ifpriomap": interface_priorities}),
    *((f"blockIO {key}", "blkio", {"io.max": rules(key, f"{way[0]}{unit}=")},
       {f"blkio.throttle.{way}_{unit}_device": rules(key)})
      for way, unit, key in THROTTLES),
)


def named_limits(resources):
    """Rows like those above, for what the spec itself names: sizes of huge pages, and
    files of version 2."""
    for page in resources.get("hugepageLimits", ()):
        for kind in ("", "rsvd."):  # taken, and reserved to be
            yield (f"hugepageLimits {page}", "hugetlb",
                   {f"hugetlb.{page}.{kind}max": None},
                   {f"hugetlb.{page}.{kind}limit_in_bytes": None})
    for file in resources.get("unified", ()):
        yield f"unified {file}", file.partition(".")[0], {file: None}, {}


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


DEVICE_KINDS = {"a": None, "b": 1, "c": 2}  # BPF_DEVCG_DEV_…, bpf(2)
ACCESSES = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_…


def device_rule(rule):
    """(allow, kind, (major, minor), access) of a rule of resources.devices; a number
    that is None or -1 stands for all."""
    numbers = [rule.get(key) for key in ("major", "minor")]
    return (rule.get("allow", False), rule.get("type") or "a",
            tuple(None if n in (None, -1) else n for n in numbers),
            rule.get("access") or "rwm")


def bpf_jump(condition, register, value, distance):
    """One eBPF instruction: skip `distance` if a register is ("=") or is not ("!") the
    value."""
    code = {"=": 0x15, "!": 0x55}[condition]
    return struct.pack("=BBhi", code, register, distance, value)


def device_filter(rules_):
    """An eBPF program that answers 1 if the last rule that fits a device allows it.

    It is given, in r1, a word with kind and access, the major and the minor number.
    """
    def move(code, registers, value=0, offset=0):
        return struct.pack("=BBhi", code, registers, offset, value)

    program = [move(0x61, 0x12, 0, 0), move(0xBF, 0x23), move(0x57, 2, 0xFFFF),
               move(0x77, 3, 16),  # r2: kind, r3: access
               move(0x61, 0x14, 0, 4), move(0x61, 0x15, 0, 8)]  # r4: major, r5: minor
    for allow, kind, numbers, access in map(device_rule, reversed(rules_)):
        block = [move(0xB7, 0, int(allow)), move(0x95, 0)]  # r0 = the answer; exit
        for register, number in ((5, numbers[1]), (4, numbers[0]),
                                 (2, DEVICE_KINDS[kind])):
            if number is not None:
                block.insert(0, bpf_jump("!", register, number, len(block)))
        bits = sum(ACCESSES[letter] for letter in set(access))
        if bits != 7:  # to allow takes that nothing else is asked, to deny any of it
            tested = 7 & ~bits if allow else bits
            block = [move(0xBF, 0x31), move(0x57, 1, tested),
                     bpf_jump("!" if allow else "=", 1, 0, len(block)), *block]
        program += block
        if len(block) == 2:  # it fits all: the kernel takes nothing unreachable
            return b"".join(program)
    return b"".join([*program, move(0xB7, 0, 0), move(0x95, 0)])


def attach_device_filter(directory, rules_):
    """Load the filter for a group of version 2, in place of the one it may have."""
    BPF_PROG_LOAD, BPF_PROG_ATTACH, PROG_TYPE, ATTACH_TYPE = 5, 8, 15, 6
    program, licence = device_filter(rules_), c_buffer(b"MIT", 4)
    buffer = c_buffer(program)
    load = c_buffer(struct.pack(
        "=IIQQ", PROG_TYPE, len(program) // 8, addressof(buffer),
        addressof(licence)), 128)
    try:
        fd = syscall("bpf", BPF_PROG_LOAD, load, 128, why="which devices work in it")
        group = open_fd(directory, os.O_RDONLY)
        attach_ = c_buffer(
            struct.pack("=IIII", group, fd, ATTACH_TYPE, 0), 128)
        syscall("bpf", BPF_PROG_ATTACH, attach_, 128, why="and in all groups below")
    except OSError as error:
        raise Fail(f"the kernel takes no filter of devices: {error.strerror}",
                   "resources.devices needs CONFIG_CGROUP_BPF and CAP_BPF") from None
    os.close(fd)
    os.close(group)


MEASURED = ("cpu_usec", "cpu_throttled_usec", "memory", "memory_peak", "memory_limit",
            "pids", "pids_limit", "io_read", "io_written", "oom_kills")


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
        return f"{root}/{self.path}" if root and self.path else None

    def directories(self):
        """All directories that make up the group: one, or one for each v1 tree; none
        for an ordinary user who has no group to make it in."""
        if not self.path:
            return []
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
        for directory in self.directories():
            depth = self.path.count("/") + 1
            for above in reversed(range(depth)):
                path = directory.rsplit("/", above)[0] if above else directory
                if not self.trees:
                    self.enable_controllers(os.path.dirname(path))
                if not os.path.isdir(path):
                    syscall("mkdirat", AT_FDCWD, path, 0o755, why="a new control group")
                    self.fill_cpuset(path)
        self.set_limits(resources, implied)

    def set_limits(self, resources, implied=()):
        """Set all limits that the spec's resources name, and which devices work."""
        for row in (*LIMITS, *named_limits(resources)):
            section, key = row[0].split()
            if key in resources.get(section, {}):
                self.limit(row, resources, implied)
        if resources.get("devices"):
            self.limit_devices(resources["devices"])

    def fill_cpuset(self, path):
        """A version 1 cpuset starts empty, and refuses processes while it is."""
        if path.startswith(f"{self.trees.get('cpuset')}/"):
            for file in ("cpuset.cpus", "cpuset.mems"):
                write_file(f"{path}/{file}",
                           read_file(f"{os.path.dirname(path)}/{file}"),
                           why="a v1 cpuset starts empty")

    def enable_controllers(self, directory):
        """Have a group of the version 2 tree pass its controllers down, for good; one
        that it cannot is missed when a limit asks for it."""
        have = read_file(f"{directory}/cgroup.controllers").split()
        on = read_file(f"{directory}/cgroup.subtree_control").split()
        if not os.access(f"{directory}/cgroup.subtree_control", os.W_OK):
            return  # an ordinary user's groups begin below it
        for name in ("memory", "cpu", "cpuset", "io", "pids", "hugetlb"):
            if name in have and name not in on:
                try:
                    write_file(f"{directory}/cgroup.subtree_control", f"+{name}",
                               why="let the groups below use this controller")
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT,
                                           errno.EBUSY):
                        raise
                    say(f"the {name} controller cannot be enabled in {directory}")

    def limit_devices(self, rules_):
        """Which devices work in the group: the last rule that fits one counts."""
        if not self.trees:
            attach_device_filter(self.directory(), rules_)
            return
        if "devices" not in self.trees:
            raise Fail("this host has no devices controller for resources.devices",
                       "mount it, or use cgroup version 2")
        for rule in rules_:
            allow, kind, numbers, access = device_rule(rule)
            text = f"{kind} {numbers[0]}:{numbers[1]} {access}".replace("None", "*")
            file = "allow" if allow else "deny"
            write_file(f"{self.directory('devices')}/devices.{file}",
                       "a" if (kind, access) == ("a", "rwm") else text,
                       why="which devices work, whatever nodes there are")

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
            if rootless.uid:
                raise Fail(f"{section}.{key}: the {controller} controller is not yours",
                           OF_HIS_OWN)
            files = " or ".join(forms) or (
                f"such setting in version {1 if self.trees else 2}")
            raise Fail(f"this host cannot set {section}.{key}: its {controller} "
                       f"controller has no {files}",
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
        if not self.trees and self.path:
            self.birth_fd = open_fd(self.directory(), O_PATH, "to be born in")
        for directory in self.directories() if self.trees else ():
            self.task_fds.append(open_fd(f"{directory}/tasks", O_WRONLY,
                                         "for init, who may not open it"))

    def pids(self):
        """The processes in the group and in the groups below it."""
        found = set()
        start = self.directory("freezer") or next(iter(self.directories()), "")
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
        self.must_be("freezing")
        if self.trees:
            file, want = f"{self.directory('freezer')}/freezer.state", "FROZEN"
            write_file(file, want if frozen else "THAWED", why="freeze or thaw, v1")
            wait_for(lambda: (read_file(file).strip() == want) == frozen)
        else:
            write_file(f"{self.directory()}/cgroup.freeze", str(int(frozen)),
                       why="freeze or thaw everything in the group")
            wait_for(lambda: self.table("cgroup.events")["frozen"] == int(frozen))

    def must_be(self, what):
        """Refuse, in words, what takes a control group where there is none."""
        if not self.path:
            raise Fail(f"{what} takes a control group, and none is yours", OF_HIS_OWN)

    def is_frozen(self):
        """Whether everything in the group has been stopped where it stands."""
        if self.trees:
            return self.read("freezer.state", "freezer") not in ("", "THAWED\n")
        return self.read("cgroup.freeze") == "1\n"

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
        except (OSError, KeyError):  # it is gone, and whoever removed it had it empty
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
            if not removed(directory):  # there are groups below it, or processes dying
                for top, _, _ in os.walk(directory, topdown=False):
                    wait_for(lambda top=top: removed(top))

    def measure(self):
        """What the group has used, in bytes and microseconds, and where it hit a
        limit; None where this host does not count something."""
        if not self.path:
            return {**dict.fromkeys(MEASURED), "pressure": {}}
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


calls(mkdirat=(258, 34, "dirfd path mode"), bpf=(321, 280, "command attr size"))


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


def group_of_his_own():
    """The group nearest to ours that this user may divide, and in which there is no
    process, as version 2 wants it; or ""."""
    path = next((line[3:] for line in lines_of("/proc/self/cgroup")
                 if line.startswith("0::") and not cgroup_trees()), "/")
    while path != "/":
        top = CGROUP_ROOT + path
        if all(os.access(f"{top}/{file}", os.W_OK) for file in (
                "", "cgroup.procs", "cgroup.subtree_control")) and not read_file(
                f"{top}/cgroup.procs"):
            return path
        path = os.path.dirname(path)
    return ""


def group_path(id):
    """Where a container's control group is to be; "": it can have none."""
    own = f"/minicontainer-{id}"
    return own if not rootless.uid else rootless.group and rootless.group + own


def cgroup_of(spec):
    """The control group that a spec names."""
    linux = spec["linux"]
    return Cgroup(linux["cgroupsPath"], cgroup_trees(linux.get("resources") or ()))


def make_cgroup(c):
    """Outside: the container's control group, limits and all, still empty."""
    cgroup = cgroup_of(c.spec)
    nowhere = not cgroup.path and not rootless.uid
    if nowhere or cgroup.pids():  # at the end we kill all that is in it
        raise Fail(f"the control group /{cgroup.path} has processes already",
                   "each container needs one of its own")
    c.cgroup = cgroup
    implied = c.spec.get("annotations", {}).get(IMPLIED, "").split(",")
    cgroup.create(c.spec["linux"].get("resources", {}), implied)
    c.cgroup.open_doors()


def open_cgroup(c):
    """Outside: what takes one more process into a group that is there."""
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
MS_MOVE = 8192
MS_BIND, MS_REC, MS_UNBINDABLE, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 17, 1 << 18
MS_SLAVE, MS_SHARED, MS_RELATIME, MS_STRICTATIME = 1 << 19, 1 << 20, 1 << 21, 1 << 24
MS_MANDLOCK, MS_DIRSYNC, MS_NOSYMFOLLOW, MS_SILENT = 64, 128, 256, 1 << 15
MS_POSIXACL, MS_I_VERSION, MS_LAZYTIME = 1 << 16, 1 << 23, 1 << 25
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
    chroot=(161, 51, "path"),
    chdir=(80, 49, "path"),
    fchdir=(81, 50, "fd"),
    fchownat=(260, 54, "dirfd path owner group AT_"),
    fchmodat=(268, 53, "dirfd path mode"),
)

OPTION_WORDS = {  # as mount(2) has them
    "ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS, "noatime": MS_NOATIME, "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME, "strictatime": MS_STRICTATIME, "dirsync": MS_DIRSYNC,
    "nosymfollow": MS_NOSYMFOLLOW, "lazytime": MS_LAZYTIME, "silent": MS_SILENT,
    "iversion": MS_I_VERSION, "mand": MS_MANDLOCK, "acl": MS_POSIXACL,
    "remount": MS_REMOUNT,
    "bind": MS_BIND, "rbind": MS_BIND | MS_REC,
}
CLEARING_WORDS = {"rw": MS_RDONLY, "suid": MS_NOSUID, "exec": MS_NOEXEC,
                  "dev": MS_NODEV, "async": MS_SYNCHRONOUS, "atime": MS_NOATIME,
                  "diratime": MS_NODIRATIME, "norelatime": MS_RELATIME,
                  "nostrictatime": MS_STRICTATIME, "symfollow": MS_NOSYMFOLLOW,
                  "nolazytime": MS_LAZYTIME, "loud": MS_SILENT,
                  "noiversion": MS_I_VERSION, "nomand": MS_MANDLOCK,
                  "noacl": MS_POSIXACL}
ATTRIBUTES = {  # of one mount, as mount_setattr(2) has them: (to set, to clear)
    "ro": (MOUNT_ATTR_RDONLY, 0), "rw": (0, MOUNT_ATTR_RDONLY),
    "nosuid": (MOUNT_ATTR_NOSUID, 0), "suid": (0, MOUNT_ATTR_NOSUID),
    "nodev": (MOUNT_ATTR_NODEV, 0), "dev": (0, MOUNT_ATTR_NODEV),
    "noexec": (MOUNT_ATTR_NOEXEC, 0), "exec": (0, MOUNT_ATTR_NOEXEC),
    "relatime": (0, 0x70), "norelatime": (0, 0), "atime": (0, 0x70),
    "noatime": (0x10, 0x70), "strictatime": (0x20, 0x70), "nostrictatime": (0, 0x70),
    "nodiratime": (0x80, 0), "diratime": (0, 0x80),
    "nosymfollow": (0x200000, 0), "symfollow": (0, 0x200000)}
DEEP_WORDS = {f"r{word}": meaning for word, meaning in ATTRIBUTES.items()}
NEUTRAL_WORDS = ("idmap", "ridmap", "defaults", "nocopy", "z", "Z", "consistent",
                 "cached", "delegated", "tmpcopyup")
TMPFS_WORDS = ("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "huge")
PROPAGATIONS = {
    "private": MS_PRIVATE, "rprivate": MS_REC | MS_PRIVATE,
    "slave": MS_SLAVE, "rslave": MS_REC | MS_SLAVE,
    "shared": MS_SHARED, "rshared": MS_REC | MS_SHARED,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_REC | MS_UNBINDABLE,
}
MOUNT_WORDS = {*OPTION_WORDS, *CLEARING_WORDS, *DEEP_WORDS, *NEUTRAL_WORDS,
               *PROPAGATIONS}
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


class open_how(Structure):
    """struct open_how of <linux/openat2.h>."""

    _fields_ = [(name, c_uint64) for name in ("flags", "mode", "resolve")]

    def __str__(self):
        return ("{.flags = " + spell_flags(self.flags, "O_") + ", .resolve = "
                + spell_flags(self.resolve, "RESOLVE_") + "}")


class mount_attr(Structure):
    """struct mount_attr of <linux/mount.h>."""

    _fields_ = [(name, c_uint64) for name in (
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
            "source": os.path.abspath(source), "options": [
                "rbind", "rnodev", "ridmap",  # no device works but those we bind
                *(f"r{word}" if word in ATTRIBUTES else word for word in words
                  if word not in ("dev", "rdev"))]}


def volume_mount(text):
    """The mount that Docker's -v SRC:DST[:OPTIONS] means."""
    source, _, rest = text.partition(":")
    target, _, words = rest.partition(":")
    if not source.startswith("/") or not target:
        raise Fail(f"-v {text}: not a directory of the host and a place for it",
                   "-v /SRC:/DST[:ro]")
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
    words = [word for word in words if word != "dev"]  # a node made there is inert
    return {"destination": "/" + os.path.normpath(target).lstrip("/"), "type": "tmpfs",
            "source": "tmpfs", "options": ["nosuid", "nodev", "noexec", *words]}


MOUNT_KEYS = {"bind": ("source", "bind-propagation", "bind-nonrecursive"),
              "volume": ("source", "volume-nocopy"),
              "tmpfs": ("tmpfs-size", "tmpfs-mode")}


def mount_keys(text):
    """What a --mount says: each key by its longest name, and what is yes or no as a
    bool."""
    keys = {"type": "volume"}
    names = {"src": "source", "dst": "target", "destination": "target",
             "ro": "readonly", "propagation": "bind-propagation"}
    for part in fields_of(text):
        key, _, value = part.partition("=")
        keys[names.get(key, key)] = value
    if keys["type"] not in MOUNT_KEYS:
        raise Fail(f"--mount {text}: type {keys['type']!r} is not known",
                   "type=bind, type=tmpfs or type=volume")
    known = ("type", "target", "readonly", "consistency", *MOUNT_KEYS[keys["type"]])
    unknown = set(keys) - set(known)
    if unknown:
        raise Fail(f"--mount {text}: unknown key {min(unknown)!r}", ", ".join(known))
    meanings = {"": True, "true": True, "1": True, "false": False, "0": False}
    for key in ("readonly", "volume-nocopy", "bind-nonrecursive"):
        value = keys.get(key, "false")
        if value.lower() not in meanings:
            raise Fail(f"--mount {text}: invalid value for {key}: {value}",
                       "true or false")
        keys[key] = meanings[value.lower()]
    return keys


def long_mount(text):
    """The mount that Docker's --mount key=value,… means."""
    keys = mount_keys(text)
    kind, target = keys["type"], keys.get("target", "")
    words = ["ro"] if keys["readonly"] else []
    if kind == "tmpfs":
        if "tmpfs-size" in keys:
            words.append(f"size={size(keys['tmpfs-size'])}")
        words.append(f"mode={keys.get('tmpfs-mode', '1777')}")
        return tmpfs_mount(f"--mount {text}", target, ",".join(words))
    if kind != "bind":
        raise Fail(f"--mount {text}: type {kind!r} is none of these",
                   "type=bind or type=tmpfs")
    if not os.path.isabs(keys.get("source", "")):
        raise Fail(f"--mount {text}: the source must be absolute", "source=/…")
    if not os.path.lexists(keys["source"]):
        raise Fail(f"--mount {text}: bind source path does not exist: "
                   f"{keys['source']}", "make it first; only -v makes it for you")
    if "bind-propagation" in keys:
        words.append(keys["bind-propagation"])
    mount = bind_mount(f"--mount {text}", keys["source"], target, words)
    if keys["bind-nonrecursive"]:
        mount["options"][0] = "bind"
    return mount


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
        if not {"r", "w"} <= set(access) and (options.userns == "host" or rootless.uid):
            whose = "the host's" if not rootless.uid else "an ordinary user's"
            raise Fail(f"{what}: root of {whose} user namespace cannot be kept to "
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
                "access": access, "source": source + path[len(target):]}
    return list(found.values())


def device_mounts(devices):
    """The same as bind mounts, for who may not make nodes: the host's own, with the
    rights that their modes give him."""
    return [{"destination": device["path"], "type": "bind", "source": device["source"],
             "options": ["bind", "nosuid", "noexec"]} for device in devices]


def usual_mounts():
    """The spec's mounts that every container has of its own, outer first."""
    quiet = ["nosuid", "noexec", "nodev"]
    return [{"destination": path, "type": kind, "source": source, "options": words}
            for path, kind, source, words in (
        ("/proc", "proc", "proc", [*quiet]),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "nodev", "strictatime", "mode=755",
                                    "size=65536k"]),
        ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance",
                                          "ptmxmode=0666", "mode=0620", "gid=5"]),
        ("/sys", "sysfs", "sysfs", [*quiet, "ro"]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", [*quiet, "ro"]),
        ("/dev/mqueue", "mqueue", "mqueue", [*quiet]),
        ("/dev/shm", "tmpfs", "shm", [*quiet, "mode=1777", "size=65536k"]))]


def mounts_spec(options):
    """The spec's mounts: those that every container has, then the volumes asked for.

    Three file systems show what a namespace holds, and a user namespace may mount
    one only if it owns that namespace; shared with the host, the host's is shown.
    """
    shared = {"/proc": options.pid, "/sys": options.network, "/dev/mqueue": options.ipc}
    mounts, shm_size = usual_mounts(), size(options.shm_size or "0")
    if options.ipc == "host" and shm_size:
        raise Fail("--shm-size with --ipc host", "that /dev/shm is the host's")
    if options.ipc == "host" and not os.path.isdir("/dev/mqueue"):
        mounts = [m for m in mounts if m["destination"] != "/dev/mqueue"]
    for mount in mounts:
        path, words = mount["destination"], mount["options"]
        if options.privileged and "ro" in words:
            words.remove("ro")
        if path == "/dev/shm" and options.ipc == "host":
            mount.update(type="bind", source=path, options=["rbind", *words[:3]])
        elif path == "/dev/shm" and shm_size:
            words[-1] = f"size={shm_size}"
        elif shared.get(path) == "host" and rootless.uid:
            # To who is not the host's root a mount shows all that is mounted on it.
            mount.update(type="bind", source=path,
                         options=["rbind", *(f"r{word}" for word in words)])
        elif shared.get(path) == "host" and options.userns != "host":
            mount.update(type="bind", source=path, options=["bind", *words])
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
        if mount["type"] in ("bind", "tmpfs"):  # as in Docker's: a new node there works
            mount["options"] = [word for word in mount["options"]
                                if word not in ("nodev", "rnodev")]
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
    c.home += [(open_fd("/proc/self/ns/mnt", os.O_RDONLY, "to find home again"),
                CLONE_NEWNS), (open_fd(".", O_PATH), 0)]
    syscall("unshare", CLONE_NEWNS, why="a copy of the host's mounts to build in")
    syscall("mount", None, "/", None, MS_REC | MS_SLAVE, None,
            why="nothing mounted from here on shows on the host")
    syscall("mount", "workshop", c.workshop, "tmpfs", MS_NODEV, "mode=755",
            why="an empty place that vanishes with the namespace")
    syscall("chdir", c.workshop, why="short names, and init inherits the directory")


def leave_workshop(c):
    """Outside: the parent goes back to where it came from."""
    while c.home:
        fd, flag = c.home[0]
        if flag:
            syscall("setns", fd, flag, why="the parent goes home")
        else:
            syscall("fchdir", fd)
        os.close(c.home.pop(0)[0])


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
                   deep=AT_RECURSIVE, cleared=0):
    """Change the mount at a descriptor and those below it; `users` is a user namespace
    through whose map it is to be seen."""
    attr = mount_attr(attr_set=attributes | (MOUNT_ATTR_IDMAP if users >= 0 else 0),
                      attr_clr=cleared, propagation=propagation,
                      userns_fd=max(users, 0))
    try:
        syscall("mount_setattr", tree, "", AT_EMPTY_PATH | deep, attr,
                sizeof(attr), why=f"how {what} is seen from inside")
    except OSError as error:
        if users >= 0 and error.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM,
                                          errno.EOPNOTSUPP):
            raise CannotMapIds(
                f"{what}: its file system cannot be id-mapped by this kernel") from None
        if error.errno != errno.ENOSYS:
            raise
        remount(tree, attributes, propagation)


def check_propagation(mount):
    """Refuse to share, or to follow, what the host does not share."""
    words = {"shared": "shared", "slave": "shared or slave"}
    wanted = [words[word.removeprefix("r")] for word in mount["options"]
              if word.removeprefix("r") in words]
    if not wanted:
        return
    source, best = os.path.realpath(mount["source"]), ("", "")
    for line in lines_of("/proc/self/mountinfo", why="shared?"):
        fields = line.split(" ")
        point = fields[4]
        for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"),
                                   ("\\134", "\\")):
            point = point.replace(escaped, character)
        if os.path.commonpath((point, source)) == point and len(point) >= len(best[0]):
            best = point, fields[6]
    if not best[1].startswith(("shared:", "master:")):
        raise Fail(f"{mount['source']} is on {best[0]}, which is not a {wanted[0]} "
                   "mount", f"mount --make-rshared {best[0]}")


def prepare_sources(c):
    """Outside: what root owns in a source is to be the container's root's."""
    for mount in c.spec["mounts"]:
        if mount["type"] == "bind":
            if not c.record:  # a runtime's caller means: inside
                check_propagation(mount)
            deep = AT_RECURSIVE if "ridmap" in mount["options"] else 0
            if mount.get("uidMappings"):
                users = user_namespace(mount["uidMappings"], mount["gidMappings"])
                set_attributes(c.sources[mount["destination"]], 0, 0, users,
                               mount["source"], deep)
                os.close(users)
            elif {"idmap", "ridmap"} & {*mount["options"]} and c.users >= 0:
                set_attributes(c.sources[mount["destination"]], 0, 0, c.users,
                               mount["source"], deep)


def shifted_id(id, base):
    """Where an owner's id lies in the range from `base` on; beyond it, nobody's."""
    return base + min(id, 65534) if base else id


def host_id(id, mappings):
    """What an id of the container is on the host; one that it has not, nobody's."""
    for m in mappings or ({"containerID": 0, "hostID": 0, "size": 1 << 32},):
        if m["containerID"] <= id < m["containerID"] + m["size"]:
            return m["hostID"] + id - m["containerID"]
    return 65534 if id == 65534 else host_id(65534, mappings)


def make_nodes(c):
    """Outside: nodes for the devices in the spec, on a file system that is not nodev.

    The host's own would not do: to the container's root they are files of nobody, for
    whom it has no rights.  Where it shall not read, or not write, that is just what
    is needed: a node of the host's root, who alone could change its mode.
    """
    devices, linux = c.spec["linux"].get("devices"), c.spec["linux"]
    if not devices:
        return
    syscall("mkdirat", AT_FDCWD, "devices", 0o755)
    syscall("mount", "devices", "devices", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755",
            why="the one place for nodes that work, out of the container's reach")
    for number, device in enumerate(devices):
        path, mode = f"devices/{number}", device["fileMode"]
        owner, group = (host_id(device[f"{key}id"], linux.get(f"{key}idMappings"))
                        for key in "ug")
        bits = 4 * ("r" in device["access"]) + 2 * ("w" in device["access"])
        if bits != 6:
            group = host_id(0, linux.get("gidMappings"))
            owner, mode = 0, bits << 3 | mode & bits
        kind = {"b": stat.S_IFBLK, "p": stat.S_IFIFO}.get(device["type"], stat.S_IFCHR)
        syscall("mknodat", AT_FDCWD, path, kind,
                os.makedev(device["major"], device["minor"]), why=device["path"])
        syscall("fchownat", AT_FDCWD, path, owner, group, 0)
        syscall("fchmodat", AT_FDCWD, path, mode, why="whatever our umask is")


def attach(path, name, attributes, users, deep=0):
    """Outside: a directory of the host as `name` in the workshop, seen through the map
    of `users` unless that is -1; `deep` with what is mounted below it."""
    syscall("mkdirat", AT_FDCWD, name, 0o755)
    tree = syscall("open_tree", AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
                   | deep, why="not yet anywhere")
    if users >= 0:  # only what is not attached yet can be id-mapped
        set_attributes(tree, 0, MS_PRIVATE, users, path)
    syscall("move_mount", tree, "", AT_FDCWD, name, MOVE_MOUNT_F_EMPTY_PATH,
            why="attached in the workshop")
    if attributes:  # only what is attached can be remounted by an older kernel
        set_attributes(tree, attributes, MS_SLAVE, what=path)
    os.close(tree)


def build_rootfs(c):
    """Outside: all layers as one file system, the directory `rootfs` of the workshop.

    Names are short because mount(2) takes one page of options: with `0`, `1`, … for
    layers, hundreds of them fit, and no path needs its commas and colons escaped.
    """
    if not c.layers:  # one directory with the owners it needs: vfs, or a bundle's
        kept = c.spec["linux"].get("resources", {}).get("devices")  # by the group
        attach(os.path.join(c.directory, c.spec["root"]["path"]), "rootfs",
               0 if kept else MOUNT_ATTR_NODEV, -1, AT_RECURSIVE)
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
    if rootless.uid:
        options += ",userxattr"  # its notes on directories are a user's attributes
    else:  # a layer is to be whole: no file, no directory that leads to one below
        options += ",redirect_dir=off,metacopy=off"
    syscall("mount", "overlay", "rootfs", "overlay", MS_NODEV, options,
            why="layers below, changes on top; device nodes in it are inert")


# ── init's part: the steps of BIRTH that mount ──


def own_the_mounts(c):
    """Step: a copy of the workshop that only this container sees or changes."""
    flags = new_namespaces(c.spec) & LATER
    syscall("unshare", flags, why="mounts of our own; our cgroup becomes the root of "
            "the tree")
    wish = (c.spec["linux"].get("rootfsPropagation") or "private").lstrip("r")
    how = MS_PRIVATE if wish == "private" else MS_SLAVE  # that it is, in the workshop
    syscall("mount", None, "/", None, MS_REC | how, None,
            why="nothing that is mounted from here on reaches the host")


def hold_rootfs(c):
    """Step: make the rootfs a mount of our own, which pivot_root asks for."""
    syscall("mount", "rootfs", "rootfs", None, MS_BIND | MS_REC, None,
            why="a mount copied from the workshop is locked; this one is ours")
    c.root_fd = open_fd("rootfs", O_PATH | O_DIRECTORY, "paths inside start here")


def open_in_root(root, path, flags=os.O_PATH):
    """A descriptor of a path, resolved as if `root`, another one, were / (P4)."""
    how = open_how(flags=flags | os.O_CLOEXEC,
                   resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    for left in reversed(range(128)):
        try:
            return syscall("openat2", root, path, how, sizeof(how))
        except BlockingIOError:  # a rename, anywhere, while there was a ".." on the way
            if not left:
                raise


def open_inside(c, path, flags=os.O_PATH):
    """A descriptor of a path of the container."""
    return open_in_root(c.root_fd, path, flags)


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
                syscall("mkdirat", above.fd, name, 0o755, why="it was missing")
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
    tree, wish = c.sources[path], MS_PRIVATE
    is_directory = stat.S_ISDIR(os.fstat(tree).st_mode)
    place = inside(c, path, "dir" if is_directory else "file")
    if is_directory != stat.S_ISDIR(os.fstat(place.fd).st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR),
                      Asked("move_mount", (mount["source"], path)))
    syscall("move_mount", tree, "", place.fd, "",
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
            why=f"the volume appears at {path}")
    place.close()
    # trap: where / is shared, a copy of /proc is the host's peer, and what we hide in
    # ours would be hidden on the host; hence private unless asked for
    for word in mount["options"]:
        wish = PROPAGATIONS.get(word, wish) & ~MS_REC
    set_attributes(tree, 0, wish, what=path)
    for table, deep in ((ATTRIBUTES, 0), (DEEP_WORDS, AT_RECURSIVE)):
        attributes, cleared = 0, 0
        for word in mount["options"]:
            more, less = table.get(word, (0, 0))
            attributes, cleared = attributes & ~less | more, cleared & ~more | less
        if attributes or cleared:
            set_attributes(tree, attributes, what=path, deep=deep, cleared=cleared)


def mount_cgroup(c, path, flags):
    """The container's own cgroup as the root of the tree, in the host's layout; in the
    host's cgroup namespace the host's tree, or in version 1 its own part of each."""
    place, own = inside(c, path, "dir"), namespace_flags(c.spec) & CLONE_NEWCGROUP
    if c.cgroup.trees:
        syscall("mount", "cgroup", place, "tmpfs", flags & ~MS_RDONLY, "mode=755",
                why="v1: a directory for each tree")
    elif own:
        try:
            syscall("mount", "cgroup", place, "cgroup2", flags & ~MS_RDONLY, None,
                    why="its own cgroup looks like the root")
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            syscall("mount", c.cgroup.directory(), place, None, MS_BIND, None,
                    why="the same, where a /sys of the host's has its own there")
    else:
        syscall("mount", CGROUP_ROOT, place, None, MS_BIND | MS_REC, None,
                why="the host's whole tree")
    for point in sorted({*c.cgroup.trees.values()}):
        names = [n for n, at in c.cgroup.trees.items() if at == point]
        tree = inside(c, f"{path}/{os.path.basename(point)}", "dir")
        if own:
            syscall("mount", "cgroup", tree, "cgroup", flags & ~MS_RDONLY,
                    ",".join(names), why="its own cgroup looks like the root")
        else:
            syscall("mount", c.cgroup.directory(names[0]), tree, None, MS_BIND, None,
                    why="its own cgroup, of all there is")
        tree.close()
    place.close()
    if flags & MS_RDONLY:
        place = inside(c, path)
        set_attributes(place.fd, MOUNT_ATTR_RDONLY, what=path)
        place.close()


def copy_up(source, target):
    """Copy what is in an open directory into another, owners, modes and links too."""
    for name in os.listdir(source):
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, dir_fd=target)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISREG(status.st_mode):
            os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o600, dir_fd=target))
        else:
            continue
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target,
                 follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            continue
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
        if stat.S_ISDIR(status.st_mode):
            pair = [os.open(name, O_DIRECTORY, dir_fd=top) for top in (source, target)]
            copy_up(*pair)
        else:
            pair = [os.open(name, how | os.O_NOFOLLOW, dir_fd=top)
                    for top, how in ((source, os.O_RDONLY), (target, O_WRONLY))]
            while os.sendfile(pair[1], pair[0], None, 1 << 30):
                pass
        for fd in pair:
            os.close(fd)


def fill_tmpfs(c, path, below, flags):
    """Let a new tmpfs begin with what was at its place: the directory `below`."""
    fds = [os.open(f"/proc/self/fd/{below.fd}", O_DIRECTORY),
           open_inside(c, path, O_DIRECTORY)]
    copy_up(*fds)
    if flags & MS_RDONLY:
        set_attributes(fds[1], MOUNT_ATTR_RDONLY, what=path)
    for fd in fds:
        os.close(fd)


def existing(c, paths):
    """The Places of those paths that the container has, each open for its turn."""
    for path in paths:
        try:
            place = inside(c, path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield place
        place.close()


def mount_one(c, mount):
    """Make one of the spec's mounts."""
    flags, data = 0, []
    for word in mount["options"]:
        if word in OPTION_WORDS:
            flags |= OPTION_WORDS[word]
        elif word in CLEARING_WORDS:
            flags &= ~CLEARING_WORDS[word]
        elif word not in MOUNT_WORDS:
            data.append(word)
    if mount["type"] == "bind":
        attach_source(c, mount)
    elif mount["type"] == "cgroup":
        mount_cgroup(c, mount["destination"], flags)
    else:
        if mount["type"] == "tmpfs" and not any(w.startswith("mode=") for w in data):
            data += [f"mode={stat.S_IMODE(os.fstat(place.fd).st_mode):o}"  # as it had
                     for place in existing(c, [mount["destination"]])]
        place = inside(c, mount["destination"], "dir")
        syscall("mount", mount["source"], place, mount["type"], flags & ~MS_RDONLY
                if "tmpcopyup" in mount["options"] else flags, ",".join(data),
                why=f"the container's own {mount['destination']}")
        if "tmpcopyup" in mount["options"]:
            fill_tmpfs(c, mount["destination"], place, flags)
        place.close()
        for word in PROPAGATIONS.keys() & {*mount["options"]}:
            place = inside(c, mount["destination"])
            syscall("mount", None, place, None, PROPAGATIONS[word], None, why=word)
            place.close()


def mount_all(c):
    """Step: everything in the spec's mounts, in its order."""
    for mount in c.spec["mounts"]:
        with about(f"the mount on {mount['destination']}"):
            mount_one(c, mount)


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
        with about(f"the device {path}"):
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
        try:
            syscall("symlinkat", target, dev.fd, name)
        except FileExistsError:  # where /dev is the image's own directory
            pass
    dev.close()


def check_device(fd, major, minor, what):
    """Refuse a file that is not the character device which it is taken for."""
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or (
            status.st_rdev != os.makedev(major, minor)):
        raise Fail(f"{what} is not the device {major}:{minor}",
                   "is something else mounted there?")


def open_console(c):
    """Step: a pseudo-terminal from the container's own /dev/pts, for -t.

    The program gets the terminal end as descriptors 0, 1, 2 and as /dev/console; the
    parent takes the other end out of us with pidfd_getfd, told the number by a line.
    """
    if not c.spec["process"].get("terminal"):
        return
    master = open_inside(c, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    check_device(master, 5, 2, "/dev/pts/ptmx")
    syscall("ioctl", master, TIOCSPTLCK, byref(c_int(0)),
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
    null = Place("/dev/null")
    null.fd = open_fd("/dev/null", O_PATH, "the host's own")
    check_device(null.fd, 1, 3, "/dev/null")
    for place in existing(c, c.spec["linux"].get("maskedPaths", ())):
        if stat.S_ISDIR(os.fstat(place.fd).st_mode):
            syscall("mount", "tmpfs", place, "tmpfs", MS_RDONLY | MS_NODEV, None,
                    why="hidden: an empty directory")
        else:
            syscall("mount", null, place, None, MS_BIND, None,
                    why="hidden: an empty file, the host's own null device")
    null.close()
    keep_nodes(c, c.spec["linux"].get("maskedPaths", ()))
    paths = c.spec["linux"].get("readonlyPaths", ())
    for place in existing(c, paths):
        syscall("mount", place, place, None, MS_BIND | MS_REC, None,
                why="a mount of its own, so that it can be read-only")
    for place in existing(c, paths):
        set_attributes(place.fd, MOUNT_ATTR_RDONLY, what=place)


AS_IT_STANDS = "minicontainer.cwd"  # annotation: the working directory is there, or not


def make_cwd(c):
    """Step: the working directory, if the root file system has none; images count on
    that.  Of a directory or a tarball, who says -w knows what there is, or errs."""
    if AS_IT_STANDS in c.spec.get("annotations", ()):
        return
    try:
        inside(c, c.spec["process"]["cwd"], "dir").close()
    except OSError:
        pass  # what is in the way is told by enter_cwd


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


def move_root(c):
    """Step: in place of pivot, where / is the kernel's first ramdisk, which cannot be
    unmounted.  subtle: the host's tree stays mounted below the new root, out of reach
    only for who may not mount."""
    syscall("fchdir", c.root_fd)
    syscall("mount", ".", "/", None, MS_MOVE, None, why="the rootfs lies on top of /")
    syscall("chroot", ".", why="and is our / from here on")
    syscall("chdir", "/")
    os.close(c.root_fd)
    c.root_fd = open_fd("/", O_PATH | O_DIRECTORY, "paths inside start here")


def share_root(c):
    """Step: how the mounts inside relate to copies of them, made inside."""
    wish = c.spec["linux"].get("rootfsPropagation")
    if wish:
        syscall("mount", None, "/", None, PROPAGATIONS[wish], None,
                why=f"rootfsPropagation: {wish}")


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
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
PR_CAP_AMBIENT_RAISE = 2
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
    ioprio_set=(251, 30, "which who priority"),
    sched_setattr=(314, 274, "pid attr flags"),
    personality=(135, 92, "persona"),
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
IOPRIO_CLASSES = tuple(f"IOPRIO_CLASS_{name}" for name in ("NONE", "RT", "BE", "IDLE"))
SCHED_POLICIES = tuple(f"SCHED_{name}" for name in (
    "OTHER", "FIFO", "RR", "BATCH", "ISO", "IDLE", "DEADLINE"))
SCHED_FLAGS = tuple(f"SCHED_FLAG_{name}" for name in (
    "RESET_ON_FORK", "RECLAIM", "DL_OVERRUN", "KEEP_POLICY", "KEEP_PARAMS",
    "UTIL_CLAMP_MIN", "UTIL_CLAMP_MAX"))  # by their bits, from 1
PERSONAS = {"LINUX": 0, "LINUX32": 8}  # PER_…, <linux/personality.h>
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
        with open(name, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = file.read().split("\n")
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
        elif origin == "-e":  # what the host does not have, the image is not to say
            env.pop(name, None)
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
    "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_NOTIFY": 0x7FC00000}
OPERATORS = {  # what to compare for, and whether it should not be so
    "SCMP_CMP_EQ": (BPF_EQ, False), "SCMP_CMP_NE": (BPF_EQ, True),
    "SCMP_CMP_GT": (BPF_GT, False), "SCMP_CMP_LE": (BPF_GT, True),
    "SCMP_CMP_GE": (BPF_GE, False), "SCMP_CMP_LT": (BPF_GE, True),
    "SCMP_CMP_MASKED_EQ": (BPF_EQ, False)}
FILTER_FLAGS = tuple(f"SECCOMP_FILTER_FLAG_{name}" for name in (
    "TSYNC", "LOG", "SPEC_ALLOW", "NEW_LISTENER", "TSYNC_ESRCH",
    "WAIT_KILLABLE_RECV"))  # by their bits, from 1
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


def refuse(place, value, wanted):
    """A Fail that names a place in a document, and what may be there."""
    raise Fail(f"{place}: {value!r:.80} is not possible", f"wanted: {wanted}")


def check_form(value, form, place):
    """Refuse what is not of a form like PROFILE_FORM, naming its place."""
    names = {str: "text", bool: "true or false", dict: "an object"}
    if isinstance(form, type):
        good, wanted = isinstance(value, form), names[form]
    elif isinstance(form, range):
        good = type(value) is int and value in form
        wanted = f"{form.start} to {form.stop - 1}"
    elif isinstance(form, tuple):
        good = isinstance(value, (str, type(None))) and value in form
        wanted = f"one of {', '.join(filter(None, form))}"
    else:
        good = isinstance(value, type(form))
        wanted = "an object" if isinstance(form, dict) else "a list"
    if not good:
        refuse(place, value, wanted)
    for number, item in enumerate(value if isinstance(form, list) else ()):
        check_form(item, form[0], f"{place}[{number}]")
    if isinstance(form, dict) and str in form:  # any names, whose values have a form
        form = dict.fromkeys(value, form[str])
    for key in form if isinstance(form, dict) else ():
        if key.endswith("!") and value.get(key[:-1]) is None:
            raise Fail(f"{place}.{key[:-1]} is missing", "it has to be there")
        key, wanted = key.rstrip("!"), form[key]
        if value.get(key) is not None or isinstance(wanted, tuple):
            check_form(value.get(key), wanted, f"{place}.{key:.80}")


def without_nulls(value):
    """JSON without what is null, which is as good as not being there."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items()
                if item is not None}
    return [*map(without_nulls, value)] if isinstance(value, list) else value


def read_json(path, form, place, what="", hint="JSON as the OCI specifies it"):
    """A document of a form like PROFILE_FORM; a Fail that names the path in it."""
    try:
        document = without_nulls(
            from_json(sys.stdin.read() if path == "-" else read_file(path)))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON: {error}"
        raise Fail(f"{what}{path}: {reason[:1].lower()}{reason[1:]}", hint) from None
    check_form(document, form, place)
    return document


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
            if k >> 16 == 5:  # to others it is no error's number
                text += errno.errorcode.get(k & 0xFFFF, "")
        else:
            value = machine if what == "arch" else hex(k)
            value = f"{k}{names.get(k, '')}" if what == "number" else value
            text = f"if {what} {signs[code]} {value} goto L{at + yes}, else L{at + no}"
        lines.append(f"{f'L{at - 1}:':6}{text}".rstrip())
    return lines


def check_profile(profile, place):
    """Refuse a profile that cannot become a filter, before anything is begun."""
    judged = [rule["names"] for rule in profile["syscalls"]
              if rule["action"] == "SCMP_ACT_NOTIFY"]
    if profile["defaultAction"] == "SCMP_ACT_NOTIFY" or any(
            "write" in names for names in judged):
        raise Fail(f"{place}: SCMP_ACT_NOTIFY cannot be the defaultAction, nor that of "
                   "write", "nobody could be told where the program asks")
    if judged and not profile.get("listenerPath"):
        raise Fail(f"{place}: SCMP_ACT_NOTIFY without a listenerPath",
                   "nobody would answer")
    try:
        seccomp_program(profile, os.uname().machine)
    except Fail as fail:
        raise Fail(f"{place}: {fail.message}", fail.hint) from None


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
    profile = read_json(word, PROFILE_FORM, f"{word}: profile",
                        "--security-opt seccomp=", "a file like Docker's profiles or "
                        "the OCI's; or `unconfined`, `builtin`")
    profile = oci_profile(profile, capabilities, machine, release)
    check_profile(profile, word)
    return {"seccomp": profile}


class sock_fprog(Structure):
    """struct sock_fprog of <linux/filter.h>: a program for the kernel."""

    _fields_ = [("len", c_ushort), ("filter", c_char_p)]

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
    safe = os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY  # it is sealed
    if rootless.uid:  # root inside is its user: who can write to a Python of his own
        safe = safe or os.stat("/proc/self/exe").st_uid != 0
    else:
        safe = safe or namespace_flags(spec) & CLONE_NEWUSER
    if safe:
        return
    directory, name = os.path.split(os.readlink("/proc/self/exe"))
    attr = mount_attr(attr_set=MOUNT_ATTR_RDONLY)
    try:
        tree = syscall("open_tree", AT_FDCWD, directory, OPEN_TREE_CLONE
                       | OPEN_TREE_CLOEXEC | AT_RECURSIVE, why="attached nowhere")
        syscall("mount_setattr", tree, "", AT_EMPTY_PATH | AT_RECURSIVE, attr,
                sizeof(attr), why="root inside is root outside, but not here")
    except OSError as error:  # before Linux 5.12
        if error.errno != errno.ENOSYS:
            raise
        say("this kernel cannot seal this machine's Python: root inside can write to "
            "it, through /proc/self/exe")
        return
    os.environ["MINICONTAINER_SAID"] = "\n".join(SAID)
    if rootless.uid:  # its lock would go when it is closed, or opened and closed again
        os.set_inheritable(rootless.fd, True)
        os.environ["MINICONTAINER_USERS"] = str(rootless.fd)
    syscall("execve", f"/proc/self/fd/{tree}/{name}", sys.orig_argv,
            c_void_p.from_address(dlsym(OURSELVES, "environ")),
            why="start anew, in an interpreter that nobody can write to")


# ── steps ──


def no_more_imports(c):
    """Step: close Python's import machinery for good (P2)."""
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path.clear()


def hide():
    """From here on nobody in the container may look into this process through /proc.

    A change of ids may undo it (fs.suid_dumpable), so it is said again after each."""
    syscall("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0,
            why="our memory, our descriptors and our interpreter are the host's")


def hide_words(c):
    """Step: overwrite our command line, which everybody inside could read until the
    program has its own, or for good with --init: the host's paths, and what -e says."""
    status = read_file("/proc/self/stat", why="where our command line is")
    begin, end = map(int, status.rpartition(")")[2].split()[45:47])
    if end > begin:  # 0 where the kernel does not tell
        words = (c_char * (end - begin)).from_address(begin)
        words.raw = b"init"[:end - begin].ljust(end - begin, b"\0")


def hide_memory(c):
    """Step: hide.

    An ordinary user's engine could not look either, and has yet to write the id maps
    and take the terminal: there this waits until the user changes.  Until then we have
    all capabilities: who is inside cannot look without CAP_SYS_PTRACE."""
    if not rootless.uid:
        hide()


def born_inside(c):
    """(pid, pidfd) of a child of ours in the pid namespace of c.target, as clone3 says.

    To be in one takes being born there; so for a moment that is where our children
    are born.  That spares `exec` a second fork, and a twentieth of its time; it is
    seen from inside at once, so this is not for all, see goes_in_late."""
    if goes_in_late(c):
        return clone3(0, c.cgroup.birth_fd, why="a process to go in")
    hide()  # the child, too, and that is seen in there from the first moment
    pid, home = -1, open_fd("/proc/self/ns/pid", os.O_RDONLY, "for the way back")
    syscall("setns", c.target, CLONE_NEWPID, why="where our next child is to be born")
    try:
        pid, pidfd = clone3(0, c.cgroup.birth_fd, why="a process to go in")
        return pid, pidfd
    finally:
        if pid:
            syscall("setns", home, CLONE_NEWPID, why="and no other child of ours")
        os.close(home)


def wait_for_go(c):
    """Step: let the parent do its part first.

    What it alone should hold is closed before: its lock must be free when it is dead,
    and its ends of the pipes, or we would never see that it is.
    """
    for fd in (c.lock, c.news[0], c.orders[1], *c.outer.values(),
               *(fd for fd, _ in c.home)):
        if fd >= 0:
            os.close(fd)
    c.lock, c.outer, c.home = -1, {}, []
    c.news, c.orders = (-1, c.news[1]), (c.orders[0], -1)
    c.await_parent()


def set_ids(uid, gid, groups):
    """Become a user for good: real, effective and saved ids, and just these groups."""
    array = (c_uint32 * len(groups))(*groups)
    if not has_one_id():  # else he keeps his own groups, and nothing may change that
        syscall("setgroups", len(groups), array, why=f"groups {groups}")
    syscall("setresgid", gid, gid, gid)
    syscall("setresuid", uid, uid, uid, why=f"it runs as {uid}:{gid}")


def become_root(c):
    """Step: root of the user namespace; until the maps were there it was nobody."""
    set_ids(0, 0, [])
    hide_memory(c)


def new_session(c):
    """Step: a session of its own."""
    syscall("setsid", why="no terminal of the host is ours: no TIOCSTI, no Ctrl-C")


def new_keyring(c):
    """Step: a session keyring of its own."""
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
    return [line.rstrip("\r").split(":") for line in text.split("\n") if line]


def look_up(rows, text, what, fields):
    """The row of a passwd or group table that a name or number means, or None for a
    number that is not in it."""
    file = "passwd" if what == "user" else what
    for row in rows:
        if len(row) >= fields and row[0] == text and row[2].isdecimal():
            return row
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 31):
        raise Fail(f"unable to find {what} {text}: no matching entries in {file} file",
                   "a name from the image's own files, or any number from 0 to "
                   "2147483647")
    for row in rows:
        if len(row) >= fields and row[2] == text:
            return row
    return None


def resolve_names(c, user, users):
    """Set the ids that a user's names mean by the image's own files; its row in passwd,
    or None if it has none there."""
    name, _, group = user["username"].partition(":")
    groups, row = image_table(c, "/etc/group"), look_up(users, name or "0", "user", 4)
    user["uid"] = int(row[2]) if row else int(name or 0)
    user["gid"] = int(row[3]) if row and row[3].isdecimal() else 0
    extra = []
    if group:
        found = look_up(groups, group, "group", 3)
        user["gid"] = int(found[2]) if found else int(group)
    elif row and not has_one_id():
        extra = [int(g[2]) for g in groups if len(g) >= 4 and g[2].isdecimal()
                 and row[0] in g[3].split(",")]
    for text in user.get("groupnames", ()):
        found = look_up(groups, text, "group", 3)
        extra.append(int(found[2]) if found else int(text))
    user["additionalGids"] = sorted({user["gid"], *extra})
    uids, gids = (sum(m["size"] for m in c.spec["linux"].get(kind, ())) or 1 << 31
                  for kind in ("uidMappings", "gidMappings"))
    if user["uid"] >= uids or max(user["additionalGids"]) >= gids:
        cure = "a smaller number, or --userns host" if not rootless.uid else (
            "more ids: see subuid(5), and the package uidmap for newuidmap")
        raise Fail(f"user {user['uid']} with groups {user['additionalGids']}: beyond "
                   f"the container's {min(uids, gids)} ids", cure)
    return row


def find_user(c):
    """Step: who --user and --group-add are, and HOME, unless it is set."""
    user, env, row = c.spec["process"]["user"], c.spec["process"]["env"], None
    users = image_table(c, "/etc/passwd")
    if "username" in user:
        row = resolve_names(c, user, users)
    else:
        row = next((r for r in users if r[2:3] == [str(user["uid"])]), None)
    if not any(line.startswith("HOME=") and line != "HOME=" for line in env):
        env[:] = [*(line for line in env if line != "HOME="),
                  f"HOME={row[5] if row and len(row) > 5 and row[5] else '/'}"]


def enter_cwd(c):
    """Step: the working directory, found inside, so that it cannot be the host's."""
    cwd = c.spec["process"]["cwd"]
    try:
        place = inside(c, cwd)
        syscall("fchdir", place.fd, why="--workdir")
        os.getcwd()  # ENOENT if it is not below our root
    except OSError as error:
        code = 127 if error.errno == errno.ENOENT else 126
        raise Fail(f"working directory {cwd}: {error.strerror}",
                   "a directory that is there; -w names another", code) from None
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
        pair = (c_uint64 * 2)(limit["soft"] % 2**64, limit["hard"] % 2**64)
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


def set_priorities(c):
    """Step: when it gets the processor and the disk, and as what kind of machine uname
    shows itself, if the spec says so."""
    process, persona = c.spec["process"], c.spec["linux"].get("personality")
    if disk := process.get("ioPriority"):
        number = IOPRIO_CLASSES.index(disk["class"]) << 13 | (disk.get("priority") or 0)
        syscall("ioprio_set", 1, 0, number, why=f"{disk['class']} for this process")
    if turn := process.get("scheduler"):
        flags = sum(1 << SCHED_FLAGS.index(flag) for flag in turn.get("flags") or ())
        numbers = [turn.get(key) or 0 for key in (
            "nice", "priority", "runtime", "deadline", "period")]
        attr = struct.pack("=IIQiIQQQ", 48, SCHED_POLICIES.index(turn["policy"]), flags,
                           *numbers)  # struct sched_attr, sched_setattr(2)
        syscall("sched_setattr", 0, c_buffer(attr), 0,
                why=turn["policy"])
    if persona:
        syscall("personality", PERSONAS[persona["domain"]], why=persona["domain"])


def become_user(c):
    """Step: the user it runs as, who also owns the terminal.

    What may be done is not yet given up with the user: see set_capabilities."""
    user = c.spec["process"]["user"]
    if c.spec["process"].get("terminal"):
        syscall("fchown", 0, user["uid"], 0xFFFFFFFF, why="the terminal is its own")
    syscall("umask", user.get("umask", 0o022), why="Docker's mask for new files")
    syscall("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0, why="one is needed until execve")
    set_ids(user["uid"], user["gid"], user.get("additionalGids", []))
    hide()


def set_capabilities(c):
    """Step: the other four sets; only root, or who inherits some, has any to keep.

    And, until execve, CAP_SYS_ADMIN: install_seccomp needs it unless nothing can be
    gained any more.  Execve makes new sets of the bounding and the inheritable one, so
    that it takes it away without a call that a filter could refuse."""
    process, last = c.spec["process"], []
    sets = process["capabilities"]
    inherited = sets.get("inheritable", [])
    if process["user"]["uid"] and not inherited:
        sets = {}
    if c.spec["linux"].get("seccomp") and not process.get("noNewPrivileges"):
        last = ["CAP_SYS_ADMIN"]
    header = (c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    data = (c_uint32 * 6)()  # low words of three sets, then their high words
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
    for name in {*inherited} & {*sets["ambient"]} if inherited else ():
        syscall("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE,
                CAPABILITIES.index(name), 0, 0, why=f"it, and heirs, keep {name}")


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


def close_all_but(low, *wanted):
    """Close every descriptor from `low` on that is not wanted."""
    for kept in sorted({*wanted, 0x7FFFFFFF}):
        if kept > low:
            try:
                syscall("close_range", low, kept - 1, 0, why="all but what we need")
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                os.closerange(low, min(kept, 1 << 20))  # Linux before 5.9
        low = max(low, kept + 1)


def let_go():
    """Hold nothing of what a command was given as 0, 1 and 2: whoever reads its output
    would wait for us to end."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def let_go_of_callers():
    """Close what whoever called us has left open beside 0, 1 and 2: a lock would be
    held, and a pipe be waited for, as long as we live.  None of our own would survive
    an execve; his have done that."""
    with os.scandir("/proc/self/fd") as found:
        for fd in (int(entry.name) for entry in found):
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)


def close_descriptors(c):
    """Step: the program gets 0, 1 and 2, and nothing else of ours.

    subtle: execve closes too, but looks the program up before: one that is named
    /proc/self/fd/5/../../bin/sh, or asks for it with #!, would be the host's, if 5 were
    a directory of the host.  What stays open until then leads nowhere.
    """
    close_all_but(3 + c.preserved, c.news[1], c.orders[0], *c.fifos, narration.fd,
                  c.proc)


def install_seccomp(c, name=NOT_YET):
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
    asks = "SCMP_ACT_NOTIFY" in {rule["action"] for rule in profile["syscalls"]}
    flags |= 8 * asks  # NEW_LISTENER: where somebody waits for what it asks
    syscall("prctl", PR_SET_NAME, name, 0, 0, 0,
            why="until execve: a filter may keep us from saying what went wrong")
    try:
        fd = syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, filter_,
                     why="which calls may be made, for good, by it and its children")
    except OSError as error:
        raise Fail(f"the kernel takes no seccomp filter: {error.strerror}",
                   "--security-opt seccomp=unconfined does without") from None
    if asks:
        c.ask_parent("listener", fd=fd)
        os.close(fd)


# ── the program ──


def become_reaper(c):
    """Step: with --init, stay behind as process 1: reap orphans, forward signals, end
    when the program ends.  The program is a child, and goes on with the next step."""
    if not c.wants_reaper:
        return
    behind, walls = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(walls)
        os.read(behind, 1)  # its end: now process 1 is behind the walls, and we may go
        os.close(behind)
        return
    c.spec["process"]["noNewPrivileges"] = True  # it executes nothing, so it may lose
    no_new_privileges(c)
    set_capabilities(c)
    install_seccomp(c, "init")  # the name that `ps` shows
    narration.style = ""  # its descriptor goes with the others
    close_all_but(3)
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
                         sizeof(how), why="ours, whatever pid we have there")
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
    if head[:2] == b"#!":  # subtle: a \r is part of the word, as it is to the kernel
        words = head[2:256].split(b"\n")[0].replace(b"\t", b" ").split(b" ")
        return os.fsdecode(next(filter(None, words), b""))
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


def program_paths(process):
    """Where a process's program may be."""
    name = process["args"][0]
    return [name] if "/" in name else [
        f"{directory or '.'}/{name}" for line in process["env"]
        if name and line.startswith("PATH=") for directory in line[5:].split(":")]


def find_program(c):
    """Step: refuse a program that is nowhere."""
    name = c.spec["process"]["args"][0]
    if any(map(os.path.lexists, program_paths(c.spec["process"]))):
        return
    if "/" in name:
        raise Fail(f"exec {name}: no such file or directory",
                   "the program must be in the image; is the path right?", 127)
    raise Fail(f"exec {name!r}: executable file not found in $PATH",
               "name it with its path, or set PATH with -e", 127)


def execute(c):
    """Step: the last, this process becomes the program."""
    args, env = c.spec["process"]["args"], c.spec["process"]["env"]
    refused = None
    for path in program_paths(c.spec["process"]):
        try:
            syscall("execve", path, args, env, why="the container's program")
            raise Fail(f"exec {path}: the seccomp profile answers 0, and does nothing",
                       "have it allow execve, or refuse it with an error", 126)
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            if not missing or os.path.lexists(path):
                refused = refused or error
    if refused:
        raise refused
    find_program(c)


# ── what an error means ──


def exec_refused(error):
    """A program that is there but was not executed: why not."""
    path = error.filename.args[0]
    if os.path.isdir(path):
        return Fail(f"exec {path}: is a directory", "name a program", 126)
    try:
        head = open_program(path)
        machine, interpreter = elf_machine(head), interpreter_of(head)
    except (OSError, ValueError, struct.error):
        machine = interpreter = ""
    try:
        noexec = os.statvfs(path).f_flag & os.ST_NOEXEC
    except OSError:  # a directory on the way is closed, or a filter lets nobody ask
        noexec = 0
    if error.errno == errno.EACCES:
        what, file = path, path
        if interpreter and os.access(path, os.X_OK):
            what, file = f"{path}: its interpreter {interpreter}", interpreter
        if noexec:
            return Fail(f"exec {path}: permission denied",
                        "the file system that it is on is mounted noexec", 126)
        return Fail(f"exec {what}: permission denied",
                    f"is it executable (chmod +x {file}), for this user?", 126)
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
    hint = "" if error.errno != errno.EPERM else (
        "does the profile of --security-opt seccomp=… allow execve?")
    return Fail(f"exec {path}: {error.strerror}", hint, 126)


def refused_to_root(error):
    """EPERM: that we are not root; or although we are, the power or the switch."""
    if os.geteuid() and narration.who == "parent" and not rootless.uid:
        return "it takes root: sudo"
    status = dict(line.split(":\t", 1)
                  for line in lines_of("/proc/self/status"))
    missing = [name for number, name in enumerate(CAPABILITIES)
               if name in ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETFCAP")
               and not int(status["CapEff"], 16) >> number & 1]
    around = "is there a container around us? It needs docker's --privileged"
    if missing and not rootless.uid:
        return f"we lack {', '.join(missing)}: {around}"
    for file, bad in (("kernel/apparmor_restrict_unprivileged_userns", "1"),
                      ("kernel/unprivileged_userns_clone", "0"),
                      ("user/max_user_namespaces", "0"),
                      ("user/max_mnt_namespaces", "0")):
        path = f"/proc/sys/{file}"
        if os.path.exists(path) and read_file(path).strip() == bad:
            return f"the sysctl {file.replace('/', '.')} is {bad}; or " + (
                "sudo" if rootless.uid else "--userns host")
    if status.get("Seccomp", "0").strip() != "0":
        return f"a seccomp filter is upon us: {around}"
    return around if len(read_file("/proc/self/uid_map").split()[2]) < 10 else ""


def shared_mounts(_):
    """EINVAL of pivot_root: the mount that is shared, or the root that cannot move."""
    for line in lines_of("/proc/self/mountinfo"):
        if " shared:" in line:
            point = line.split(" ")[4]
            return f"{point} is a shared mount: mount --make-rprivate {point}"
    return "is the host's / its initial ramfs? That one cannot be pivoted away"


def holders(error):
    """EBUSY: what is mounted on or below the path, and who is in it."""
    words = getattr(error.filename, "args", (error.filename,))
    path = next((w for w in words if isinstance(w, str) and w.startswith("/")), None)
    found = []
    for line in lines_of("/proc/self/mountinfo") if path else ():
        point = line.split(" ")[4]
        if f"{point}/".startswith(f"{path}/"):
            found.append(f"the mount at {point}")
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


def not_mounted(_):
    """ENOENT: what every host has, and this place has not."""
    missing = [f"mount -t {kind} {kind} {top}" for kind, top, inside in (
        ("proc", "/proc", "self"), ("sysfs", "/sys", "kernel"))
        if narration.who == "parent" and not os.path.exists(f"{top}/{inside}")]
    return " && ".join(missing)


# Which call (any, if none is named), which errors, and what a person can do: words, a
# function of the error that finds them, or one that says all.  The first that has an
# answer is taken.
ADVICE = (
    ("execve", (), exec_refused),
    ("pivot_root", (errno.EINVAL,), shared_mounts),
    ("setns", (errno.ESRCH,), lambda _: Fail(
        "the container is not running: it has just ended", "`ps -a` tells how", 1)),
    ("clone3 clone unshare", (errno.ENOSPC, errno.EUSERS), lambda _:
     "the sysctls user.max_*_namespaces allow no more here; or "
     + ("sudo" if rootless.uid else "--userns host")),
    ("mount", (errno.ELOOP,), "no layer may be there twice, or lie within another"),
    ("mount move_mount openat2 mkdirat mknodat",
     (errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.EEXIST),
     "what is there already is in the way: a directory goes on a directory, a file on "
     "a file, and a link of the image may lead to where nothing can be made"),
    ("mount", (errno.EINVAL,), "are the options of this mount right? see mount(8)"),
    ("mount", (errno.ENODEV,), "the kernel lacks this file system: is there a module?"),
    ("", (errno.ENOENT,), not_mounted),
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
    if isinstance(error, MemoryError):
        return Fail("no memory is left" + f" for the step {step}" * bool(step),
                    "is there a limit on ours, or is a --ulimit too low for any?")
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
    return Fail(f"{getattr(error, 'about', '')}{error.filename or step or 'error'}: "
                f"{error.strerror or error}", hint)

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
    take_sources, visit_namespaces,  # while our mounts are still the host's
    open_workshop,      # and now they are not
)
OUTSIDE = (             # the parent, while init waits
    map_ids,            # first: all that belongs to root inside needs to know who it is
    prepare_sources, make_nodes,  # they need the id maps
    build_rootfs,       # too; last, because init copies it all at "go"
)
BIRTH = (               # init, from "go" until it is your program
    no_more_imports,    # from here on Python's library path may lie inside the image
    hide_memory, hide_words,  # before anything of the container runs that could look
    wait_for_go,        # the ids and the rootfs are there after it
    join_cgroup, join_users,  # before it uses what is counted, or owned
    become_root, shift_clocks,  # of the user namespace: what follows needs its powers
    new_session, new_keyring,  # before there is a terminal to belong to it
    own_the_mounts,     # before the first mount: nothing may leak to the host
    hold_rootfs,        # pivot needs it to be a mount point of ours
    mount_all,          # /proc, /sys, /dev, volumes: in the spec's order
    make_devices,       # in the /dev that was just mounted
    open_console,       # from the /dev/pts that was just mounted
    take_stdio,         # if there is no terminal
    set_names, loopback_up,  # any time will do: each has a namespace of its own
    set_sysctls,        # while the host's /proc is there
    mask_paths,         # after all mounts that could lie on top of a mask
    make_cwd,           # after all mounts that it could lie in
    pivot,              # after every step that needs a path of the host
    seal_root,          # after every step that makes a place to mount on
    *(TAIL := (         # what `exec` does too
        find_user,      # names mean what the image says: its files are / now
        enter_cwd,      # while we may still enter every directory
        drop_bounding,  # needs CAP_SETPCAP, so before the user changes
        set_priorities, ask_for_rlimits,  # as late as may be: they bind us too
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
JOIN = (no_more_imports, hide_memory, hide_words, wait_for_go, join_cgroup,
        join_namespaces, become_root, new_session, new_keyring, open_console,
        take_stdio, *TAIL)


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
        flags = birth_flags(c.spec)
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


def enter(c, before=(open_stdio, open_cgroup), steps=JOIN):
    """Run c's process in the namespaces of c.target and in the group c.cgroup;
    returns when it runs.  After an error it is gone."""
    try:
        c.open_pipes()
        for step in before:
            step(c)
        c.pid, c.pidfd = born_inside(c)
        if c.pid == 0:
            narration.who = "exec"
            init(c, steps)
        c.answer("go")
        c.listen()
    except BaseException:
        kill_and_wait(c)
        raise

# ══ 7. THE OCI RUNTIME ════════════════════════════════════════════════════════════
#
# podman, buildah, containerd and dockerd do not make containers.  They prepare a
# directory, the bundle, with a root file system and a config.json that says what is
# wanted, and call a runtime for each turn in a container's life:
#
#       create ID    the whole of BIRTH but its end: init waits          created
#       start ID     it becomes the program                              running
#       kill ID 15   a signal for it                                     stopped
#       delete ID    its control group and its record are removed
#
# Called as `minirunc`, this file is such a runtime.  That config.json is the very spec
# that chapter 6 takes; so what is left to do here is to check it, to fill in what it
# leaves out, to choose the steps, and to keep a record:
#
#       /run/minirunc/ID/state.json    pid, bundle, and the spec as it was then
#                        exec.fifo     init waits for a word from it; gone when started
#                        news.fifo     what init has to say from then on
#                        workshop/     see chapter 4; gone when all is made
#
# Create and start are two processes, and the one that created is gone by the time of
# the other.  So where init would execute, it changes its two pipes for two FIFOs;
# whoever opens their other ends is its parent from then on, as far as news and orders
# go.  The caller of create is its parent when it dies, who has to reap it.
#
# The program gets the 0, 1 and 2 that create was given.  A config.json may give less
# protection than ours do: without a user namespace root inside is root outside, whom
# the devices of the control group and the capabilities keep in.
#
# Specification: github.com/opencontainers/runtime-spec, version 1.2.

VERSION, OCI_VERSION = "0.1.0", "1.2.0"
OCI_GLOBALS = (
    arg("--root", metavar="DIR", default="/run/minirunc", help="where the records are"),
    arg("--log", metavar="FILE", help="a file for errors, beside standard error"),
    arg("--log-format", choices=["text", "json"], default="text",
        help="the form of its lines"),
    arg("--debug", action="store_true", help="narrate on standard error, as --explain"),
    arg("--systemd-cgroup", action="store_true", help="refused: groups are made "
        "directly"),
    arg("--rootless", choices=["auto", "true", "false"], default="auto",
        help="what it allows runc, to go on without control groups, is never done"),
)
START_OPTIONS = (
    arg("-b", "--bundle", metavar="DIR", default=".", help="with config.json and root"),
    arg("--pid-file", metavar="FILE", default="", help="to write its pid to"),
    arg("--console-socket", metavar="PATH", default="",
        help="a socket that is sent the terminal"),
    arg("--preserve-fds", metavar="N", default="0",
        help="pass on N descriptors from 3 on"),
    arg("--no-new-keyring", action="store_true", help="keep the caller's keyring"),
    arg("--no-pivot", action="store_true", help="move the root, where / is a ramdisk"),
)
ID = arg("id", metavar="ID", help="the container's name")

# ── errors, as callers want to hear them ──


def open_log(options):
    """The log, to append to; if it cannot be, there is none to say so in."""
    path, options.log = options.log, ""
    try:
        file = open(path, "a", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise Fail(f"--log {path}: {error.strerror}", "a file to append to") from None
    options.log = path
    return file


def log_error(options, fail):
    """One line on standard error, which some callers read; and in the log, others."""
    message = fail.message + (f" ({fail.hint})" if fail.hint else "")
    now = rfc3339()
    line = f'time="{now}" level=error msg={quote(message)}'
    if options.log_format == "json":
        line = to_json({"level": "error", "msg": message, "time": now})
    print(f"minirunc: {message}", file=sys.stderr, flush=True)
    if options.log:
        with open_log(options) as log:
            log.write(line + "\n")


def oci(word, *declared):
    """Declare a command of the runtime; its errors are told by log_error."""
    def declare(function):
        def run(options):
            try:
                if options.log:
                    open_log(options).close()
                if options.systemd_cgroup:
                    raise Fail("--systemd-cgroup is not offered",
                               "have the caller use cgroupfs")
                if word not in ("spec", "features") and os.geteuid():
                    raise Fail("permission denied: rootless containers are not offered",
                               "only root can make containers here")
                if options.debug and not narration.style:
                    start_narration("text")
                return function(options) or 0
            except Exception as error:
                log_error(options, diagnose(error))
                return 255 if word == "exec" else 1  # as runc
        run.__doc__ = function.__doc__
        names = [names for names, _ in declared]
        usual = [option for option in OCI_GLOBALS if option[0] not in names]
        command(f"oci {word}", *declared, *usual)(run)
        return function
    return declare


@command("oci", arg("-v", "--version", action="store_true", help="show it"),
         *OCI_GLOBALS, arg("word", nargs="?", metavar="COMMAND", help="see --help"))
def oci_command(options):
    """What runc does: create, start, kill, delete …; the same as `minirunc`."""
    if options.word:
        raise Fail(f"{options.word!r} is not a command of minirunc",
                   "see `minicontainer --help` for those of `oci`", 1)
    print(f"minirunc version {VERSION}\nspec: {OCI_VERSION}" if options.version
          else "minirunc: see `minicontainer --help` for the commands of `oci`")


def refuse_words(words, fail):
    """Tell what is wrong with a command line where its --log says, if it says so."""
    options = Options()
    for name, default in (("--log", ""), ("--log-format", "text")):
        given = [word.partition("=")[2] if "=" in word else following
                 for word, following in zip(words, [*words[1:], ""], strict=True)
                 if word.partition("=")[0] == name]
        setattr(options, name[2:].replace("-", "_"), [default, *given][-1])
    log_error(options, fail)
    return 1


def oci_words(words):
    """`oci --root DIR create ID` in our order: a command, and what belongs to it."""
    flags = {name: how for names, how in OCI_GLOBALS for name in names}
    at = 0
    while at < len(words) and words[at].startswith("-"):
        takes_next = words[at] in flags and "action" not in flags[words[at]]
        at += 2 if takes_next else 1
    return [*words[at:at + 1], *words[:at], *words[at + 1:]]


# ── config.json ──

TEXTS, IDS, MAP = [str], range((1 << 32) - 1), {str: str}  # the last means: unchanged
MAPPINGS = [{"containerID!": IDS, "hostID!": IDS, "size!": range(1, 1 << 32)}]
HOOKS = "prestart", "createRuntime", "createContainer", "startContainer", "poststart", \
    "poststop"
RLIMIT_TYPES = tuple(f"RLIMIT_{name.upper()}" for name in RLIMITS)
CAPABILITY_SETS = "bounding", "effective", "permitted", "inheritable", "ambient"
PROCESS_FORM = {
    "terminal": bool, "args": TEXTS, "env": TEXTS, "cwd": str,
    "consoleSize": {"height": range(1 << 16), "width": range(1 << 16)},
    "user": {"uid": IDS, "gid": IDS, "umask": range(0o1000), "additionalGids": [IDS]},
    "capabilities": dict.fromkeys(CAPABILITY_SETS, [CAPABILITIES]),
    "rlimits": [{"type": RLIMIT_TYPES, "soft!": range(1 << 64),
                 "hard!": range(1 << 64)}],
    "noNewPrivileges": bool, "oomScoreAdj": range(-1000, 1001),
    "ioPriority": {"class": IOPRIO_CLASSES, "priority": range(8)},
    "scheduler": {"policy": SCHED_POLICIES, "flags": [SCHED_FLAGS],
                  "nice": range(-20, 20), "priority": range(100),
                  **dict.fromkeys(("runtime", "deadline", "period"), range(1 << 64))},
    "apparmorProfile": str, "selinuxLabel": str}
RATES = [{"major!": IDS, "minor!": IDS, "rate!": range(1 << 64)}]
SIGNED = range(-1, 1 << 63)
ARCHITECTURES = tuple(f"SCMP_ARCH_{name}" for name in """X86 X86_64 X32 ARM AARCH64
    MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64 PPC64LE S390 S390X
    PARISC PARISC64 RISCV64 LOONGARCH64 M68K SH SHEB NATIVE""".split())
RESOURCES_FORM = {
    "memory": {"limit": SIGNED, "swap": SIGNED, "reservation": SIGNED,
               "kernelTCP": SIGNED, "swappiness": range(101), "disableOOMKiller": bool,
               "checkBeforeUpdate": bool},
    "cpu": {"shares": range(1 << 64), "quota": range(-(1 << 63), 1 << 63),
            "period": range(1 << 64), "burst": range(1 << 64), "idle": range(2),
            "realtimeRuntime": range(-1, 1 << 63), "realtimePeriod": range(1 << 64),
            "cpus": str, "mems": str},
    "hugepageLimits": [{"pageSize!": str, "limit!": range(1 << 64)}],
    "network": {"classID": IDS, "priorities": [{"name!": str, "priority!": IDS}]},
    "unified": MAP,
    "pids": {"limit": range(-(1 << 63), 1 << 63)},
    "blockIO": {"weight": range(1001), **{key: RATES for *_, key in THROTTLES},
                "weightDevice": [{"major!": IDS, "minor!": IDS,
                                   "weight!": range(1001)}]},
    "devices": [{"allow": bool, "type": ("a", "b", "c", None, ""), "access": str,
                 "major": SIGNED, "minor": SIGNED}]}
SPEC_FORM = {
    "ociVersion": str, "process": PROCESS_FORM, "root": {"path": str, "readonly": bool},
    "hostname": str, "domainname": str, "annotations": MAP,
    "mounts": [{"destination!": str, "type": str, "source": str, "options": TEXTS,
                "uidMappings": MAPPINGS, "gidMappings": MAPPINGS}],
    "hooks": dict.fromkeys(HOOKS, [{"path!": str, "args": TEXTS, "env": TEXTS,
                                    "timeout": range(1, 1 << 31)}]),
    "linux": {
        "namespaces": [{"type": tuple(NAMESPACES), "path": str}],
        "uidMappings": MAPPINGS, "gidMappings": MAPPINGS, "cgroupsPath": str,
        "devices": [{"path!": str, "type": ("b", "c", "u", "p"), "major": IDS,
                     "minor": IDS, "fileMode": IDS, "uid": IDS, "gid": IDS}],
        "resources": RESOURCES_FORM, "sysctl": MAP, "maskedPaths": TEXTS,
        "readonlyPaths": TEXTS, "rootfsPropagation": (*PROPAGATIONS, None, ""),
        "timeOffsets": dict.fromkeys(CLOCKS, {"secs": range(-(1 << 63), 1 << 63),
                                              "nanosecs": range(10 ** 9)}),
        "personality": {"domain": tuple(PERSONAS), "flags": [()]},
        "seccomp": {**PROFILE_FORM, "architectures": [ARCHITECTURES],
                    "listenerPath": str, "listenerMetadata": str}}}
# What would change the container, and is not done; the rest of what we do not know is
# to be ignored, says the specification.
REFUSED = """process.execCPUAffinity vm linux.intelRdt linux.mountLabel
    linux.memoryPolicy linux.netDevices linux.resources.rdma
    linux.resources.blockIO.leafWeight""".split()
# The devices that work in every container, whatever resources.devices says: making
# any node, terminals, and those of DEVICES.
USUAL_DEVICES = [{"allow": True, "type": kind, "major": major, "minor": minor,
                  "access": access} for kind, major, minor, access in (
    ("c", None, None, "m"), ("b", None, None, "m"), ("c", 1, 3, "rwm"),
    ("c", 1, 5, "rwm"), ("c", 1, 7, "rwm"), ("c", 1, 8, "rwm"), ("c", 1, 9, "rwm"),
    ("c", 5, 0, "rwm"), ("c", 5, 2, "rwm"), ("c", 136, None, "rwm"))]


def check_refused(spec):
    """Refuse what asks for something that is not done."""
    for path in REFUSED:
        value = spec
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value:
            raise Fail(f"config.{path} is not offered", "leave it out")


def complete_process(process, place):
    """A process with all that our steps look for."""
    user, sets = process.setdefault("user", {}), process.get("capabilities") or {}
    user.pop("username", None)  # for Windows
    user.setdefault("uid", 0)
    user.setdefault("gid", 0)
    process["capabilities"] = {name: sets.get(name) or [] for name in CAPABILITY_SETS}
    for number, line in enumerate(process.get("env") or ()):
        if "=" not in line[1:]:
            refuse(f"{place}.env[{number}]", line, "NAME=VALUE")
    process["env"] = [*{line.partition("=")[0]: line
                        for line in process.get("env") or ()}.values()]  # the last
    for number, limit in enumerate(process.get("rlimits") or ()):
        if limit["soft"] > limit["hard"]:
            refuse(f"{place}.rlimits[{number}].soft", limit["soft"], "at most its hard")
    for key in ("rlimits", "oomScoreAdj", "apparmorProfile", "selinuxLabel"):
        if process.get(key) in (None, "", []):
            process.pop(key, None)
    if not process.get("args"):
        refuse(f"{place}.args", process.get("args"), "a program, and its arguments")
    if not str(process.get("cwd")).startswith("/"):
        refuse(f"{place}.cwd", process.get("cwd"), "an absolute path")


def complete_mounts(mounts, bundle):
    """Mounts in the form that our steps know: "bind" for every bind mount."""
    for number, mount in enumerate(mounts):
        place = f"config.mounts[{number}]"
        mount["options"] = words = mount.get("options") or []
        target = os.path.normpath(f"/{mount.get('destination', '')}")
        mount["destination"] = f"/{target.lstrip('/')}"
        if mount["destination"] == "/":
            refuse(f"{place}.destination", mount["destination"], "a path below /")
        if {"bind", "rbind"} & {*words} or mount.get("type") == "bind":
            mount["type"] = "bind"
            mount["source"] = os.path.join(bundle, mount.get("source") or "?")
            if not os.path.exists(mount["source"]):
                raise Fail(f"{place}.source: {mount.get('source')!r}: no such file or "
                           "directory", "a path of the host")
            for at, word in enumerate(words):
                if word not in MOUNT_WORDS:
                    refuse(f"{place}.options[{at}]", word, "an option of a bind mount")
        if bool(mount.get("uidMappings")) != bool(mount.get("gidMappings")):
            refuse(f"{place}.gidMappings", mount.get("gidMappings"),
                   "one with uidMappings, and none without")
        if mount.get("uidMappings") and mount.get("type") != "bind":
            refuse(f"{place}.uidMappings", mount["uidMappings"], "a bind mount")
        mount["source"] = mount.get("source") or mount.get("type") or "none"
        mount["type"] = mount.get("type") or "none"


def complete_resources(resources, zeros=()):
    """Resources without what is not set: to the OCI, 0 and null are that, but for a 0
    of what is only changed by one."""
    pages = {item.get("pageSize"): item.get("limit")
             for item in resources.get("hugepageLimits") or ()}
    for file in (*(resources.get("unified") or ()), *pages):
        if not file or "/" in file:
            refuse("config.linux.resources", file, "the name of a file or a page size")
    for number, rule in enumerate(resources.get("devices") or ()):
        if not {*(rule.get("access") or "")} <= {*"rwm"}:
            refuse(f"config.linux.resources.devices[{number}].access", rule["access"],
                   "letters of rwm")
    return {name: {key: value for key, value in section.items()
                   if value or value == 0 and key in zeros}
            if isinstance(section, dict) else section
            for name, section in {**resources, "hugepageLimits": pages}.items()
            if section}


def complete_linux(spec, id):
    """The spec's `linux` with all that our steps look for."""
    linux = spec["linux"] = spec.get("linux") or {}
    linux["namespaces"] = linux.get("namespaces") or []
    kinds = [namespace["type"] for namespace in linux["namespaces"]]
    for number, namespace in enumerate(linux["namespaces"]):
        if namespace["type"] == "mount" and namespace.get("path"):
            refuse(f"config.linux.namespaces[{number}].path", namespace["path"],
                   "none: a container has mounts of its own")
    if not new_namespaces(spec) & CLONE_NEWNS or len({*kinds}) < len(kinds):
        refuse("config.linux.namespaces", kinds,
               "each once, and among them a new mount namespace")
    if new_namespaces(spec) & CLONE_NEWUSER and not linux.get("uidMappings"):
        refuse("config.linux.uidMappings", None, "the ids of the new user namespace")
    for key in ("hostname", "domainname"):
        if spec.get(key) and "uts" not in kinds:
            refuse(f"config.{key}", spec[key], "none, without a uts namespace")
    if linux.get("timeOffsets") and not new_namespaces(spec) & CLONE_NEWTIME:
        refuse("config.linux.timeOffsets", linux["timeOffsets"],
               "none, without a new time namespace")
    for name in linux.get("sysctl") or ():
        kind = "network" if name.startswith("net.") else "ipc"
        if name in ("kernel.hostname", "kernel.domainname") and "uts" in kinds:
            continue
        if not name.replace("/", ".").startswith(SYSCTLS) or kind not in kinds:
            refuse("config.linux.sysctl", name, f"a setting of its {kind} namespace")
    path = linux.get("cgroupsPath") or f"/minicontainer-{id}"
    if ":" in path:
        refuse("config.linux.cgroupsPath", path, "a path; this form is systemd's")
    linux["cgroupsPath"] = os.path.normpath(f"/{path}")
    for key in ("sysctl", "devices", "maskedPaths", "readonlyPaths"):
        linux[key] = linux.get(key) or ({} if key == "sysctl" else [])
    for number, device in enumerate(linux["devices"]):
        if not device["path"]:
            refuse(f"config.linux.devices[{number}].path", "", "a path")
        if device["type"] == "p":
            device.update(major=0, minor=0)
        for key in ("major", "minor"):
            if device.get(key) is None:
                refuse(f"config.linux.devices[{number}].{key}", None, "a number")
        mode = device.get("fileMode")
        device["fileMode"] = (0o666 if mode is None else mode) & 0o7777
        device.update(uid=device.get("uid") or 0, gid=device.get("gid") or 0,
                      access="rwm", type=device["type"].replace("u", "c"))
    linux["resources"] = complete_resources(linux.get("resources") or {})
    if not namespace_flags(spec) & CLONE_NEWUSER:  # or whoever may make nodes has disks
        rules_ = linux["resources"].get("devices") or []
        linux["resources"]["devices"] = [{"allow": False}, *rules_, *USUAL_DEVICES]
    if seccomp := linux.get("seccomp"):
        seccomp["syscalls"] = seccomp.get("syscalls") or []
        for number, rule in enumerate(seccomp["syscalls"]):
            if not rule.get("names"):
                refuse(f"config.linux.seccomp.syscalls[{number}].names",
                       rule.get("names"), "the calls that it is about")
        check_profile(seccomp, "config.linux.seccomp")


def read_spec(bundle, id):
    """The config.json of a bundle, checked and completed."""
    spec = read_json(f"{bundle}/config.json", SPEC_FORM, "config")
    check_refused(spec)
    if not spec.get("process") or not (spec.get("root") or {}).get("path"):
        refuse("config", sorted(spec), "an object with a process and a root.path")
    complete_process(spec["process"], "config.process")
    spec["mounts"] = spec.get("mounts") or []
    complete_mounts(spec["mounts"], bundle)
    complete_linux(spec, id)
    if not os.path.isdir(os.path.join(bundle, spec["root"]["path"])):
        raise Fail(f"config.root.path: {spec['root']['path']!r}: no such file or "
                   "directory", "a directory, from the bundle or absolute")
    return spec


# ── the record ──


def record_directory(options):
    """Where the container's record is, or would be."""
    id = options.id
    if not id or id.strip(".") == "" or not all(
            c.isalnum() and c.isascii() or c in "_+-." for c in id):
        raise Fail(f"invalid container id: {id!r}", "letters, digits, _ + - and .")
    return os.path.join(os.path.abspath(options.root), id)


def read_record(options):
    """The record of a container."""
    directory = record_directory(options)
    try:
        return from_json(read_file(f"{directory}/state.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise Fail(f"container {options.id!r} does not exist", "see `list`") from None


def process_facts(pid):
    """(state, start time) of a process, which tell it from a later one of its number;
    ("X", 0) if there is none."""
    try:
        words = read_file(f"/proc/{pid}/stat").rpartition(") ")[2].split()
        return words[0], int(words[19])
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0


def status_of(record):
    """creating, created, running, paused or stopped."""
    state, began = process_facts(record["pid"])
    if not record["pid"] or state in "ZX" or began != record["began"]:
        return "stopped"
    if os.path.exists(f"{record['where']}/workshop"):  # its / is the host's
        return "creating"
    if cgroup_of(record["spec"]).is_frozen():
        return "paused"
    try:  # whoever would start it may have died before it could remove the FIFO
        os.close(os.open(f"{record['where']}/exec.fifo", O_WRONLY | O_NONBLOCK))
    except OSError:  # there is none any more, or nobody waits at it
        return "running"
    return "created"


def first_process(record):
    """(a pidfd of a container's first process, or -1; its status).

    In this order: a pid that is looked at first may be another's when it is opened."""
    try:
        pidfd = syscall("pidfd_open", record["pid"], 0, why="its process 1, no other")
    except OSError:  # EINVAL: it was never made
        return -1, "stopped"
    return pidfd, status_of(record)


def signal_first(record, number):
    """Send a signal to a container's first process; whether there was one."""
    pidfd, status = first_process(record)
    try:
        if status != "stopped":
            syscall("pidfd_send_signal", pidfd, number, None, 0, why="to its process 1")
        return status != "stopped"
    except ProcessLookupError:
        return False
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def lock_record(directory):
    """A descriptor that holds a container while it is made, started or removed."""
    try:
        fd = open_fd(directory, O_DIRECTORY, "one at a time")
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else the one before us has removed it
            return fd
        os.close(fd)
    except (FileNotFoundError, NotADirectoryError):
        pass
    raise Fail(f"container {os.path.basename(directory)!r} does not exist",
               "see `list`")


def oci_state(record, status):
    """A container's state, as the specification has it for hooks and `state`."""
    found = {"ociVersion": OCI_VERSION, "id": record["id"], "status": status,
             "pid": record["pid"] if status != "stopped" else 0,
             "bundle": record["bundle"]}
    if notes := record["spec"].get("annotations"):
        found["annotations"] = notes
    return found


def forget(directory):
    """Remove a record."""
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        (os.rmdir if os.path.isdir(path) else os.unlink)(path)
    os.rmdir(directory)


# ── hooks ──
#
# Programs of the caller's, each run with the container's state on its standard input:
# prestart and createRuntime on the host once the namespaces are there, createContainer
# in them before the pivot, startContainer after it, poststart and poststop on the host
# again.  One that fails or takes too long undoes the container, but for the last two,
# which come too late for that.


def run_hook(hook, state, what):
    """Run a program of the caller's with the state on its standard input; a Fail
    unless it ends well, and in time."""
    its = os.memfd_create("state")  # a pipe would wait for a hook that does not read
    os.write(its, to_json(state).encode())
    os.lseek(its, 0, os.SEEK_SET)
    refusal = os.pipe()  # closed by execve
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(its, 0)
            os.dup2(2, 1)  # 1 is the container's
            os.setsid()  # to be killed with what it has begun
            close_all_but(3, refusal[1])
            reset_signals(None)
            env = dict(line.partition("=")[::2] for line in hook.get("env") or ())
            os.execve(hook["path"], hook.get("args") or [hook["path"]], env)
        except OSError as error:
            os.write(refusal[1], error.strerror.encode())
        finally:
            os._exit(127)
    os.close(its)
    os.close(refusal[1])
    refused = os.read(refusal[0], 100).decode()
    os.close(refusal[0])
    poll, pidfd = select.poll(), syscall("pidfd_open", pid, 0, why=f"a {what} hook")
    poll.register(pidfd, select.POLLIN)
    in_time = poll.poll(hook["timeout"] * 1000 if hook.get("timeout") else None)
    os.close(pidfd)
    if not in_time:
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code or not in_time:
        how = f"ended with {code}" if in_time else "took too long"
        raise Fail(f"the {what} hook {hook['path']}"
                   + (f": {refused}" if refused else f" {how}"), "see what it printed")


def run_hooks(c, *kinds, status, pid):
    """Run the container's hooks of these kinds, in order."""
    hooks = c.spec.get("hooks") or {}
    state = oci_state({"id": c.id, "pid": pid, "bundle": c.directory, "spec": c.spec},
                      status)
    for kind in kinds:
        for hook in hooks.get(kind) or ():
            run_hook(hook, state, kind)


def run_late_hooks(record, kind, status):
    """Run hooks that come too late to undo anything: one that fails is told."""
    for hook in (record["spec"].get("hooks") or {}).get(kind) or ():
        try:
            run_hook(hook, oci_state(record, status), kind)
        except Fail as fail:
            say(fail.message)


@answers("hooks")
def run_host_hooks(c):
    """Outside: the hooks of a container that has its namespaces, on the host."""
    run_hooks(c, "prestart", "createRuntime", status="creating", pid=c.pid)


def run_create_hooks(c):
    """Step: hooks that see all mounts, those of the host and of the container."""
    if c.spec.get("hooks"):
        c.ask_parent("hooks")
        pid = int(os.readlink("/proc/self"))  # the host's number: its /proc is there
        run_hooks(c, "createContainer", status="creating", pid=pid)


# ── steps, where they differ ──
#
# A caller's container outlives the process that created it, and has standard streams
# that the caller made.  So in place of dying with its parent it waits for whoever
# starts it, and in place of getting pipes of ours it becomes the owner of the caller's.


def open_fifos(c):
    """Outside: what init will wait at; open for both, no end waits for the other."""
    for name in ("exec.fifo", "news.fifo"):
        os.mkfifo(f"{c.record}/{name}", 0o600)
        c.fifos.append(open_fd(f"{c.record}/{name}", O_RDWR, "until it is started"))


def own_stdio(c):
    """Step: whoever it runs as may open its /dev/stdout, if that is a pipe."""
    user = c.spec["process"]["user"]
    for number in (0, 1, 2) if user["uid"] else ():
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            syscall("fchown", number, user["uid"], 0xFFFFFFFF, why="it is its own")


def await_start(c):
    """Step: tell the parent that all is ready, and wait for the one who starts it."""
    c.tell_parent()
    os.close(c.news[1])
    os.close(c.orders[0])
    c.orders, c.news = (c.fifos[0], -1), (-1, c.fifos[1])
    c.await_parent()
    run_hooks(c, "startContainer", status="created", pid=os.getpid())
    c.tell_parent()


def tell_runs(c):
    """Step: in place of die_with_parent, for what outlives the one who started it."""
    c.tell_parent()


def replace_steps(steps, instead):
    """Steps, with others in place of some."""
    return [new for step in steps for new in instead.get(step, (step,))]


def oci_steps(steps, last, options=None):
    """BIRTH or JOIN as a caller of ours needs it; `last` is in place of what makes a
    program die with us."""
    return replace_steps(steps, {
        die_with_parent: (find_program, last),  # `create` tells if there is none
        make_cwd: (), pivot: (  # hooks may mount something where it is to be
            run_create_hooks, move_root if options and options.no_pivot else pivot,
            make_cwd, share_root),
        new_keyring: () if options and options.no_new_keyring else (new_keyring,),
        become_user: (own_stdio, become_user)})


# ── create, start, run, exec ──


def begin(spec, process, options, stays):
    """Refuse a terminal that nobody would have; be sealed; and keep of what the caller
    had open only 0, 1, 2 and what is to be passed on: how many, from 3 on."""
    if not process.get("terminal") and options.console_socket:
        raise Fail("--console-socket without a terminal", "set process.terminal")
    if process.get("terminal") and not options.console_socket and not stays:
        raise Fail("a terminal of what goes on without us, and no --console-socket",
                   "name one, or unset process.terminal")
    seal_interpreter(spec)
    preserved = whole("--preserve-fds", options.preserve_fds, 0, 1 << 10)
    close_all_but(3 + preserved, narration.fd)
    return preserved


def send_descriptor(path, fd, message, what):
    """Send a descriptor and a message to whoever listens at a socket."""
    import _socket

    try:
        socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        socket.connect(path)
        socket.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS,
                                    struct.pack("i", fd))])
        socket.close()
    except OSError as error:
        raise Fail(f"{what} {path}: {error.strerror}",
                   "somebody has to listen there") from None


def send_console(c, path):
    """Send our end of the terminal to whoever listens at a socket."""
    fd = c.outer["console"]
    os.set_blocking(fd, True)
    if size_ := c.spec["process"].get("consoleSize"):
        TIOCSWINSZ = 0x5414
        fcntl.ioctl(fd, TIOCSWINSZ, struct.pack("4H", size_["height"], size_["width"],
                                                0, 0))
    send_descriptor(path, fd, b"/dev/ptmx", "--console-socket")


@answers("listener")
def pass_listener(c, fd):
    """Outside: send what asks about system calls to the one who is to judge them."""
    profile = c.spec["linux"]["seccomp"]
    fd = syscall("pidfd_getfd", c.pidfd, fd, 0, why="where the kernel will ask")
    lines = lines_of(f"/proc/self/fdinfo/{c.pidfd}")
    pid = next(int(line[4:]) for line in lines if line.startswith("Pid:"))
    record = {"id": c.id, "pid": pid, "bundle": c.directory, "spec": c.spec}
    message = {"ociVersion": OCI_VERSION, "fds": ["seccompFd"], "pid": pid,
               "metadata": profile.get("listenerMetadata", ""),
               "state": oci_state(record, "creating" if c.is_new else "running")}
    send_descriptor(profile["listenerPath"], fd, to_json(message).encode(),
                    "linux.seccomp.listenerPath")
    os.close(fd)


def hand_over(c, options):
    """Give the caller what was asked for: the terminal, then the pid."""
    if options.console_socket:
        send_console(c, options.console_socket)
        os.close(c.outer.pop("console"))
    if path := options.pid_file:  # whole or not at all (P3)
        write_file(f"{path}.new", str(c.pid), create=0o644)
        os.rename(f"{path}.new", path)


def create_container(options, stays=False):
    """Make a container whose init waits to be started; its record, and it."""
    directory, bundle = record_directory(options), os.path.realpath(options.bundle)
    spec = read_spec(bundle, options.id)
    preserved = begin(spec, spec["process"], options, stays)
    os.makedirs(options.root, 0o700, exist_ok=True)
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        raise Fail(f"container with id exists: {options.id}", "see `list`") from None
    record = {"id": options.id, "bundle": bundle, "spec": spec, "where": directory,
              "created": rfc3339()}
    c = Container(options.id, spec, bundle)
    c.record, c.workshop, c.preserved = directory, f"{directory}/workshop", preserved
    c.lock = lock_record(directory)

    def note(c):  # so that `delete` finds all that there is, were we killed now
        record.update(pid=max(c.pid, 0), began=process_facts(c.pid)[1])
        save(f"{directory}/state.json", record)

    try:
        os.mkdir(c.workshop)
        before = replace_steps(BEFORE, {
            make_cgroup: (open_fifos, make_cgroup, note), open_stdio: ()})
        start(c, before, (note, *OUTSIDE), oci_steps(BIRTH, await_start, options))
        if c.pid != record["pid"]:  # see be_born_again
            note(c)
        os.rmdir(c.workshop)
        hand_over(c, options)
    except BaseException:
        end(c)
        forget(directory)
        if record.get("pid"):  # there was one, whose hooks may have made something
            run_late_hooks(record, "poststop", "stopped")
        raise
    for fd in c.fifos:
        os.close(fd)
    c.fifos = []
    return record, c


def release(c, record):
    """Have the init of a container that was created become the program."""
    where = record["where"]
    try:
        news = open_fd(f"{where}/news.fifo", os.O_RDONLY | O_NONBLOCK, "what init says")
        os.set_blocking(news, True)
        c.news = news, -1
        c.orders = -1, open_fd(f"{where}/exec.fifo", O_WRONLY | O_NONBLOCK,
                               "init waits for a word, unless it is dead")
        c.answer("go")
        c.listen()
        os.unlink(f"{where}/exec.fifo")
    except BaseException:
        signal_first(record, signal.SIGKILL)
        raise


def start_container(record, held):
    """Start a container that was created; returns when its program runs, or with an
    error when it is dead.  `held` is its lock, and is given back."""
    c = Container(record["id"], record["spec"], record["bundle"])
    try:
        c.pidfd, status = first_process(record)
        if status != "created":
            raise Fail(f"cannot start a container that is {status}",
                       "create makes one that can be started")
        release(c, record)
    finally:
        c.close()
        os.close(held)  # a hook may want to do something to the container
    run_late_hooks(record, "poststart", "running")


def stay_at_terminal(c):
    """Pass on what is typed at our terminal and shown at its, until it ends; its exit
    code.  What it does not take is not read either."""
    import termios
    import tty

    master, typed, size_of = c.outer["console"], b"", bytes(8)  # struct winsize

    def resize(*_):
        fcntl.ioctl(master, termios.TIOCSWINSZ,
                    fcntl.ioctl(0, termios.TIOCGWINSZ, size_of))

    poll, before = select.poll(), termios.tcgetattr(0) if os.isatty(0) else None
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda number, _: os.kill(c.pid, number))
    if before:
        tty.setraw(0)
        resize()
        signal.signal(signal.SIGWINCH, resize)
    poll.register(0, select.POLLIN)
    try:
        while True:
            poll.register(master, select.POLLIN | (select.POLLOUT if typed else 0))
            for fd, events in poll.poll():
                if fd == 0:
                    typed += os.read(0, 1024)
                    poll.unregister(0)  # no more before this is taken
                elif events & select.POLLIN:
                    shown = os.read(master, 1 << 16)
                    while shown:
                        shown = shown[os.write(1, shown):]
                elif events & select.POLLOUT:
                    typed = typed[os.write(master, typed):]
                    if not typed:
                        poll.register(0, select.POLLIN)
                else:
                    return c.wait()  # nobody has it open any more
    finally:
        if before:
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def stay_with(c):
    """Pass signals on to a process until it ends; its exit code."""
    if "console" in c.outer:
        return stay_at_terminal(c)
    every = signal.valid_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, every)
    while True:  # it may have ended before, and nobody tells twice
        pid, status = os.waitpid(c.pid, os.WNOHANG)
        if pid:
            c.status = status
            return c.wait()
        told = signal.sigwaitinfo(every)
        if told.si_signo not in (signal.SIGCHLD, signal.SIGURG):
            os.kill(c.pid, told.si_signo)


def delete_container(options, force):
    """Remove all that is left of a container that has ended, or is to end now."""
    where = record_directory(options)
    if force and os.path.exists(f"{where}/state.json"):
        signal_first(read_record(options), signal.SIGKILL)  # who makes it lets go then
    held = lock_record(where)
    try:
        if force and not os.path.exists(f"{where}/state.json"):
            forget(where)  # its `create` was killed before there was more
            return
        record = read_record(options)
        status = status_of(record)
        if status not in ("stopped", "created") and not force:
            raise Fail(f"cannot delete container {options.id} that is not stopped: "
                       f"{status}", "kill it before, or --force")
        signal_first(record, signal.SIGKILL)
        cgroup_of(record["spec"]).remove()
        wait_for(lambda: status_of(record) == "stopped")
        forget(where)
    finally:
        os.close(held)
    run_late_hooks(record, "poststop", "stopped")


@oci("create", *START_OPTIONS, ID)
def create_command_oci(options):
    """Make a container that waits to be started."""
    create_container(options)


@oci("start", ID)
def start_command_oci(options):
    """Start the program of a container that was created."""
    held = lock_record(record_directory(options))
    start_container(read_record(options), held)


@oci("run", *START_OPTIONS, arg("-d", "--detach", action="store_true",
                                help="return when it runs"),
     arg("--keep", action="store_true", help="do not delete it when it has ended"), ID)
def run_command_oci(options):
    """Create a container, start it, and stay with it until it ends."""
    record, c = create_container(options, not options.detach)
    try:
        start_container(record, c.lock)
        code = 0 if options.detach else stay_with(c)
    except BaseException:
        delete_container(options, True)
        raise
    if not (options.detach or options.keep):
        delete_container(options, True)
    return code


HELD_BACK = "capabilities", "rlimits", "apparmorProfile", "selinuxLabel"


def exec_process(options, spec):
    """The process that `exec` is to run: from a file, or the container's with what the
    options say."""
    process = from_json(to_json(spec["process"]))
    if options.process:  # what it leaves out of what holds a process back is as in ours
        given = read_json(options.process, PROCESS_FORM, "process")
        process = {**{key: process[key] for key in HELD_BACK if key in process},
                   **{key: value for key, value in given.items()
                      if value or key not in HELD_BACK}}
    else:
        process.update(args=options.words, terminal=options.tty,
                       cwd=options.cwd or process["cwd"])
        process["env"] += options.env
        user, _, group = options.user.partition(":")
        if options.user:
            process["user"] = {**process["user"],
                               "uid": whole("--user", user, 0, IDS.stop - 1)}
        if group:
            process["user"]["gid"] = whole("--user", group, 0, IDS.stop - 1)
        more = [whole("--additional-gids", gid, 0, IDS.stop - 1)
                for gid in options.additional_gids]
        process["user"]["additionalGids"] = [
            *(process["user"].get("additionalGids") or ()), *more]
        for name in capability_names("--cap", options.cap):
            for key in CAPABILITY_SETS[:3]:
                process["capabilities"][key].append(name)
        if options.no_new_privs:
            process["noNewPrivileges"] = True
        if options.apparmor:
            process["apparmorProfile"] = options.apparmor
    complete_process(process, "process")
    return process


@oci("exec", *START_OPTIONS[1:4], arg("-p", "--process", metavar="FILE", default="",
                                      help="a process as in config.json"),
     arg("-d", "--detach", action="store_true", help="return when it runs"),
     arg("-t", "--tty", action="store_true", help="give it a terminal"),
     arg("--cwd", metavar="DIR", default="", help="directory to start in"),
     arg("-e", "--env", metavar="NAME=VALUE", action="append", default=[],
         help="set a variable"),
     arg("-u", "--user", metavar="UID[:GID]", default="", help="whom it runs as"),
     arg("-g", "--additional-gids", metavar="GID", action="append", default=[],
         help="one more group"),
     arg("-c", "--cap", metavar="NAME", action="append", default=[],
         help="one more capability"),
     arg("--no-new-privs", action="store_true", help="it can gain no privileges"),
     arg("--apparmor", metavar="PROFILE", default="", help="hold it to this profile"),
     arg("--ignore-paused", action="store_true", help="also in a paused container"),
     arg("--cgroup", metavar="PATH", default="", help="a group below the container's"),
     ID,
     arg("words", nargs="A*", metavar="COMMAND", help="program and arguments"))
def exec_command_oci(options):
    """Run one more process in a container."""
    record = read_record(options)
    process = exec_process(options, spec := record["spec"])
    preserved = begin(spec, process, options, not options.detach)
    target, status = first_process(record)
    if status in ("stopped", "creating") or (
            status == "paused" and not options.ignore_paused):
        raise Fail(f"cannot exec in a {status} container", "container not running")
    c = Container(options.id, {**spec, "process": process}, record["bundle"])
    c.is_new, c.preserved, c.target = False, preserved, target
    c.cgroup = cgroup_of(spec)
    if options.cgroup:
        c.cgroup.path += os.path.normpath(f"/{options.cgroup}")
        if ".." in options.cgroup.split("/") or not c.cgroup.exists():
            raise Fail(f"--cgroup {options.cgroup}: the container has no such group",
                       "make it first, below its own")
    enter(c, (open_cgroup,), oci_steps(JOIN, tell_runs))
    try:
        hand_over(c, options)
    except BaseException:
        kill_and_wait(c)
        raise
    return 0 if options.detach else stay_with(c)


# ── the other turns ──
#
# They find the container by its record, which has the pid of its first process and when
# that began: if a later process has got the number since, the container has stopped.


def signal_number(text, wrong=""):
    """The signal that TERM, SIGTERM, RTMIN+3 or 15 means; 0 asks whether there is a
    process.  `wrong` is how Docker says that it is none, with exit code 1."""
    name = text.upper().removeprefix("SIG")
    number = getattr(signal, f"SIG{name}", None)
    if number is None or "_" in name:  # SIG_IGN and its like are none
        number = {**{f"{n}": n for n in range(65)},
                  **{f"RTMIN+{n}": signal.SIGRTMIN + n for n in range(1, 16)},
                  **{f"RTMAX-{n}": signal.SIGRTMAX - n for n in range(1, 15)}}.get(name)
    if number is None:
        raise Fail(f"{wrong}{text}" if wrong else f"unknown signal {text!r}",
                   "a name or a number, see `kill -l`", 1 if wrong else 125)
    return number


@oci("kill", arg("-a", "--all", action="store_true", help="all of its processes"), ID,
     arg("signal", nargs="?", metavar="SIGNAL", help="TERM, if none is named"))
def kill_command_oci(options):
    """Send a signal to a container's first process, or to all."""
    record, number = read_record(options), signal_number(options.signal or "TERM")
    cgroup = cgroup_of(record["spec"])
    if not options.all:
        if not signal_first(record, number):
            raise Fail("container not running", "it has ended")
        if number == signal.SIGKILL and status_of(record) == "paused":
            cgroup.freeze(False)
    elif number == signal.SIGKILL:
        cgroup.kill()  # also those that are just being born
    else:
        for pid in cgroup.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it has just ended
                pass


@oci("delete", arg("-f", "--force", action="store_true",
                   help="kill it if it runs; and no error if there is none"), ID)
def delete_command_oci(options):
    """Remove a container that has ended."""
    try:
        delete_container(options, options.force)
    except Fail:
        if not options.force or os.path.isdir(record_directory(options)):
            raise  # else there is none, or somebody has just removed it


def full_state(options):
    """A container's state as runc tells it."""
    record = read_record(options)
    rootfs = os.path.join(record["bundle"], record["spec"]["root"]["path"])
    return {**oci_state(record, status_of(record)), "rootfs": rootfs,
            "created": record["created"], "owner": "root"}


@oci("state", ID)
def state_command_oci(options):
    """Print a container's state as JSON."""
    print(to_json(full_state(options)))


@oci("list", arg("-f", "--format", choices=["table", "json"], default="table",
                 help="table or json"),
     arg("-q", "--quiet", action="store_true", help="only the ids"))
def list_command_oci(options):
    """Show all containers of this --root."""
    rows = []
    there = os.listdir(options.root) if os.path.isdir(options.root) else ()
    for id in sorted(there):
        options.id = id
        try:
            rows.append(full_state(options))
        except Fail:  # it is just being made, or deleted
            continue
    if options.quiet:
        print("".join(f"{row['id']}\n" for row in rows), end="")
    elif options.format == "json":
        print(to_json(rows))
    else:
        form = "{id:24} {pid!s:8} {status:10} {bundle:40} {created:22} {owner}".format
        titles = ("id", "pid", "status", "bundle", "created", "owner")
        for row in ({title: title.upper() for title in titles}, *rows):
            print(form(**row))


def shown_by_ps(pids, words):
    """The lines of the host's `ps`, with these options, about some processes."""
    import subprocess

    done = subprocess.run(["ps", *words], capture_output=True, text=True)
    title, *rows = done.stdout.splitlines() or [""]
    if done.returncode or "PID" not in title.split():
        raise Fail(f"ps {' '.join(words)}: {done.stderr.strip() or title}",
                   "options that show a PID", 1)
    column = title.split().index("PID")
    return [title, *(row for row in rows if int(row.split()[column]) in pids)]


@oci("ps", arg("-f", "--format", choices=["table", "json"], default="table",
               help="table, as `ps -ef`, or the pids as json"), ID,
     arg("words", nargs="A*", metavar="PS-OPTIONS", help="for `ps`, instead of -ef"))
def ps_command_oci(options):
    """Show the processes of a container."""
    pids = cgroup_of(read_record(options)["spec"]).pids()
    print(to_json(pids) if options.format == "json" else
          "\n".join(shown_by_ps(pids, options.words or ["-ef"])))


def freeze_container(options, frozen, *wanted):
    """Freeze or thaw a container that is in one of the statuses `wanted`."""
    record = read_record(options)
    if (status := status_of(record)) not in wanted:
        raise Fail(f"container not {wanted[0]}", f"it is {status}")
    cgroup_of(record["spec"]).freeze(frozen)


@oci("pause", ID)
def pause_command_oci(options):
    """Stop all processes of a container where they stand."""
    freeze_container(options, True, "running", "created")


@oci("resume", ID)
def resume_command_oci(options):
    """Let a paused container go on."""
    freeze_container(options, False, "paused")


def change_limits(cgroup, resources):
    """Set limits of a group in which somebody lives.

    subtle: version 1 never takes a swap limit below that of memory, so which of the two
    is written first depends on whether they grow or shrink."""
    memory, used = resources.get("memory", {}), cgroup.measure()["memory"] or 0
    if memory.get("limit") == -1:  # it would be more than what swap is limited to
        memory.setdefault("swap", -1)
    if memory.get("checkBeforeUpdate") and -1 < memory.get("limit", -1) < used:
        raise Fail(f"memory.limit {memory['limit']} is less than the {used} in use",
                   "checkBeforeUpdate asks to refuse what would kill somebody")
    if cgroup.trees and "swap" in memory:  # more than it was?
        try:
            cgroup.set_limits({"memory": {"swap": memory["swap"]}})
        except Fail:  # less: then memory goes first
            pass
    cgroup.set_limits(resources)


LIMIT_OPTIONS = {  # of `update`: where in the resources each is
    "--memory": "memory limit", "--memory-swap": "memory swap",
    "--memory-reservation": "memory reservation", "--cpu-period": "cpu period",
    "--cpu-quota": "cpu quota", "--cpu-share": "cpu shares", "--cpu-burst": "cpu burst",
    "--cpu-rt-period": "cpu realtimePeriod", "--cpu-rt-runtime": "cpu realtimeRuntime",
    "--cpu-idle": "cpu idle", "--cpuset-cpus": "cpu cpus", "--cpuset-mems": "cpu mems",
    "--pids-limit": "pids limit", "--blkio-weight": "blockIO weight"}


@oci("update", arg("-r", "--resources", metavar="FILE", default="",
                   help="resources as in config.json; - is standard input"),
     *(arg(name, metavar="N", help=f"set the limit {where}")
       for name, where in LIMIT_OPTIONS.items()),
     *(arg(name, metavar="X", help="refused: see intelRdt")
       for name in ("--l3-cache-schema", "--mem-bw-schema")), ID)
def update_command_oci(options):
    """Change a container's limits."""
    if options.l3_cache_schema or options.mem_bw_schema:
        raise Fail("linux.intelRdt is not offered", "leave out its two options")
    record, resources = read_record(options), {}
    if options.resources:
        resources = read_json(options.resources, RESOURCES_FORM, "resources")
        check_refused({"linux": {"resources": resources}})
    for name, where in LIMIT_OPTIONS.items():
        text = getattr(options, name[2:].replace("-", "_"))
        if text is not None:
            section, key = where.split()
            sizes, lists = section == "memory" and text != "-1", key in ("cpus", "mems")
            resources.setdefault(section, {})[key] = (
                text if lists else size(text) if sizes else whole(name, text, -1))
    resources = complete_resources(resources, ("idle", "burst", "swappiness"))
    resources.pop("devices", None)  # as runc: they stay what they were
    if status_of(record) == "stopped":
        raise Fail("container not running", "it has ended")
    change_limits(cgroup_of(record["spec"]), resources)


@oci("events", arg("--stats", action="store_true", help="once, and no more"),
     arg("--interval", metavar="TIME", default="5s", help="between two, as 500ms"), ID)
def events_command_oci(options):
    """Print what a container has used, as JSON, again and again."""
    record = read_record(options)
    cgroup, poll = cgroup_of(record["spec"]), select.poll()
    interval = nanoseconds("--interval", options.interval)
    if not interval:
        raise Fail("--interval has to be more than 0", "as in 5s")
    killed = None
    while status_of(record) != "stopped":
        used = cgroup.measure()
        if killed is not None and used["oom_kills"] > killed:
            print(to_json({"type": "oom", "id": record["id"]}))
        killed = used["oom_kills"]
        print(to_json({"type": "stats", "id": record["id"], "data": {
            "cpu": {"usage": {"total": 1000 * (used["cpu_usec"] or 0)}, "throttling": {
                "throttledTime": 1000 * (used["cpu_throttled_usec"] or 0)}},
            "memory": {"usage": {"usage": used["memory"], "max": used["memory_peak"],
                                 "limit": used["memory_limit"]}},
            "pids": {"current": used["pids"], "limit": used["pids_limit"]}}}),
            flush=True)
        if options.stats:
            return
        pidfd, _ = first_process(record)
        if pidfd >= 0:  # to hear of its end
            poll.register(pidfd, select.POLLIN)
            poll.poll(interval / 1e6)
            poll.unregister(pidfd)
            os.close(pidfd)
    if options.stats:
        raise Fail("container not running", "it has ended")


def example_spec():
    """A config.json to begin with."""
    kept = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    mounts = usual_mounts()
    mounts[1]["options"].remove("nodev")  # /dev: the control group says which work
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False, "user": {"uid": 0, "gid": 0}, "args": ["sh"],
            "env": [f"PATH={DEFAULT_PATH}", "TERM=xterm"], "cwd": "/",
            "capabilities": capability_sets(kept), "noNewPrivileges": True},
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "minirunc", "mounts": mounts,
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts",
                                                       "mount", "cgroup")],
            "maskedPaths": MASKED_PATHS, "readonlyPaths": READONLY_PATHS}}


def for_a_user(spec):
    """The example as somebody needs it who is not root: what the kernel lets nobody
    else do is left out, or shown as it is on the host."""
    linux, own = spec["linux"], {"containerID": 0, "size": 1}
    linux["namespaces"] = [*(n for n in linux["namespaces"] if n["type"] != "network"),
                           {"type": "user"}]
    linux["uidMappings"] = [{**own, "hostID": os.geteuid()}]
    linux["gidMappings"] = [{**own, "hostID": os.getegid()}]
    del linux["resources"]
    for mount in spec["mounts"]:
        mount["options"] = [word for word in mount["options"] if word != "gid=5"]
        if mount["destination"] == "/sys":
            mount.update(type="none", source="/sys", options=[
                "rbind", "nosuid", "noexec", "nodev", "ro"])
    return spec


@oci("spec", START_OPTIONS[0], arg("--rootless", metavar="BOOL", optional="true",
                                   default="", help="one for who is not root"))
def spec_command_oci(options):
    """Write a config.json to begin with."""
    import json

    path, spec = os.path.join(options.bundle, "config.json"), example_spec()
    if os.path.exists(path):
        raise Fail(f"{path} exists", "remove it first")
    spec = for_a_user(spec) if options.rootless == "true" else spec
    write_file(path, json.dumps(spec, indent=2) + "\n", create=0o644)


@oci("features")
def features_command_oci(options):
    """Print what this runtime can do, as JSON."""
    print(to_json({
        "ociVersionMin": "1.0.0", "ociVersionMax": OCI_VERSION, "hooks": HOOKS,
        "mountOptions": sorted(MOUNT_WORDS),
        "linux": {
            "namespaces": list(NAMESPACES), "capabilities": CAPABILITIES,
            "cgroup": {"v1": True, "v2": True, "systemd": False, "systemdUser": False},
            "seccomp": {"enabled": True, "actions": list(ACTIONS),
                        "operators": list(OPERATORS), "archs": [
                            f"SCMP_ARCH_{os.uname().machine.upper()}"]},
            "apparmor": {"enabled": True}, "selinux": {"enabled": True},
            "mountExtensions": {"idmap": {"enabled": True}},
            "intelRdt": {"enabled": False}}}))

# ══ 8. IMAGES ═════════════════════════════════════════════════════════════════════
#
# An image is files whose names are the digests of what is in them: a manifest names
# its config (what to run, as whom, with which variables) and its layers, so that
# whoever trusts the manifest's digest can check all the rest, and what two images
# share is there once.  Only index.json gives a manifest a name that people use:
#
#       images/index.json   docker.io/library/alpine:3.20 ──▶ sha256:3f2a…
#       images/blobs/sha256/3f2a…  manifest ──▶ config, layers (tarballs, compressed)
#       layers/8d3a…               each layer unpacked, by its diff_id: plain digest
#       ingest/…                   blobs that are still on their way
#
# That is an OCI image layout; skopeo, umoci and podman read it as it stands, also what
# came with a manifest of Docker's form, of which there is one of OCI's as well.  Files
# come in by rename once they are verified, and index.json last: a pull that is killed
# has left nothing to be seen, and goes on where it ended.  Who adds holds a shared
# lock of blobs/, so that nobody sweeps away what no name leads to yet.
#
# A layer is a tarball on its way, and a directory at rest: every container that uses
# it sees that directory through an id-mapped mount, with the image's own owners and
# modes.  A tarball is hostile until shown otherwise: names with "..", a symlink and
# then a file written through it, a hard link to outside.  So what it names is reached
# from a descriptor of the layer, with openat2 and RESOLVE_IN_ROOT: a symlink to /etc
# leads to the layer's own, which is what it means, and what others make of it.  And as
# a few kilobytes can mean a petabyte of zeros, of entries or of headers, each of the
# three is bounded.  And a layer can take away: an entry `.wh.NAME` says that NAME of
# the layers below is gone, `.wh..wh..opq` that its directory hides all of them; overlay
# says it with a device 0,0 and an attribute.
#
# The default root file system needs no tarball and no network: it is made of what the
# host has, a static busybox or else its shell and common tools, with the libraries
# that the dynamic linker says it would load for them.
#
# Man pages: tar(5), ld.so(8); the OCI image specification.

calls(syncfs=(306, 267, "fd"))

DATA_HOME = ("/var/lib" if os.geteuid() == 0 else os.environ.get("XDG_DATA_HOME")
             or os.path.expanduser("~/.local/share"))  # "~/…" if nobody knows his home


def absolute(path):
    """A path from the root on; as it is if where we are is gone, which is told by
    whoever needs it."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        return path


STORE = absolute(os.environ.get("MINICONTAINER_ROOT") or f"{DATA_HOME}/minicontainer")
OPAQUE = "trusted.overlay.opaque"  # overlay's note on a directory that hides all below
PARENTS = set()  # directories of the store that are there
FOLDER = os.O_RDONLY | O_DIRECTORY | os.O_NOFOLLOW | O_CLOEXEC


def store(*names):
    """A path in the store, its directory made if need be.

    Only root may look in: a layer has setuid programs that the host never asked for.
    """
    path = os.path.join(STORE, *names)
    parent = os.path.dirname(path)
    if parent not in PARENTS:
        os.makedirs(parent, mode=0o700, exist_ok=True)
        PARENTS.add(parent)
    return path


def need_root(what):
    """Refuse, in words, to begin what only root can finish."""
    if os.geteuid() != 0 or rootless.uid:
        python = "python3 " * sys.argv[0].endswith(".py")
        raise Fail(f"only root can {what}", f"sudo {python}{sys.argv[0]} …")


def check_store(uid):
    """Make an ordinary user's store, and refuse one that somebody else could have put
    something into."""
    cure = "MINICONTAINER_ROOT=/DIRECTORY names another place"
    if not (os.path.isabs(DATA_HOME) or os.environ.get("MINICONTAINER_ROOT")):
        raise Fail("there is no home directory for the store: set HOME", cure)
    try:
        os.makedirs(STORE, mode=0o700, exist_ok=True)
        status = os.lstat(STORE)
    except OSError as error:
        raise Fail(f"the store {STORE}: {error.strerror}", cure) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid:
        raise Fail(f"the store {STORE} is not a directory of yours", cure)
    if status.st_mode & 0o077:
        raise Fail(f"others may look into the store {STORE}", f"chmod 700 {STORE}")
    top = os.path.dirname(os.path.realpath(STORE))
    above = os.stat(top)
    if above.st_uid not in (0, uid) or above.st_mode & 0o1002 == 0o002:
        raise Fail(f"others may take the store away from {top}", cure)


def holder(fd):
    """A process that has locked an open file, or 0; fcntl(2)."""
    form, F_WRLCK, F_UNLCK = "hhqqi4x", 1, 2  # struct flock
    found = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(form, F_WRLCK, 0, 0, 0, 0))
    kind, *_, pid = struct.unpack(form, found)
    return 0 if kind == F_UNLCK else pid


def stay_in_users():
    """Show all who come later that this process is in the engine's namespace."""
    if rootless.uid:
        fcntl.lockf(rootless.fd, fcntl.LOCK_SH)


def be_root():
    """Be root: of the host, or, for an ordinary user, of the namespace that his engine
    has (chapter 2), with a store of his own."""
    global OPAQUE
    uid, inside = os.geteuid(), "MINICONTAINER_UID" in os.environ and (
        read_file("/proc/self/uid_map").split()[1] != "0")  # have we started anew?
    if uid == 0 and not inside:
        return
    rootless.uid = uid or int(os.environ["MINICONTAINER_UID"])
    if uid:
        check_store(uid)
    kept = os.environ.pop("MINICONTAINER_USERS", "")
    rootless.fd = int(kept) if inside and kept else os.open(
        store("users"), O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(rootless.fd, False)
    fcntl.flock(rootless.fd, fcntl.LOCK_EX)  # one after the other, or there were two
    while uid:
        if not (pid := holder(rootless.fd)):
            make_users()
            break
        try:
            fd = open_fd(f"/proc/{pid}/ns/user", os.O_RDONLY, "our containers' ids")
        except OSError:
            if holder(rootless.fd) == pid:
                raise
            continue  # it has just ended
        if holder(rootless.fd) == pid:  # or the number was somebody else's by then
            visit_users(fd)
            break
        os.close(fd)
    stay_in_users()
    fcntl.flock(rootless.fd, fcntl.LOCK_UN)
    look_at_maps()
    rootless.group, OPAQUE = group_of_his_own(), "user.overlay.opaque"
    os.environ.update(MINICONTAINER_UID=str(rootless.uid), MINICONTAINER_ROOT=STORE)


def lock(path, how, kind=O_DIRECTORY):
    """An open, locked descriptor of a directory, or None if it is somebody else's."""
    fd = os.open(path, os.O_RDONLY | O_CLOEXEC | kind)
    try:
        fcntl.flock(fd, how)
        return fd
    except BlockingIOError:
        os.close(fd)
        return None


def is_held(path):
    """Whether somebody has a directory locked."""
    fd = lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if fd is not None:
        os.close(fd)
    return fd is None


def take_away_file(path):
    """Remove a file that may have been moved to its place already."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_tree(path):
    """Remove a directory and all that is in it, however deep; the bytes of its files.

    Each directory is opened from the one that it is in, so no symlink is ever followed.
    Those in the eighth level are moved up to the top, which is looked at until nothing
    is left, so no more than eight are open.
    """
    from itertools import islice

    freed, serial, mark = 0, 0, f".removed-{os.urandom(8).hex()}"

    def empty(fd, level):
        nonlocal freed, serial
        while entries := list(islice(os.scandir(fd), 10_000)):  # bounds the memory
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    freed += entry.stat(follow_symlinks=False).st_size
                    os.unlink(entry.name, dir_fd=fd)
                elif level == 8:
                    serial += 1
                    os.rename(entry.name, f"{mark}-{serial}",
                              src_dir_fd=fd, dst_dir_fd=top)
                else:
                    remove(fd, entry.name, level)

    def remove(fd, name, level):
        child = os.open(name, FOLDER, dir_fd=fd)
        try:
            empty(child, level + 1)
        finally:
            os.close(child)
        os.rmdir(name, dir_fd=fd)

    try:
        top = os.open(path, FOLDER)
    except FileNotFoundError:
        return 0
    try:
        empty(top, 1)
    finally:
        os.close(top)
    os.rmdir(path)
    return freed


def temporary_directory(parent):
    """A new directory of the store, which its maker removes; or `system prune`, once
    its maker is dead."""
    top = store(parent, f".new-{os.getpid()}-{os.urandom(4).hex()}")
    os.mkdir(top, 0o755)
    return top


def new_directories(parent, make):
    """What make(top) returns, after the directories that it has made in `top` have got
    their names in a directory of the store; none if it fails.

    Names come last, by rename (P3), when the disk has what is in them: else a power cut
    could leave a name without its content, which would be taken for good ever after.
    One syncfs does that for all layers of an image: 0.5 s for 285 MB, where a sync for
    each of 50 layers, or of 13,000 files, would wait as often for everybody's writes.
    """
    top = temporary_directory(parent)
    try:
        result = make(top)
        if names := os.listdir(top):
            fd = os.open(top, FOLDER)
            syscall("syncfs", fd)
            os.close(fd)
        guard = lock(store(parent, ""), fcntl.LOCK_EX)
        try:
            for name in names:  # subtle: rename would replace a directory that is empty
                if not os.path.lexists(store(parent, name)):  # or others were faster
                    os.rename(f"{top}/{name}", store(parent, name))
        finally:
            os.close(guard)
        return result
    finally:
        remove_tree(top)


# ── work for other processes ──

BLOCK = 1 << 16  # so much at once, of whatever is passed on


def begin_job(job):
    """Do a job in a fork: (pid, descriptor of what it says, in lines of JSON).

    The fork shares all that was imported and learnt so far, as a registry's token; what
    is open it must not read from, since the place in a file would be shared too.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, ours

    def say_that(**news):
        os.write(theirs, to_json(news).encode() + b"\n")

    def tell(status, at=0, of=0):
        if not of or time.monotonic() > tell.next:
            tell.next = time.monotonic() + 0.1 * bool(of)
            say_that(show=[status, at, of])

    tell.next = 0
    try:
        syscall("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0,
                why="nobody would wait for what it does")
        say_that(result=job(tell))
    except Exception as error:
        fail = diagnose(error)
        say_that(fail=[fail.message, fail.hint, fail.code])
    finally:
        os._exit(0)


def in_parallel(jobs, show, at_once=3, tick=None, ended=None):
    """Do every job in a process of its own, some at a time: their results, in order.

    A job is a function that is given one to tell how it gets on, which ends in show(id,
    …), and tick() is called ten times a second.  Whoever has jobs that wait for others
    gives them when ended(number, result) tells of one.  Unpacking is mostly Python,
    where threads would have to take turns.
    """
    results, running, jobs = {}, {}, list(jobs)
    waiting = list(enumerate(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, (id, job) = waiting.pop(0)
                pid, fd = begin_job(job)
                running[fd] = [number, id, pid, b""]
            ready = select.select(list(running), [], [], tick and 0.1)[0]
            if tick:
                tick()
            for fd in ready:
                number, id, pid, rest = running[fd]
                text = os.read(fd, 1 << 16)
                *lines, running[fd][3] = (rest + text).split(b"\n")
                for news in map(from_json, lines):
                    if "fail" in news:
                        raise Fail(*news["fail"])
                    if "show" in news:
                        show(id, *news["show"])
                    else:
                        results[number] = news["result"]
                if not text:
                    os.close(fd)
                    del running[fd]
                    os.waitpid(pid, 0)
                    if number not in results:
                        raise Fail(f"the process for {id} was killed", "see `dmesg`")
                    for more in ended(number, results[number]) if ended else ():
                        waiting.append((len(jobs), more))
                        jobs.append(more)
    finally:
        for fd, (_, _, pid, _) in running.items():
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            os.close(fd)
    return [results[number] for number in range(len(jobs))]


# ── what is compressed ──

PACKERS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz",
           b"BZh": "bzip2"}  # the first bytes of what each has packed
ZEROS = bytes(BLOCK)


def compression(head):
    """What has compressed a file that begins so, or ""."""
    return "" if head[257:262] == b"ustar" else next(
        (name for mark, name in PACKERS.items() if head.startswith(mark)), "")


def damaged(title, reason):
    """What is said of a tarball that is none."""
    reason = (str(reason).splitlines() or [repr(reason)])[0].rstrip(":")
    return Fail(f"{title}: not a tarball, or a damaged one: {reason:.200}",
                "a .tar, plain or compressed with gzip, zstd, xz or bzip2; "
                "fetch it again?")


def pieces(file):
    """The bytes of a file, piece by piece."""
    return iter(lambda: file.read(BLOCK), b"")


def unzstd(file):
    """What zstd has packed, to be read; before Python 3.14 its program does it."""
    try:
        from compression import zstd

        return zstd.open(file)
    except ImportError:
        import subprocess
    try:
        process = subprocess.Popen(["zstd", "-dcq"], stdin=file, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise Fail("it is compressed with zstd, which this Python cannot read",
                   "apt-get install zstd, or Python 3.14") from None

    class Output:
        def read(self, length):
            data = process.stdout.read(length)
            if not data and process.wait():
                raise EOFError("zstd cannot decompress it")
            return data
    return Output()


def plain_pieces(path, title):
    """What a file was before it was compressed, piece by piece; errors have a title."""
    import bz2
    import gzip
    import lzma

    unpackers = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open, "zstd": unzstd}
    try:
        with open(path, "rb", buffering=0) as file:  # zstd gets the descriptor
            packed = compression(file.read(512))
            file.seek(0)
            yield from pieces(unpackers[packed](file) if packed else file)
    except Fail as fail:
        fail.message = f"{title}: {fail.message}"
        raise
    except Exception as error:  # each of them has its own
        if getattr(error, "errno", None):
            raise
        raise damaged(title, error) from None


def write_all(fd, data):
    """Write bytes, also to what takes only some at a time."""
    while data:
        data = data[os.write(fd, data):]


# ── tarballs ──
#
# A tarball is a row of headers of 512 bytes, each with the content of its file behind
# it, filled up to 512 again.  What found no room in a header, a long name or an
# attribute, stands in an entry of its own before it: of kind x for pax (g: for all that
# follow), L and K for GNU.  We read them ourselves, no faster than Python's tarfile
# does, but from a pipe, within bounds, and with two kinds of error: they are the one
# thing here that an attacker writes byte by byte.

LAYER_ENTRIES = 1_000_000  # more take $MINICONTAINER_LAYER_ENTRIES
HEADER_BYTES = 1 << 20  # of the extensions of one entry
FIELDS = "name mode uid gid size mtime sum kind link magic who major minor rest".split()
FIELD_BYTES = struct.Struct("100s 8s 8s 8s 12s 12s 8s c 100s 8s 64s 8s 8s 155s 12x")
KINDS = {b"0": stat.S_IFREG, b"\0": stat.S_IFREG, b"7": stat.S_IFREG,
         b"S": stat.S_IFREG, b"1": stat.S_IFREG, b"2": stat.S_IFLNK, b"3": stat.S_IFCHR,
         b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"6": stat.S_IFIFO}  # S has holes


class Entry:
    """A file as a tarball, or a directory, tells of it."""

    def __init__(self, name, mode, owner, size, when):
        self.name = name
        self.mode = mode  # as of stat(2), its kind too; 0 for a kind we do not know
        self.uid, self.gid = owner
        self.size = size  # bytes, its holes too
        self.when = when  # last changed, in nanoseconds
        self.link = ""  # where a symlink leads
        self.hard = ""  # the name of an earlier entry that is the same file
        self.device = 0
        self.xattrs = {}  # name: bytes
        self.stretches = [(0, size)]  # (at, length) of what is no hole
        self.stream = None  # a file to read all these from, one after the other

    def is_gone(self):
        """Whether it says, to overlay, that something is not there."""
        return stat.S_ISCHR(self.mode) and self.device == 0


def tar_number(field, base=8):
    """The number in a field of a header: octal digits, or binary if it says so; or
    with base 10 in what extends it."""
    if base == 8 and field[0] in (0x80, 0xff):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xff)
    text = field.partition(b"\0")[0].strip()
    try:
        return int(text or b"0", base)
    except ValueError:
        raise ValueError(f"{os.fsdecode(text[:12])!r} is no number") from None


def pax_records(data):
    """{key: value} of pax's "LENGTH KEY=VALUE\\n"."""
    found, at = {}, 0
    while at < len(data):
        space = data.index(b" ", at, at + 20)
        end = at + tar_number(data[at:space], 10)
        key, equals, value = data[space + 1:end - 1].partition(b"=")
        if not space < end <= len(data) or not equals:
            raise ValueError("a pax header is damaged")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):  # one for each hole
            key = b"GNU.sparse.map"
            value = found[key] + b"," + value if key in found else value
        found[key] = value
        at = end
    return found


def layer_bytes():
    """How many bytes may be unpacked: what is free, as it has to fit, or as was set."""
    room = os.statvfs(STORE)
    return size(os.environ.get("MINICONTAINER_LAYER_BYTES")
                or f"{room.f_bavail * room.f_frsize}")


class TarReader:
    """The entries of a tarball that is read from a file, each before the next."""

    may_end = False  # whether it may end here; before the first header is unusual

    def __init__(self, file, title):
        self.file, self.title = file, title
        self.common = {}  # what a header of kind g has said
        self.left = 0  # bytes of the content that are still to be read
        self.bytes = 0  # of all files so far

    def exactly(self, length):
        """The next bytes."""
        data = self.file.read(length)
        if len(data) < length:
            raise EOFError("it ends too early")
        return data

    def read(self, length):
        """Some bytes of an entry's content."""
        self.left -= length
        if self.left < 0:
            raise ValueError("its size and its holes do not agree")
        return self.exactly(length)

    def header(self):
        """The next header; at the end b"".  That should be a block of zeros, but some
        end right behind a file's content (`umoci insert`), and everybody takes that."""
        head = self.file.read(512)
        if 0 < len(head) < 512 or not head and not self.may_end:
            raise EOFError("it ends too early")
        self.may_end = True
        return head if head != ZEROS[:512] else b""

    def skip(self, length):
        """Pass over some bytes."""
        if self.file.seekable() and length:
            self.file.seek(length - 1, os.SEEK_CUR)
            self.exactly(1)  # or it would end beyond its end
        else:
            for at in range(0, length, BLOCK):
                self.exactly(min(BLOCK, length - at))

    def bounded(self, over, what):
        """Refuse what could fill the disk, the memory or the day."""
        if over:
            raise Fail(f"{self.title}: the tarball {what}",
                       "the bounds are MINICONTAINER_LAYER_BYTES (what is free on "
                       "the disk) and MINICONTAINER_LAYER_ENTRIES (a million)")

    def __iter__(self):
        """Every entry, while they stay within bounds."""
        most, count, notes, room = layer_bytes(), 0, {}, HEADER_BYTES
        at_most = f"unpacks to more than {human(most)}"
        entries = whole("$MINICONTAINER_LAYER_ENTRIES", os.environ.get(
            "MINICONTAINER_LAYER_ENTRIES") or f"{LAYER_ENTRIES}", 1)
        while head := self.header():
            field = dict(zip(FIELDS, FIELD_BYTES.unpack(head), strict=True))
            if tar_number(field["sum"]) != sum(head) - sum(field["sum"]) + 8 * 32:
                raise ValueError("bad checksum")
            field["size"] = tar_number(field["size"])
            if field["kind"] in b"xXgLK":
                room -= max(field["size"], 1)
                self.bounded(room < 0,
                             f"has more than {human(HEADER_BYTES)} of headers")
                notes.update(self.extension(field["kind"], field["size"]))
                continue
            entry = self.entry(field, {**self.common, **notes})
            count, notes, room = count + 1, {}, HEADER_BYTES
            self.bytes += entry.size
            self.bounded(self.bytes > most, at_most)
            if count == entries // 20 + 1:
                self.look_ahead(entries)
            self.bounded(count > entries, f"has more than {entries} entries")
            padding = -self.left % 512
            yield entry
            self.skip(self.left)
            self.file.read(padding)  # at the end there may be none

    def look_ahead(self, entries):
        """Refuse what has more entries than that before so many have been made."""

    def extension(self, kind, size):
        """What an entry says of the next one, or of all."""
        if size < 0:
            raise ValueError("a negative size")
        data = self.exactly(size + -size % 512)[:size]
        if kind in b"LK":
            return {b"path" if kind == b"L" else b"linkpath": data.partition(b"\0")[0]}
        if kind != b"g":
            return pax_records(data)
        self.common.update(pax_records(data))
        self.bounded(len(self.common) > 100 or sum(
            map(len, self.common.values())) > HEADER_BYTES, "has 100 global headers")
        return {}

    def entry(self, field, notes):
        """The Entry of a header and of what extends it."""
        def text(key, *names):
            said = next(filter(None, map(notes.get, names)), b"")
            return os.fsdecode(said or field[key].partition(b"\0")[0])

        def number(key):
            said = notes.get(key.encode())
            return tar_number(said, 10) if said else tar_number(field[key])

        kind, names = field["kind"], (b"GNU.sparse.name", b"path")
        name = text("name", *names)
        if field["magic"][:6] == b"ustar\0" and field["rest"][0] and not any(
                map(notes.get, names)):
            name = f"{text('rest')}/{name}"
        said = notes.get(b"size")
        size = (tar_number(said, 10) if said else field["size"]) * (
            kind not in b"123456")
        if size < 0:
            raise ValueError(f"{name!r} has a negative size")
        format = KINDS.get(kind, 0)
        if format == stat.S_IFREG and kind != b"1" and name.endswith("/"):
            format = stat.S_IFDIR  # before there was a kind for them
        seconds, _, decimals = notes.get(b"mtime", b"").partition(b".")
        entry = Entry(name, format | tar_number(field["mode"]) & 0o7777,
                      [number("uid"), number("gid")], size,
                      tar_number(seconds + b"%.9s" % decimals.ljust(9, b"0"), 10)
                      if seconds else tar_number(field["mtime"]) * 10**9)
        entry.stream, self.left, link = self, size, text("link", b"linkpath")
        entry.link, entry.hard = ("", link) if kind == b"1" else (link, "")
        if kind in b"34":
            entry.device = os.makedev(*(tar_number(field[key]) % (1 << 20)
                                        for key in ("major", "minor")))
        # Notes of overlay itself, that a directory hides what is below or is to be
        # found elsewhere, are made of whiteouts and of nothing else.
        entry.xattrs = {os.fsdecode(key[13:]): value for key, value in notes.items()
                        if key.startswith(b"SCHILY.xattr.") and not key[13:].startswith(
                            (b"trusted.overlay.", b"user.overlay."))}
        self.find_holes(entry, field, notes)
        return entry

    def find_holes(self, entry, field, notes):
        """Where the content of a sparse file goes: GNU tar has four ways to say it."""
        if field["kind"] == b"S":
            table, more = field["rest"][41:137], field["rest"][137]
            entry.size = tar_number(field["rest"][138:150])
            while more:
                block = self.exactly(512)
                table, more = table + block[:504], block[504]
                self.bounded(len(table) > HEADER_BYTES, "has too many holes")
            numbers = [tar_number(table[at:at + 12]) for at in range(0, len(table), 12)]
        elif notes.get(b"GNU.sparse.major") == b"1":
            text = self.read(512)
            while text.count(b"\n") <= 2 * tar_number(text.partition(b"\n")[0], 10):
                text += self.read(512)
                self.bounded(len(text) > HEADER_BYTES, "has too many holes")
            count, *numbers = (tar_number(line, 10) for line in text.split(b"\n")[:-1])
            numbers = numbers[:2 * count]
        elif b"GNU.sparse.map" in notes:
            numbers = [tar_number(part, 10)
                       for part in notes[b"GNU.sparse.map"].split(b",")]
        else:
            return
        for key in (b"GNU.sparse.size", b"GNU.sparse.realsize"):
            entry.size = tar_number(notes[key], 10) if key in notes else entry.size
        entry.stretches = list(zip(numbers[::2], numbers[1::2], strict=False))
        if len(numbers) % 2 or entry.size < 0 or any(
                at < 0 or length < 0 or at + length > entry.size
                for at, length in entry.stretches):
            raise ValueError(f"{entry.name!r} has holes that are none")


class Tarball(TarReader):
    """One that a process of its own decompresses, which works out the digest of what is
    inside, a layer's diff_id: half of the work, and there are mostly two processors."""

    def __init__(self, path, title):
        ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 16 * BLOCK)
        super().__init__(open(ours, "rb", 2 * BLOCK), title)
        self.path = path
        self.pid, self.news = begin_job(lambda tell: self.pour(path, ours, theirs))
        os.close(theirs)

    def pour(self, path, ours, theirs):
        """What that process does: all into the pipe; the digest."""
        import hashlib

        os.close(ours)  # so that it ends when nobody reads any more
        found = hashlib.sha256()
        for part in plain_pieces(path, self.title):
            found.update(part)
            write_all(theirs, part)
        return f"sha256:{found.hexdigest()}"

    def look_ahead(self, entries):
        """Count them, once there are many, in a second look at the file: to hop from
        header to header takes 3 µs each, to make a file fifty times that.  Whoever
        hides a size from it meets the slower count."""
        count = 0
        try:
            with Tarball(self.path, self.title) as other:
                while count <= entries and (head := other.exactly(512)) != ZEROS[:512]:
                    kind, size = head[156:157], tar_number(head[124:136])
                    count += kind not in b"xXgLK"
                    if size and kind not in b"123456":
                        other.skip(size + -size % 512)
        except (ValueError, EOFError):
            pass
        self.bounded(count > entries, f"has more than {entries} entries")

    def digest(self):
        """The digest, at the end; or why there is none."""
        most = 1 << 30
        while part := self.file.read(BLOCK):
            most -= len(part)
            self.bounded(most < 0, "has more than 1GiB behind its end")
        with open(self.news, "rb", closefd=False) as news:
            said = from_json(news.readline() or b"{}")
        if "result" not in said:
            raise Fail(*said.get("fail") or (f"{self.title}: its process was killed",))
        return said["result"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        os.close(self.news)
        os.waitpid(self.pid, 0)


# ── layers from tarballs ──


def write_content(entry, fd):
    """The content of a file; what is a hole, or a block of zeros, becomes a hole."""
    end = 0
    for at, length in entry.stretches:
        os.lseek(fd, at, os.SEEK_SET)
        while length:
            part = entry.stream.read(min(length, BLOCK))
            at, length = at + len(part), length - len(part)
            if part == ZEROS:
                os.lseek(fd, at, os.SEEK_SET)
            else:
                write_all(fd, part)
                end = at
    if end != entry.size:
        os.ftruncate(fd, entry.size)


def open_beneath(top, path):
    """A descriptor of a directory below `top`, reached through no symlink."""
    how = open_how(flags=FOLDER, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    return syscall("openat2", top, path, how, sizeof(how))


def parts_of(path):
    """The names in an entry's path, of which none leads out of the layer."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"{path!r} leads out of the layer")
    return parts


def is_whiteout(status):
    """Whether a file, by its stat, says to overlay that something is not there."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def set_owner(name, owner, parent):
    """Give a file to an owner, by ids; who has only one id keeps it."""
    try:
        os.chown(name, *(0, 0) if has_one_id() else owner, dir_fd=parent,
                 follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EINVAL or not rootless.uid:
            raise
        raise ValueError(f"its owner {owner[0]}:{owner[1]} is beyond the ids that "
                         "/etc/subuid and /etc/subgid grant you") from None


class Layer:
    """A directory that entries are unpacked into; a later one replaces an earlier one.

    Neighbours in a tarball mostly share their directory, so the last one stays open:
    then its path is walked once for all of them, and safely.  What is made in it
    changes its time, which is set back when it is left: so no list of a million
    directories has to be kept until the end.
    """

    def __init__(self, path):
        self.top = os.open(path, os.O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        self.fd, self.above, self.when = -1, None, 0  # the last one: its names, time

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.leave()
        os.close(self.top)

    def leave(self):
        """Be done with the directory that was open."""
        if self.fd >= 0:
            if not rootless.uid or os.fstat(self.fd).st_uid != 65534:  # `cp` to /tmp
                os.utime(self.fd, ns=(self.when, self.when))
            os.close(self.fd)
        self.fd, self.above = -1, None

    def parent(self, path):
        """(descriptor of the directory that an entry goes into, its name there)."""
        *above, name = parts_of(path) or ["."]
        if above != self.above:
            self.leave()
            self.fd, self.above = self.walk(above), above
            self.when = os.fstat(self.fd).st_mtime_ns
        return self.fd, name

    def walk(self, parts):
        """A descriptor of a directory.  Symlinks lead where they would with the layer
        as root, what is missing is made, and a file in the way replaced by a directory.
        """
        def reach(count):
            return open_in_root(self.top, "/".join(parts[:count]) or ".",
                                os.O_RDONLY | O_DIRECTORY)
        try:
            return reach(len(parts))
        except OSError:
            fd = reach(0)  # name by name, then
        for count, part in enumerate(parts, 1):
            try:
                below = reach(count)
            except OSError as error:
                gone, when = False, os.fstat(fd).st_mtime_ns
                if error.errno != errno.ENOENT:
                    there = os.lstat(part, dir_fd=fd)
                    if error.errno != errno.ENOTDIR or stat.S_ISLNK(there.st_mode):
                        raise
                    gone = is_whiteout(there)
                    os.unlink(part, dir_fd=fd)
                try:
                    os.mkdir(part, 0o755, dir_fd=fd)
                except FileExistsError:  # a symlink that leads to nothing
                    raise error from None
                os.utime(fd, ns=(when, when))
                below = reach(count)
                if gone:
                    self.hide_below(fd, part)
            os.close(fd)
            fd = below
        return fd

    def clear(self, parent, name):
        """Remove what an earlier entry has made, if anything."""
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            if name == ".":
                raise ValueError("the top of a layer is a directory") from None
            remove_tree(f"/proc/self/fd/{parent}/{name}")

    def hide_below(self, parent, name):
        """Have a directory hide what layers below have there; a file does anyway."""
        try:
            fd = open_beneath(parent, name)
        except OSError:
            return
        os.setxattr(fd, OPAQUE, b"y")
        os.close(fd)

    def add(self, entry):
        """Make the file that an entry tells of."""
        if ".wh..wh." in entry.name and not entry.name.endswith(".wh..wh..opq"):
            return  # what aufs noted for itself: some old images have it
        parent, name = self.parent(entry.name)
        if name == ".wh..wh..opq":
            os.setxattr(parent, OPAQUE, b"y")
        elif name.startswith(".wh."):
            if name[4:] in ("", ".", ".."):
                raise ValueError(f"a whiteout of {name[4:]!r}")
            try:
                os.mknod(name[4:], stat.S_IFCHR, 0, dir_fd=parent)
            except FileExistsError:  # made by this layer: it says nothing of that, but
                self.hide_below(parent, name[4:])
        elif entry.hard or stat.S_IFMT(entry.mode):
            try:
                made = self.create(entry, parent, name)
            except FileExistsError:
                there = os.stat(name, dir_fd=parent, follow_symlinks=False)
                made = True
                if not stat.S_ISDIR(entry.mode) or not stat.S_ISDIR(there.st_mode):
                    self.clear(parent, name)
                    made = self.create(entry, parent, name)
                    if is_whiteout(there):
                        self.hide_below(parent, name)
            if made and not entry.hard:
                self.set_metadata(entry, parent, name)

    def create(self, entry, parent, name):
        """Make a file of an entry's kind, with its content; never one that exists.
        Whether there is one now: an ordinary user makes no devices."""
        kind = stat.S_IFMT(entry.mode)
        if entry.hard:
            *above, old = parts_of(entry.hard)
            source = self.walk(above)
            try:
                os.link(old, name, src_dir_fd=source, dst_dir_fd=parent,
                        follow_symlinks=False)
            finally:
                os.close(source)
        elif kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=parent)
        elif kind == stat.S_IFLNK:
            os.symlink(entry.link, name, dir_fd=parent)
        elif kind == stat.S_IFREG:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                         | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                write_content(entry, fd)
            finally:
                os.close(fd)
        elif rootless.uid and kind in (stat.S_IFCHR, stat.S_IFBLK) and entry.device:
            say("devices that the image brings are left out: only root may make any")
            return False
        else:
            os.mknod(name, kind | 0o600, entry.device, dir_fd=parent)
        return True

    def set_metadata(self, entry, parent, name):
        """Owner, mode, extended attributes and times, in the order that keeps them all:
        a chown clears setuid and file capabilities.

        An attribute that the file system does not take is left out, as Docker does, but
        for capabilities: a program that was to have them would fail later, and oddly.
        """
        set_owner(name, (entry.uid, entry.gid), parent)
        if not stat.S_ISLNK(entry.mode):
            # subtle: chmod by name would follow a symlink that a container to which
            # `cp` copies has put there meanwhile, to a file of the host.
            fd = os.open(name, O_PATH | os.O_NOFOLLOW | O_CLOEXEC, dir_fd=parent)
            try:
                os.chmod(f"/proc/self/fd/{fd}", entry.mode & 0o7777)
            finally:
                os.close(fd)
            for key, value in entry.xattrs.items():
                try:
                    os.setxattr(f"/proc/self/fd/{parent}/{name}", key, value,
                                follow_symlinks=False)
                except OSError as error:
                    if key == "security.capability" or error.errno not in (
                            errno.EOPNOTSUPP, errno.EPERM):
                        raise
        os.utime(name, ns=(entry.when, entry.when), dir_fd=parent,
                 follow_symlinks=False)
        if name == ".":
            self.when = entry.when

    def add_all(self, entries, title):
        """Make every file; errors name the entry."""
        for entry in entries:
            try:
                self.add(entry)
            except (ValueError, OverflowError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise Fail(f"{title}: {entry.name!r:.200}: {reason:.200}", "is the "
                           "disk full, or the tarball damaged or hostile?") from None


def unpack(path, top, title=None, may_end=False):
    """Unpack a tarball as a layer into the directory `top`: the digest of its plain
    form, and the bytes of its files.  Errors call it by its title."""
    title = title or path
    say_one_id()
    os.makedirs(top, exist_ok=True)
    with Layer(top) as layer, Tarball(path, title) as tarball:
        tarball.may_end = may_end
        try:
            layer.add_all(tarball, title)
        except (ValueError, EOFError) as error:
            if isinstance(error, EOFError):
                tarball.digest()  # if it could not be decompressed, that is why
            raise damaged(title, error) from None
        return tarball.digest(), tarball.bytes


def sha256(file):
    """The digest of all that can be read from a file."""
    import hashlib

    found = hashlib.sha256()
    while part := file.read(1 << 20):
        found.update(part)
    return f"sha256:{found.hexdigest()}"


def layer_of(path):
    """The directory of a --rootfs: itself, or where its tarball is unpacked."""
    if os.path.isdir(path):
        return os.path.realpath(path)
    if not os.path.isfile(path):
        raise Fail(f"--rootfs {path}: " + ("neither a directory nor a tarball"
                   if os.path.exists(path) else "no such file or directory"),
                   "a directory or a tarball; ./rootfs-fetch.sh gets a real one")
    with open(path, "rb") as file:
        digits = sha256(file)[7:]
    if not os.path.isdir(store("layers", digits)):
        new_directories("layers", lambda top: unpack(path, f"{top}/{digits}"))
    return store("layers", digits)


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


def walk(begin, parent):
    """os.fwalk() of a directory, which calls itself for each level."""
    try:
        yield from os.fwalk(begin, dir_fd=parent)
    except RecursionError:
        raise Fail("directories are nested too deep to be packed",
                   "some 900 levels are possible") from None


def tree_entries(parent, begin, base, wanted=None):
    """An Entry for all that a directory, a descriptor, has under one name, with owners
    from `base` on; outer first, and by name.  What is there itself is named ".".  What
    is not `wanted`, a function of its name, is passed over with all that is in it."""
    first = {}  # inode: the name that is not a hard link to another
    is_tree = stat.S_ISDIR(os.stat(begin, dir_fd=parent, follow_symlinks=False).st_mode)
    for top, directories, files, fd in walk(begin, parent) if is_tree else [
            (begin, [], [begin], parent)]:
        for names in (directories, files):
            names[:] = sorted(name for name in names if not wanted or wanted(
                os.path.normpath(f".{top[len(begin):]}/{name}")))
        for name in ["."] * (is_tree and top == begin) + directories + files:
            path, status = f"/proc/self/fd/{fd}/{name}", os.lstat(name, dir_fd=fd)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFSOCK:  # nobody listens at it any more
                continue
            inner = f"{top[len(begin):]}/{name}".lstrip("/") if is_tree else "."
            entry = Entry(os.path.normpath(inner), status.st_mode,
                          (shifted_id(status.st_uid, base),
                           shifted_id(status.st_gid, base)),
                          status.st_size * (kind == stat.S_IFREG), status.st_mtime_ns)
            entry.device = status.st_rdev
            if kind == stat.S_IFLNK:
                entry.link = os.readlink(path)
            elif kind != stat.S_IFDIR and status.st_nlink > 1:
                entry.hard = first.setdefault(status.st_ino, entry.name)
            if entry.hard == entry.name:
                entry.hard = ""
            for key in () if kind == stat.S_IFLNK else sorted(
                    os.listxattr(path, follow_symlinks=False)):
                entry.xattrs[key] = shifted(key, os.getxattr(
                    path, key, follow_symlinks=False), base)
            # What a running container has made of it meanwhile is not followed, and not
            # waited for.
            source = os.open(name if entry.size else os.devnull, os.O_RDONLY | O_CLOEXEC
                             | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
            with open(source, "rb") as entry.stream:
                yield entry


def layer_entries(layer, base):
    """tree_entries() of all that is in a directory, and of nothing that is mounted in
    it."""
    tree = syscall("open_tree", AT_FDCWD, layer, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
    yield from tree_entries(tree, ".", base)
    os.close(tree)


def uncovered(copy, entries):
    """The entries of a layer for a copy of those below it, from which what this one
    says is gone has been taken away."""
    for entry in entries:  # overlay has no opaque top
        if entry.xattrs.pop(OPAQUE, entry.is_gone()) and entry.name != ".":
            copy.clear(*copy.parent(entry.name))
        if not entry.is_gone():
            yield entry


def copy_layers(layers, top, base):
    """Fill a directory with what an overlay of the layers would show, with owners from
    `base` on: for hosts without overlay, at the price of time and disk."""
    with Layer(top) as copy:
        for layer in layers:
            copy.add_all(uncovered(copy, layer_entries(layer, base)), layer)


def tar_header(entry):
    """The same as Python's tarfile writes it."""
    import tarfile

    info = tarfile.TarInfo(entry.name)
    info.mode, info.uid, info.gid = entry.mode & 0o7777, entry.uid, entry.gid
    info.type = tarfile.LNKTYPE if entry.hard else next(
        kind for kind, format in KINDS.items() if format == stat.S_IFMT(entry.mode))
    info.size = 0 if entry.hard else entry.size
    info.linkname = entry.hard or entry.link
    info.devmajor, info.devminor = os.major(entry.device), os.minor(entry.device)
    info.pax_headers = {"mtime": f"{entry.when // 10**9}.{entry.when % 10**9:09}", **{
        f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
        for key, value in entry.xattrs.items()}}
    return info


def pack(top, file, base=0, when=None):
    """Write a directory as the tarball of a layer, the reverse of unpack(): what says
    to overlay that something is gone is a `.wh.` entry again.  Owners from `base` on
    are a container's, and are counted from there.  `when` is in place of all times."""
    import tarfile

    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as out:
        for entry in layer_entries(top, 0):
            opaque = entry.xattrs.get(OPAQUE)
            entry.when = entry.when if when is None else when
            entry.xattrs = {key: value for key, value in entry.xattrs.items()
                            if not key.startswith(OPAQUE[:-6])}
            entry.uid, entry.gid = (id - base * (id >= base)
                                    for id in (entry.uid, entry.gid))
            if entry.is_gone():
                above, _, name = entry.name.rpartition("/")
                out.addfile(tarfile.TarInfo(os.path.join(above, f".wh.{name}")))
                continue
            if os.path.basename(entry.name).startswith(".wh."):
                raise Fail(f"{entry.name}: a name that layers keep to themselves",
                           "it says that a file is gone: call it otherwise", 1)
            out.addfile(tar_header(entry), entry.stream)
            if opaque:
                out.addfile(tarfile.TarInfo(f"{entry.name}/.wh..wh..opq"))


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


def libraries_of(path):
    """What the dynamic linker would load for a program of the host, and itself; or
    what a script's interpreter needs."""
    import re
    import subprocess

    head = open_program(os.path.realpath(path))
    if not os.path.exists(loader := interpreter_of(head)):
        return []
    if head[:2] == b"#!":
        return [loader, *libraries_of(loader)]
    said = subprocess.run([loader, "--list", path], capture_output=True, text=True)
    return list(dict.fromkeys([loader, *re.findall(r"(/\S+) \(0x", said.stdout)]))


def copy_program(path, top, target):
    """Copy a program, and every library that it asks for."""
    copy_in(path, top, target)
    for library in libraries_of(path):
        copy_in(library, top, library)


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
        new_directories("rootfs", lambda top: make_host_rootfs(f"{top}/host"))
        link = f"{default}.{os.getpid()}"
        os.symlink("host", link)
        os.replace(link, default)
        say(f"no root file system yet: made one from this host's own programs in "
            f"{STORE}/rootfs/host; ./rootfs-fetch.sh gets a real one (Alpine)")
    return os.path.realpath(default)


# ── the store of images ──

MANIFEST_LIMIT = 4 << 20  # bytes of a manifest or config; registries take no more
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
MANIFESTS = OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST
NAME, ALSO_NAME = "org.opencontainers.image.ref.name", "io.containerd.image.name"
SIZES = "minicontainer.sizes"  # annotation of ours: bytes of each layer, unpacked
AS_IT_CAME = "minicontainer.manifest"  # the same: of Docker's form, its digest, bytes
TAGGED = "minicontainer.tagged"  # the same: when a person last gave it this name
OF_IMAGE, OF_LAYERS = "minicontainer.image", "minicontainer.layers"  # a container's

DESCRIPTOR_FORM = {
    "size!": range(1 << 50), "digest!": str, "mediaType": str,
    "annotations": {NAME: str, ALSO_NAME: str, AS_IT_CAME: str},
    "platform": {"os": str, "architecture": str, "variant": str}}
MANIFEST_FORM = {"mediaType": str, "config": DESCRIPTOR_FORM,
                 "layers": [DESCRIPTOR_FORM], "manifests": [DESCRIPTOR_FORM]}
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME_FORM = (  # the first part is a host if it has a dot, a port or a capital letter
    r"(?:(?=localhost/|[^/]*[.:A-Z])(?P<host>(?:\[[0-9a-fA-F:]+\]|"
    r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::[0-9]{1,5})?)/)?"
    rf"(?P<path>{PART}(?:/{PART})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?")
CONFIG_FORM = {
    "created": str, "author": str, "architecture": str, "os": str, "variant": str,
    "rootfs": {"diff_ids": [str]},
    "config": {"User": str, "WorkingDir": str, "StopSignal": str, "Env": [str],
               "Entrypoint": [str], "Cmd": [str], "Labels": {str: str},
               "Volumes": {str: {}}, "ExposedPorts": {str: {}}},
    "history": [{"created": str, "created_by": str, "comment": str,
                 "empty_layer": bool}]}


def spelled_out(text):
    """What Docker's short name of an image means, if it is one: busybox is
    docker.io/library/busybox:latest."""
    name, at, digest = text.partition("@")
    host, slash, path = name.partition("/")
    if not slash or not (host == "localhost" or set(".:") & set(host)
                         or host != host.lower()):
        host, path = "docker.io", name
    path, colon, tag = path.partition(":")
    if host in ("docker.io", "index.docker.io"):
        host, path = "docker.io", path if "/" in path else f"library/{path}"
    return f"{host}/{path}@{digest}" if at else (
        f"{host}/{path}:{tag if colon else 'latest'}")


def full_name(text):
    """The same, or a Fail in Docker's words."""
    import re

    found = re.fullmatch(NAME_FORM, text, re.ASCII)
    if not found or len(text.partition("@")[0]) > 255 or (
            re.fullmatch("[0-9a-f]{64}", text)):
        raise NoSuch(f"invalid reference format: {text!r}",
                     "[HOST[:PORT]/]NAME[:TAG] or NAME@sha256:…, in lower case, as in "
                     "alpine:3.20")  # what cannot be the name of an image is none
    return spelled_out(text)


def new_name(text):
    """The same for an image that is about to get the name.  A digest is no part of it:
    that says what is in an image, and is for a registry to give."""
    ref = full_name(text)
    if "@" in ref:
        raise Fail("refusing to create a tag with a digest reference", "NAME:TAG", 1)
    if ref.startswith("docker.io/library/sha256:"):  # sha256:abc is the id of one
        raise Fail("refusing to create an ambiguous tag using digest algorithm as name",
                   "call it otherwise", 1)
    return ref


def short_name(ref):
    """A name in full as Docker shows it."""
    return ref.removeprefix("docker.io/").removeprefix("library/")


def split_name(ref):
    """(host, path, tag or digest) of a name in full."""
    host, _, rest = ref.partition("/")
    return host, *rest.rsplit("@" if "@" in rest else ":", 1)


def has_version(text):
    """Whether a name that a person gives has a tag or a digest."""
    return "@" in text or ":" in text.rpartition("/")[2]


def hex_of(digest):
    """The hex digits of a digest, which are a file's name: so nothing else will do."""
    digits = digest.removeprefix("sha256:")
    if len(digits) != 64 or digits == digest or set(digits) - set("0123456789abcdef"):
        raise Fail(f"not a digest that can be verified: {digest!r:.90}",
                   "sha256: and 64 hex digits are")
    return digits


def blob_path(digest):
    """Where the store has what has this digest."""
    return store("images", "blobs", "sha256", hex_of(digest))


def diff_ids_of(config):
    """The digests of an image's layers as plain tarballs, as its config has them."""
    return (config.get("rootfs") or {}).get("diff_ids") or []


def layer_path(diff_id):
    """Where the store has a layer unpacked."""
    return store("layers", hex_of(diff_id))


def parsed(raw, what, form):
    """The JSON document in some bytes, of a form like PROFILE_FORM."""
    try:
        document = from_json(raw)
    except (ValueError, RecursionError) as error:
        raise Fail(f"{what}: not JSON: {str(error):.80}", "it is damaged") from None
    check_form(document, form, what)
    return document


class held:
    """A context in which a directory of the store is locked; its descriptor, or None
    if that would have taken waiting and LOCK_NB says not to."""

    def __init__(self, directory, how):
        self.directory, self.how = store(directory, ""), how

    def __enter__(self):
        self.fd = lock(self.directory, self.how)
        return self.fd

    def __exit__(self, *_):
        if self.fd is not None:
            os.close(self.fd)


def adding():
    """A context in which nothing is swept out of the store that no image has yet."""
    return held("images/blobs", fcntl.LOCK_SH)


# What has happened, and to whom, is written down wherever it happens: a line of JSON
# each, in two files of a megabyte, which `events` in chapter 12 reads like the log of a
# container.  The lock is the innermost that there is: who has it takes no other.

EVENT_BYTES = 1 << 20


def note_event(kind, id, action, facts):
    """Write down an event of a container, an image, a network or a volume, as Docker
    spells it.  On a full disk it is lost: what it tells of has happened already."""
    now, first = time.time_ns(), {}
    if kind in ("container", "image"):  # as it was before there were other kinds
        first = {"status": action, "id": id}
        first.update({"from": facts["image"]} if "image" in facts else {})
    line = to_json({
        **first, "Type": kind, "Action": action,
        "Actor": {"ID": id, "Attributes": facts}, "scope": "local",
        "time": now // 10 ** 9, "timeNano": now}).encode() + b"\n"
    path = store("events", "log")
    with held("events", fcntl.LOCK_EX):
        try:
            if os.path.exists(path) and os.path.getsize(path) >= EVENT_BYTES:
                os.rename(path, f"{path}.1")
            with open(path, "ab", 0) as file:
                size = file.tell()
                if file.write(line) < len(line):
                    file.truncate(size)  # not half a line
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise


class Spooled:
    """A file that is being written into the store: its digest is known in the end."""

    def __init__(self, file):
        import hashlib

        self.file, self.digest, self.most = file, hashlib.sha256(), layer_bytes()

    def write(self, part):
        """Write some more."""
        if self.file.tell() + len(part) > self.most:
            raise Fail(f"more than {human(self.most)} are coming",
                       "MINICONTAINER_LAYER_BYTES sets another bound than what is free "
                       "on the disk")
        self.digest.update(part)
        return self.file.write(part)


def spool(parts, write=None):
    """Bring a stream, or what write(file) writes, into the store as a file, for now:
    (its path, its digest)."""
    path = store("ingest", f".new-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(path, "wb") as file:
            spooled = Spooled(file)
            for part in parts:
                spooled.write(part)
            if write:
                write(spooled)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        take_away_file(path)
        raise
    return path, f"sha256:{spooled.digest.hexdigest()}"


def keep(raw):
    """Put some bytes into the store as a blob; their digest."""
    path, digest = spool([raw])
    os.rename(path, blob_path(digest))
    return digest


def oci_manifest(config, layers):
    """The bytes of the manifest of an image that has none yet."""
    return to_json({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
                    "config": config, "layers": layers}).encode()


def bare(entry):
    """An entry without what only the store wants to know."""
    return {key: entry[key] for key in ("mediaType", "digest", "size")}


def index_entries():
    """The entries of index.json, as they stand there."""
    path = store("images", "index.json")
    try:
        return from_json(read_file(path))["manifests"]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError):
        raise Fail(f"{path} is damaged", "move it away, and pull or load anew what it "
                   "named") from None


def read_index():
    """What they stand for: a descriptor of a manifest, and mostly a name."""
    return [{**entry, **from_json(entry["annotations"][AS_IT_CAME])}
            if AS_IT_CAME in entry.get("annotations", ()) else entry
            for entry in index_entries()]


def as_oci(entry):
    """How index.json has such an entry: to skopeo and umoci a manifest of Docker's form
    is none, so they find the same in OCI's words, and we the original beside it."""
    import io

    if entry["mediaType"] != DOCKER_MANIFEST:
        return entry
    manifest = from_json(read_file(blob_path(entry["digest"])))
    layers = [{**layer, "mediaType": layer["mediaType"].replace(
        f"{DOCKER_LAYER}.", f"{OCI_LAYER}+").replace(DOCKER_LAYER, OCI_LAYER)}
        for layer in manifest.get("layers") or ()]
    raw = oci_manifest({**manifest["config"], "mediaType": OCI_CONFIG}, layers)
    digest = sha256(io.BytesIO(raw))
    if not os.path.exists(blob_path(digest)):
        keep(raw)
    return {**entry, "mediaType": OCI_MANIFEST, "digest": digest, "size": len(raw),
            "annotations": {**entry.get("annotations", {}),
                            AS_IT_CAME: to_json(bare(entry))}}


def name_of(entry):
    """The name in full that an entry of the index gives its image, or ""."""
    return entry.get("annotations", {}).get(NAME, "")


def with_name(entry, ref):
    """An entry like this, with that name or none."""
    known = entry.get("annotations", {})
    notes = {key: known[key] for key in (SIZES, TAGGED) if key in known}
    names = {NAME: ref, ALSO_NAME: ref} if ref else {}
    return {**entry, "annotations": {**notes, **names}}


def tagged(entry):
    """An entry like this, to which a person gives a name now."""
    return {**entry, "annotations": {**entry.get("annotations", {}), TAGGED: rfc3339()}}


def point(entries, ref, entry=None):
    """Have a name mean an image, whatever it meant before, or none any more; an image
    without a name keeps an entry, to be seen and pruned."""
    old = [other for other in entries if name_of(other) in ("", ref)]
    entries[:] = [other for other in entries if other not in old]
    if entry:
        (entries if ref else old).append(with_name(entry, ref))
    for other in old:
        if all(kept["digest"] != other["digest"] for kept in entries):
            entries.append(with_name(other, ""))


def seconds_of(text):
    """The Unix time of an RFC 3339 date; 0 for none.

    time.strptime would do, but at each `run` of an image it imports a megabyte."""
    try:
        date, _, rest = text[:10], text[10:11], text[19:].lstrip(".0123456789")
        year, month, day = map(int, date.split("-"))
        hour, minute, second = map(int, text[11:19].split(":"))
        sign = {"+": -1, "-": 1}.get(rest[:1], 0)
        away = sign * (int(rest[1:3] or 0) * 3600 + int(rest[4:6] or 0) * 60)
    except ValueError:
        return 0
    if not (0 < month < 13 and 0 < day < 32 and hour < 24 and minute < 60):
        return 0
    year -= month < 3  # a year that begins in March has its leap day at its end
    days = (365 * year + year // 4 - year // 100 + year // 400
            + (153 * ((month + 9) % 12) + 2) // 5 + day - 719469)
    return days * 86400 + hour * 3600 + minute * 60 + second + away


class Image:
    """An image of the store: what its manifest and its config say, and its names."""

    def __init__(self, entry):
        self.entry = entry
        self.manifest = from_json(read_file(blob_path(entry["digest"])))
        self.id = self.manifest["config"]["digest"]
        self.config = from_json(read_file(blob_path(self.id)))
        self.names = []
        self.settings = self.config.get("config") or {}
        self.labels = self.settings.get("Labels") or {}
        self.diff_ids = diff_ids_of(self.config)
        self.layers = self.manifest.get("layers") or []
        sizes = entry.get("annotations", {}).get(SIZES, "").split()
        self.sizes = list(map(int, sizes)) or [d["size"] for d in self.layers]
        self.created = seconds_of(self.config.get("created") or "")

    def tags(self):
        """Its names as Docker shows them, without those that are digests."""
        return [short_name(ref) for ref in self.names if "@" not in ref]

    def digests(self):
        """Those that are: where it was pulled from or pushed to."""
        return [short_name(ref) for ref in self.names if "@" in ref]

    def blobs(self):
        """The digests of all that it consists of."""
        return [self.entry["digest"], self.id, *(d["digest"] for d in self.layers)]


class changed_index(held):
    """A context that gives those entries to be changed, by nobody else meanwhile."""

    def __init__(self):
        super().__init__("images", fcntl.LOCK_EX)

    def __enter__(self):
        """Nobody sweeps what the index names, so what is missing was lost in another
        way, and must not be in the way of all other images for ever."""
        super().__enter__()
        self.entries = read_index()
        lost = {}
        for entry in self.entries[:]:
            try:
                Image(entry)
            except FileNotFoundError as error:
                lost[error.filename.args[0]] = name_of(entry) or entry["digest"]
                self.entries.remove(entry)
        if lost:
            self.write()
        for path, name in lost.items():
            say(f"{path} is missing: so the image {name} is forgotten")
        return self.entries

    def write(self):
        """Make it so."""
        save(store("images", "oci-layout"), {"imageLayoutVersion": "1.0.0"})
        save(store("images", "index.json"), {
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": list(map(as_oci, self.entries))}, lasting=True)

    def __exit__(self, failed, *_):
        try:
            if not failed:
                self.write()
        finally:
            super().__exit__()


def forget_lost():
    """Have the index name only what is there."""
    with changed_index():
        pass


def indexed_images():
    """An Image for each entry of the index, with all names that have its id.

    Readers lock nothing, or sweep() would find no moment for itself: so an image may go
    between the index and its files, and then the index is another one."""
    entries, names = read_index(), {}
    try:
        images = list(map(Image, entries))
    except FileNotFoundError as error:
        if read_index() == entries:
            lost, = error.filename.args
            raise Fail(f"an image in the store is damaged: {lost} is missing",
                       "`image prune` forgets it; then pull or load it again") from None
        return indexed_images()
    for image in images:
        image.names = names.setdefault(image.id, image.names)
        image.names += filter(None, [name_of(image.entry)])
        image.names.sort()
    return images


def all_images():
    """Every image in the store, the newest first, each with all its names.

    Two manifests with one config, packed in two ways, are one image to a person."""
    found = {}
    for image in indexed_images():
        found.setdefault(image.id, image)
    return sorted(found.values(), key=lambda image: -image.created)


class NoImage(NoSuch):
    """An image that is not in the store."""


def find_image(text, code=1):
    """The Image that a name, or an id or its beginning, means."""
    images, digits = indexed_images(), text.removeprefix("sha256:")
    by_id = list({image.id: image for image in reversed(images)
                  if digits and image.id[7:].startswith(digits)}.values())
    if len(digits) == 64 and by_id:
        return by_id[0]
    ref = spelled_out(text)  # to ask whether it is well formed would import re
    for image in images:  # of two manifests of an image, the one so named
        if name_of(image.entry) == ref:
            return image
    if text != f"sha256:{digits}" and not by_id:
        ref = full_name(text)
    if len(by_id) > 1:
        raise Fail(f"image reference is ambiguous: {text!r} is the beginning of "
                   f"{len(by_id)} ids", "a few digits more; see `minicontainer images`",
                   code)
    if not by_id:
        raise NoImage(f"No such image: {short_name(ref)}",
                      "see `minicontainer images`; `pull` gets one", code)
    return by_id[0]


# ── an image on its way in ──
#
# It comes from a registry, an archive or a tarball, and all that differs is who opens
# a blob: source.open(descriptor, at) is a stream that begins at byte `at`, or earlier.
# What has come of a blob is kept in ingest/DIGEST until it is all there and its digest
# is right; so an attempt after an error goes on where the last one ended.


class Broken(Exception):
    """A stream that ended too early: worth another attempt."""


def copy_rest(source, descriptor, file, tell):
    """Append what is missing of a blob to a file that has its beginning.

    Never more than was announced: who lies about a size must not fill the disk.
    """
    at = file.seek(0, os.SEEK_END)
    if at == descriptor["size"]:
        return
    if descriptor["size"] - at > (room := layer_bytes()):
        raise Fail(f"{descriptor['digest']}: {descriptor['size']} bytes are announced, "
                   f"{at} are here, and there is room for {human(room)}",
                   "the bound is MINICONTAINER_LAYER_BYTES (what is free on the disk)")
    stream, at = source.open(descriptor, at if at < descriptor["size"] else 0)
    file.truncate(at)
    with stream:
        while part := stream.read(1 << 18):
            at += len(part)
            if at > descriptor["size"]:
                raise Fail(f"{descriptor['digest']}: longer than the "
                           f"{descriptor['size']} bytes that were announced",
                           "the source is damaged or hostile")
            file.write(part)
            tell("Downloading", at, descriptor["size"])
    if at < descriptor["size"]:
        raise Broken(f"only {at} of {descriptor['size']} bytes have come")


def fetch(source, descriptor, tell=lambda *_: None):
    """Bring a blob into the store, verified; its path."""
    digest, part = descriptor["digest"], store("ingest", hex_of(descriptor["digest"]))
    while not os.path.exists(blob_path(digest)):
        with open(part, "a+b") as file:
            # Another command may be fetching it: then wait, and find it done, or go on
            # from where that one ended; unless the file is by then another one.
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.exists(part) or not os.path.samestat(
                    os.fstat(file.fileno()), os.stat(part)):
                continue
            if os.path.exists(blob_path(digest)):  # since we looked, and `part` is new
                os.unlink(part)
                break
            source.patiently(copy_rest, source, descriptor, file, tell)
            tell("Verifying Checksum")
            file.seek(0)
            if (found := sha256(file)) != digest:
                os.unlink(part)
                raise Fail(f"{digest}: wrong digest, what has come is {found}",
                           "the source is damaged or hostile")
            file.flush()
            os.fsync(file.fileno())
            os.rename(part, blob_path(digest))
    if (found := os.path.getsize(blob_path(digest))) != descriptor["size"]:
        raise Fail(f"{digest} has {found} bytes, not the {descriptor['size']} that "
                   "were announced", "the source is damaged or hostile")
    return blob_path(digest)


def fetch_small(source, descriptor, what):
    """The bytes of a manifest or config, verified."""
    if not 0 < descriptor["size"] <= MANIFEST_LIMIT:
        raise Fail(f"{what}: {descriptor['size']} bytes cannot be right",
                   f"1 to {MANIFEST_LIMIT} can")
    with open(fetch(source, descriptor), "rb") as file:
        return file.read()


ARCHITECTURE_ALIASES = {  # other names of some: (architecture, variant)
    "x86_64": ("amd64", ""), "x86-64": ("amd64", ""), "i386": ("386", ""),
    "aarch64": ("arm64", ""), "armhf": ("arm", "v7"), "armel": ("arm", "v6")}
SYSTEMS = "linux", "windows", "darwin", "freebsd"
PROCESSORS = ("386 amd64 arm arm64 loong64 mips mips64 mips64le mipsle ppc64 "
              "ppc64le riscv64 s390x wasm").split()
PLATFORM_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
VARIANTS = {"amd64": 1, "arm64": 8, "arm": 5}  # the first of those with numbers


def normal_platform(system, architecture, variant=""):
    """(system, architecture, variant) as containerd writes them: arm64/v8 is arm64,
    and arm is arm/v7."""
    architecture, own = ARCHITECTURE_ALIASES.get(architecture, (architecture, ""))
    variant = variant or own or "v7" * (architecture == "arm")
    variant = f"v{variant}" if variant.isdecimal() else variant
    plain = (architecture, variant) in (("arm64", "v8"), ("amd64", "v1"))
    return system, architecture, "" if plain else variant


def platform_of(text=None):
    """[system, architecture, variant if there is one] of Docker's --platform, or our
    own."""
    ours = ["linux", MACHINES[os.uname().machine][1]]
    parts = text.lower().split("/") if text else ours
    if len(parts) > 3 or not all(
            part and PLATFORM_LETTERS.issuperset(part) for part in parts):
        raise Fail(f"invalid platform: {text!r}", "linux/arm64 or linux/arm/v7")
    if len(parts) == 1:
        if parts[0] not in (*SYSTEMS, *PROCESSORS, *ARCHITECTURE_ALIASES):
            raise Fail(f'"{text}": unknown operating system or architecture',
                       "linux/arm64 or linux/arm/v7")
        parts = [*parts, ours[1]] if parts[0] in SYSTEMS else ["linux", *parts]
    return list(filter(None, normal_platform(*parts)))


def platforms_for(platform):
    """What runs on a platform, in their normal form, the best first, as containerd has
    it: older variants too, and what its 32-bit brother does."""
    system, architecture, variant = normal_platform(*platform)
    found, first = [(system, architecture, variant)], VARIANTS.get(architecture, 0)
    number = variant[1:] or f"{first}"
    for older in reversed(range(first, int(number) if number.isdecimal() else 0)):
        found.append(normal_platform(system, architecture, f"v{older}"))
    return found + {"amd64": [(system, "386", "")], "arm64": platforms_for(
        (system, "arm", "v8")) if architecture == "arm64" else []}.get(architecture, [])


def pick(source, raw, platform, depth=0):
    """The manifest for a platform: this document, or one that is in its list.

    A list in a list is taken, as some builders write it; deeper ones are not.
    """
    document = parsed(raw, "manifest", MANIFEST_FORM)
    kind, listed = document.get("mediaType") or "", bool(document.get("manifests"))
    if document.get("schemaVersion") == 1:
        raise Fail("a manifest of schema 1, which is no longer in use", "push it anew")
    # What says the one and has the other, or has both, is not the same to everybody.
    if kind and (kind not in MANIFESTS or listed != (kind in (OCI_INDEX, DOCKER_INDEX))
                 ) or listed and (document.get("layers") or document.get("config")):
        raise Fail(f"neither a manifest nor a list of them: {kind!r:.90}",
                   "is it the image of a container, or of something else?", 1)
    if not listed:
        return raw
    offers = {}
    for entry in document["manifests"]:
        have = entry.get("platform") or {}
        offers.setdefault(normal_platform(*(
            have.get(key) or "" for key in ("os", "architecture", "variant"))), entry)
    found = next(filter(None, map(offers.get, platforms_for(platform))), None)
    if not found or depth > 1:
        raise Fail(f"no matching manifest for {'/'.join(platform)} in the manifest "
                   "list entries", "--platform names another; it may be listed as "
                   "another", 1)
    return pick(source, fetch_small(source, found, "manifest"), platform, depth + 1)


def check_layers(manifest, diff_ids):
    """Refuse layers that are none, and numbers that do not agree."""
    layers = manifest.get("layers") or []
    for layer in layers:
        kind = layer.get("mediaType") or ""
        if "foreign" in kind or "nondistributable" in kind:
            raise Fail(f"a foreign layer ({kind}): it is not where its image is",
                       "its maker's terms keep it elsewhere: use another image", 1)
        if not kind.startswith((OCI_LAYER, DOCKER_LAYER)):
            raise Fail(f"a layer of an unknown kind: {kind!r:.90}",
                       "is it the image of a container, or of something else?", 1)
        hex_of(layer["digest"])
    if len(layers) != len(diff_ids):
        raise Fail(f"{len(layers)} layers, but {len(diff_ids)} diff_ids",
                   "the image is damaged", 1)
    return layers


def unpack_layer(diff_id, blob, top=""):
    """Unpack a layer from its blob, verified, under its name in `top`, or in the store;
    the bytes of its files."""
    if not top:
        return new_directories("layers", lambda top: unpack_layer(diff_id, blob, top))
    # Some builders have made layers of no byte at all.
    found, bytes_ = unpack(blob, f"{top}/{hex_of(diff_id)}", may_end=True)
    if found != diff_id:
        raise Fail(f"{blob}: unpacked it is {found}, not the {diff_id} that the "
                   "image's config promises", "the image is damaged or hostile")
    return bytes_


def bytes_in(layer):
    """The sizes of a directory's files added up, as Docker does it."""
    total, waiting = 0, [layer]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def sound_images():
    """An Image for each entry of the index of which nothing was lost."""
    for entry in read_index():
        try:
            yield Image(entry)
        except FileNotFoundError:
            continue  # it may just be on its way in again


def known_layers():
    """{(diff_id, digest of a blob)} of all images: of these it was seen that they are
    one layer."""
    return {pair for image in sound_images() for pair in zip(
        image.diff_ids, (d["digest"] for d in image.layers), strict=False)}


def take_layer(source, descriptor, diff_id, known, top, tell):
    """Bring a layer into the store as a blob, and unpacked into the directory `top`
    unless it is known and there; the bytes of its files.

    The blob stays: packed again, the layer would have another digest.  One of which
    no image says yet that it is this layer is unpacked in any case, to see that it is.
    """
    if known and os.path.isdir(layer_path(diff_id)) and os.path.exists(
            blob_path(descriptor["digest"])):
        tell("Already exists")
        return bytes_in(layer_path(diff_id))
    tell("Pulling fs layer")
    blob = fetch(source, descriptor, tell)
    tell("Download complete")
    bytes_ = unpack_layer(diff_id, blob, top)
    tell("Pull complete")
    return bytes_


def take_image(source, raw, refs, show=lambda *_: None):
    """Bring the image of a manifest into the store and give it names; it."""
    manifest = parsed(raw, "manifest", MANIFEST_FORM)
    if not manifest.get("config"):
        raise Fail("the manifest has no config", "is it the manifest of an image?", 1)
    diff_ids = diff_ids_of(parsed(fetch_small(source, manifest["config"], "config"),
                                  "config", CONFIG_FORM))
    layers = check_layers(manifest, diff_ids)
    pairs = dict(zip(diff_ids, layers, strict=True))
    known = known_layers()
    sizes = dict(zip(pairs, new_directories("layers", lambda top: in_parallel([
        (layer["digest"][7:19], lambda tell, layer=layer, diff_id=diff_id:
            take_layer(source, layer, diff_id, (diff_id, layer["digest"]) in known, top,
                       tell))
        for diff_id, layer in pairs.items()], show)), strict=True))
    for diff_id, layer in zip(diff_ids, layers, strict=True):
        blob = fetch(source, layer)  # it is there, but is it as large as this says?
        if layer["digest"] != pairs[diff_id]["digest"]:  # the same in another packing
            unpack_layer(diff_id, blob)
    entry = {"mediaType": manifest.get("mediaType") or OCI_MANIFEST,
             "digest": keep(raw), "size": len(raw), "annotations": {
                 SIZES: " ".join(str(sizes[diff_id]) for diff_id in diff_ids)}}
    with changed_index() as entries:  # last: until now nobody can see any of it
        for ref in refs or [""]:
            point(entries, ref, entry)
    return Image(entry)


# ── archives ──
#
# What `save` writes is an OCI layout in a tarball, with Docker's older manifest.json
# beside it that points to the same blobs: so whoever knows one of the two can read it.
# As in the store, a manifest of Docker's form is there beside the same in OCI's words.


class Part:
    """A stretch of a file, to be read as if it were all of it."""

    def __init__(self, path, at, length):
        self.file, self.left = open(path, "rb"), length
        self.file.seek(at)
        self.tell = lambda left: None  # is told how many bytes are left

    def read(self, length=1 << 20):
        """Some bytes; none at the end."""
        data = self.file.read(max(min(length, self.left), 0))
        self.left -= len(data)
        self.tell(self.left)
        return data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class Archive:
    """A source of images: a tarball of `save`, of ours or anybody's.

    It is only indexed; each blob is read where it lies, by a descriptor of its own,
    since the processes that do so would share the place in one.  Docker's older form
    names layers as it likes, and has one that comes twice as a symlink.
    """

    def __init__(self, path, title):
        self.path, self.title = path, title
        self.names = {}  # digest: the member that has it, if not named after it
        self.members, links = {}, {}  # name: (where, bytes) and name: name
        try:
            with open(path, "rb") as file:
                for entry in TarReader(file, title):
                    name = os.path.normpath(entry.name)
                    if stat.S_ISREG(entry.mode) and not entry.hard:
                        self.members[name] = file.tell(), entry.size
                    elif entry.hard or entry.link:
                        above = "" if entry.hard else os.path.dirname(name)
                        links[name] = os.path.normpath(
                            f"{above}/{entry.hard or entry.link}").lstrip("/")
                    if len(self.members) + len(links) > 100_000:
                        raise ValueError("more files than images have")
        except (ValueError, EOFError) as error:
            raise Fail(f"{title}: not an archive of images: {str(error):.80}",
                       "what `save` wrote is one", 1) from None
        for name, target in links.items():
            for _ in range(40):
                target = links.get(target, target)
            if target in self.members:
                self.members[name] = self.members[target]

    def patiently(self, do, *args):
        """Do something; there is no second attempt with a file."""
        try:
            return do(*args)
        except Broken as error:
            raise Fail(f"{self.title}: {error}", "it is damaged", 1) from None

    def part(self, name, at=0):
        """A member's bytes, to be read."""
        if name not in self.members:
            raise Fail(f"{self.title}: {name} is missing", "it is incomplete", 1)
        where, length = self.members[name]
        return Part(self.path, where + at, length - at)

    def open(self, descriptor, at=0):
        """A blob from byte `at`, and that number."""
        digest = descriptor["digest"]
        name = self.names.get(digest) or f"blobs/sha256/{hex_of(digest)}"
        return self.part(name, at), at

    def document(self, name, form):
        """One of its JSON files."""
        with self.part(name) as part:
            return parsed(part.read(MANIFEST_LIMIT), f"{self.title}: {name}", form)

    def images(self, platform):
        """(manifest, names) of each image in it."""
        if "index.json" in self.members:
            index = self.document("index.json", MANIFEST_FORM)
            for entry in index.get("manifests") or ():
                notes = entry.get("annotations") or {}
                name = notes.get(ALSO_NAME) or notes.get(NAME)
                if came := notes.get(AS_IT_CAME):
                    came = parsed(came, f"{self.title}: {AS_IT_CAME}", DESCRIPTOR_FORM)
                    if f"blobs/sha256/{hex_of(came['digest'])}" in self.members:
                        entry = came  # others may have passed on only OCI's form
                raw = fetch_small(self, entry, "manifest")
                yield pick(self, raw, platform), [full_name(name)] if name else []
        elif "manifest.json" in self.members:
            for item in self.document("manifest.json", [
                    {"Config": str, "RepoTags": [str], "Layers": [str]}]):
                yield self.manifest_of(item), [
                    full_name(tag) for tag in item.get("RepoTags") or ()]
        else:
            raise Fail(f"{self.title}: neither index.json nor manifest.json is in it",
                       "a root file system is for `import`", 1)

    def describe(self, name, kind, digest=None):
        """The descriptor of a member."""
        if not digest:
            with self.part(name) as part:
                digest = sha256(part)
        self.names[digest] = name
        return {"mediaType": kind, "digest": digest, "size": self.members[name][1]}

    def manifest_of(self, item):
        """The manifest of an image in Docker's older form, which has none."""
        config = self.describe(os.path.normpath(item.get("Config") or ""), OCI_CONFIG)
        layers, diff_ids = [], diff_ids_of(
            self.document(self.names[config["digest"]], CONFIG_FORM))
        names = item.get("Layers") or []  # too many are for check_layers() to refuse
        for name, diff_id in zip(names, diff_ids + [None] * len(names), strict=False):
            name = os.path.normpath(name)
            with self.part(name) as part:
                packed = compression(part.read(512))
            layers.append(self.describe(name, OCI_LAYER + (packed and f"+{packed}"),
                                        None if packed else diff_id))
        return oci_manifest(config, layers)


class output:
    """A context that gives the file to write to: one that appears under its name when
    it is whole (P3), or standard output."""

    def __init__(self, path):
        if not path and os.isatty(1):
            raise Fail("cowardly refusing to save to a terminal",
                       "-o FILE, or redirect", 1)
        plain = path and (os.path.isfile(path) or not os.path.exists(path))
        self.path, self.new = path, f"{path}.new-{os.getpid()}" if plain else ""

    def __enter__(self):
        try:
            self.file = open(self.new or self.path or 1, "wb", closefd=bool(self.path))
        except OSError as error:
            raise Fail(f"{self.path}: {error.strerror}", "is the directory there?", 1
                       ) from None
        return self.file

    def __exit__(self, _, error, __):
        try:
            self.file.close()
        except OSError as late:  # there was no room for what it still had to write
            error = error or late
        if self.new:
            os.unlink(self.new) if error else os.rename(self.new, self.path)
        if isinstance(error, BrokenPipeError):
            raise error
        if isinstance(error, OSError) and not error.filename:
            raise Fail(f"{self.path or 'standard output'}: {error.strerror}",
                       "see `df -h`", 1) from None


def write_archive(chosen, file):
    """Write images, pairs of an Image and names in full, as such a tarball."""
    import io
    import tarfile

    def add(name, length, data):
        member = tarfile.TarInfo(name)
        member.size, member.mode = length, 0o644
        tar.addfile(member, data)

    def add_json(name, document):
        raw = to_json(document).encode()
        add(name, len(raw), io.BytesIO(raw))

    entries, digests = [], {}
    for image, names in chosen:
        entry = {"annotations": {}, **as_oci(bare(image.entry))}
        digests |= dict.fromkeys([entry["digest"], *image.blobs()])
        entries += [{**entry, "annotations": {
            **entry["annotations"], NAME: name, ALSO_NAME: name}}
            for name in names] or [entry]
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        add_json("oci-layout", {"imageLayoutVersion": "1.0.0"})
        for digest in digests:
            with open(blob_path(digest), "rb") as blob:
                add(f"blobs/sha256/{hex_of(digest)}", os.fstat(blob.fileno()).st_size,
                    blob)
        add_json("index.json", {"schemaVersion": 2, "mediaType": OCI_INDEX,
                                "manifests": entries})
        add_json("manifest.json", [{
            "Config": f"blobs/sha256/{hex_of(image.id)}",
            "RepoTags": [short_name(name) for name in names if "@" not in name] or None,
            "Layers": [f"blobs/sha256/{hex_of(d['digest'])}" for d in image.layers],
        } for image, names in chosen])


# ── lists, as Docker prints them ──


def decimal(number, digits=3):
    """Bytes as Docker writes those of images, 1984227 is 1.98MB; sums have 4 digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if float(f"{number:.{digits}g}") < 1000 or unit == "TB":
            return f"{number:.{digits}g}{unit}"
        number /= 1000


def how_long(seconds):
    """A span of time as Docker says it."""
    unit, name = next((unit, name) for unit, name, limit in (
        (1, "second", 60), (60, "minute", 3600), (3600, "hour", 48 * 3600),
        (86400, "day", 14 * 86400), (604800, "week", 60 * 86400),
        (2592000, "month", 730 * 86400), (31536000, "year", 1 << 62))
        if seconds < limit)
    count = int(seconds // unit)
    if count < 1:
        return "Less than a second"
    if count == 1 and unit in (60, 3600):
        return f"About a{'n' * (unit == 3600)} {name}"
    return f"{count} {name}{'s' * (count != 1)}"


def ago(moment):
    """How long it is since a Unix time, as Docker says it."""
    return f"{how_long(max(time.time() - moment, 0))} ago" if moment else "N/A"


def go_value(value):
    """A value as Go's templates print it."""
    if isinstance(value, dict):
        pairs = sorted(value.items())
        return f"map[{' '.join(f'{k}:{go_value(v)}' for k, v in pairs)}]"
    if type(value) is list:
        return f"[{' '.join(map(go_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "<no value>" if value is None else str(value)


# ── templates ──
#
# --format takes what Docker's users write, Go's text/template.  A template is text
# with actions between {{ and }}: a pipeline such as `.Names | upper`, whose value is
# printed, or {{if}}, {{range}} and {{with}}, which govern what follows up to {{end}}.
# Here it becomes functions within functions, once, which are called for each row:
#
#       {{if .Ports}}{{.Names}}{{end}}     branch(pipeline(.Ports), [show(.Names)])
#
# Of a value nothing can be asked but the keys of a dict: no attribute of Python's can
# be reached.  {{define}}, {{block}} and {{template}} are not there, so that no template
# calls itself, and each ends.  Manual: pkg.go.dev/text/template.

WORDS = (r"""\s*(/\*.*?\*/|"(?:\\.|[^"\\])*"|`[^`]*`|[-+]?\d[\w.]*|\$\w*(?:\.\w+)*|"""
         r"""\)(?:\.\w+)*|(?:\.\w+)+|\.|\w+|:=|[=(|,])""")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
MOST_WIDE = 10 ** 6  # a width that a template may ask for, as in Go

# What Docker has as maps, and not as structs: only they may be asked for what they do
# not have; what it has as lists; and the fields that are left out where they are nil.
MAPS = {"Annotations", "Attributes", "Containers", "Data", "DriverOpts",
        "ExposedPorts", "Labels", "Networks", "Options", "PortBindings", "Ports",
        "Sysctls", "Volumes"}
LISTS = {"Binds", "CapAdd", "CapDrop", "Cmd", "Entrypoint", "Env", "GroupAdd",
         "OnBuild", "SecurityOpt", "Shell", "VolumesFrom"}
STRINGS = {"StopSignal"}
NILS = {"ExposedPorts", "Health", "Healthcheck", "Shell", "SizeRw", "SizeRootFs",
        "StopSignal"}


class TemplateError(Exception):
    """What an action of a template cannot do, in words."""


class Map(dict):
    """A map of Go's, which may be asked for any key."""


class Nil(list):
    """What is null in JSON: a list or a map without anything, or what is not there."""

    def __init__(self, name):
        self.text = ("[]" if name in LISTS else "map[]" if name in MAPS else
                     "" if name in STRINGS else "<nil>")

    def __str__(self):
        return self.text


def or_none(value):
    """A value, or None for what is null in JSON."""
    return None if isinstance(value, Nil) else value


class LabelText(str):
    """Labels as a list shows them, and the dict that they are as `labels`."""


def label_text(labels):
    """Labels as `ps` and `volume ls` print them."""
    text = LabelText(",".join(f"{key}={value}" for key, value in labels.items()))
    text.labels = labels
    return text


def field_of(value, name):
    """What a value has under a name."""
    if isinstance(value, dict):
        if name not in value and not isinstance(value, Map):  # ID is Id in JSON, or id
            name = next((key for key in value if key.lower() == name.lower()), name)
        found = value.get(name)
        if isinstance(value, Map):
            return found
        if name in value or name in NILS:
            return (Nil(name) if found is None else
                    Map(found) if name in MAPS and isinstance(found, dict) else found)
        raise TemplateError(f"there is no field {name!r}; of {len(value)} there are "
                            + ", ".join(sorted(value)[:20]))
    raise TemplateError(f"nothing has a field {name!r}" if value in (None, []) else
                        f"there is no field {name!r} in {go_value(value)!r:.40}")


def go_type(value):
    """The name of a value's type, as Go prints it where it does not fit."""
    names = {bool: "bool", int: "int", float: "float64", type(None): "<nil>"}
    return names.get(type(value), "string" if isinstance(value, str) else "map"
                     if isinstance(value, dict) else "[]string")


def index_of(value, *keys):
    """What a list or a map has at a place, and that at another …"""
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key, "")  # what a map does not have is "" to Go
        elif value is None or not 0 <= key < len(value):
            raise TemplateError(f"index out of range: {key}")
        else:
            value = value.encode()[key] if isinstance(value, str) else value[key]
    return value


def go_printf(form, *values):
    """What printf makes of values: by %s %q %v %t %d %x %o %c %f %e %g."""
    import re

    left = list(values)

    def one(match):
        flags, width, precision, kind = match.groups()
        if int(width or 0) > MOST_WIDE or int(precision or 0) > MOST_WIDE:
            raise TemplateError(f"printf: {match[0]} is too wide")
        if kind == "%":
            return "%"
        if not left:
            return f"%!{kind}(MISSING)"
        value, shape = left.pop(0), f"%{flags}{width}"
        if precision is not None:
            shape += f".{precision or 0}"
        try:
            if kind in "svqt":
                text = go_value(value)
                return (shape + "s") % (to_json(text) if kind == "q" else text)
            if kind not in "dxXoeEfgGc":
                raise ValueError
            if kind in "xX" and isinstance(value, str):
                text = value.encode().hex()
                return (shape + "s") % (text.upper() if kind == "X" else text)
            return (shape + kind) % value
        except (TypeError, ValueError, OverflowError):
            return f"%!{kind}({go_type(value)}={go_value(value)})"
    made = re.sub(r"%([-+# 0]*)(\d*)(?:\.(\d*))?([a-zA-Z%])", one, form)
    rest = ", ".join(f"{go_type(value)}={go_value(value)}" for value in left)
    return made + f"%!(EXTRA {rest})" * bool(left)


def go_print(*values):
    """What print makes of values: a blank between two that are no strings."""
    made = ""
    for before, value in zip((" ", *values), values, strict=False):
        made += " " * (not isinstance(before, str) and not isinstance(value, str))
        made += go_value(value)
    return made


def of_one_type(how):
    """A function of two values of one type."""
    def compared(one, other):
        if go_type(one) != go_type(other) or go_type(one) in ("map", "[]string"):
            raise TemplateError("incompatible types for comparison: "
                                f"{go_type(one)} and {go_type(other)}")
        return how(one, other)
    return compared


def equals_one(one, *others):
    """Whether a value is equal to one of others."""
    one, *others = map(or_none, (one, *others))
    same = of_one_type(lambda one, other: one == other)
    return any([same(one, other) for other in others if None not in (one, other)]) or (
        one is None and None in others)


def padded(text, left, right):
    """A text, unless it is empty, between so many blanks."""
    return text and " " * min(left, MOST_WIDE) + text + " " * min(right, MOST_WIDE)


def titled(text):
    """A text whose every word begins with a capital letter."""
    return "".join(letter if before.isalnum() or before == "_" else letter.upper()
                   for before, letter in zip(f" {text}", text, strict=False))


def truncated(text, most):
    """The first letters of a text."""
    return text[:max(most, 0)]


TEMPLATE_FUNCTIONS = {  # and `and` and `or`, which look no further than they must
    "not": lambda value: not value, "eq": equals_one,
    "ne": lambda one, other: not equals_one(one, other),
    "lt": of_one_type(lambda one, other: one < other),
    "le": of_one_type(lambda one, other: one <= other),
    "gt": of_one_type(lambda one, other: one > other),
    "ge": of_one_type(lambda one, other: one >= other),
    "len": lambda value: len(value.encode() if isinstance(value, str) else
                             () if value is None else value),
    "index": index_of, "slice": lambda value, *ends: value[slice(*(*ends, None)[:2])
                                                            if ends else slice(None)],
    "print": go_print, "printf": go_printf,
    "println": lambda *values: " ".join(map(go_value, values)) + "\n",
    "json": lambda value: to_json(or_none(value)),
    "join": lambda texts, between: between.join(texts or ()),
    "split": lambda text, between: text.split(between) if between else list(text),
    "lower": str.lower, "upper": str.upper, "title": titled, "truncate": truncated,
    "pad": padded, ".Label": lambda row, key: row["Labels"].labels.get(key, "")}
HEADER_FUNCTIONS = {  # what they make of the title of a column
    **TEMPLATE_FUNCTIONS, **dict.fromkeys(
        ("json", "lower", "upper", "title", "truncate"), lambda title, *_: title),
    ".Label": lambda row, key: key.rpartition(".")[2].translate({45: " ", 95: " "})}


class Template:
    """A template, parsed; called with a value, it gives the text that it makes of it.

    `code` is the exit code where it cannot be parsed.
    """

    DEEPEST = 50  # blocks and parentheses within each other

    def __init__(self, text, code=64):
        self.code, self.fields, self.depth, self.at = code, set(), 0, text
        self.functions, self.variables, self.made = {}, [], []
        self.pieces = self.split(text)
        self.steps, _ = self.block(())

    def __call__(self, value, functions=TEMPLATE_FUNCTIONS):
        self.functions, self.variables, self.made = functions, [["$", value]], []
        try:
            self.run(self.steps, value)
        except TemplateError as error:
            raise self.fail(error, 1) from None
        return "".join(self.made)

    def fail(self, reason, code=0):
        """A Fail that names the action."""
        return Fail(f"template parsing error: {self.at[:200]}: {reason}",
                    "{{.A.B}}, {{index .A \"my-key\"}}, {{range .A}}…{{end}} …: see "
                    "pkg.go.dev/text/template; '{{json .}}' shows what there is",
                    code or self.code)

    def split(self, text):
        """Text as it is, and each action as (the words in it, as it is written)."""
        import re

        opening, word = re.compile(r"\{\{(-(?=\s))?"), re.compile(WORDS, re.S)
        closing, end, trim = re.compile(r"(\s+-)?\s*\}\}|\s*$"), 0, False
        while begin := opening.search(text, end):
            before, end, words = text[end:begin.start()], begin.end(), []
            before = before.lstrip() if trim else before
            yield before.rstrip() if begin[1] else before
            while not (closed := closing.match(text, end)):
                found = word.match(text, end)
                self.at = text[begin.start():]
                if not found:
                    raise self.fail(f"unexpected {text[end:].lstrip()[:1]!r}")
                words += [found[1]] if not found[1].startswith("/*") else []
                end = found.end()
            self.at = text[begin.start():closed.end()]
            if "}}" not in closed[0]:
                raise self.fail("unclosed action")
            end, trim = closed.end(), bool(closed[1])
            yield words, self.at
        yield text[end:].lstrip() if trim else text[end:]

    def deeper(self):
        """Count what is within something else; the parser and Python's stack agree."""
        self.depth += 1
        if self.depth > self.DEEPEST:
            raise self.fail(f"more than {self.DEEPEST} levels")

    # Statements: functions of the dot, which write to self.made.

    def run(self, steps, dot):
        """Do statements, and forget the variables that they have declared."""
        kept = len(self.variables)
        for step in steps:
            step(dot)
        del self.variables[kept:]

    def block(self, ends):
        """(statements up to {{end}}, or another of `ends`, the words of that)."""
        steps = []
        for piece in self.pieces:
            if isinstance(piece, str):
                steps.append(lambda dot, text=piece: self.made.append(text))
                continue
            words, at = piece
            kind = words[0] if words else ""
            if kind in ends:
                return steps, words
            if kind in ("if", "range", "with"):
                steps.append(self.branch(kind, words[1:], at))
            elif kind in ("else", "end"):
                raise self.fail(f"unexpected {{{{{kind}}}}}")
            elif words or not at.strip("{}- \n\t").startswith("/*"):
                steps.append(self.action(words, at))
        if ends:
            raise self.fail(f"unexpected end: {{{{{ends[-1]}}}}} is missing")
        return steps, []

    def action(self, words, at):
        """A statement that prints a value, or sets a variable to it."""
        names, sign = self.declared(words)
        value = self.pipeline(words)

        def show(dot):
            self.at = at
            found = value(dot)
            if names:
                self.set(names[0], found, sign)
            else:
                self.made.append(go_value(found))
        return show

    def declared(self, words):
        """The variables, and := or =, that a pipeline begins with; none mostly."""
        for count in (1, 3):
            if words[count:count + 1] in (["="], [":="]) and words[0].startswith("$"):
                names, sign = words[:count:2], words[count]
                del words[:count + 1]
                return names, sign
        return [], ""

    def set(self, name, value, sign=":="):
        """Declare a variable, or change the one that was declared last."""
        if sign == ":=":
            self.variables.append([name, value])
        else:
            self.variable(name)[1] = value

    def variable(self, name):
        """[name, value] of a variable."""
        for pair in reversed(self.variables):
            if pair[0] == name:
                return pair
        raise TemplateError(f"undefined variable {name!r}")

    def branch(self, kind, words, at):
        """A statement that does others, once, not at all, or for each of several."""
        self.deeper()
        names, sign = self.declared(words)
        value = self.pipeline(words)
        steps, end = self.block(("else", "end"))
        instead = []
        if end[1:2] == ["if"]:
            instead = [self.branch("if", end[2:], self.at)]  # to the same {{end}}
        elif end[1:]:
            raise self.fail(f"unexpected {end[1]!r}")
        elif end[0] == "else":
            instead, _ = self.block(("end",))
        self.depth -= 1

        def do(dot):
            self.at, kept = at, len(self.variables)
            found = value(dot)
            rows = self.pairs(found) if kind == "range" else [("", found)]
            for key, item in rows:
                for name, one in zip(reversed(names), (item, key), strict=False):
                    self.set(name, one, sign)
                if kind == "range" or item:
                    self.run(steps, dot if kind == "if" else item)
                else:  # the variables are there, too
                    self.run(instead, dot)
                del self.variables[kept:]
            if not rows:
                self.run(instead, dot)
        return do

    @staticmethod
    def pairs(value):
        """The (key, item) of what {{range}} goes through."""
        if isinstance(value, dict):
            return sorted(value.items())
        if not isinstance(value, list | None):
            raise TemplateError(f"range can't iterate over {go_value(value):.40}")
        return list(enumerate(value or ()))

    # Expressions: functions of the dot, and of what they are called with, that give a
    # value.  What they are called with are functions too, for `and` and `or`.

    def pipeline(self, words, enclosed=False):
        """The expression of commands, each called with the value of that before, up to
        the end of the action, or the `)` of what is `enclosed`."""
        value, depth = self.command(words), self.depth
        while words[:1] == ["|"]:
            self.deeper()
            del words[0]
            value = self.command(words, value)
        self.depth = depth
        if enclosed != bool(words):
            raise self.fail("unclosed left paren" if enclosed else
                            f"unexpected {words[0]!r}")
        return value

    def command(self, words, piped=None):
        """The expression of an operand that is called with those after it."""
        operands = []
        while words and words[0] != "|" and words[0][0] != ")":
            operands.append(self.operand(words))
        if not operands:
            raise self.fail("missing value for command")
        first, rest = operands[0], operands[1:] + [piped] * bool(piped)
        return lambda dot: first(dot, [lambda one=one: one(dot) for one in rest])

    def operand(self, words):
        """The expression of one operand: a literal, a variable, a field, a function."""
        import re

        word = words.pop(0)
        if word[0] == '"' or word[0] == "`":
            text = word[1:-1] if word[0] == "`" else re.sub(
                r"\\(.)", lambda found: ESCAPES.get(found[1], found[0]), word[1:-1])
            return self.literal(text)
        if word.lstrip("+-")[0].isdecimal():
            try:
                return self.literal(float(word) if "." in word else int(word, 0))
            except ValueError:
                raise self.fail(f"bad number {word!r}") from None
        if word in ("true", "false", "nil"):
            return self.literal({"true": True, "false": False}.get(word))
        if word == "(":
            self.deeper()
            inner = self.pipeline(words, enclosed=True)
            self.depth -= 1
            return self.chain(inner, words.pop(0)[1:])
        if word[0] == "$":
            name, _, path = word.partition(".")
            return self.chain(lambda dot: self.variable(name)[1], path)
        if word[0] == ".":
            return self.chain(lambda dot: dot, word[1:])
        if word not in TEMPLATE_FUNCTIONS and word not in ("and", "or"):
            raise self.fail(f"function {word!r} not defined")
        return lambda dot, given=(): self.call(word, given)

    @staticmethod
    def literal(value):
        """The expression of a value, which takes nothing to be called with."""
        def expression(dot, given=()):
            if given:
                raise TemplateError(f"can't give argument to {go_value(value)!r}")
            return value
        return expression

    def chain(self, start, path):
        """The expression of a value, of a field of its, of a field of that …"""
        names = path.strip(".").split(".") if path.strip(".") else []
        self.fields.update(names[:1])

        def expression(dot, given=()):
            value = start(dot)
            for name in names:
                if given and name is names[-1] and f".{name}" in self.functions:
                    return self.call(f".{name}", [lambda row=value: row, *given])
                value = field_of(value, name)
            if given:
                raise TemplateError(f"{path or 'this'} has no arguments")
            return value
        return expression

    def call(self, name, given):
        """The value of a function."""
        if name in ("and", "or"):
            if not given:
                raise TemplateError(f"wrong number of args for {name}")
            for one in given:
                value = one()
                if bool(value) == (name == "or"):
                    break
            return value
        values = [one() for one in given]
        try:
            return self.functions[name](*values)
        except (TypeError, ValueError, LookupError, AttributeError):
            shown = ", ".join(map(go_type, values))
            raise TemplateError(f"wrong number or type of args for {name}: ({shown})"
                                ) from None


def spaced(name):
    """A field's name as a person reads it: LocalVolumes is Local Volumes."""
    return "".join(f" {letter}" if letter.isupper() and before.islower() else letter
                   for before, letter in zip(f"_{name}", name, strict=False))


def list_template(form, known, rows):
    """The template of a list of rows, which have the fields that are `known`."""
    template = Template(form.replace("\\t", "\t").replace("\\n", "\n"), 1)
    unknown = sorted(template.fields.difference(known, ["Label"]))
    if unknown and not rows:  # which would tell by themselves
        field_error = f"there is no field {unknown[0]!r}; there are {', '.join(known)}"
        raise template.fail(field_error)
    return template


def print_list(columns, rows, form, quiet="", more=""):
    """Print rows as Docker does; `columns` are titles and the fields below them, `more`
    the other fields that there are."""
    import itertools

    form, known = form or "table", [*columns.values(), *more.split()]
    cells = []
    if quiet and form == "table":
        lines = [row[quiet] for row in rows]
    elif form == "json":
        lines = map(to_json, rows)
    elif not form.startswith("table"):
        template = list_template(form, known, rows)
        lines = [template(row) for row in rows]
    elif not form[5:].strip():  # mostly so, and without what templates import
        cells = [list(columns), *([go_value(row[field]) for field in columns.values()]
                                  for row in rows)]
    else:
        template = list_template(form[5:].strip(), known, rows)
        titles = Map({field: spaced(field).upper() for field in template.fields})
        titles.update((field, title) for title, field in columns.items())
        cells = [text.split("\t") for text in (
            template(titles, HEADER_FUNCTIONS), *map(template, rows))]
    if cells:
        widths = [max(7, *map(len, column), 0) for column in itertools.zip_longest(
            *cells, fillvalue="")]
        lines = ["   ".join(f"{cell:{width}}" for cell, width in zip(
            row, widths, strict=False)).rstrip() for row in cells]
    for line in lines:
        print(line)


def filters_of(texts, known):
    """{key: its values} of --filter."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise Fail(f"invalid filter {text!r}", f"KEY=VALUE; {', '.join(known)}", 1)
        found.setdefault(key, []).append(value)
    return found


def passes(thing, tests, wanted):
    """Whether a thing passes --filter: of a key any value will do, of labels it takes
    all."""
    return all((all if key.startswith("label") else any)(tests[key](thing, text)
                                                for text in texts)
               for key, texts in wanted.items())


def confirm(options, *what):
    """Ask the person, unless --force; whether the answer is yes."""
    if not options.force:
        listed = f" {what[0]}." if len(what) == 1 else ":" + "".join(
            f"\n  - {text}" for text in what) + "\n"
        print(f"WARNING! This will remove{listed}\nAre you sure you want to continue? "
              "[y/N] ", end="", flush=True)
    return options.force or sys.stdin.readline().strip().lower() == "y"


def tell_gone(gone, more=0):
    """Say what was removed, {kind: {name: bytes}}, and how much room all makes."""
    for kind, found in gone.items():
        if found:
            print("\n".join([f"Deleted {kind}:", *found, ""]))
        note_event(kind.lower().removesuffix("s"), "", "prune",
                   {"reclaimed": str(sum(found.values()))})
        more += sum(found.values())
    print(f"Total reclaimed space: {decimal(more, 4)}")


class Progress:
    """How several layers get on: on a terminal a line for each, with bytes and rate;
    elsewhere a line for each thing that happens."""

    def __init__(self, file):
        self.file, self.rows, self.began = file, {}, {}
        self.live = file.isatty()

    def __call__(self, id, status, at=0, of=0):
        if self.live:
            now, (begun, first) = time.monotonic(), self.began.setdefault(
                (id, status), (time.monotonic(), at))
            wide = os.get_terminal_size(self.file.fileno()).columns or 200
            bar = f"[{'=' * (50 * at // of) + '>':51.51}] " * (wide > 110) if of else ""
            rate = (at - first) / max(now - begun, 0.1)
            count = f"{decimal(at)}/{decimal(of)}  {decimal(rate)}/s" if of else ""
            up = f"\033[{len(self.rows)}A" if self.rows else ""
            self.rows[id] = f"{id}: {status} {bar}{count}"[:wide - 1]
            lines = "".join(f"\033[2K{row}\n" for row in self.rows.values())
            print(up + lines, end="", file=self.file, flush=True)
        elif not of:
            print(f"{id}: {status}", file=self.file, flush=True)


FORCE = arg("-f", "--force", action="store_true", help="do not ask")
ONLY = arg("--filter", metavar="KEY=VALUE", action="append", default=[],
           help="only such: until, label, label!")
FORMAT = arg("--format", metavar="FORM", help="json, 'table {{.A}}' or '{{.A}} {{.B}}'")
FILTER = arg("-f", "--filter", metavar="KEY=VALUE", action="append", default=[],
             help="show only such")
QUIET = arg("-q", "--quiet", action="store_true", help="show only ids")
NO_TRUNC = arg("--no-trunc", action="store_true", help="show all of everything")
PLATFORM = arg("--platform", metavar="OS/ARCH", help="of several, the one for this")


def moment(option, text):
    """The Unix time, in nanoseconds, that a date, a number of seconds or a span of time
    before now means."""
    import re

    if found := re.fullmatch(r"(\d+)(?:\.(\d{1,9}))?", text):
        return int(found[1]) * 10 ** 9 + int((found[2] or "").ljust(9, "0"))
    form = r"(\d{4}-\d\d-\d\d)(T\d\d:\d\d)?(:\d\d)?(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?"
    if found := re.fullmatch(form, text):
        day, clock, seconds, rest, zone = found.groups()
        date = f"{day}{clock or 'T00:00'}{seconds or ':00'}{zone or 'Z'}"
        return seconds_of(date) * 10 ** 9 + int((rest or "").ljust(9, "0"))
    return time.time_ns() - nanoseconds(option, text, 1)


def has_label(labels, asked):
    """Whether there is a label KEY, or KEY=VALUE, of that value."""
    key, equals, value = asked.partition("=")
    return key in labels and (not equals or labels[key] == value)


def prune_filters(labels, created):
    """{KEY: whether a thing passes for one of the values} of `prune`, by what these
    give of it: its labels, and when it was made, in nanoseconds."""
    return {"label": lambda thing, text: has_label(labels(thing), text),
            "label!": lambda thing, text: not has_label(labels(thing), text),
            "until": lambda thing, text: created(thing) < moment("until", text)}


def is_true(key, text):
    """Whether the value of a filter means yes, of those that mean yes or no."""
    if text.lower() not in ("1", "t", "true", "0", "f", "false"):
        raise Fail(f"invalid filter '{key}={text}'", "true or false", 1)
    return text.lower() in ("1", "t", "true")


def made(image):
    """When an image was made, in nanoseconds: often several are in one second."""
    import re

    part = re.match(r"\.(\d{1,9})", (image.config.get("created") or "")[19:])
    return image.created * 10 ** 9 + int(part[1].ljust(9, "0") if part else 0)


IMAGE_FILTERS = {  # whether one passes KEY=text
    **prune_filters(lambda image: image.labels, made),
    "dangling": lambda image, text: (  # a digest alone is a name, but no tag
        not image.tags() if is_true("dangling", text) else bool(image.names)),
    "before": lambda image, text: made(image) < made(find_image(text)),
    "since": lambda image, text: made(image) > made(find_image(text)),
}


def image_rows(image, no_trunc):
    """What `images` shows of an image: a row for each of its names, and one for each
    repository that has given it a digest but no tag."""
    of_repository = {name.partition("@")[0]: name.partition("@")[2]
                     for name in image.digests()}
    names = [tag.rpartition(":")[::2] for tag in image.tags()]
    names += [(name, "<none>") for name in of_repository if name not in dict(names)]
    for repository, tag in names or [("<none>", "<none>")]:
        yield {"Repository": repository, "Tag": tag,
               "Digest": of_repository.get(repository, "<none>"),
               "ID": image.id if no_trunc else image.id[7:19],
               "CreatedSince": ago(image.created),
               "CreatedAt": time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC",
                                          time.gmtime(image.created)),
               "Size": decimal(sum(image.sizes)),
               "VirtualSize": decimal(sum(image.sizes), 4), "Containers": "N/A",
               "SharedSize": "N/A", "UniqueSize": "N/A"}  # Docker counts none either


LIST_OPTIONS = (
    arg("-a", "--all", action="store_true", help="there are no hidden ones here"),
    QUIET, arg("--digests", action="store_true", help="show digests"), NO_TRUNC, FILTER,
    FORMAT, arg("repository", nargs="?", metavar="REPOSITORY", help="only so named"))


@command("image ls", *LIST_OPTIONS)
@command("images", *LIST_OPTIONS)
def images_command(options):
    """List the images of the store."""
    import fnmatch

    def is_like(name, pattern):  # to Go a * stands for no slash
        parts = name.split("/"), pattern.replace("[^", "[!").split("/")
        return len(parts[0]) == len(parts[1]) and all(map(fnmatch.fnmatchcase, *parts))

    wanted = filters_of(options.filter, (*IMAGE_FILTERS, "reference"))
    like = wanted.pop("reference", []) + [options.repository] * bool(options.repository)
    rows = [row for image in all_images() if passes(image, IMAGE_FILTERS, wanted)
            for row in image_rows(image, options.no_trunc)
            if not like or any(is_like(text, pattern) for pattern in like for text in (
                row["Repository"], f"{row['Repository']}:{row['Tag']}"))]
    digest = {"DIGEST": "Digest"} if options.digests else {}
    print_list({"REPOSITORY": "Repository", "TAG": "Tag", **digest, "IMAGE ID": "ID",
                "CREATED": "CreatedSince", "SIZE": "Size"}, rows, options.format,
               "ID" if options.quiet else "", "Digest CreatedAt VirtualSize Containers "
               "SharedSize UniqueSize")


@command("history", QUIET, NO_TRUNC, FORMAT,
         arg("-H", "--human", metavar="BOOL", optional="true", default="true",
             choices=("true", "false"), help="ages and rounded sizes (true)"),
         arg("image", metavar="IMAGE", help="its name or id"))
def history_command(options):
    """Show of what steps an image was made."""
    image = find_image(options.image)
    rows, sizes, human = [], iter(image.sizes), options.human == "true"
    for step in image.config.get("history") or [{} for _ in image.sizes]:
        by, when = (step.get("created_by") or "").replace("\t", " "), (
            step.get("created") or "")
        rows.insert(0, {
            "ID": "<missing>", "CreatedSince": ago(seconds_of(when)),
            "CreatedAt": when, "Comment": step.get("comment") or "",
            "CreatedBy": by if options.no_trunc or len(by) < 46 else by[:44] + "…",
            "Size": (decimal if human else str)(
                0 if step.get("empty_layer") else next(sizes, 0))})
    for row in rows[:1]:
        row["ID"] = image.id if options.no_trunc else image.id[7:19]
    when = {"CREATED": "CreatedSince"} if human else {"CREATED AT": "CreatedAt"}
    print_list({"IMAGE": "ID", **when, "CREATED BY": "CreatedBy", "SIZE": "Size",
                "COMMENT": "Comment"}, rows, options.format,
               "ID" if options.quiet else "", "CreatedAt CreatedSince")


UNSAID = {"User": "", "Env": [], "Cmd": [], "Volumes": {}, "WorkingDir": "",
          "Entrypoint": [], "OnBuild": [], "Labels": {}}  # keys there in any case


def inspected(image):
    """What `image inspect` tells, under Docker's keys."""
    history, size_ = image.config.get("history") or [{}], sum(image.sizes)

    def said(key):
        return image.config.get(key) or ""

    return {
        "Id": image.id, "RepoTags": image.tags(), "RepoDigests": image.digests(),
        "Parent": "", "Comment": history[-1].get("comment") or "",
        "Created": said("created"), "DockerVersion": "", "Author": said("author"),
        "Config": {**UNSAID, **{key: value for key, value in image.settings.items()
                                if value is not None}},
        "Architecture": said("architecture"),
        "Variant": said("variant"), "Os": said("os"), "Size": size_,
        "VirtualSize": size_, "GraphDriver": {"Name": "overlay", "Data": {
            "LowerDir": ":".join(map(layer_path, reversed(image.diff_ids)))}},
        "RootFS": {"Type": "layers", "Layers": image.diff_ids},
        "Metadata": {"LastTagTime": max(
            other.entry.get("annotations", {}).get(TAGGED, "0001-01-01T00:00:00Z")
            for other in indexed_images() if other.id == image.id)},
        "Descriptor": bare(image.entry)}


def for_each(names, do, all_failed=""):
    """Do something with each of several, also if it fails with some of them, which are
    then named once more after the words `all_failed`, if there are any."""
    failed = {}
    for name in names:
        try:
            do(name)
        except Fail as fail:
            failed[name] = fail
    if failed:
        lines = [fail.message for fail in failed.values()]
        if all_failed:
            lines.append(all_failed + ", ".join(failed))
        raise Fail("\nminicontainer: ".join(lines), [*failed.values()][-1].hint, 1)


def show_facts(names, look, form):
    """Print what look(name) finds of each, as `inspect` does."""
    import json

    found, show = [], to_json if form in (None, "json") else Template(form)
    try:
        for_each(names, lambda name: found.append(look(name)))
    finally:
        if form:
            for document in found:
                print(show(document))
        else:
            print(json.dumps(found, indent=4))


@command("image inspect", arg("-f", "--format", metavar="FORM", help="'{{.A.B}}'"),
         arg("images", nargs="+", metavar="IMAGE", help="names or ids"))
def image_inspect_command(options):
    """Show all that is known of images, as JSON."""
    show_facts(options.images, lambda name: inspected(find_image(name)), options.format)


# ── variables ──
#
# In lines of a Dockerfile, and in those that --change takes, Docker expands them
# itself, in a language that looks like a shell's:
#
#       ${x:-y}  y if x is unset or empty      ${x:+y}  y if it is neither
#       ${x-y}   y if x is unset               ${x+y}   y if it is set
#       ${x#p}   without the shortest p in front, ## the longest; % and %% at the end
#       ${x/p/y} with y for the first p, // for each
#
# In what is left to a real shell, RUN, CMD, ENTRYPOINT and HEALTHCHECK, it expands
# nothing.  A line sees what the lines above it have set, and not itself.


def joined_by_stars(parts, shortest=False):
    """The regular expression of parts between which there is any text.

    Who writes a pattern must not make us try every way to match, which might never end.
    So up to each part but the last the text is as short as it can be, for good, since
    nothing goes back into (?=(…))\\1.  No other way matches more."""
    first, *others, last = parts if len(parts) > 1 else [*parts, None]
    return first + "".join(
        f"(?=(?P<n{n}>.*?{part}))(?P=n{n})" for n, part in enumerate(others)) + (
            "" if last is None else f".*{'?' * shortest}{last}")


class Expansion:
    """A word as Docker reads it: quotes and escapes go, variables become values."""

    def __init__(self, text, known, escape, quotes=True):
        self.text, self.known, self.escape, self.at = text, known, escape, 0
        self.quotes = quotes  # whether they are anything special

    def take(self):
        """The next character; "" at the end."""
        self.at += 1
        return self.text[self.at - 1:self.at]

    def ahead(self):
        """The same, without taking it."""
        return self.text[self.at:self.at + 1]

    def word(self, stop="", kept=""):
        """What it means up to a character of `stop` that is in no quotes.  An escape
        goes, or is `kept` as what is to stand there."""
        found = []
        while (letter := self.ahead()) and letter not in stop:
            self.take()
            if letter == "'" and self.quotes:
                end = self.text.find("'", self.at)
                if end < 0:
                    raise ValueError("unexpected end of statement while looking for "
                                     "matching single-quote")
                found.append(self.text[self.at:end])
                self.at = end + 1
            elif letter == '"' and self.quotes:
                found.append(self.in_quotes())
            elif letter == "$":
                found.append(self.variable())
            elif letter == self.escape:
                found.append(kept + self.take())
            else:
                found.append(letter)
        return "".join(found)

    def in_quotes(self):
        """What stands between double quotes."""
        found = []
        while (letter := self.take()) != '"':
            if not letter:
                raise ValueError("unexpected end of statement while looking for "
                                 "matching double-quote")
            if letter == self.escape and self.ahead() in ('"', "$", self.escape):
                letter = self.take()
            elif letter == "$":
                letter = self.variable()
            found.append(letter)
        return "".join(found)

    def name(self):
        """The name that begins here: a variable's, a number, or a sign that to a shell
        is one, as $$, and has no value here."""
        import re

        found = re.compile(r"\d+|[@*#?$!-]|\w*").match(self.text, self.at)
        self.at = found.end()
        return found[0]

    def variable(self):
        """The value of what stands after a dollar."""
        if self.ahead() != "{":
            name = self.name()
            return self.known.get(name, "") if name else "$"
        self.take()
        if (after := self.ahead()) and after in "{}:":
            raise ValueError("bad substitution")
        name = self.name()
        value, sign = self.known.get(name), self.take()
        if sign == "}":
            return value or ""
        if sign == "/":
            return self.replaced(value or "")
        if sign == ":":
            sign, value = ":" + self.take(), value or None  # empty is as good as unset
        if sign[-1:] in ("#", "%") and self.ahead() == sign[-1]:
            sign += self.take()
        if sign in ("", ":"):
            raise ValueError("syntax error: missing '}'")
        if sign.lstrip(":") not in ("+", "-", "?", "#", "##", "%", "%%"):
            raise ValueError(f"unsupported modifier ({sign}) in substitution")
        word = self.part("}", "\\" * (sign[-1] in "#%"))  # it tells \* from a wildcard
        if sign[-1] in "#%":
            return self.trimmed(value or "", sign.lstrip(":"), word)
        if sign[-1] == "?" and value is None:
            raise ValueError(f"{name}: " + (word or "is not allowed to be " + (
                "empty" if name in self.known else "unset")))
        return (word if value is not None else "") if sign[-1] == "+" else (
            word if value is None else value)

    def part(self, end, kept):
        """A part of what stands in braces, up to the sign that ends it."""
        found = self.word(end, kept)
        if self.take() != end:
            raise ValueError(f"syntax error: missing {end!r} in ${{}}")
        return found

    def regex(self, word, backwards=False, shortest=False):
        """The regular expression of a pattern: * is any text, ? any character."""
        import re

        if odd := re.search(r"\\([^*?\\/}]|$)", re.sub(r"\\\\", "", word)):
            raise ValueError(f"invalid pattern ({word}) in substitution: "
                             f"invalid escape '{odd[0]}'")
        parts, step = [""], -1 if backwards else 1
        for letter in re.findall(r"(?s)\\?.", word)[::step]:
            if letter == "*":
                parts.append("")
            else:
                parts[-1] += "." if letter == "?" else re.escape(letter[-1])
        return re.compile(joined_by_stars(parts, shortest))

    def replaced(self, value):
        """A value with one text in place of another, of the first or of each.  Escapes
        in the new text stay there, as with BuildKit."""
        once = self.ahead() != "/"
        self.at += not once
        pattern, other = self.regex(self.part("/", "\\")), self.part("}", self.escape)
        return pattern.sub(lambda _: other, value, count=once)

    def trimmed(self, value, sign, word):
        """A value without what a pattern matches at one of its ends: with # and % the
        shortest, with ## and %% the longest.  From the end all is read backwards."""
        step = -1 if sign[0] == "%" else 1
        found = self.regex(word, step < 0, len(sign) == 1).match(value[::step])
        return value[::step][found.end():][::step] if found else value


# ── images made, named and removed ──


CHANGES = {"CMD": "Cmd", "ENTRYPOINT": "Entrypoint", "ENV": "Env", "LABEL": "Labels",
           "EXPOSE": "ExposedPorts", "VOLUME": "Volumes", "USER": "User",
           "WORKDIR": "WorkingDir", "STOPSIGNAL": "StopSignal", "ONBUILD": "OnBuild",
           "HEALTHCHECK": "Healthcheck"}


def health_check(text):
    """What an image says of its health, of the rest of a line HEALTHCHECK."""
    found, flags = {}, ("interval", "timeout", "start-period", "retries")
    while text.startswith("--"):
        flag, _, text = text.partition(" ")
        name, _, value = flag[2:].partition("=")
        if name not in flags:
            raise ValueError(f"unknown flag: --{name}")
        found[name.title().replace("-", "")] = whole(
            flag, value, 0) if name == "retries" else nanoseconds(flag, value, 1)
        text = text.lstrip()
    kind, _, rest = text.partition(" ")
    if kind.upper() == "NONE" and not rest:
        return {"Test": ["NONE"]}
    if kind.upper() != "CMD" or not rest.strip():
        raise ValueError(f"Unknown type {kind!r} in HEALTHCHECK (try CMD)")
    rest = rest.strip()
    words = parsed(rest, kind, [str]) if rest[0] == "[" else None
    return {"Test": ["CMD-SHELL", rest] if words is None else ["CMD", *words], **found}


def port_range(text, option):
    """The ports of "80" or "80-82"."""
    low, dash, high = text.partition("-")
    first = whole(option, low, 0, 65535)
    return range(first, (whole(option, high, first, 65535) if dash else first) + 1)


def exposed(words):
    """What an image says of the ports that EXPOSE names."""
    ports = {}
    for word in words:
        span, _, kind = word.lower().partition("/")
        if kind not in ("", "tcp", "udp", "sctp"):
            raise Fail(f"invalid proto: {kind}", "tcp, udp or sctp")
        for port in port_range(span, f"containerPort {word}"):
            ports[f"{port}/{kind or 'tcp'}"] = {}
    return ports


def pairs_of(word, words, rest):
    """[(NAME, VALUE), …] of ENV or LABEL; the older ENV NAME VALUE has just one."""
    if "=" not in words[0]:
        if len(words) < 2:
            raise ValueError(f"{word} must have two arguments")
        return [(words[0], rest[len(words[0]):].strip())]
    for item in words:
        if "=" not in item:
            raise ValueError(f"can't find = in {item!r}. Must be of the form: "
                             "name=value")
    return [item.partition("=")[::2] for item in words]


def json_list(text):
    """The list that JSON gives, or None where it is none: [ is a program, too."""
    try:
        return from_json(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        return None


def changed(settings, word, rest):
    """The new value of what one line of a Dockerfile changes in a config."""
    import re

    old, listed = settings.get(CHANGES[word]), json_list(rest)
    if listed is not None:
        listed = parsed(rest, word, [str])
    env = dict(line.partition("=")[::2] for line in settings.get("Env") or ())

    def meaning(text):
        return Expansion(text, env, "\\").word()

    if word in ("CMD", "ENTRYPOINT"):
        return ["/bin/sh", "-c", rest] if listed is None else listed
    if word == "WORKDIR":  # one may lead on from the last
        path = os.path.normpath(os.path.join("/", old or "", meaning(rest)))
        return f"/{path.lstrip('/')}"
    if word == "ONBUILD":
        if (name := rest.split()[0].upper()) in ("ONBUILD", "FROM", "MAINTAINER"):
            raise ValueError(f"{name} isn't allowed as an ONBUILD trigger")
        return [*(old or ()), rest]
    if word == "HEALTHCHECK":
        return health_check(rest)
    if word in ("USER", "STOPSIGNAL"):
        rest = meaning(rest)
        if word == "STOPSIGNAL" and not signal_number(rest):
            raise ValueError("0 is no signal")
        return rest
    words = listed or re.findall(  # what is in quotes is part of one
        r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|\S)+""", rest, re.S)
    if word == "EXPOSE":
        return {**(old or {}), **exposed(map(meaning, words))}
    if word == "VOLUME":
        return {**(old or {}), **{meaning(item): {} for item in words}}
    pairs = {meaning(name): meaning(value)
             for name, value in pairs_of(word, words, rest)}
    if word == "LABEL":
        return {**(old or {}), **pairs}
    return [f"{name}={value}" for name, value in {**env, **pairs}.items()]


def take_line(settings, text):
    """Apply one line of a Dockerfile, of those that only change the config."""
    word, _, rest = text.strip().partition(" ")
    word, rest = word.upper(), rest.strip()
    if word not in CHANGES or not rest:
        raise Fail(f"--change {text!r}: not possible", f"{', '.join(CHANGES)}, each "
                   "with what it takes in a Dockerfile", 1)
    try:
        settings[CHANGES[word]] = changed(settings, word, rest)
    except (ValueError, Fail) as error:
        raise Fail(f"--change {text!r}: {error}", "as in a Dockerfile", 1) from None


def take_change(settings, text):
    """Apply what one --change says: mostly one such line."""
    import re

    lines = re.sub(r"\\[ \t]*\n", "", text).split("\n")
    for line in [line for line in lines if line.strip()] or [text]:
        if not line.lstrip().startswith("#"):
            take_line(settings, line)


def import_pieces(text, headers=None):
    """What `import` is to read, piece by piece: a file, standard input, or what a URL
    leads to, whose answer's headers `headers` gets, in lower case."""
    import http.client
    import urllib.request

    try:
        with urllib.request.urlopen(text, timeout=60) if text.startswith(
                ("http://", "https://")) else open(
                0 if text == "-" else text, "rb", closefd=text != "-") as stream:
            if headers is not None:
                headers.update((key.lower(), value) for key, value in
                               stream.headers.items())
            yield from pieces(stream)
            if getattr(stream, "length", None):
                raise ConnectionError("the connection was cut")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error  # urllib's is an error itself
        said = getattr(reason, "strerror", None) or str(reason) or repr(error)
        raise Fail(f"{text}: {said:.200}",
                   "is the server there, and the URL right?" if "://" in text else
                   "FILE, URL, or - for standard input", 1) from None


def keep_layer(path, digest, title):
    """Bring a tarball that was spooled into the store as a blob and as a layer: its
    descriptor, diff_id and the bytes of its files.  OCI has no name for xz and bzip2:
    they become plain."""
    def make(top):
        found = unpack(path, f"{top}/new", title)
        os.rename(f"{top}/new", f"{top}/{hex_of(found[0])}")
        return found

    try:
        with open(path, "rb") as file:
            packed = compression(file.read(512))
        if packed in ("xz", "bzip2"):
            packed, old = "", path
            path, digest = spool(plain_pieces(old, title))
            os.unlink(old)
        found = new_directories("layers", make)
        os.rename(path, blob_path(digest))
    finally:
        take_away_file(path)
    return {"mediaType": OCI_LAYER + (packed and f"+{packed}"), "digest": digest,
            "size": os.path.getsize(blob_path(digest))}, *found


def new_image(config, below, made, refs, step):
    """The id of an image of the layers `below`, [(descriptor, diff_id, bytes), …], and
    one more that keep_layer() has made; `step` is what `history` tells of that.

    Caller must be adding()."""
    now = rfc3339()
    layers, diff_ids, sizes_ = zip(*below, made, strict=True)
    raw = to_json({
        **config, "created": now,
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [*(config.get("history") or [{} for _ in below]),
                    {"created": now, **step}]}).encode()
    id = keep(raw)
    manifest = oci_manifest({"mediaType": OCI_CONFIG, "digest": id, "size": len(raw)},
                            list(layers))
    entry = {"mediaType": OCI_MANIFEST, "digest": keep(manifest),
             "size": len(manifest), "annotations": {SIZES: " ".join(map(str, sizes_))}}
    with changed_index() as entries:
        for ref in refs:
            point(entries, ref, tagged(entry) if ref else entry)
    for ref in filter(None, refs):
        note_event("image", id, "tag", {"name": short_name(ref)})
    return id


def note_image(action, id, name=""):
    """Note an event of an image, which is called by its id if by no name."""
    note_event("image", id, action, {"name": name or id})


@command("import",
         arg("-c", "--change", metavar="LINE", action="append", default=[],
             help="a line of a Dockerfile, as 'CMD [\"sh\"]'"),
         arg("-m", "--message", metavar="TEXT", default="", help="shown by history"),
         PLATFORM,
         arg("file", metavar="FILE|URL|-", help="a tarball of a root file system"),
         arg("name", nargs="?", metavar="NAME[:TAG]", help="of the new image"))
def import_command(options):
    """Make an image of a tarball."""
    refs = [new_name(options.name)] if options.name else [""]
    settings, platform = {}, platform_of(options.platform)
    if platform[0] != "linux":
        raise Fail("operating system is not supported", "--platform linux/arm64", 1)
    for text in options.change:
        take_change(settings, text)
    with adding():
        made = keep_layer(*spool(import_pieces(options.file)), options.file)
        config = dict(zip(("os", "architecture", "variant"), platform, strict=False))
        id = new_image({**config, "config": settings}, [], made, refs, {
            "comment": options.message or f"Imported from {options.file}"})
    note_image("import", id)
    print(id)


@command("tag", arg("source", metavar="IMAGE", help="its name or id"),
         arg("name", metavar="NAME[:TAG]", help="the new one"))
def tag_command(options):
    """Give an image one more name."""
    ref = new_name(options.name)
    with changed_index() as entries:
        image = find_image(options.source)
        point(entries, ref, tagged(image.entry))
    note_image("tag", image.id, short_name(ref))


def containers():
    """(id, annotations) of every container there is."""
    for id in os.listdir(store("containers", "")):
        try:
            spec = from_json(read_file(f"{store('containers', '')}{id}/config.json"))
            yield id, spec.get("annotations", {})
        except (FileNotFoundError, NotADirectoryError):
            continue  # not quite made, or just removed
        except ValueError:
            raise Fail(f"container {id[:12]}: its config.json is damaged",
                       f"`rm -f {id[:12]}` removes it", 1) from None


def layers_in_use():
    """The layers that containers are made of, by their names in the store."""
    return {os.path.basename(path) for _, notes in containers()
            for path in from_json(notes.get(OF_LAYERS, "[]"))}


def cached_steps():
    """(name, parts of the key, layer) of every step in the cache of `build`; a layer is
    its digest, its diff_id and the bytes of its files, or it is None."""
    for name in os.listdir(store("steps", "")):
        try:
            step = from_json(read_file(store("steps", name)))
            layer = step["layer"] and [hex_of(step["layer"][0]["digest"]), hex_of(
                step["layer"][1]), int(step["layer"][2])]
            step["parts"]["instruction"].split()[0]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, Fail):
            continue  # it is being replaced, or damaged: then it leads to nothing
        yield name, step["parts"], layer


# Sweeping is the one way in which blobs and layers go: what is needed is marked, all
# else removed.  So it does not matter where an earlier one was killed.


def sweep(all_of_it=False):
    """Remove blobs and layers that belong to no image and no container, with all_of_it
    unfinished ones too; the bytes freed.  While anybody adds some, none."""
    with held("images/blobs", fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
        if alone is None:
            return 0
        keep_, freed = {hex_of(entry["digest"]) for entry in index_entries()}, 0
        for image in indexed_images():
            keep_.update(map(hex_of, [*image.blobs(), *image.diff_ids]))
        keep_.update(layers_in_use())
        for _, _, layer in cached_steps():
            keep_.update(layer[:2] if layer else ())
        for parent in ("images/blobs/sha256", "layers", *["ingest"] * all_of_it):
            for name in set(os.listdir(store(parent, ""))) - keep_:
                path = store(parent, name)
                if not os.path.isdir(path):
                    freed += os.path.getsize(path)
                    os.unlink(path)
                elif not name.startswith(".new-"):
                    new = store(parent, f".new-{os.getpid()}-{name}")
                    os.rename(path, new)
                    freed += remove_tree(new)
        return freed


def check_removable(image, text, by_name, force):
    """Refuse, in Docker's words, to remove an image that is in use; who runs of it."""
    short = image.id[7:19]
    users = [id for id, notes in containers() if notes.get(OF_IMAGE) == image.id]
    running = [id[:12] for id in users if is_held(store("containers", id))]
    single = len(image.tags()) <= 1 and len({
        split_name(ref)[:2] for ref in image.names}) <= 1

    def conflict(what, why, hint):
        raise Fail(f"conflict: unable to {what} {why}", hint, 1)

    if by_name:
        if users and not force and single:
            conflict(f'remove repository reference "{text}" (must force) - container',
                     f"{users[0][:12]} is using its referenced image {short}",
                     "`system prune` removes containers that have ended")
    elif running:
        conflict(f"delete {short} (cannot be forced) - image is being used by running "
                 "container", running[0], "end it")
    elif not force and not single:
        conflict(f"delete {short} (must be forced) - image is", "referenced in "
                 "multiple repositories", "-f")
    elif not force and users:
        conflict(f"delete {short} (must be forced) - image is being used by stopped "
                 "container", users[0][:12], "-f")
    return running


def remove_image(text, force=False):
    """Take one name from an image, or all if it is named by its id; with the last one
    it goes itself unless a container runs of it.  What Docker prints, line by line;
    what only it had is for sweep(), but for the layers of containers.

    The digest that a repository gave it is a name too, which goes with its last tag.
    """
    with changed_index() as entries:
        image = find_image(text)
        ref, digits = spelled_out(text), text.removeprefix("sha256:")
        by_name = not image.id[7:].startswith(digits) or ref in image.names
        running = check_removable(image, text, by_name, force)
        gone = [ref] if by_name else list(image.names)
        left = [ref for ref in image.names if ref not in gone]
        known = {split_name(ref)[:2] for ref in left if "@" not in ref}
        gone += [ref for ref in left if "@" in ref and split_name(ref)[:2] in {
            split_name(name)[:2] for name in gone} - known]
        for ref in gone:
            point(entries, ref)
            note_image("untag", image.id)
        said = [f"Untagged: {short_name(ref)}" for ref in gone]
        if set(image.names) - set(gone) or running:
            return said
        entries[:] = [entry for entry in entries if Image(entry).id != image.id]
        note_image("delete", image.id)
        kept = {diff_id for entry in entries for diff_id in Image(entry).diff_ids}
        kept.update(f"sha256:{digits}" for digits in layers_in_use())
    return said + [f"Deleted: {digest}" for digest in
                   [image.id, *reversed(image.diff_ids)] if digest not in kept]


RMI_OPTIONS = (
    arg("-f", "--force", action="store_true", help="also if it has more names, or is "
        "used by containers that have ended"),
    arg("--no-prune", action="store_true", help="no image here has untagged parents"),
    arg("images", nargs="+", metavar="IMAGE", help="names or ids"))


@command("image rm", *RMI_OPTIONS)
@command("rmi", *RMI_OPTIONS)
def rmi_command(options):
    """Remove images."""
    def remove(text):
        try:
            print(*remove_image(text, options.force), sep="\n")
        except NoImage as missing:
            if not options.force:
                raise
            say(missing.message)  # and with -f that is all, as in Docker

    try:
        for_each(options.images, remove)
    finally:
        sweep()


IDLE_IMAGES = ("all dangling images", "all images without at least one container "
               "associated to them")


def remove_idle(named, wanted):
    """Remove images that no container uses, those with a name too if they are `named`
    as well: what is said of each, with no size of its own, and the bytes of them all.
    """
    used, gone = {notes.get(OF_IMAGE) for _, notes in containers()}, {}
    forget_lost()
    for image in all_images():
        if (named or not image.tags()) and image.id not in used and passes(
                image, IMAGE_FILTERS, wanted):
            try:
                said = remove_image(image.id, True)
            except NoImage:
                continue  # removed by somebody else meanwhile
            gone.update((line[0].lower() + line[1:], 0) for line in said)
    return gone, sweep(True)


@command("image prune", FORCE,
         arg("-a", "--all", action="store_true", help="all that no container uses"),
         ONLY)
def image_prune_command(options):
    """Remove images that have no name, and what no image needs."""
    wanted = filters_of(options.filter, ("until", "label", "label!"))
    for text in wanted.get("until", ()):
        moment("until", text)  # which says what is wrong with it
    gone, freed = {}, 0
    if confirm(options, IDLE_IMAGES[options.all]):
        gone, freed = remove_idle(options.all, wanted)
    tell_gone({"Images": gone}, freed)


@command("save", arg("-o", "--output", metavar="FILE", help="not to standard output"),
         arg("images", nargs="+", metavar="IMAGE", help="names or ids"))
def save_command(options):
    """Write images to a tarball, for `load` here or `docker load` elsewhere."""
    with adding():
        chosen = {}
        for text in options.images:
            tags = [] if has_version(text) else [  # a name without one means them all
                name for name in map(name_of, read_index()) if "@" not in name
                and split_name(name)[:2] == split_name(spelled_out(text))[:2]]
            for name in sorted(tags) or [text]:
                image = find_image(name)
                names = chosen.setdefault(image.entry["digest"], (image, {}))[1]
                if not image.id[7:].startswith(name.removeprefix("sha256:")):
                    names[full_name(name)] = True
        with output(options.output) as file:
            write_archive(list(chosen.values()), file)
    for image, _ in chosen.values():
        note_image("save", image.id)


@command("load", arg("-i", "--input", metavar="FILE", help="not standard input"),
         arg("-q", "--quiet", action="store_true", help="no progress"), PLATFORM)
def load_command(options):
    """Bring in the images of a tarball that `save` wrote, here or elsewhere."""
    if not options.input and os.isatty(0):
        raise Fail("requested load from stdin, but stdin is empty", "-i FILE, or <", 1)
    title, temporary = options.input or "standard input", []
    with adding():
        try:
            path = options.input
            with open(path or 0, "rb", closefd=bool(path)) as file:
                if not path or not file.seekable():  # each blob is read where it lies
                    path = spool(pieces(file))[0]
                    temporary.append(path)
            with open(path, "rb") as file:
                packed = compression(file.read(512))
            if packed:
                path = spool(plain_pieces(path, title))[0]
                temporary.append(path)
            archive, progress = Archive(path, title), Progress(sys.stdout)

            def show(id, _, at=0, of=0):
                if of and progress.live and not options.quiet:
                    progress(id, "Loading layer", at, of)

            known = {name_of(old.entry): old.id for old in sound_images()}
            for raw, refs in archive.images(platform_of(options.platform)):
                image = take_image(archive, raw, refs, show)
                note_image("load", image.id)
                for ref in refs:
                    old, known[ref] = known.get(ref, image.id), image.id
                    if old != image.id:
                        print(f"The image {short_name(ref)} already exists, renaming "
                              f"the old one with ID {old} to empty string")
                    print(f"Loaded image: {short_name(ref)}")
                if not refs:
                    print(f"Loaded image ID: {image.id}")
        except OSError as error:
            if not title == options.input == error.filename:
                raise
            raise Fail(f"open {title}: {error.strerror}", "see `ls`", 1) from None
        finally:
            for path in temporary:
                take_away_file(path)


# ── images as what containers are made of ──


def image_layers(image):
    """The directories of an image's layers, bottom first; unpacked again if missing.

    One that comes twice is needed only where it lies highest, and overlay takes no
    directory twice."""
    found = {}
    for diff_id, layer in zip(image.diff_ids, image.layers, strict=True):
        found.pop(diff_id, None)
        found[diff_id] = layer_path(diff_id)
        if not os.path.isdir(found[diff_id]):
            unpack_layer(diff_id, blob_path(layer["digest"]))
    if not found:
        raise Fail(f"image {image.id[7:19]} has no files", "there is nothing to run")
    return list(found.values())


def image_process(image):
    """What an image says of its process, in the spec's form."""
    lines = [line for line in image.settings.get("Env") or () if "=" in line]
    if not any(line.startswith("PATH=") for line in lines):
        lines.insert(0, f"PATH={DEFAULT_PATH}")
    return {"env": lines, "cwd": image.settings.get("WorkingDir") or "/",
            "user": {"username": image.settings.get("User") or ""}}


def image_command(image, entrypoint, words):
    """The program and its arguments: the image's Entrypoint, then what was asked for or
    else its Cmd; --entrypoint replaces both."""
    own = image.settings.get("Entrypoint") or []
    default = image.settings.get("Cmd") or [] if entrypoint is None else []
    found = (own if entrypoint is None else [entrypoint] * bool(entrypoint)) + (
        words or default)
    if not found:
        raise Fail("No command specified", "the image names none: run IMAGE COMMAND")
    return found


EXPOSED = "org.opencontainers.image.exposedPorts"  # of a container: --expose, too


def image_notes(image):
    """The annotations of a container made of an image, as the OCI image specification
    has them ("conversion.md"): what only `stop`, `ps` or its user needs to know."""
    key, settings = "org.opencontainers.image", image.settings
    notes = {f"{key}.os": image.config.get("os"),
             f"{key}.architecture": image.config.get("architecture"),
             f"{key}.author": image.config.get("author"),
             f"{key}.created": image.config.get("created"),
             f"{key}.stopSignal": settings.get("StopSignal"),
             EXPOSED: ",".join(settings.get("ExposedPorts") or {})}
    return {**{name: text for name, text in notes.items() if text},
            **(settings.get("Labels") or {}), OF_IMAGE: image.id}

# ══ 9. REGISTRY ═══════════════════════════════════════════════════════════════════
#
# A registry is a store as above behind HTTP, and an image goes there and back in a
# handful of requests, each of which names a digest that the other side can check:
#
#       GET  /v2/NAME/manifests/TAG     the manifest, or a list of one for each platform
#       GET  /v2/NAME/blobs/DIGEST      the config, the layers; Range: bytes=N- goes on
#       HEAD /v2/NAME/blobs/DIGEST      is it there?  then nothing is sent
#       POST /v2/NAME/blobs/uploads/    where to PUT it, or PATCH it in pieces; or, with
#                                       ?mount=DIGEST&from=OTHER, there it is already
#       PUT  /v2/NAME/manifests/TAG     last: now others can see it
#
# Who we are is asked for by an answer 401.  "Basic" takes name and password themselves,
# "Bearer" a token that the server it names gives for them, or to anybody for what is
# public.  They are sent to the host that asked and never along a redirect to another.
#
# The other side is not to be trusted: with what is larger than announced, with another
# digest, with redirects without end.  And it fails: what may pass is tried again, after
# longer and longer pauses, and of a blob only the rest.  It is https, verified with the
# system's authorities and those in /etc/docker/certs.d/HOST; http only where Docker
# takes that too, on this machine or for "insecure-registries" in its daemon.json.
#
# The OCI distribution specification; Docker's "Token Authentication Specification".

DOCKER_ETC = "/etc/docker"
HUB, HUB_KEY = "registry-1.docker.io", "https://index.docker.io/v1/"
ATTEMPTS, PAUSE, PATIENCE = 5, 0.5, 60  # how often, seconds before the second, to wait
CHUNK = 64 << 20  # bytes: a larger blob is uploaded in pieces


# ── who we are ──


def login_host(server):
    """The host that names its images, of what `login` and `logout` are given."""
    host = (server or "docker.io").partition("://")[2] or server or "docker.io"
    host = host.partition("/")[0]
    return "docker.io" if host in ("index.docker.io", HUB) else host


def docker_config(host):
    """Docker's config.json, where logins are kept: (its path, its content, the key that
    it has for a registry, the credential helper for that or "")."""
    top = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    path, config = os.path.realpath(f"{top}/config.json"), {}
    if os.path.exists(path):
        with open(path, "rb") as file:
            config = parsed(file.read(), path, {
                "auths": {}, "credHelpers": {str: str}, "credsStore": str})
    key = HUB_KEY if host == "docker.io" else host
    return path, config, key, (config.get("credHelpers") or {}).get(key) or config.get(
        "credsStore") or ""


def ask_helper(name, verb, text):
    """What a credential helper answers; "" if it knows nothing."""
    import subprocess

    program = f"docker-credential-{name}"
    try:
        done = subprocess.run([program, verb], input=text, capture_output=True,
                              text=True)
    except OSError as error:
        raise Fail(f"{program}: {error.strerror}",
                   "config.json names it: install it, or take it out", 1) from None
    if done.returncode and "credentials not found" not in done.stdout:
        raise Fail(f"{program} {verb}: {(done.stdout or done.stderr).strip():.200}", "",
                   1)
    return "" if done.returncode else done.stdout


def credentials(host):
    """[name, password] for a registry, or None; Docker's name for who has an identity
    token instead is "<token>"."""
    import base64

    path, config, key, helper = docker_config(host)
    if helper:
        said = parsed(ask_helper(helper, "get", key) or "{}",
                      f"docker-credential-{helper}", {"Username": str, "Secret": str})
        return [said.get("Username") or "", said["Secret"]] if said.get("Secret") else (
            None)
    auths = config.get("auths") or {}
    kept = auths.get(key) or next(  # older ones have a whole URL
        (kept for name, kept in auths.items() if login_host(name) == host), None)
    try:
        if token := kept and kept.get("identitytoken"):
            return ["<token>", token]
        if not kept or not kept.get("auth"):  # it may be there in the clear
            name, secret = (kept or {}).get("username"), (kept or {}).get("password")
            return [name, secret or ""] if name else None
        name, secret = base64.b64decode(kept["auth"]).decode().split(":", 1)
        return [name, secret]
    except (ValueError, TypeError, AttributeError):
        raise Fail(f"{path}: no name and password for {key}", "log in again", 1
                   ) from None


def keep_credentials(host, user):
    """Keep [name, password] for a registry, or with None forget them; for our own user
    alone (P3), and with a helper not in a file at all.  Of two at once none is lost."""
    import base64

    # An absolute path is none in the store, but the directory is made in the same way.
    with held(os.path.dirname(docker_config(host)[0]), fcntl.LOCK_EX):
        path, config, key, helper = docker_config(host)
        before = config.get("auths") or {}
        auths = {name: kept for name, kept in before.items()
                 if login_host(name) != host}
        known = auths != before or bool(helper)
        if helper:
            ask_helper(helper, *("store", to_json({
                "ServerURL": key, "Username": user[0], "Secret": user[1]})
                ) if user else ("erase", key))
        if user:
            auths[key] = {} if helper else {
                "auth": base64.b64encode(":".join(user).encode()).decode()}
        take_away_file(f"{path}.new")  # not ours: it may be a link, or open to others
        save(path, {**config, "auths": auths})
    return known


# ── the protocol ──
#
# urllib speaks HTTP for us, with just the handlers named below: what it would follow
# or send by itself (ftp and file, names and passwords along a redirect) is not there.


def is_loopback(host):
    """Whether a registry is on this machine."""
    import re

    return bool(re.fullmatch(
        r"(localhost|\[::1\]|127(\.[0-9]{1,3}){3})(:[0-9]+)?", host))


def is_within(host, networks):
    """Whether a registry has an address in one of some networks."""
    import ipaddress
    import re
    import socket

    name = re.sub(r":[0-9]+$", "", host).strip("[]")
    try:
        found = [ipaddress.ip_address(address[0])
                 for *_, address in socket.getaddrinfo(name, None)]
        return any(address in ipaddress.ip_network(network, strict=False)
                   for network in networks for address in found)
    except (OSError, UnicodeError):
        return False  # whoever connects to it says why
    except ValueError as error:
        raise Fail(f"{DOCKER_ETC}/daemon.json: insecure-registries: {error}",
                   "HOST, HOST:PORT or ADDRESS/BITS", 1) from None


def may_be_insecure(host):
    """Whether http will do for a registry."""
    path = f"{DOCKER_ETC}/daemon.json"
    if is_loopback(host) or not os.path.exists(path):
        return is_loopback(host)
    with open(path, "rb") as file:
        config = parsed(file.read(), path, {"insecure-registries": [str]})
    rules = config.get("insecure-registries") or []
    networks = [rule for rule in rules if "/" in rule]
    return host in rules or bool(networks) and is_within(host, networks)


def tls_context(host):
    """How a registry proves who it is, and we to it: certs.d, as Docker has it."""
    import glob
    import ssl

    context, top = ssl.create_default_context(), f"{DOCKER_ETC}/certs.d/{host}"
    try:
        for path in sorted(glob.glob(f"{glob.escape(top)}/*.crt")):
            context.load_verify_locations(path)
        for path in sorted(glob.glob(f"{glob.escape(top)}/*.cert")):
            context.load_cert_chain(path, f"{path[:-5]}.key")
    except OSError as error:  # ssl's errors are that too
        raise Fail(f"{top}: {error}", "*.crt: authorities; *.cert and *.key: ours"
                   ) from None
    return context


def needs_no_proxy(host, port, rules):
    """Whether it is this machine, or NO_PROXY names it, which Go and so Docker reads in
    another way than urllib: 10.0.0.0/8, a.b (and all below it), .a.b (only these), each
    of the latter also with a port."""
    import ipaddress
    import re

    def address(text):
        try:
            return ipaddress.ip_address(text)
        except ValueError:
            return None

    numeric = address(host)
    if host == "localhost" or numeric and numeric.is_loopback:
        return True
    for rule in rules.lower().replace(" ", "").split(","):
        found = re.fullmatch(r"(\[.*\]|[^:]*):(\d*)", rule)
        name, number = found.groups() if found else (rule, "")
        name = name.strip("[]").removeprefix("*" * (name != "*"))
        if "/" in rule:
            try:
                found = numeric and numeric in ipaddress.ip_network(rule, strict=False)
            except ValueError:
                continue
        elif (number or f"{port}") != f"{port}" or not name:
            continue
        elif address(name):
            found = numeric == address(name)
        else:
            found = name in ("*", host) or host.endswith(f".{name.lstrip('.')}")
        if found:
            return True
    return False


def proxy_for(url):
    """(address, name and password if there are any) of the proxy that the environment
    names for a URL; or None."""
    from urllib.parse import unquote, urlsplit
    from urllib.request import getproxies_environment

    to, known = urlsplit(url), getproxies_environment()
    proxy = known.get(to.scheme)
    if not proxy or needs_no_proxy(to.hostname, to.port or {"http": 80}.get(
            to.scheme, 443), known.get("no", "")):
        return None
    at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if at.scheme != "http" or not at.hostname:
        raise Fail(f"the proxy {at.scheme}://{at.hostname}: not possible",
                   f"{to.scheme.upper()}_PROXY=http://HOST:PORT", 1)
    user = at.username and unquote(f"{at.username}:{at.password or ''}")
    return at.netloc.rpartition("@")[2], user


def listening(kind):
    """urllib's handler of that kind, but that it hears an answer which comes before all
    has been sent: it says why the rest is not wanted."""
    class Handler(kind):
        def do_open(self, connection, req, **how):
            class Connection(connection):
                def request(self, *args, **how):
                    try:
                        super().request(*args, **how)
                    except (BrokenPipeError, ConnectionResetError):
                        if not self.sock:
                            raise
            return super().do_open(Connection, req, **how)
    return Handler


def http_opener(host):
    """urllib's opener for a registry: http and https alone, a proxy if the environment
    names one, and nothing that proves who we are along a redirect to another host.

    urllib would read a redirect's body to its end, which it need not have; and make a
    GET of HEAD, while a storage behind a registry signs the one that was asked for."""
    import base64
    from urllib import request
    from urllib.parse import urlsplit

    class Proxies(request.BaseHandler):
        handler_order = 100  # before those that connect

        def http_open(self, req):
            if found := proxy_for(req.full_url):
                if found[1]:
                    req.add_unredirected_header("Proxy-authorization", "Basic " + (
                        base64.b64encode(found[1].encode()).decode()))
                req.set_proxy(found[0], "http")

        https_open = http_open

    class Redirects(request.HTTPRedirectHandler):
        def redirect_request(self, req, fp, code, msg, headers, newurl):
            new = super().redirect_request(req, fp, code, msg, headers, newurl)
            fp.close()
            if req.type == "https" and new.type != "https":
                raise Fail(f"{host} redirects to {new.type}, which is not safe", "")
            if req.get_method() == "HEAD":
                new.method = "HEAD"
            # Not req.host: that is the proxy's.
            if urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
                for name, value in req.unredirected_hdrs.items():
                    if name == "Authorization":
                        new.add_unredirected_header(name, value)
            return new

    opener = request.OpenerDirector()
    for handler in (Proxies, Redirects, listening(request.HTTPHandler),
                    listening(request.HTTPSHandler)(context=tls_context(host)),
                    request.UnknownHandler, request.HTTPDefaultErrorHandler,
                    request.HTTPErrorProcessor):
        opener.add_handler(handler() if isinstance(handler, type) else handler)
    return opener


class Refused(Fail):
    """What a registry does not do for us: HTTP's status."""

    status = 0


def in_one_line(text):
    """What the other side says, however long and in however many lines."""
    return f"{' '.join(str(text).split()):.300}"


def refusal(error, host):
    """urllib's HTTPError as a Refused, or Broken if it may pass."""
    try:
        said = parsed(error.read(1 << 16), "", {"errors": [{"code": str}]})["errors"][0]
        text = f"{said['code'].lower().replace('_', ' ')}: {said.get('message')}"
    except (Fail, KeyError, IndexError, OSError, TypeError):
        text = f"{error.code} {error.reason}"
    text = in_one_line(text)
    if error.code == 429 or error.code >= 500:
        broken, after = Broken(text), error.headers.get("Retry-After", "")
        broken.pause = min(int(after), PATIENCE) if after.isdecimal() else 0
        return broken
    refused = Refused(text, f"that is what {host} says", 1)
    refused.status = error.code
    return refused


def small_answer(answer, what):
    """All bytes of an answer that is kept in memory."""
    raw = answer.read(MANIFEST_LIMIT + 1)
    if len(raw) > MANIFEST_LIMIT:
        raise Fail(f"{what} has more than {MANIFEST_LIMIT} bytes", "it is hostile", 1)
    if answer.length:  # what was announced and did not come: read() does not mind
        raise Broken(f"{what} was cut")
    return raw


class Registry:
    """A source of images, and where they go: one repository of a registry.

    The first request finds out whether it talks https, and an answer 401 who it wants
    us to be.
    """

    def __init__(self, host, path, user=None):
        self.host, self.path = host, path
        self.address = HUB if host == "docker.io" else host
        self.scheme, self.authorization = "", ""
        self.user, self.opener = user or credentials(host), http_opener(host)

    def patiently(self, do, *args):
        """Do something, and what may pass again, after a pause that grows."""
        import http.client
        import ssl

        for attempt in range(ATTEMPTS):
            try:
                return do(*args)
            except (Broken, ConnectionError, TimeoutError, ssl.SSLError,
                    http.client.HTTPException, ValueError) as error:
                if isinstance(error, ValueError) and not isinstance(error, OSError):
                    raise Fail(f"{self.host}: {in_one_line(error)}", "it sends us to "
                               "what is no address, or gives what is no token", 1
                               ) from None
                if attempt == ATTEMPTS - 1:
                    raise Fail(f"{self.host}: {in_one_line(error) or repr(error)}",
                               f"the last of {ATTEMPTS} attempts; what has come is "
                               "kept", 1) from None
                time.sleep(max(PAUSE * 2 ** attempt, getattr(error, "pause", 0)))

    def find_scheme(self):
        """https; or where it may be http, what the other side talks.

        A certificate that cannot be verified is no reason to go on without one.
        """
        import ssl
        import urllib.error

        self.scheme = "https"
        if may_be_insecure(self.host):
            try:
                self.opener.open(f"https://{self.address}/v2/", None, PATIENCE).close()
            except urllib.error.HTTPError:
                pass
            except OSError as error:
                reason = getattr(error, "reason", error)
                if not isinstance(reason, ssl.SSLCertVerificationError):
                    self.scheme = "http"

    def ask(self, method, path, body=lambda: None, **headers):
        """One request, and if need be once more as somebody: its answer, to be closed.
        A header's _ is a -; body() is what it sends."""
        import urllib.error
        import urllib.parse
        import urllib.request

        if not self.scheme:
            self.find_scheme()
        home = f"{self.scheme}://{self.address}/"
        url = urllib.parse.urljoin(home, path)  # an upload may go on elsewhere
        if self.scheme == "https" and not url.startswith("https://"):
            raise Fail(f"{self.host} sends us on to http, which is not safe", "", 1)

        def is_at_home(url):  # a port that goes without saying may be said
            to, us = urllib.parse.urlsplit(url), urllib.parse.urlsplit(home)
            usual = {"http": 80, "https": 443}[us.scheme]
            return (to.scheme, to.hostname, to.port or usual) == (
                us.scheme, us.hostname, us.port or usual)

        for known in (False, True):
            asked = urllib.request.Request(url, body(), {
                name.replace("_", "-"): value for name, value in headers.items()
            }, method=method)
            if self.authorization and is_at_home(url):
                asked.add_unredirected_header("Authorization", self.authorization)
            try:
                return self.open_url(asked)
            except urllib.error.HTTPError as error:
                challenge = error.headers.get_all("WWW-Authenticate") or [""]
                # Another host that redirects led to may ask too, and is told nothing.
                if error.code != 401 or known or not is_at_home(error.filename):
                    raise refusal(error, self.host) from None
                error.close()
            self.authorize(sorted(
                challenge, key=lambda text: text[:6].lower() != "bearer")[0])

    def open_url(self, asked):
        """What the opener gives for a request; Broken where another try may help."""
        import socket
        import ssl
        import urllib.error

        try:
            # What was sent may first be copied and read again, all of it.
            return self.opener.open(asked, timeout=PATIENCE * (
                10 if asked.get_method() == "PUT" else 1))
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            reason = error.reason
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise Fail(f"{self.host}: {reason.verify_message}", "its authority's "
                           f"certificate goes into {DOCKER_ETC}/certs.d/{self.host}/",
                           1) from None
            if isinstance(reason, (ConnectionRefusedError, socket.gaierror)):
                raise Fail(f"{self.host}: {reason.strerror}", "is the name right, and "
                           "is there a network?", 1) from None
            raise Broken(getattr(reason, "strerror", None) or f"{reason or error!r}"
                         ) from None

    def authorize(self, challenge):
        """Prove who we are, as an answer 401 asks us to."""
        import base64
        import re
        import urllib.error
        import urllib.parse
        import urllib.request

        kind = challenge.partition(" ")[0].lower()
        fields = {key.lower(): quoted or plain for key, quoted, plain in re.findall(
            r'(\w+)=(?:"([^"]*)"|([^\s,"]+))', challenge)}
        name, secret = self.user or ("", "")
        basic = name not in ("", "<token>") and "Basic " + base64.b64encode(
            f"{name}:{secret}".encode()).decode()
        if kind == "basic" and basic:
            self.authorization = basic
            return
        realm = fields.get("realm", "")
        if kind != "bearer" or not realm.startswith(
                ("https://", f"{self.scheme}://")):
            raise Refused("unauthorized: authentication required",
                          f"minicontainer login {self.host}", 1)
        form, body = {key: fields[key] for key in ("service", "scope")
                      if key in fields}, None
        if name == "<token>":  # OAuth 2: in a body, by POST
            form.update(grant_type="refresh_token", client_id="minicontainer",
                        refresh_token=secret)
            body = urllib.parse.urlencode(form).encode()
        else:
            form["scope"] = fields.get("scope", "").split()  # each as one parameter
            realm += ("&" if "?" in realm else "?") + urllib.parse.urlencode(form, True)
        asked = urllib.request.Request(realm, body)
        if basic:
            asked.add_unredirected_header("Authorization", basic)
        try:
            with self.open_url(asked) as answer:
                said = parsed(small_answer(answer, "the token"), "token", {
                    "token": str, "access_token": str})
        except urllib.error.HTTPError as error:
            raise refusal(error, self.host) from None
        token = said.get("token") or said.get("access_token") or ""
        self.authorization = f"Bearer {token}"

    def manifest(self, version):
        """The bytes that a tag or digest names, and their digest."""
        import io

        with self.ask("GET", f"/v2/{self.path}/manifests/{version}",
                      Accept=", ".join(MANIFESTS)) as answer:
            raw = small_answer(answer, "the manifest")
            said = answer.headers.get("Docker-Content-Digest")
        digest = sha256(io.BytesIO(raw))
        for wanted in (version, said):
            if wanted and wanted.startswith("sha256:") and wanted != digest:
                raise Fail(f"{self.host}: wrong digest: asked for {wanted}, what has "
                           f"come is {digest}", "it is damaged or hostile", 1)
        return raw, digest

    def tags(self):
        """The tags of the repository, of which a registry gives some at a time."""
        from urllib.parse import urljoin

        path, found = f"/v2/{self.path}/tags/list", {}
        while path:
            with self.ask("GET", path) as answer:
                said = parsed(small_answer(answer, "the tags"), "tags", {"tags": [str]})
                more = answer.headers.get("Link", "").partition(">")
            before = len(found)
            found.update(dict.fromkeys(said.get("tags") or ()))
            path = urljoin(path, more[0].strip(" <")) if "next" in more[2] and (
                len(found) > before) else ""
        return sorted(found)

    def open(self, descriptor, at):
        """A blob or manifest from byte `at`, or 0 if it does not do that; which."""
        kind = "manifests" if descriptor.get("mediaType") in MANIFESTS else "blobs"
        rest = {"Range": f"bytes={at}-"} if at else {}
        answer = self.ask("GET", f"/v2/{self.path}/{kind}/{descriptor['digest']}",
                          Accept=descriptor.get("mediaType") or "*/*", **rest)
        begins = answer.headers.get("Content-Range", "").startswith(f"bytes {at}-")
        return answer, at if answer.status == 206 and begins else 0

    def has(self, digest):
        """Whether it has a blob."""
        try:
            self.ask("HEAD", f"/v2/{self.path}/blobs/{digest}").close()
            return True
        except Refused as refused:
            if refused.status != 404:
                raise
            return False

    def upload(self, descriptor, other, tell):
        """Send a blob in one piece or several, unless it can be taken from another
        repository of the same registry.

        Each answer says where the next request goes; that may be another host, which
        is then told nothing of who we are.
        """
        digest, length, sent = descriptor["digest"], descriptor["size"], 0
        mount = f"?mount={digest}&from={other}" if other else ""
        try:
            answer = self.ask("POST", f"/v2/{self.path}/blobs/uploads/{mount}",
                              lambda: b"")
        except Refused:  # we may not read the other, or it does not do that
            if not other:
                raise
            return self.upload(descriptor, "", tell)
        with answer:
            if answer.status == 201:
                return tell(f"Mounted from {other}")
            where = answer.headers.get("Location", "")

        def send(method, end, **headers):
            def piece():
                part = Part(blob_path(digest), sent, end - sent)
                part.tell = lambda left: tell("Pushing", end - left, length)
                return part
            return self.ask(method, where, piece, Content_Length=str(end - sent),
                            Content_Type="application/octet-stream", **headers)

        while length > CHUNK and sent < length:
            end = min(sent + CHUNK, length)
            with send("PATCH", end, Content_Range=f"{sent}-{end - 1}") as answer:
                where, sent = answer.headers.get("Location", where), end
        where += f"{'&' if '?' in where else '?'}digest={digest}"
        send("PUT", length).close()
        tell("Pushed")

    def put(self, descriptor, other="", tell=lambda *_: None):
        """Have the registry have a blob of the store."""
        tell("Preparing")
        if self.patiently(self.has, descriptor["digest"]):
            tell("Layer already exists")
        else:
            self.patiently(self.upload, descriptor, other, tell)

    def put_manifest(self, image, tag):
        """Last, the manifest under a name."""
        with open(blob_path(image.entry["digest"]), "rb") as file:
            raw = file.read()
        with self.ask("PUT", f"/v2/{self.path}/manifests/{tag}", lambda: raw,
                      Content_Type=image.entry["mediaType"]) as answer:
            digest = answer.headers.get("Docker-Content-Digest")
        if digest not in (None, image.entry["digest"]):
            raise Fail(f"{self.host} has another digest, {digest}", "push again", 1)


# ── what a person sees of it ──


def ask_for(registry, what, do, *args):
    """What do(*args) gets from a registry; or, in Docker's words, why it does not."""
    try:
        return registry.patiently(do, *args)
    except Refused as refused:
        name = short_name(f"{registry.host}/{registry.path}")
        refused.message = {
            404: f"{what} not found: ", **dict.fromkeys((0, 401, 403), (
                f"pull access denied for {name}, repository does not exist or may "
                "require 'minicontainer login': "))
            }.get(refused.status, "") + refused.message
        raise


def pull_version(registry, ref, platform, out):
    """Bring one image into the store; whether its name has meant another, or none."""
    import io

    host, path, version = split_name(ref)
    raw, digest = ask_for(registry, f"manifest for {short_name(ref)}",
                          registry.manifest, version)
    print(f"{short_name(ref) if '@' in ref else version}: Pulling from {path}",
          file=out)
    known = [(name_of(entry), entry["digest"]) for entry in read_index()]
    progress = Progress(out)

    def show(id, status, *how):
        if status != "Already exists" or not is_here:
            progress(id, status, *how)

    with adding():
        raw = pick(registry, raw, platform)
        is_here = sha256(io.BytesIO(raw)) in [digest for _, digest in known]
        image = take_image(registry, raw, dict.fromkeys(
            (ref, f"{host}/{path}@{digest}")), show)
    print(f"Digest: {digest}", file=out)
    return (ref, image.entry["digest"]) not in known


def pull_image(ref, platform, out=None, all_tags=False):
    """Bring an image, or all that its repository has, from a registry into the store,
    telling about it on `out`."""
    host, path, _ = split_name(ref)
    registry, out, refs = Registry(host, path), out or sys.stdout, [ref]
    repository, name = short_name(f"{host}/{path}"), short_name(ref)
    if all_tags:
        name = repository
        refs = [full_name(f"{host}/{path}:{tag}") for tag in ask_for(
            registry, f"repository {name}", registry.tags)]
    news = [pull_version(registry, one, platform, out) for one in refs]
    status = "Downloaded newer image" if any(news) else "Image is up to date"
    print(f"Status: {status} for {name}", file=out)
    note_image("pull", name, repository)


ALL_TAGS = arg("-a", "--all-tags", action="store_true", help="all of the repository")
ONLY_NAME = arg("-q", "--quiet", action="store_true", help="print only the name")


def telling(options, fd=1):
    """The file that is told how it goes, for -q one that keeps nothing."""
    return open(os.devnull if options.quiet else fd, "w", closefd=options.quiet)


def asked_name(options):
    """The name in full that a person asks a registry for, said if it was completed."""
    ref = full_name(options.name)
    if options.all_tags and has_version(options.name):
        raise Fail("tag can't be used with --all-tags/-a", "the name without it", 1)
    if not (options.quiet or options.all_tags or has_version(options.name)):
        print("Using default tag: latest", flush=True)
    return ref


@command("pull", ONLY_NAME, ALL_TAGS, PLATFORM,
         arg("name", metavar="NAME[:TAG|@DIGEST]", help="of the image"))
def pull_command(options):
    """Fetch an image from a registry."""
    ref = asked_name(options)
    with telling(options) as out:
        pull_image(ref, platform_of(options.platform), out, options.all_tags)
    print(ref.rpartition(":")[0] if options.all_tags else ref)


def push_image(image, ref, out):
    """Send an image to the registry of one of its names, telling about it on `out`."""
    host, path, tag = split_name(ref)
    registry, others = Registry(host, path), {}
    for entry in read_index():  # where the registry has it from us, if not there
        if "@" in name_of(entry) and split_name(name_of(entry))[0] == host:
            others.update(dict.fromkeys(Image(entry).blobs(),
                                        split_name(name_of(entry))[1]))
    registry.patiently(registry.find_scheme)
    layers = {layer["digest"]: layer for layer in image.layers}
    in_parallel([(digest[7:19], lambda tell, layer=layer: registry.put(
        layer, others.get(layer["digest"], ""), tell))
        for digest, layer in layers.items()], Progress(out))
    registry.put(image.manifest["config"], others.get(image.id, ""))
    digest = image.entry["digest"]
    registry.patiently(registry.put_manifest, image, tag)
    with changed_index() as entries:
        point(entries, f"{host}/{path}@{digest}", image.entry)
    print(f"{tag}: digest: {digest} size: {image.entry['size']}", file=out)
    note_image("push", short_name(ref), short_name(f"{host}/{path}"))


def names_to_push(ref, all_tags):
    """This name, or all tags of its repository, if there are any."""
    host, path, _ = split_name(ref)
    repository = short_name(f"{host}/{path}")
    there = [name for name in map(name_of, read_index())
             if split_name(name)[:2] == (host, path)]
    found = sorted(name for name in there
                   if name == ref or all_tags and "@" not in name)
    if not found:
        raise Fail("An image does not exist locally with the tag: " + repository
                   if not there else f"no tags to push for {repository}"
                   if all_tags else f"tag does not exist: {short_name(ref)}",
                   "see `minicontainer images`", 1)
    return found


@command("push", ONLY_NAME, ALL_TAGS,
         arg("name", metavar="NAME[:TAG]", help="of the image"))
def push_command(options):
    """Send an image to a registry."""
    ref = asked_name(options)
    host, path, _ = split_name(ref)
    if "@" in ref:
        raise Fail("cannot push a digest reference", "NAME[:TAG]", 1)
    with telling(options) as out, adding():
        print(f"The push refers to repository [{host}/{path}]", file=out, flush=True)
        for name in names_to_push(ref, options.all_tags):
            push_image(find_image(name), name, out)
    if options.quiet:
        print(short_name(f"{host}/{path}" if options.all_tags else ref))


@command("login", arg("-u", "--username", metavar="NAME", help="else it is asked for"),
         arg("--password-stdin", action="store_true", help="read it from there"),
         arg("server", nargs="?", metavar="SERVER", help="default: Docker Hub"))
def login_command(options):
    """Check a name and password with a registry, and keep them for pull and push."""
    import getpass

    if not options.password_stdin and not os.isatty(0) or (
            options.password_stdin and not options.username):
        raise Fail("Must provide --username with --password-stdin"
                   if options.password_stdin else "Cannot perform an interactive login "
                   "from a non TTY device", "echo $TOKEN | minicontainer login -u NAME "
                   "--password-stdin SERVER; an option would show in `ps`", 1)
    name = options.username or input("Username: ")
    registry = Registry(login_host(options.server), "", [
        name, sys.stdin.read().removesuffix("\n").removesuffix("\r")  # or a whole key
        if options.password_stdin
        else getpass.getpass("Password: ")])
    try:
        registry.patiently(registry.ask, "GET", "/v2/").close()
    except Refused as refused:
        raise Fail(f"login attempt to {registry.scheme}://{registry.address}/v2/ "
                   f"failed with status: {refused.status or 401} {refused.message}",
                   "is the password right?", 1) from None
    keep_credentials(registry.host, registry.user)
    path, _, _, helper = docker_config(registry.host)
    if not helper:
        print(f"WARNING! Your password will be stored unencrypted in {path}.\n"
              "Configure a credential helper to remove this warning.\n",
              file=sys.stderr)
    print("Login Succeeded")


@command("logout", arg("server", nargs="?", metavar="SERVER", help="as for login"))
def logout_command(options):
    """Forget the name and password for a registry."""
    host = login_host(options.server)
    key, known = docker_config(host)[2], keep_credentials(host, None)
    print(f"Removing login credentials for {key}" if known else
          f"Not logged in to {key}")

# ══ 10. NETWORK ═══════════════════════════════════════════════════════════════════
#
# A new network namespace has a loopback interface and nothing else.  What leads out of
# it is a cable with two ends (veth): one inside, named eth0, and one on the host, that
# is plugged into a bridge, a switch that the kernel plays:
#
#       container            container            the world
#       eth0 172.18.0.2      eth0 172.18.0.3         │
#         ║                    ║                   the host's own eth0
#         ╚═══════ bridge ═════╝                     │
#                172.18.0.1, the gateway ──── routing and NAT
#
# The kernel is told in messages to a socket (netlink), which is what `ip` and `nft` do
# too; --explain shows each as the line of theirs that it replaces.
#
# What leaves for the world gets the host's address (masquerade), and what comes to a
# published port of the host is sent on to the container.  That is done by nf_tables,
# in one table of ours, written anew as a whole, in one transaction, whenever somebody
# comes or goes: it follows from the files below, and cannot get out of step with them.
#
#       networks/NAME.json         a network: its subnets, gateways, bridge …
#       endpoints/ID-NAME.json     who is on it, from start to end: addresses, ports …
#       networks/forwarding        what we have switched on, to be switched off again
#
# Whoever changes these locks networks/.  An address is one container's for as long as
# its endpoint is there; that of a container which nobody looks after any more counts
# for nothing, until `gc` clears it away.  A bridge is there while somebody is on it, so
# that the host is left as it was.
#
# Names are in /etc/hosts, which we write for all who are on a network when somebody
# comes or goes: so no process has to answer for it, a lookup asks nobody, and finds an
# address's name as well as a name's address.  A program that asks name servers past
# the C library (nslookup) does not see them; and what a container has written there
# itself is written over.
#
# Man pages: rtnetlink(7), netlink(7), veth(4), bridge(8), nft(8).

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_NEWROUTE = 20, 24
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_EXCL = 1, 4, 0x300, 0x200
NLM_F_CREATE, NLM_F_APPEND = 0x400, 0x800
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 10, 18
IFLA_NET_NS_PID, IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 19, 1, 2, 1
IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA, IFLA_BRPORT_MODE = 4, 5, 4
IFA_ADDRESS, IFA_LOCAL, IFA_F_NODAD, RTA_OIF, RTA_GATEWAY = 1, 2, 2, 4, 5
AF_INET, AF_INET6, AF_NETLINK, IFF_UP = 2, 10, 16, 1
NETWORK = "minicontainer.network"  # annotation: what the container wants, see WANTS

ADDRESS_OPTIONS = (
    arg("--ip", metavar="ADDRESS", help="its IPv4 address in the network"),
    arg("--ip6", metavar="ADDRESS", help="its IPv6 address in the network"),
    arg("--mac-address", metavar="MAC", help="that of its interface"),
)
ENDPOINT_OPTIONS = (
    arg("-p", "--publish", metavar="[[IP:]PORT:]PORT[/udp]", action="append",
        default=[], help="what comes to that port of the host is for this of its own"),
    arg("-P", "--publish-all", action="store_true",
        help="publish what the image says it listens at, at ports that are free"),
    arg("--expose", metavar="PORT[-PORT][/udp]", action="append", default=[],
        help="it listens there, too, whatever the image says"),
    *ADDRESS_OPTIONS,
    arg("--network-alias", metavar="NAME", action="append", default=[],
        help="one more name in the network"),
    arg("--add-host", metavar="NAME:ADDRESS", action="append", default=[],
        help="a line of /etc/hosts; host-gateway is the host's address"),
    arg("--dns", metavar="ADDRESS", action="append", default=[],
        help="a name server, in place of the host's"),
    arg("--dns-search", metavar="DOMAIN", action="append", default=[],
        help="where short names are looked up"),
    arg("--dns-option", metavar="OPTION", action="append", default=[],
        help="an option of resolv.conf"),
)


# ── addresses ──
#
# An address is a number of 128 bits: one of IPv4 is the one that IPv6 has for it,
# ::ffff:172.18.0.2.  So all are in one row, a subnet is a range of it, and nothing that
# counts or compares them has to ask for the family.

IPV4 = range(0xFFFF << 32, 0x10000 << 32)


def packed(address):
    """The four or sixteen bytes of an address."""
    import _socket

    try:
        data = _socket.inet_pton(AF_INET6 if ":" in address else AF_INET, address)
        if len(data) == 4 or int.from_bytes(data, "big") not in IPV4:
            return data
    except (OSError, UnicodeError):
        pass
    raise Fail(f"invalid address: {address!r}", "as 172.18.0.2, or fd00::2")


def number_of(address):
    """An address as a number."""
    data = packed(address)
    return int.from_bytes(data, "big") + (IPV4.start if len(data) == 4 else 0)


def address_of(number):
    """The address that a number is."""
    import _socket

    if number in IPV4:
        return _socket.inet_ntop(AF_INET, (number - IPV4.start).to_bytes(4, "big"))
    return _socket.inet_ntop(AF_INET6, number.to_bytes(16, "big"))


def subnet_range(text):
    """The numbers of the addresses of a subnet in the form 172.18.0.0/16."""
    address, slash, bits = text.partition("/")
    first, length = number_of(address), 8 * len(packed(address))
    size_ = 1 << length - whole("the length of a prefix", bits if slash else "", 8,
                                length - 2)
    if first % size_:
        raise Fail(f"invalid subnet {text}: it has bits beyond its prefix",
                   f"{address_of(first // size_ * size_)}/{bits}", 1)
    return range(first, first + size_)


def lies_in(address, subnet):
    """Whether an address is one of a subnet's."""
    return number_of(address) in subnet_range(subnet)


def overlap(one, other):
    """Whether two ranges have an address in common."""
    return one.start < other.stop and other.start < one.stop


def mac_of(address):
    """The MAC that Docker makes of an address."""
    return "02:42:" + ":".join(f"{byte:02x}" for byte in packed(address)[-4:])


# ── rtnetlink ──
#
# A message is a header, a struct that depends on its kind, and attributes, each with
# its own length and kind, of which some hold attributes again:
#
#       length kind flags number port │ struct ifinfomsg │ length kind value… │ …
#       ──────── 16 bytes ─────────── │ ── RTM_…LINK ─── │ ── padded to 4 ───
#
# The kernel answers each with an error, whose number is 0 where all went well; what was
# asked for comes before that.  It also says in words what it did not like, if we ask
# for it (an extended acknowledgement), which is more than the name of an errno tells.


def attribute(kind, value, order="="):
    """A netlink attribute: a number, text, bytes, or others inside it, as a dict."""
    if isinstance(value, dict):
        value = b"".join(attribute(*item, order) for item in value.items())
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    elif isinstance(value, int):
        value = struct.pack(f"{order}I", value & 0xFFFFFFFF)
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes_of(data):
    """(kind, value) of each of the attributes in a message, or in another."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & 0x3FFF, data[4:length]  # without NLA_F_NESTED
        data = data[length + -length % 4:]


def message(kind, flags, number, head, attributes, order="="):
    """A netlink message; an answer has its number."""
    body = head + b"".join(attribute(*item, order) for item in attributes.items())
    return struct.pack("=IHHII", 16 + len(body), kind, flags | NLM_F_REQUEST, number,
                       0) + body


def link(index=0, flags=0):
    """struct ifinfomsg: an interface by its number, and flags that it is to have."""
    return struct.pack("=BxHiII", 0, 0, index, flags, flags)


class Netlink:
    """A socket to tables of the network namespace that it is made in: of interfaces,
    addresses and routes, or (NETLINK_NETFILTER) of rules."""

    def __init__(self, tables=0):
        import _socket

        self.socket = _socket.socket(AF_NETLINK, _socket.SOCK_RAW
                                     | _socket.SOCK_CLOEXEC, tables)
        for option in (10, 11):  # NETLINK_CAP_ACK, _EXT_ACK: short errors, in words
            self.socket.setsockopt(270, option, 1)

    def ask(self, words, kind, head, attributes, flags=0, why=""):
        """Send the message that `ip WORDS` would send; the index of the interface that
        is asked for, or 0."""
        def send():
            found = list(self.replies(message(kind, flags | NLM_F_ACK, 0, head,
                                              attributes)))
            return struct.unpack_from("=i", found[0], 4)[0] if found else 0
        return request("netlink", (f"ip {words}",), send, why)

    def make(self, words, kind, head, attributes, why=""):
        """Ask for something that is not there yet."""
        self.ask(words, kind, head, attributes, NLM_F_CREATE | NLM_F_EXCL, why)

    def replies(self, messages):
        """Send messages, and yield what comes back, until the kernel has done it all,
        or says why not and, in the error's `number`, which it did not."""
        self.socket.send(messages)
        while True:
            data = self.socket.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                body, data = data[16:length], data[length + -length % 4:]
                if kind not in (2, 3):
                    yield body
                    continue
                # NLMSG_ERROR, also where all is well; NLMSG_DONE, the end of a list
                if code := -struct.unpack_from("=i", body)[0]:
                    words = dict(attributes_of(body[20:])).get(1, b"").rstrip(b"\0")
                    error = OSError(code, words.decode() or os.strerror(code))
                    error.number = struct.unpack_from("=I", body, 12)[0]
                    raise error
                return

    def index(self, name):
        """The number of an interface; 0 if there is none of that name."""
        try:
            return self.ask(f"link show {name}", RTM_GETLINK, link(),
                            {IFLA_IFNAME: name})
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return 0

    def remove(self, name, why):
        """Remove an interface, unless its namespace has taken it along already."""
        try:
            if index := self.index(name):
                self.ask(f"link delete {name}", RTM_DELLINK, link(index), {}, why=why)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def set_up(self, name, addresses=()):
        """Give an interface addresses (with the length of their prefix), and switch it
        on."""
        index = self.index(name)
        for address in addresses:
            plain, _, bits = address.partition("/")
            six = ":" in plain  # then it is to work now, not when all were asked for it
            self.make(f"address add {address} dev {name}{' nodad' * six}", RTM_NEWADDR,
                      struct.pack("=BBBBI", AF_INET6 if six else AF_INET, int(bits),
                                  IFA_F_NODAD * six, 0, index),
                      {IFA_LOCAL: packed(plain), IFA_ADDRESS: packed(plain)})
        self.ask(f"link set {name} up", RTM_SETLINK, link(index, IFF_UP), {})

    def route(self, gateway, name):
        """Have what is not near go to a gateway, through an interface."""
        six = ":" in gateway
        self.make(f"{'-6 ' * six}route add default via {gateway} dev {name}",
                  RTM_NEWROUTE, struct.pack("=8BI", AF_INET6 if six else AF_INET,
                                            0, 0, 0, 254, 3, 0, 1, 0),
                  {RTA_GATEWAY: packed(gateway), RTA_OIF: self.index(name)},
                  why="the way to everywhere else")


class network_of:
    """A context in the network namespace of a process: what is made there is of there.

    /proc/sys/net too shows whoever looks the settings of his own."""

    def __init__(self, pid):
        self.pid = pid

    def __enter__(self):
        self.home = open_fd("/proc/self/ns/net", os.O_RDONLY, "to come back")
        there = open_fd(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        syscall("setns", there, CLONE_NEWNET, why="a socket made there is of there")
        os.close(there)

    def __exit__(self, *_):
        syscall("setns", self.home, CLONE_NEWNET, why="and back")
        os.close(self.home)


def with_prefix(network, addresses):
    """Addresses with the length of their subnet's prefix: 172.18.0.2/16."""
    return [f"{address}/{pool['subnet'].partition('/')[2]}"
            for address, pool in zip(addresses, network["pools"], strict=True)]


def set_ipv6(name, **settings):
    """Settings of an interface for IPv6, where this kernel knows that."""
    for key, (value, why) in settings.items():
        path = f"/proc/sys/net/ipv6/conf/{name}/{key}"
        if os.path.exists(path):
            write_file(path, value, why=why)


def wake_ipv6(name, network):
    """Have an interface speak IPv6 if its network does, also where the host does not by
    its own settings."""
    if any(":" in pool["subnet"] for pool in network["pools"]):
        set_ipv6(name, disable_ipv6=("0", "its network has addresses of IPv6"))


def make_bridge(netlink, network):
    """The switch of a network, with the gateways' addresses, if it is not there yet."""
    name = network["bridge"]
    if netlink.index(name):
        return
    netlink.make(f"link add {name} mtu {network['mtu']} type bridge", RTM_NEWLINK,
                 link(), {IFLA_IFNAME: name, IFLA_MTU: network["mtu"],
                          IFLA_LINKINFO: {IFLA_INFO_KIND: "bridge"}},
                 why="a switch for all who are on it")
    set_ipv6(name, accept_ra=("0", "or a container could offer itself as the router"),
             accept_dad=("0", "nobody else has its address: it need not wait a second"))
    wake_ipv6(name, network)
    netlink.set_up(name, with_prefix(network, [p["gateway"] for p in network["pools"]]))


def plug_in(pid, network, endpoint, leads_out):
    """A cable from the bridge to an interface in the network namespace of a process."""
    netlink, inner, outer = Netlink(), endpoint["interface"], endpoint["cable"]
    bridge, mtu = network["bridge"], network["mtu"]
    peer = link() + b"".join(attribute(*item) for item in {
        IFLA_IFNAME: inner, IFLA_NET_NS_PID: pid, IFLA_MTU: mtu,
        IFLA_ADDRESS: bytes.fromhex(endpoint["mac"].replace(":", ""))}.items())
    netlink.make(f"link add {outer} mtu {mtu} master {bridge} type veth peer {inner} "
                 f"mtu {mtu} address {endpoint['mac']} netns {pid}", RTM_NEWLINK,
                 link(), {IFLA_IFNAME: outer, IFLA_MASTER: netlink.index(bridge),
                          IFLA_MTU: mtu, IFLA_LINKINFO: {
                              IFLA_INFO_KIND: "veth",
                              IFLA_INFO_DATA: {VETH_INFO_PEER: peer}}},
                 why="a cable: one end there, one inside")
    if endpoint["ports"]:
        # Trap: with br_netfilter, which Docker loads, rules are asked already in the
        # bridge, which sends nothing out where it came in, unless it is told to.
        netlink.ask(f"link set {outer} type bridge_slave hairpin on", RTM_NEWLINK,
                    link(netlink.index(outer)), {IFLA_LINKINFO: {
                        IFLA_INFO_SLAVE_KIND: "bridge",
                        IFLA_INFO_SLAVE_DATA: {IFLA_BRPORT_MODE: b"\1"}}},
                    why="it may call itself by a port that it has published")
    netlink.set_up(outer)
    with network_of(pid):
        netlink = Netlink()
        set_ipv6(inner, accept_dad=("0", "nor need this one"))
        wake_ipv6(inner, network)
    netlink.set_up(inner, with_prefix(network, endpoint["addresses"]))
    for pool in network["pools"] if leads_out else ():
        netlink.route(pool["gateway"], inner)


# ── networks ──
#
# A network is a file until somebody is on it.  Its subnets, one of IPv4 and perhaps one
# of IPv6, must be nobody else's: not another network's, and nothing that this host has
# a route to, or what is sent there would end in the bridge.


def host_subnets():
    """The ranges that the host has routes to, other than the default one."""
    for line in read_file("/proc/net/route", why="what is taken").splitlines()[1:]:
        fields = line.split()
        first, mask = (int.from_bytes(bytes.fromhex(fields[n])[::-1], "big")
                       for n in (1, 7))
        if mask:
            first += IPV4.start
            yield range(first, first + (1 << 32) - mask)


def free_subnet(networks):
    """A private subnet that neither a network nor the host has."""
    taken = [*host_subnets(), *(subnet_range(pool["subnet"]) for network in networks
                                for pool in network["pools"])]
    for text in (*(f"172.{n}.0.0/16" for n in range(18, 32)),
                 *(f"192.168.{n}.0/20" for n in range(0, 256, 16))):
        if not any(overlap(subnet_range(text), other) for other in taken):
            return text
    raise Fail("all predefined address pools have been fully subnetted",
               "remove networks, or name a --subnet", 1)


def any_subnet6():
    """A subnet of IPv6 that nobody else is likely to have: RFC 4193 says by chance."""
    return address_of((0xFD << 40 | int.from_bytes(os.urandom(5), "big")) << 80) + "/64"


# Addresses of IPv6 come the same way: the host is a router there too, and gives what
# leaves its own address (NAT66), since the provider's router knows of no subnet that we
# have thought out.


def make_pools(subnets, gateways, ranges, six, networks):
    """The subnets of a new network, each with its gateway, and the range of it that
    addresses are taken from."""
    families = [":" in subnet for subnet in subnets]
    subnets = [*([] if False in families else [free_subnet(networks)]), *subnets,
               *([any_subnet6()] if six and True not in families else [])]
    subnets.sort(key=lambda subnet: ":" in subnet)
    if len(subnets) > 1 + (True in families or six):
        raise Fail(f"too many subnets: {', '.join(subnets)}",
                   "one of IPv4, and one of IPv6", 1)
    pools = []
    for subnet in subnets:
        own = subnet_range(subnet)
        if packed(subnet.partition("/")[0])[0] in (
                (255,) if ":" in subnet else (0, 127, *range(224, 256))):
            raise Fail(f"invalid subnet {subnet}: no host has such an address",
                       "as 172.18.0.0/16 or fd00:1::/64", 1)
        for gateway in gateways:
            if number_of(gateway) == own.start:
                raise Fail(f"{gateway} is the address of {subnet} itself",
                           f"--gateway {address_of(own.start + 1)}", 1)
        for network in networks:
            for other in network["pools"]:
                if overlap(own, subnet_range(other["subnet"])):
                    raise Fail("Pool overlaps with other one on this address space: "
                               f"{subnet} and {other['subnet']} of {network['name']}",
                               "another --subnet", 1)
        pools.append({
            "subnet": subnet,
            "gateway": next((g for g in gateways if lies_in(g, subnet)),
                            address_of(own.start + 1)),
            "ip_range": next((r for r in ranges if subnet_range(r).start in own
                              and subnet_range(r).stop <= own.stop), "")})
    for word, given in (("gateway", gateways), ("ip_range", ranges)):
        for text in {*given} - {pool[word] for pool in pools}:
            raise Fail(f"{text} is not in {', '.join(subnets)}, or not alone there",
                       "each gateway and range has to be one of a subnet's own", 1)
    return pools


PREDEFINED = {"host": "host", "none": "null"}  # name: driver; there is no file of these
BRIDGE_NAME, BRIDGE_MTU = ("com.docker.network.bridge.name",
                           "com.docker.network.driver.mtu")


def predefined(name):
    """What there is to be seen of one of those."""
    return {"name": name, "id": name.encode().hex().ljust(64, "0"), "created": 0,
            "pools": [], "internal": False, "labels": {}, "options": {}}


def all_networks():
    """Every network that there is, but for none and host."""
    directory = os.path.dirname(store("networks", "x"))
    return [from_json(read_file(f"{directory}/{name}"))
            for name in sorted(os.listdir(directory)) if name.endswith(".json")]


def check_bridge(name, networks):
    """Refuse a name for a bridge that is no interface's, or somebody else's."""
    if not 0 < len(name) < 16 or not name.isascii() or not all(
            letter.isalnum() or letter in "-_." for letter in name) or (
                name in (".", "..", "all", "default")):  # others in /proc/sys/net
        raise Fail(f"invalid name of a bridge: {name!r}", "at most 15 letters", 1)
    if Netlink().index(name) or any(
            network["bridge"] == name for network in networks):
        raise Fail(f"there is an interface {name} already", "another name", 1)


def new_network(name, subnets=(), gateways=(), ranges=(), six=False, internal=False,
                labels=(), options=()):
    """Make a network; caller must hold the lock of networks/."""
    if not name.isascii() or not name[:1].isalnum() or not all(
            letter.isalnum() or letter in "_.-" for letter in name) or len(name) > 128:
        raise Fail(f"invalid network name: {name[:200]!r}",
                   "at most 128 letters, digits, _ . and -", 1)
    networks = all_networks()
    if name in PREDEFINED or any(n["name"] == name for n in networks):
        raise Fail(f"network with name {name} already exists", "take another", 1)
    options, id = dict(options), os.urandom(32).hex()
    for key in options.keys() - {BRIDGE_NAME, BRIDGE_MTU}:  # it may be meant as a wall
        raise Fail(f"unknown option of a network: {key!r}",
                   f"-o {BRIDGE_NAME}=NAME or {BRIDGE_MTU}=BYTES", 1)
    bridge = options.get(BRIDGE_NAME, f"br-{id[:12]}")
    check_bridge(bridge, networks)
    pools = make_pools(subnets, gateways, ranges, six, networks)
    least = 1280 if any(":" in pool["subnet"] for pool in pools) else 68
    mtu = whole("mtu", options.get(BRIDGE_MTU, "1500"), least, 65535)
    network = {"name": name, "id": id, "created": time.time_ns(), "bridge": bridge,
               "pools": pools, "internal": internal, "mtu": mtu,
               "labels": dict(labels), "options": options}
    save(store("networks", f"{name}.json"), network)
    return network


def find_network(text, code=1, only_seen=False):
    """The network of a name or the beginning of an id; the default one is made when it
    is first asked for.  None and host are `only_seen`.  Caller must hold the lock of
    networks/."""
    networks = [*all_networks(), *map(predefined, PREDEFINED)]
    found = [n for n in networks if n["name"] == text] or [
        n for n in networks if text and n["id"].startswith(text)]
    if not found and text == "bridge":
        return new_network("bridge")
    if not found:
        raise NoSuch(f"network {text} not found", "see `network ls`", code)
    if len(found) > 1:
        raise Fail(f"network {text} is ambiguous", "see `network ls`", code)
    name = found[0]["name"]
    if name in PREDEFINED and not only_seen:
        raise Fail(f"{name} is a pre-defined network: nothing can be changed of it",
                   f"run --network {name}", code)
    return found[0]


# ── nf_tables ──
#
# Four chains, each hooked in where the kernel asks what to do with a packet:
#
#       arrives ─▶ arriving ─▶ routing ─▶ passing ─▶ leaving ─▶ goes out
#                                 ▲
#       a program of the host ─▶ own
#
# arriving and own give what is for a published port a new destination; passing keeps
# networks apart, and lets nobody in but those whom a published port has sent there;
# leaving gives what a container sends into the world the address of the host, since
# nobody out there knows the way to its own.  Later packets of the same connection, both
# ways, are changed alike: the kernel remembers it.
#
# A rule is a small program for a machine of the kernel's: load something of the packet
# into a register, compare it with a value, and only if it is that, go on; the last
# instruction says what becomes of the packet.  Ours are written as nft(8) takes them,
# `ip saddr 10.0.0.0/8 drop`, which is what --explain tells, and assembled below.

NFPROTO_INET, NFT = 1, 10 << 8  # NFNL_SUBSYS_NFTABLES
OURS = "minicontainer"  # and the store's path: the tables of others are not touched
if os.path.isabs(STORE) and os.path.realpath(STORE) != os.path.realpath(
        "/var/lib/minicontainer"):
    OURS += "".join(
        letter if letter.isascii() and letter.isalnum() or letter in "/.-" else "_"
        for letter in os.path.realpath(STORE))[-60:]  # as nft(8) takes it, unquoted
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN = 0, 2, 3, 4
NFT_MSG_NEWRULE, NFT_MSG_GETRULE, NFT_MSG_DELRULE = 6, 7, 8
FAMILIES = {"inet": NFPROTO_INET, "ip": AF_INET, "ip6": AF_INET6}
NFT_HOOKS = "prerouting", "input", "forward", "output", "postrouting", "ingress"
CHAINS = {  # type, hook, priority: before or after the chains of others
    "published": (), "arriving": ("nat", "prerouting", -100),
    "own": ("nat", "output", -100), "leaving": ("nat", "postrouting", 100),
    "passing": ("filter", "forward", 0)}


def operation(name, *values):
    """One of a rule's: its attributes are numbered from 1 on, and None is left out."""
    found = {n: value for n, value in enumerate(values, 1) if value is not None}
    return attribute(1, {1: name, 2: found}, ">")


def compare(value, differs=False):
    """Go on if register 1 begins with a value, or if it does not."""
    return operation("cmp", 1, int(differs), {1: value})


def masked(mask):
    """Keep of register 1 only these bits."""
    return operation("bitwise", 1, 1, len(mask), {1: mask}, {1: bytes(len(mask))})


# For each first word: what it loads, and its comparison with the words that follow.


def of_interface(word, words):
    """iifname, oifname [!=] NAME: where it has come in, and will go out."""
    name = next(words)
    differs = name == "!="
    name = (next(words) if differs else name).encode().ljust(16, b"\0")
    return (operation("meta", 1, 6 if word == "iifname" else 7)
            + compare(name, differs))


def of_family(_, words):
    """meta nfproto ipv4 or ipv6."""
    family = {"ipv4": AF_INET, "ipv6": AF_INET6}[(next(words), next(words))[1]]
    return operation("meta", 1, 15) + compare(bytes([family]))


def of_address(word, words):
    """ip, ip6 saddr or daddr SUBNET: who has sent it, and whom it is for."""
    side, (address, _, bits) = next(words), next(words).partition("/")
    family, at = ("ipv4", 12) if word == "ip" else ("ipv6", 8)  # of saddr
    data = packed(address)
    size_, most = len(data), 8 * len(data)
    mask = (1 << most) - (1 << most - int(bits or most))
    return (of_family("meta", iter(("nfproto", family)))
            + operation("payload", 1, 1, at + size_ * (side == "daddr"), size_)
            + masked(mask.to_bytes(size_, "big")) + compare(data))


def of_port(word, words):
    """tcp, udp dport PORT: the two bytes that either header has there."""
    port = struct.pack(">H", int((next(words), next(words))[1]))
    return (operation("meta", 1, 16) + compare(bytes([6 if word == "tcp" else 17]))
            + operation("payload", 1, 2, 2, 2) + compare(port))


def of_route(_, words):
    """fib daddr type local: it is for an address of this host's."""
    for _ in range(3):
        next(words)
    return operation("fib", 1, 3, 2) + compare(struct.pack("=I", 2))


def of_connection(_, words):
    """ct state or status: what the kernel knows of the connection that it is part of.
    """
    key, bits = {"established,related": (0, 6), "dnat": (2, 32)}[
        (next(words), next(words))[1]]
    return (operation("ct", 1, key) + masked(struct.pack("=I", bits))
            + compare(bytes(4), True))


def translation(_, words):
    """dnat ip or ip6 to ADDRESS:PORT: it is for that one from here on."""
    family, _, target = next(words), next(words), next(words)
    address, _, port = target.rpartition(":")
    return (operation("immediate", 1, {1: packed(address.strip("[]"))})
            + operation("immediate", 2, {1: struct.pack(">H", int(port))})
            + operation("nat", 1, FAMILIES[family], 1, None, 2))


def verdict(word, words):
    """accept, drop, return, or jump CHAIN: what becomes of it."""
    code = {1: {"drop": 0, "accept": 1, "jump": -3, "return": -5}[word]}
    return operation("immediate", 0, {2: {
        **code, **({2: next(words)} if word == "jump" else {})}})


ASSEMBLERS = {
    "iifname": of_interface, "oifname": of_interface, "meta": of_family,
    "ip": of_address, "ip6": of_address, "tcp": of_port, "udp": of_port,
    "fib": of_route, "ct": of_connection, "dnat": translation, "accept": verdict,
    "drop": verdict, "return": verdict, "jump": verdict,
    "masquerade": lambda *_: operation("masq")}


def assemble(rule):
    """The instructions of a rule that is written in words."""
    words = iter(rule.replace('"', "").split())
    return b"".join(ASSEMBLERS[word](word, words) for word in words)


TABLES = {}  # process: its socket to nf_tables


def tables():
    """The socket to nf_tables, which a process keeps until it ends: to close one takes
    8 ms after something was deleted, until the memory of that is free."""
    if os.getpid() not in TABLES:
        TABLES[os.getpid()] = Netlink(12)  # NETLINK_NETFILTER
        # SO_SNDBUFFORCE: a change is one message, and there may be many ports.
        TABLES[os.getpid()].socket.setsockopt(1, 32, 1 << 25)
    return TABLES[os.getpid()]


class Rules:
    """A change of the rules in one transaction: all of it is done, or nothing."""

    def __init__(self):
        self.listing, self.messages = [], []

    def add(self, line, kind, family, attributes, flags=NLM_F_CREATE):
        """One more message: the one that `nft LINE` would send."""
        self.messages.append(bytearray(message(
            NFT | kind, flags, len(self.listing), struct.pack(">BBH", FAMILIES[family],
                                                              0, 0), attributes, ">")))
        self.listing.append(f"nft {line}")

    def add_rule(self, family, table, chain, rule, how="add", comment=""):
        """One more rule, at the end of a chain, or inserted at its head."""
        attributes = {1: table, 2: chain, 4: assemble(rule)}
        if comment:
            rule += f' comment "{comment}"'
            attributes[7] = b"\0%c%b\0" % (len(comment) + 1, comment.encode())
        self.add(f"{how} rule {family} {table} {chain} {rule}", NFT_MSG_NEWRULE, family,
                 attributes, NLM_F_CREATE | NLM_F_APPEND * (how == "add"))

    def commit(self, why):
        """Have it done; a Fail names the line that the kernel refuses."""
        self.messages[-1][6] |= NLM_F_ACK  # its flags: when the last is done, all are
        begin, end_ = (message(kind, 0, 0, struct.pack(">BBH", 0, 0, NFT >> 8), {})
                       for kind in (16, 17))  # NFNL_MSG_BATCH_BEGIN, _END

        def ask():
            batch = b"".join((begin, *self.messages, end_))
            return len(list(tables().replies(batch)))
        try:
            request("nft", (self,), ask, why)
        except OSError as error:
            TABLES.pop(os.getpid(), None)  # there may be more answers to come
            raise Fail(f"{self.listing[getattr(error, 'number', 0)]}: {error.strerror}",
                       "does this kernel have nf_tables? --network none or host does "
                       "without") from None


def is_oneself(address):
    """Whether an address means "myself"."""
    return lies_in(address, "127.0.0.0/8") or number_of(address) == 1


# Trap: arriving comes before the kernel refuses what somebody outside sends to an
# address like 127.0.0.1.  There must be no rule for a port of such an address, or a
# neighbour could reach what is for this host only.


def port_rules(endpoint):
    """A rule for each published port that the kernel is to send on: not those of
    loopback addresses, nor of a family that the container has no address of."""
    for kind, address, port, inner in endpoint["ports"]:
        six = "6" if ":" in address else ""
        own = next((a for a in endpoint["addresses"] if (":" in a) == bool(six)), None)
        if own and not is_oneself(address):
            to = f"[{own}]" if six else own
            yield (f"meta nfproto ipv{six or 4} fib daddr type local" if address in (
                "0.0.0.0", "::") else f"ip{six} daddr {address}") + (
                    f" {kind} dport {port} dnat ip{six} to {to}:{inner}")


def our_rules(networks, there):
    """All our rules, each after the name of its chain."""
    open_, closed = ([network["bridge"] for network in networks
                      if network["internal"] == internal] for internal in (False, True))
    sources = [f"{'ip6' if ':' in pool['subnet'] else 'ip'} saddr {pool['subnet']}"
               for network in networks if not network["internal"]
               for pool in network["pools"]]
    return [
        *(f"published {rule}" for endpoint in there for rule in port_rules(endpoint)),
        "arriving jump published",
        "own ip daddr 127.0.0.0/8 return", "own ip6 daddr ::1 return",
        "own jump published",
        # To its neighbours on a bridge it has its own address, but not by a published
        # port: or the answer would come straight back, from somebody it never asked.
        *(f"leaving {source} ct status dnat masquerade" for source in sources),
        *(f'leaving oifname "{bridge}" return' for bridge in (*open_, *closed)),
        *(f"leaving {source} masquerade" for source in sources),
        "passing ct state established,related accept",
        *(f'passing {one} "{bridge}" {other} != "{bridge}" drop' for bridge in closed
          for one, other in (("iifname", "oifname"), ("oifname", "iifname"))),
        "passing ct status dnat accept",
        *(f'passing oifname "{bridge}" iifname != "{bridge}" drop'
          for bridge in open_),
    ]


def our_table(networks, there):
    """Our table, written anew; without networks there is none."""
    rules, own = Rules(), {1: OURS}
    rules.add(f"add table inet {OURS}", NFT_MSG_NEWTABLE, "inet", own)
    rules.add(f"delete table inet {OURS}", NFT_MSG_DELTABLE, "inet", own, 0)
    if not networks:
        return rules
    rules.add(f"add table inet {OURS}", NFT_MSG_NEWTABLE, "inet", own)
    for chain, base in CHAINS.items():
        attributes, text = {1: OURS, 3: chain}, ""
        if base:
            kind, hook, priority = base
            text = f" {{ type {kind} hook {hook} priority {priority}; }}"
            attributes.update({4: {1: NFT_HOOKS.index(hook), 2: priority}, 7: kind})
        rules.add(f"add chain inet {OURS} {chain}{text}", NFT_MSG_NEWCHAIN, "inet",
                  attributes)
    for line in our_rules(networks, there):
        rules.add_rule("inet", OURS, *line.split(" ", 1))
    return rules


# ── other walls ──
#
# Whatever passes through this host is shown to everybody's chains, and is dropped if
# one of them says so.  Docker and ufw drop what they do not know, and firewalld's chain
# ends with a reject.  So while a network of ours is up, rules of ours stand at the head
# of such a chain: it is to leave alone what goes to or comes from our bridges, which is
# judged by our own; and, where such a chain is asked about what comes to this host, the
# ports that our relay (chapter 11) listens at for others.  They have a comment by which
# they are known and taken out again, and are of a form that iptables knows how to show.


def listed(kind, family=0, attributes=(), subsystem=NFT):
    """(number of its family, {kind: value}) of all that there are of a kind in
    nf_tables, or in another part of netfilter: its attributes."""
    ask = message(subsystem | kind, NLM_F_DUMP, 0, struct.pack(">BBH", family, 0, 0),
                  dict(attributes), ">")
    return [(body[0], dict(attributes_of(body[4:])))
            for body in tables().replies(ask)]


def text_of(value):
    """The text that an attribute is."""
    return value.rstrip(b"\0").decode(errors="replace")


def foreign_chains():
    """{hook: [(family, table, chain, whether its policy is to drop)]} of the chains of
    others that are asked about what passes, or comes in."""
    found, families = {"forward": [], "input": []}, {v: k for k, v in FAMILIES.items()}
    for number, facts in listed(NFT_MSG_GETCHAIN):
        hook = int.from_bytes(dict(attributes_of(facts.get(4, b""))).get(1, b""), "big")
        if number in families and text_of(facts[1]) != OURS and (
                text_of(facts.get(7, b"")) == "filter" and NFT_HOOKS[hook] in found):
            found[NFT_HOOKS[hook]].append((families[number], text_of(facts[1]),
                                           text_of(facts[3]), facts.get(5) == bytes(4)))
    return found


# A chain is known to drop what it does not know by its policy, or by a last rule that
# asks for nothing before it drops.


def drops_all(code):
    """Whether a rule of that code drops or rejects whatever comes to it."""
    names = [text_of(dict(attributes_of(part))[1]) for _, part in attributes_of(code)]
    names = [name for name in names if name not in ("counter", "log")]
    return names == ["reject"] or names == ["target"] and b"REJECT" in code or (
        names == ["immediate"] and assemble("drop") in code)


def holes(chain, drops, rules, wanted):
    """The change to a chain (family, table, name) that has such rules and a policy, so
    that it accepts what is `wanted`, if it drops what it does not know, and does
    nothing more of ours."""
    family, table, name = chain
    ours, last, change = {}, b"", Rules()
    for _, facts in rules:
        note = text_of(facts.get(7, b"")[2:])
        if note.startswith(f"{OURS}: "):
            ours[note] = facts[3]
        else:
            last = facts.get(4, b"")
    notes = {f"{OURS}: {words}".replace('"', ""): words for words in wanted
             if drops or last and drops_all(last)}
    for note in ours.keys() - notes.keys():
        change.add(f"delete rule {family} {table} {name} handle "
                   f"{int.from_bytes(ours[note], 'big')}", NFT_MSG_DELRULE, family,
                   {1: table, 2: name, 3: ours[note]}, 0)
    for note in notes.keys() - ours.keys():
        change.add_rule(*chain, f"{notes[note]} accept", "insert", note)
    return change


def open_walls(chains, wanted):
    """Have the chains of others accept what is wanted, or say which does not."""
    for *chain, drops in chains:
        family, table, name = chain
        rules = listed(NFT_MSG_GETRULE, FAMILIES[family], {1: table, 2: name})
        change = holes(chain, drops, rules, wanted)
        try:
            if change.messages:
                change.commit("our own chain judges that")
        except Fail as fail:
            say(f"the chain {' '.join(chain)} of nf_tables may drop "
                f"{', '.join(wanted)}, and cannot be changed: {fail.message}\n  hint: "
                "with firewalld, `firewall-cmd --zone=trusted --add-interface=BRIDGE`")


# What becomes of a connection is settled by its first packet.  With UDP it is all that
# goes from one port to another without a pause: who never pauses would for ever reach
# whom it led to when he began, or whoever has got that address since, and publishes
# nothing.  So when a container with such ports comes or goes, and the rules say so, the
# kernel is to forget these connections.  It takes 20 ms to look for them.

CONNTRACK, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 1 << 8, 1, 2
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_FILTER, UDP = 1, 2, 0x8019, 17


def probe(kind, address, port):
    """The port that a program would have who asked for that one; 0 is any.  An OSError
    says why it would not."""
    import _socket

    socket = _socket.socket(AF_INET6 if ":" in address else AF_INET, _socket.SOCK_STREAM
                            if kind == "tcp" else _socket.SOCK_DGRAM)
    try:
        if kind == "tcp":  # connections that were closed a minute ago do not count
            socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if ":" in address:
            socket.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        socket.bind((address, port))
        return socket.getsockname()[1]
    finally:
        socket.close()


def is_own(address):
    """Whether an address, as bytes, is one of this host's."""
    first = IPV4.start if len(address) == 4 else 0
    try:
        return bool(probe("udp", address_of(first + int.from_bytes(address, "big")), 0))
    except OSError:
        return False


def ends_of(data):
    """(who sends, whom to, which port of his), as bytes, of a connection's packets that
    go one way."""
    ends = {kind: dict(attributes_of(value)) for kind, value in attributes_of(data)}
    address, ports = ends[1], ends[2]
    return address.get(1, address.get(3)), address.get(2, address.get(4)), ports.get(3)


def forget_connection(family, connection):
    """Have the kernel forget a connection, unless it has just done so."""
    try:
        list(tables().replies(message(CONNTRACK | IPCTNL_MSG_CT_DELETE, NLM_F_ACK, 0,
                                      struct.pack(">BBH", family, 0, 0), connection)))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def forget_callers(endpoint):
    """Have the kernel forget who sends UDP to a container, or to its ports here."""
    ports = {struct.pack(">H", port) for kind, _, port, _ in endpoint["ports"]
             if kind == "udp"}
    for address in map(packed, endpoint["addresses"] if ports else ()):
        family = AF_INET if len(address) == 4 else AF_INET6
        only = {CTA_TUPLE_ORIG: {2: {1: bytes([UDP])}},
                CTA_FILTER: {CTA_TUPLE_ORIG: struct.pack("=I", 1 << 3)}}  # the protocol
        try:
            for _, facts in listed(IPCTNL_MSG_CT_GET, family, only, CONNTRACK):
                _, to, port = ends_of(facts[CTA_TUPLE_ORIG])
                if ends_of(facts[CTA_TUPLE_REPLY])[0] == address or (
                        port in ports and is_own(to)):
                    forget_connection(family, {
                        CTA_TUPLE_ORIG: facts[CTA_TUPLE_ORIG]})
        except OSError as error:
            say("who sends UDP to a published port already may not be heard: the "
                f"kernel forgets no connections: {error.strerror}")


def relayed(there):
    """What comes to a port of this host's that a container without IPv6 has published:
    to our relay."""
    for endpoint in there:
        for kind, address, port, _ in endpoint["ports"]:
            if ":" in address and not is_oneself(address) and not any(
                    ":" in own for own in endpoint["addresses"]):
                yield f"{kind} dport {port}"


def check_old_wall(bridge):
    """Say so if the older iptables, which nf_tables does not show, drop what passes."""
    for version in ("", "6"):
        try:
            names = read_file(f"/proc/net/ip{version}_tables_names").split()
        except FileNotFoundError:
            continue
        program = f"ip{version}tables-legacy"
        if "filter" in names and any("-P FORWARD DROP" in line for line in os.popen(
                f"{program} -S FORWARD 2>&1 || echo -P FORWARD DROP?")):
            say(f"{program} drops what goes to and comes from {bridge}, or may; try"
                + "".join(f"\n  {program} -I FORWARD -{side} {bridge} -j ACCEPT"
                          for side in "io"))


FORWARDING = {False: "/proc/sys/net/ipv4/ip_forward",
              True: "/proc/sys/net/ipv6/conf/all/forwarding"}
BOOT = "/proc/sys/kernel/random/boot_id"  # another one: what was switched on is off


# A host that forwards is a router, and not everybody's machine is meant to be one.  So
# what we switch on is said, is noted with the number of this boot, and is switched off
# when the last network goes, unless others have come meanwhile who judge what passes:
# they may need it too.


def forwarded():
    """What of FORWARDING we have switched on since the machine was, and whose chains
    judged what passes before we did."""
    path, boot = store("networks", "forwarding"), read_file(BOOT)
    kept = from_json(read_file(path)) if os.path.exists(path) else {}
    return kept if kept.get("boot") == boot else {"boot": boot, "on": [], "others": []}


def forward_for(networks, others):
    """Have the host pass packets on between its interfaces while a network needs it,
    which is said; `others` are the chains that judge what passes."""
    needed = {FORWARDING[":" in pool["subnet"]] for network in networks
              if not network["internal"] for pool in network["pools"]}
    kept, judges = forwarded(), [" ".join(chain[:3]) for chain in others]
    off = [path for path in sorted(needed) if read_file(path).strip() == "0"]
    for path in off:
        six = path == FORWARDING[True]
        say(f"this host now forwards IPv{'6' if six else '4'} packets between its "
            "interfaces, until no network needs it" + (
                ", and takes no route that routers advertise, but on an interface with "
                "accept_ra=2" if six else ""))
        write_file(path, "1", why="or nothing gets beyond the bridge")
    if off and not kept["on"]:
        kept["others"] = judges
    back = [path for path in kept["on"] if path not in needed
            and {*judges} <= {*kept["others"]}]
    for path in back:
        write_file(path, "0", why="as it was before")
    if off or back:
        kept["on"] = sorted({*kept["on"], *off} - {*back})
        save(store("networks", "forwarding"), kept)


# ── endpoints ──
#
# What a container wants is an annotation of its spec: the names it has, the lines of
# its /etc/hosts, and a wish for each network.  An endpoint is such a wish fulfilled.


def wants_of(spec):
    """What a spec says of networks."""
    nothing = {"names": [], "hosts": [], "of": "", "networks": [], "program": ""}
    notes = spec.get("annotations", {})
    return from_json(notes[NETWORK]) if NETWORK in notes else nothing


def endpoints_of(id):
    """Where a container is, while it runs; the first is the first that it was given."""
    directory, found = os.path.dirname(store("endpoints", "x")), []
    for name in os.listdir(directory):
        if name.startswith(f"{id}-") and name.endswith(".json"):
            try:
                found.append(from_json(read_file(f"{directory}/{name}")))
            except FileNotFoundError:  # it leaves
                pass
    return sorted(found, key=lambda endpoint: endpoint["number"])


def place_of(id, network):
    """The path of an endpoint."""
    return store("endpoints", f"{id}-{network}.json")


def all_endpoints():
    """Every endpoint, also of those who have ended; caller must hold the lock of
    networks/."""
    directory = os.path.dirname(store("endpoints", "x"))
    return [from_json(read_file(f"{directory}/{name}"))
            for name in sorted(os.listdir(directory)) if name.endswith(".json")]


def endpoints():
    """Who is on which network; caller must hold the lock of networks/.

    The directory of a container is locked by whoever looks after it.  One that can be
    had, or is not there, has none who does: its place is free."""
    def is_alive(id):
        try:
            return is_held(store("containers", id))
        except FileNotFoundError:
            return False
    return [endpoint for endpoint in all_endpoints() if is_alive(endpoint["id"])]


def note_network(action, network, id=""):
    """Note an event of a network; `id` is the container's that it is about."""
    note_event("network", network["id"], action, {
        **({"container": id} if id else {}), "name": network["name"], "type": "bridge"})


def unplug(endpoint, why):
    """Take an endpoint away, and the cable that led to it."""
    Netlink().remove(endpoint["cable"], why)
    os.unlink(place_of(endpoint["id"], endpoint["network"]))
    for network in all_networks():
        if network["name"] == endpoint["network"]:
            note_network("disconnect", network, endpoint["id"])


def free_places(own=""):
    """Take away the endpoints of those who have ended, and of a last life of `own`, and
    return them.  Their network namespaces may take a while to die, and answer for an
    address until then.  Caller must hold the lock of networks/."""
    alive = {endpoint["id"] for endpoint in endpoints()} - {own}
    dead = [endpoint for endpoint in all_endpoints() if endpoint["id"] not in alive]
    for endpoint in dead:
        unplug(endpoint, "whose it was has ended")
    return dead


def take_addresses(network, there, wanted):
    """An address of each of the network's subnets that nobody has: the one that is
    wanted, if any is."""
    taken, found = {number_of(address) for endpoint in there if
                    endpoint["network"] == network["name"]
                    for address in endpoint["addresses"]}, []
    for pool in network["pools"]:
        own = subnet_range(pool["subnet"])
        never = {own.start, own.stop - 1, number_of(pool["gateway"])}
        asked = next((number_of(a) for a in wanted if number_of(a) in own), None)
        if asked in never | taken:
            raise Fail("Address already in use", f"{address_of(asked)} is somebody "
                       "else's, or the subnet's own")
        for number in subnet_range(pool["ip_range"] or pool["subnet"]) if (
                asked is None) else [asked]:
            if number not in taken and number not in never:
                found.append(address_of(number))
                break
        else:
            raise Fail("no free address in "
                       f"{pool['ip_range'] or pool['subnet']} of network "
                       f"{network['name']}", "a larger subnet, or fewer containers")
    for address in wanted:
        if address_of(number_of(address)) not in found:
            raise Fail(f"no configured subnet contains IP address {address}",
                       f"{network['name']} is "
                       f"{', '.join(pool['subnet'] for pool in network['pools'])}")
    return found


# A port is taken if a container has it, which no socket may show, as it is the kernel
# who sends its packets on; or if a program has it.  Neither may be said too late, when
# the container runs already.


def is_taken(kind, address, port, there):
    """Whether a container or another program has a port of the host."""
    every = "::" if ":" in address else "0.0.0.0"
    if any((kind, port) == (k, p) and (a == address or every in (a, address) and
                                       (":" in a) == (":" in address))
           for endpoint in there for k, a, p, _ in endpoint["ports"]):
        return True
    try:
        probe(kind, address, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise Fail(f"-p {address}:{port}: {error.strerror}", "an address of this "
                       "host; to who is not root the sysctl net.ipv4."
                       "ip_unprivileged_port_start says from which port on") from None
        return True
    return False


def host_ports(wishes, there):
    """[protocol, address, port of the host, port inside] of what is published: with no
    address, for all of either family; with port 0, at one that is free, and with a list
    of ports, at the first of them that is."""
    both = ["0.0.0.0", *(["::"] if os.path.exists("/proc/net/if_inet6") else [])]
    found = []
    for kind, given, port, inner in wishes:
        addresses, taken = [given] if given else both, True
        for one in port if isinstance(port, list) else [port] * (1 if port else 100):
            outer = one or probe(kind, addresses[0], 0)
            taken = [a for a in addresses if is_taken(
                kind, a, outer, [*there, {"ports": found}])]
            if not taken:
                break
        if taken:
            raise Fail(f"Bind for {taken[0]}:{outer} failed: port is already allocated",
                       "another port, or stop what has this one")
        found += [[kind, address, outer, inner] for address in addresses]
    return found


def write_hosts(id, there):
    """Write the /etc/hosts of a container.

    It is a mount in there, so it is written over, not replaced; and it is never empty,
    or a lookup at that moment would find nothing."""
    own = [endpoint for endpoint in there if endpoint["id"] == id]
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback",
             *(f"{address}\t{name}" for name, address in own[0]["hosts"])]
    networks = {endpoint["network"] for endpoint in own}
    for other in sorted(there, key=lambda endpoint: endpoint["id"] != id):
        names = other["names"]
        if other["id"] == id:  # the first is what `hostname -f` tells
            names = sorted(names, key=lambda name: name != own[0].get("hostname"))
        lines += [f"{address}\t{' '.join(names)}"
                  for address in other["addresses"] if other["network"] in networks]
    text = os.fsencode("\n".join(lines) + "\n")
    try:
        fd = os.open(f"{store('containers', id)}/hosts", O_RDWR | O_CLOEXEC)
    except FileNotFoundError:  # it has just been removed
        return
    try:
        if os.read(fd, len(text) + 1) != text:
            os.lseek(fd, 0, os.SEEK_SET)
            write_file(fd, os.fsdecode(text), why="who else is on its networks")
            os.ftruncate(fd, len(text))
    finally:
        os.close(fd)


def tell_everybody(there, moved=()):
    """Make rules, bridges, names and forwarding those of the endpoints that there are,
    after some have come or gone."""
    everything, netlink = all_networks(), Netlink()
    used = {endpoint["network"] for endpoint in there}
    networks = [network for network in everything if network["name"] in used]
    our_table(networks, there).commit("who may go out, and which port leads to whom")
    for endpoint in moved:
        forget_callers(endpoint)
    others = foreign_chains()
    open_walls(others["forward"], [f'{word} "{network["bridge"]}"' for word in (
        "iifname", "oifname") for network in networks])
    for family, prefix in (("ip6", ""), ("inet", "meta nfproto ipv6 ")):
        open_walls([chain for chain in others["input"] if chain[0] == family],
                   [prefix + words for words in relayed(there)])
    for network in everything:
        if network["name"] not in used:
            netlink.remove(network["bridge"], "nobody is on it any more")
    for id in {endpoint["id"] for endpoint in there}:
        write_hosts(id, there)
    forward_for(networks, others["forward"])


def gate_of(id, there):
    """Of a container's endpoints, the one whose network leads out of this host."""
    inner = {network["name"] for network in all_networks() if network["internal"]}
    own = [endpoint for endpoint in there if endpoint["id"] == id]
    return next((endpoint for endpoint in sorted(own, key=lambda e: e["number"])
                 if endpoint["network"] not in inner), None)


def join_network(id, pid, wants, wish, gone):
    """Put a container, whose process 1 is `pid`, on a network, in place of those who
    have `gone`; the caller must hold the lock of networks/, and after an error has it
    leave again."""
    network, there = find_network(wish["network"], 125), endpoints()
    own = [endpoint for endpoint in there if endpoint["id"] == id]
    if any(endpoint["network"] == network["name"] for endpoint in own):
        raise Fail(f"endpoint with name {wants['names'][0]} already exists in network "
                   f"{network['name']}", "it is there already", 1)
    addresses = take_addresses(network, there, wish["ips"])
    number = min({*range(len(own) + 1)} - {endpoint["number"] for endpoint in own})
    endpoint = {
        "id": id, "pid": pid, "network": network["name"], "number": number,
        "interface": f"eth{number}", "cable": f"mc{number}-{id}"[:15],
        "addresses": addresses, "mac": wish["mac"] or mac_of(addresses[0]),
        "ports": [], "hosts": wants["hosts"], "hostname": wants.get("hostname"),
        "names": list(dict.fromkeys([*wants["names"], *wish["aliases"]]))}
    leads_out = not network["internal"] and not gate_of(id, there)
    path = place_of(id, network["name"])
    save(path, endpoint)  # first: it says what is to be undone
    make_bridge(Netlink(), network)  # whose address may be one to publish a port at
    endpoint["ports"] = host_ports(wish["ports"], there)
    save(path, endpoint)
    if not any(other["network"] == network["name"] for other in there):
        check_old_wall(network["bridge"])
    tell_everybody([*there, endpoint], [*gone, endpoint])
    plug_in(pid, network, endpoint, leads_out)
    note_network("connect", network, id)


def leave_network(id, name, pid):
    """Take a container that runs as `pid` off a network; if the way out was there,
    another is."""
    with held("networks", fcntl.LOCK_EX):
        own = endpoints_of(id)
        for endpoint in own:
            if endpoint["network"] == name:
                unplug(endpoint, "it leaves")
        tell_everybody(endpoints(), own)
        before, after = gate_of(id, own), gate_of(id, endpoints_of(id))
        if after and after != before:
            with network_of(pid):
                netlink = Netlink()
            for pool in find_network(after["network"])["pools"]:
                netlink.route(pool["gateway"], after["interface"])


def leave_networks(id, life=0):
    """Take a container that has ended off its networks, and all others who have; if it
    was process `life`, and does not live again."""
    if not endpoints_of(id):
        return
    with held("networks", fcntl.LOCK_EX):
        lives = [endpoint["pid"] for endpoint in endpoints_of(id)]
        if life in (0, *lives) and (gone := free_places(id)):
            tell_everybody(endpoints(), gone)


# The kernel takes 30 to 70 ms to remove a bridge.  Nobody who waits for a container's
# end has to wait for that, too: a process of its own does it, a moment later, so that
# whoever comes right after finds the bridge, and it stays.

MOMENT = 0.1  # seconds


def leave_unseen(id, pid):
    """Have a container whose process 1 was `pid` leave its networks behind everybody's
    back."""
    if not endpoints_of(id):
        return
    if narration.style:  # who listens is to hear it
        leave_networks(id)
        return
    with held("endpoints", fcntl.LOCK_SH) as guard:  # `gc` waits until we are done
        if os.fork():
            return
        try:
            os.setsid()  # Ctrl-C is not for us
            os.chdir("/")  # and what we have open may be waited for until it is closed
            null = os.open("/dev/null", O_RDWR)
            for fd, number in ((null, 0), (null, 1), (null, 2), (guard, 3)):
                os.dup2(fd, number)
            syscall("close_range", 4, 0x7FFFFFFF, 0)
            time.sleep(MOMENT)
            leave_networks(id, pid)
        finally:
            os._exit(0)


def idle_bridges():
    """The bridges that are there, and that nobody is on, dead or alive.

    Caller must hold the lock of networks/."""
    used, netlink = {endpoint["network"] for endpoint in all_endpoints()}, Netlink()
    return [network["bridge"] for network in all_networks()
            if network["name"] not in used and netlink.index(network["bridge"])]


def sweep_networks():
    """Take away what those who have ended have left on networks."""
    with held("networks", fcntl.LOCK_EX):
        gone = free_places()
        tell_everybody(endpoints(), gone)


def rename_there(id, spec, name):
    """Give a container another name on its networks; what its spec is to say."""
    wants = wants_of(spec)
    wants["names"][0] = name
    with held("networks", fcntl.LOCK_EX):
        for endpoint in endpoints_of(id):
            endpoint["names"][0] = name
            save(place_of(id, endpoint["network"]), endpoint)
        if there := endpoints():
            tell_everybody(there)
    return wants


# An ordinary user has no power over the host's network, so no cable can lead there.
# But he may open sockets; and pasta and slirp4netns, programs of the host's, are who
# does that for what a container sends: they hold the other end of a tap, an interface
# whose cable ends in a process, and speak TCP and UDP with the world in its name.
#
# Such a program is in a namespace of the container's, whose end it does not see, so it
# has a guard: a process that looks at the container from outside, ends the program
# after it, and is looked after by nobody.
#
# A guard does one thing more.  If a shim is killed, the kernel kills process 1, but it
# forgets that it should when process 1 changes its user, as su and gosu do; who has a
# control group is then found through it.  An ordinary user's container without one has
# a guard, with a program or not, who kills process 1 if its shim has died.  Both are
# watched by pidfds: the end of a pipe, which a health check inherits, stays open.

PR_SET_CHILD_SUBREAPER = 36
LOWEST_PORT = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
PROGRAMS = {  # the address at which it answers what names mean; how it is called
    "pasta": ("169.254.1.1", "--quiet --config-net --ns-ifname eth0 --no-map-gw "
              "--dns-forward 169.254.1.1 -T none -U none"),
    "slirp4netns": ("10.0.2.3", "--configure --mtu=65520 --disable-host-loopback "
                    "--enable-sandbox --enable-seccomp --ready-fd={ready} {pid} eth0")}


def program_words(name, pid, ports, ready):
    """The command line that puts the network of process `pid` into a program's hands;
    pasta is ready when it has gone to the background, the other says so."""
    words = PROGRAMS[name][1].format(ready=ready, pid=pid).split()
    if name == "slirp4netns":
        return [on_path(name), *words]
    for kind, option in (("tcp", "-t"), ("udp", "-u")):
        found = {f"{outer}:{inner}" if address in ("0.0.0.0", "::") else
                 f"{address}/{outer}:{inner}"
                 for k, address, outer, inner in ports if k == kind}
        for port in sorted(found) or ["none"]:
            words += [option, port]
    return [on_path(name), *words, str(pid)]


def see_it_end(c, shim, heard=()):
    """In a guard: return when process 1 has ended; it is killed if its shim, who is at
    the other end of the pidfd `shim`, has.  What is `heard` of a program is let go: it
    would stop if a pipe were full."""
    wanted = [c.pidfd, shim, *heard]
    while c.pidfd not in (ready := select.select(wanted, [], [])[0]):
        for fd in ready:
            if fd == shim:
                signal_by(c.pidfd, signal.SIGKILL, "nobody stays with it")
            if fd == shim or not os.read(fd, 1 << 16):
                wanted.remove(fd)


def guard_program(name, c, ports, shim, told):
    """Be the guard of such a program: start it, say what is wrong with it in `told`, or
    close that when it is ready, and end it when the container has ended."""
    syscall("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0, why="pasta's parent leaves it")
    (heard, output), (ready, sign) = os.pipe(), os.pipe()
    words = program_words(name, c.pid, ports, sign)
    program = os.fork()
    if program == 0:
        reset_signals(c)
        syscall("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0,
                why="slirp4netns stays no longer than its guard; pasta has left it")
        os.set_inheritable(sign, name == "slirp4netns")
        for fd in (1, 2):
            os.dup2(output, fd)
        syscall("execve", words[0], words, [], why="the container's way out")
    os.close(sign)
    os.close(output)
    works = os.read(ready, 1) == b"1" if name == "slirp4netns" else (
        os.waitpid(program, 0)[1] == 0)
    if works:
        fd = open_fd(f"/proc/{c.pid}/ns/net", os.O_RDONLY)
        syscall("setns", fd, CLONE_NEWNET, why="for what is set there")
        write_file(LOWEST_PORT, "0", why="in there port 80 is anybody's")
        os.close(told)
        see_it_end(c, shim, [heard])
    else:
        os.write(told, os.read(heard, 4096).strip() or b"it failed")
    for child in read_file(f"/proc/self/task/{os.getpid()}/children").split():
        os.kill(int(child), signal.SIGKILL)
        os.waitpid(int(child), 0)


def be_guard(c, name, ports, shim, told):
    """Be a container's guard, and of a program if it has one; never returns.

    It is seen to be in the user namespace: who comes later is to come to the same, from
    where process 1 can be killed, for as long as that may live."""
    try:
        os.setsid()  # Ctrl-C is not for us
        stay_in_users()
        leave_workshop(c)
        os.chdir("/")
        let_go()
        close_all_but(3, shim, c.pidfd, told, narration.fd, rootless.fd)
        if name:
            guard_program(name, c, ports, shim, told)
        else:
            os.close(told)
            see_it_end(c, shim)
    except (OSError, Fail) as error:
        os.write(told, diagnose(error).message.encode())
    finally:
        os._exit(0)


def set_guard(c):
    """Outside: give the container a guard if it needs one, and with it, perhaps, a way
    out through a program."""
    wants = wants_of(c.spec)
    name = wants["program"]
    if not name and c.cgroup.path:
        return
    shim = syscall("pidfd_open", os.getpid(), 0, why="so that our own end is seen")
    heard, told = os.pipe()
    c.guard = os.fork()
    if c.guard == 0:
        be_guard(c, name, wants.get("ports"), shim, told)
    os.close(shim)
    os.close(told)
    wrong = b"".join(iter(lambda: os.read(heard, 4096), b""))
    os.close(heard)
    if wrong:
        lines = [line for line in wrong.decode("utf-8", "replace").splitlines()
                 if not line.startswith("WARNING")]
        raise Fail(f"{name or 'guard'}: {'; '.join(lines)}", "has the host a way out "
                   "itself, and may you open /dev/net/tun? or --network none" if name
                   else "")


def end_guard(c):
    """Outside: wait for the guard of a container that has ended."""
    if c.guard:
        try:
            os.waitpid(c.guard, 0)
        except ChildProcessError:  # it was reaped when it ended
            pass
        c.guard = 0


def connect(c):
    """Outside: put the container on the networks that its spec names."""
    wants = wants_of(c.spec)
    if not wants["networks"]:
        return
    with held("networks", fcntl.LOCK_EX):
        gone = free_places(c.id)
        for wish in wants["networks"]:
            join_network(c.id, c.pid, wants, wish, gone)
    if os.path.exists(LOWEST_PORT):
        with network_of(c.pid):
            write_file(LOWEST_PORT, "0", why="in there port 80 is anybody's, as with "
                       "Docker")


# ── the spec: what the options mean ──


def published(option):
    """[protocol, address, port of the host, port inside] of each port that -p
    [[IP:]PORT:]PORT[/PROTOCOL] names; what is not named is "", or 0, and ports of which
    any will do are a list."""
    text, _, kind = option.partition("/")
    outer, _, inner = text.rpartition(":")
    address, _, outer = outer.rpartition(":")
    what, kind = f"-p {option}", kind.lower() or "tcp"
    if kind not in ("tcp", "udp"):
        raise Fail(f"{what}: invalid protocol {kind!r}", "tcp or udp")
    address = address.removeprefix("[").removesuffix("]")
    if address:
        packed(address)
    inner = port_range(inner, what)
    outer = port_range(outer, what) if outer else [0] * len(inner)
    if len(inner) == 1 < len(outer):
        return [[kind, address, [*outer], inner[0]]]
    if len(outer) != len(inner):
        raise Fail(f"{what}: two ranges of different lengths", "-p 80-82:8080-8082")
    return [[kind, address, *pair] for pair in zip(outer, inner, strict=True)]


def ports_text(ports, listens=()):
    """Ports as Docker's `ps` has them: what it only listens at is "80/tcp", what has
    the same number outside is one of a range, and what has another comes last."""
    known = {(str(inner), kind) for kind, _, _, inner in ports}
    only = [(kind, "", "", int(inner)) for inner, _, kind in (
        text.partition("/") for text in listens) if (inner, kind) not in known]
    texts, ranges, mapped = [], {}, []  # ranges: where and of which protocol: its ends

    def tell(host, kind, first, last):
        span = f"{first}-{last}" if last > first else f"{first}"
        texts.append(f"{host}:{span}->{span}/{kind}" if host else f"{span}/{kind}")
    for kind, address, port, inner in sorted(
            [*ports, *only], key=lambda row: (row[3], row[1], str(row[2]), row[0])):
        host = f"[{address}]" if ":" in address else address
        first, last = ranges.get((host, kind), (inner, inner - 1))
        if host and port != inner:
            mapped.append(f"{host}:{port}->{inner}/{kind}")
        elif inner == last + 1:
            ranges[host, kind] = first, inner
        else:
            tell(host, kind, first, last)
            ranges[host, kind] = inner, inner
    for where, ends in ranges.items():
        tell(*where, *ends)
    return ", ".join(texts + mapped)


def check_words(option, words):
    """Refuse what would be more, or less, than one word of a line in /etc."""
    for word in words:
        if word.split() != [word]:
            raise Fail(f"invalid argument {word!r} for {option}", "one word")


def wish_for(network, options, ports=(), aliases=()):
    """What the options of `run` or `network connect` want of a network."""
    check_words("a name in a network", aliases)
    mac = options.mac_address or ""
    if mac and ([len(part) for part in mac.split(":")] != [2] * 6 or
                set(mac.lower()) - set("0123456789abcdef:") or
                int(mac[:2], 16) & 1 or not set(mac) - set("0:")):
        raise Fail(f"invalid MAC address: {mac!r}", "one interface's, as "
                   "02:42:ac:12:00:02: the first number is even")
    ips = [address for address in (options.ip, options.ip6) if address]
    for address in ips:
        packed(address)
    return {"network": network, "ips": ips, "mac": mac, "ports": list(ports),
            "aliases": list(aliases)}


def choose_program(name, asked):
    """The program that is to be an ordinary user's network `name`, of which some
    options were asked for."""
    if name not in ("bridge", *PROGRAMS):
        raise Fail(f"network {name}: only root can make bridges",
                   "--network pasta or slirp4netns, none or host")
    wanted = PROGRAMS if name == "bridge" else [name]
    program = next(filter(on_path, wanted), "")
    if not program:
        there = next((f"--network {other}, which is there; or " for other in PROGRAMS
                      if on_path(other)), "")
        raise Fail(f"--network {name}: not root, so it takes {' or '.join(wanted)}, "
                   "which is not installed",
                   f"{there}as root: apt install passt (which has pasta) or "
                   "slirp4netns; or --network none or host")
    for word in asked:
        if word not in ("-p", "-P"):
            raise Fail(f"{word}: {program} has nothing of that", "a bridge has: sudo")
        if program == "slirp4netns":
            raise Fail(f"{word}: {program} publishes no ports here", "pasta does: as "
                       "root, apt install passt; or sudo")
    return program


def choose_network(options):
    """The network that `run` means if it names none: of what is asked for only one of
    ours can do, `bridge`; else `none`, which is safer and quicker."""
    asked = [word for word, value in (
        ("-p", options.publish), ("-P", options.publish_all), ("--ip", options.ip),
        ("--ip6", options.ip6), ("--mac-address", options.mac_address),
        ("--network-alias", options.network_alias)) if value]
    check_words("--dns-search", options.dns_search)
    check_words("--dns-option", options.dns_option)
    for address in options.dns:
        packed(address)
    if not options.network:
        options.network = "bridge" if asked else "none"
    elif asked and (options.network in ("none", "host") or ":" in options.network):
        raise Fail(f"{asked[0]} without a network of its own",
                   "--network bridge, or one that `network create` has made")
    if rootless.uid and options.network not in ("none", "host") and (
            ":" not in options.network):
        options.network = choose_program(options.network, asked)
        options.dns = options.dns or [PROGRAMS[options.network][0]]


def host_lines(texts, gateway):
    """[name, address] of each --add-host."""
    found = []
    for text in texts:
        host, colon, address = text.partition("=" if "=" in text else ":")
        check_words("--add-host", [host])
        if address[:1] + address[-1:] == "[]":
            address = address[1:-1]
        address = gateway if address == "host-gateway" else address
        try:
            packed(address)
        except Fail:
            raise Fail(f"invalid IP address in add-host: {address!r}" if colon else
                       f"bad format for add-host: {text!r}", "--add-host NAME:ADDRESS"
                       ) from None
        found.append([host, address])
    return found


def network_spec(options, id, name, hostname):
    """What a container wants of its networks, for the spec's annotation."""
    gateway, wishes, program = "127.0.0.1", [], ""
    exposed = options.exposed if options.publish_all else ()
    ports = [port for option in (*options.publish, *exposed)
             for port in published(option)]
    if rootless.uid and options.network in PROGRAMS:
        program, ports = options.network, host_ports(ports, [])
    elif options.network not in ("none", "host") and ":" not in options.network:
        with held("networks", fcntl.LOCK_EX):
            network = find_network(options.network, 125)
        gateway = network["pools"][0]["gateway"]
        wishes = [wish_for(network["name"], options, ports, options.network_alias)]
    return {"names": list(dict.fromkeys(filter(None, (name, id[:12], hostname)))),
            "hostname": hostname, "hosts": host_lines(options.add_host, gateway),
            "networks": wishes, "of": options.network.partition(":")[2],
            "program": program, "ports": ports}


# ── its commands ──


@command("network create", arg("-d", "--driver", metavar="DRIVER", default="bridge",
                               help="bridge is what there is more than one of"),
         arg("--subnet", metavar="SUBNET", action="append", default=[],
             help="as 172.30.0.0/16, and one of IPv6"),
         arg("--gateway", metavar="ADDRESS", action="append", default=[],
             help="the host's in it"),
         arg("--ip-range", metavar="SUBNET", action="append", default=[],
             help="what addresses are taken from"),
         arg("--ipv6", action="store_true", help="with IPv6, too"),
         arg("--internal", action="store_true", help="nothing in or out"),
         arg("--label", metavar="KEY[=VALUE]", action="append", default=[],
             help="a note"),
         arg("-o", "--opt", metavar="KEY=VALUE", action="append", default=[],
             help="com.docker.network.driver.mtu=1400 …"),
         arg("name", metavar="NAME", help="what to call it"))
def network_create_command(options):
    """Make a network for containers that shall reach each other."""
    pairs = [[text.partition("=")[::2] for text in texts]
             for texts in (options.label, options.opt)]
    if options.driver != "bridge":
        raise Fail(f'only one instance of "{options.driver}" network is allowed' if (
            options.driver in PREDEFINED.values()) else
            f'plugin "{options.driver}" not found', "-d bridge", 1)
    with held("networks", fcntl.LOCK_EX):
        network = new_network(options.name, options.subnet, options.gateway,
                              options.ip_range, options.ipv6, options.internal, *pairs)
    note_network("create", network)
    print(network["id"])


def network_document(network, there):
    """What `network inspect` shows, with Docker's keys."""
    at = rfc3339(network["created"])
    members = {}
    for endpoint in there:
        if endpoint["network"] == network["name"]:
            four, six = [*with_prefix(network, endpoint["addresses"]), ""][:2]
            members[endpoint["id"]] = {
                "Name": endpoint["names"][0], "MacAddress": endpoint["mac"],
                "IPv4Address": four, "IPv6Address": six}
    return {
        "Name": network["name"], "Id": network["id"], "Created": at, "Scope": "local",
        "Driver": PREDEFINED.get(network["name"], "bridge"),
        "EnableIPv6": len(network["pools"]) > 1,
        "Internal": network["internal"],
        "IPAM": {"Driver": "default", "Options": {}, "Config": [
            {"Subnet": pool["subnet"], "Gateway": pool["gateway"],
             **({"IPRange": pool["ip_range"]} if pool["ip_range"] else {})}
            for pool in network["pools"]]},
        "Containers": members, "Options": network["options"],
        "Labels": network["labels"]}


BUILT_IN = "bridge", *PREDEFINED
NETWORK_FILTERS = {  # of `network ls`: whether one passes KEY=text
    "driver": lambda row, text: row["Driver"] == text,
    "id": lambda row, text: row["ID"].startswith(text),
    "name": lambda row, text: text in row["Name"],
    "label": lambda row, text: has_label(row["Labels"].labels, text),
    "scope": lambda row, text: row["Scope"] == text,
    "type": lambda row, text: (text == "builtin") == (row["Name"] in BUILT_IN),
    "dangling": lambda row, text: is_true("dangling", text) == row["Dangling"],
}


@command("network ls", QUIET, NO_TRUNC, FILTER, FORMAT)
def network_ls_command(options):
    """List the networks."""
    wanted = filters_of(options.filter, NETWORK_FILTERS)
    with held("networks", fcntl.LOCK_EX):
        find_network("bridge")
        used = {endpoint["network"] for endpoint in endpoints()}
        rows = [(n["name"], n["id"], "bridge", n["labels"]) for n in all_networks()]
    rows += [(name, predefined(name)["id"], driver, {})
             for name, driver in PREDEFINED.items()]
    rows = [{"ID": id if options.no_trunc else id[:12], "Name": name, "Driver": driver,
             "Scope": "local", "Labels": label_text(labels),
             "Dangling": name not in used and name not in BUILT_IN}
            for name, id, driver, labels in rows]
    print_list({"NETWORK ID": "ID", "NAME": "Name", "DRIVER": "Driver",
                "SCOPE": "Scope"},
               [row for row in rows if passes(row, NETWORK_FILTERS, wanted)],
               options.format, "ID" if options.quiet else "", "Labels")


NETWORKS = arg("names", nargs="+", metavar="NETWORK…",
               help="names, or the beginning of ids")


@command("network inspect", arg("-f", "--format", metavar="FORM", help="'{{.A.B}}'"),
         NETWORKS)
def network_inspect_command(options):
    """Show all about networks, and who is on them, as JSON."""
    with held("networks", fcntl.LOCK_EX):
        there = endpoints()
        show_facts(options.names, lambda name: network_document(
            find_network(name, only_seen=True), there), options.format)


def remove_network(network):
    """Remove a network that nobody is on, and what its last guest may have left."""
    if gone := free_places():
        tell_everybody(endpoints(), gone)
    os.unlink(store("networks", f"{network['name']}.json"))
    note_network("destroy", network)


@command("network rm", NETWORKS)
def network_rm_command(options):
    """Remove networks that nobody is on."""
    def remove(text):
        network = find_network(text)
        name = network["name"]
        if name == "bridge":
            raise Fail("bridge is a pre-defined network and cannot be removed",
                       "it takes nothing while nobody is on it", 1)
        if any(endpoint["network"] == name for endpoint in endpoints()):
            raise Fail(f"network {name} has active endpoints",
                       "stop its containers: `network inspect`", 1)
        remove_network(network)
        print(text)
    with held("networks", fcntl.LOCK_EX):
        for_each(options.names, remove)


IDLE_FILTERS = prune_filters(lambda network: network["labels"],
                             lambda network: network["created"])


def remove_idle_networks(wanted):
    """Remove the networks that nobody is on; their names."""
    with held("networks", fcntl.LOCK_EX):
        used = {endpoint["network"] for endpoint in endpoints()} | {"bridge"}
        found = [network for network in all_networks() if network["name"] not in used
                 and passes(network, IDLE_FILTERS, wanted)]
        for network in found:
            remove_network(network)
    return [network["name"] for network in found]


@command("network prune", FORCE, ONLY)
def network_prune_command(options):
    """Remove all networks that nobody is on."""
    wanted = filters_of(options.filter, IDLE_FILTERS)
    if confirm(options, "all custom networks not used by at least one container"):
        print("".join(f"{name}\n" for name in remove_idle_networks(wanted)), end="")
        note_event("network", "", "prune", {"reclaimed": "0"})

# ══ 11. THE SHIM ══════════════════════════════════════════════════════════════════
#
# Somebody has to stay with a container while it lives: hold the outer ends of its pipes
# or of its terminal, keep what it writes, be there when it ends, and tell the truth
# about that afterwards.  It cannot be the command that the person typed, who may want
# to leave (ctrl-p ctrl-q), nor a daemon, whose death would be everybody's.  It is one
# small process for each container, the shim: a fork of the command that started it.
#
#       run, attach                     shim                           container
#     keyboard ──▶ ┌────────┐  input  ┌──────┐ ──▶ console ┄┄▶ /dev/pts/0 ──▶ program
#     screen   ◀── │ client │ ◀─────▶ │ poll │ ◀── console ◀┄┄ /dev/pts/0 ◀──    │
#     Ctrl-C ────▶ └────────┘ output  └──────┘ ◀─────────── SIGCHLD ─────────────┘
#                    … and others      │  └──▶ the log
#                                      └──▶ the record (chapter 12)
#
# Client and shim talk over a Unix socket that keeps messages whole: a letter, and what
# it is about.  The shim forks with one end of such a pair and listens for more at
# `attach` in the container's directory, so any number can look on and type; a letter
# is a method of the class below.  Each sees what is written from then on, after it is
# in the log; the container waits for the slowest of them, as it would for a slow
# terminal.  The log is a file and waits for nobody who reads it.
#
# A signal that arrives at any moment is awkward; one that is read from a descriptor is
# a message like the others.  So both block signals and read them from a signalfd in
# the same poll() as the rest.  With -t the person's terminal is made raw, so that
# Ctrl-C is a byte that the container's terminal turns into a signal inside.  It has to
# be put back even if the client is killed with -9: a second process waits for that.
#
# Process 1 dies with its shim (chapter 5), so that a killed one leaves nothing running
# unseen.  A killed client is a client that has left.
#
# Man pages: unix(7), pty(7), signalfd(2), termios(3), poll(2), inotify(7).

calls(
    timerfd_create=(283, 85, "clock flags"),
    timerfd_settime=(286, 86, "fd flags new old"),
    inotify_init1=(294, 26, "IN_"), inotify_add_watch=(254, 27, "fd path IN_"),
    signalfd4=(289, 74, "fd mask size flags"),
    socketpair=(53, 199, "family type protocol sv"),
    bind=(49, 200, "fd addr addrlen"), connect=(42, 203, "fd addr addrlen"),
    listen=(50, 201, "fd backlog"), accept4=(288, 242, "fd addr addrlen flags"),
)
IN_MODIFY, IN_MOVED_TO, IN_CREATE, IN_DELETE_SELF = 2, 0x80, 0x100, 0x400
AF_UNIX, MESSAGES = 1, 5 | O_CLOEXEC | O_NONBLOCK  # SOCK_SEQPACKET
MOST = 1 << 16  # bytes read at once
TROUBLE = select.POLLHUP | select.POLLERR | select.POLLNVAL

# All signals but those that stop us, cannot be held, or are a mistake of our own.
WATCHED = signal.valid_signals() - {getattr(signal, f"SIG{name}") for name in (
    "KILL STOP TSTP TTIN TTOU PIPE URG SEGV BUS FPE ILL ABRT SYS").split()}


def hold_signals():
    """From here on signals wait to be read: nothing below can be interrupted."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, we would hear of no end
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)


def open_signals(numbers):
    """A descriptor to read those signals from."""
    mask = c_uint64(sum(1 << (number - 1) for number in numbers))
    return syscall("signalfd4", -1, byref(mask), 8, O_CLOEXEC | O_NONBLOCK,
                   why="signals become messages")


def only_look():
    """From here on a signal ends us as any program: there is nothing to undo."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def watch_directory(path):
    """A descriptor that can be read when a file there has changed or been replaced."""
    fd = syscall("inotify_init1", O_CLOEXEC, why="to be told of changes")
    syscall("inotify_add_watch", fd, path, IN_MODIFY | IN_MOVED_TO | IN_CREATE
            | IN_DELETE_SELF, why="of the files in it")
    return fd


def door_of(call, directory):
    """bind or connect a new socket to `attach` in a directory: its descriptor.

    The kernel takes 107 bytes of a path, so the way there is by descriptor."""
    fd = syscall("socket", AF_UNIX, MESSAGES, 0, why="messages, not bytes")
    try:
        where = struct.pack("H", AF_UNIX) + b"/proc/self/fd/%d/attach\0" % directory
        syscall(call, fd, where, len(where), why="where clients meet the shim")
        return fd
    except OSError:
        os.close(fd)
        raise


def turn(parties, timeout=None):
    """Wait until there is something to do for one of the parties, each of which has an
    open ear for some descriptors; what act() of the first of them returned."""
    poll, wanted = select.poll(), {}
    for party in parties:
        for fd, events in party.wanted().items():
            wanted[fd] = wanted.get(fd, 0) | events
    for fd, events in wanted.items():
        poll.register(fd, events)
    ready = dict(poll.poll(timeout))
    return [party.act(ready) for party in parties][0]


class Peer:
    """One end of a connection between client and shim, over a socket."""

    def __init__(self, fd):
        self.fd = fd
        self.waiting = []  # messages that there was no room for
        self.quiet = False  # it only wants to hear of the end

    def send(self, letter, data=b""):
        """Send a message, now or when there is room."""
        self.waiting.append(letter + data)
        self.flush()

    def flush(self):
        """Send what there is room for; what nobody will read is dropped."""
        try:
            while self.waiting:
                os.write(self.fd, self.waiting[0])
                del self.waiting[0]
        except BlockingIOError:
            pass
        except OSError:
            self.waiting = []

    def receive(self):
        """The next message, a letter and its data; None if there is none yet, and an
        empty letter if there never will be."""
        try:
            message = os.read(self.fd, MOST + 1)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # it has not read all of ours; its own is there
            return self.receive()
        return message[:1], message[1:]

    def wanted(self, listening=True):
        """The events that it waits for."""
        return {self.fd: (select.POLLIN if listening else 0)
                | (select.POLLOUT if self.waiting else 0)}

    def act(self, ready):
        """Send what has waited."""
        if self.fd in ready:
            self.flush()


# ── the log ──
#
# Docker's json-file: an object for each line that was written, with the stream and the
# time.  A line is in the file before anybody is shown it, and a file never ends in the
# middle of one, unless the machine was switched off; who reads passes over such a one.
# To keep 10 MB of log, files are renamed, not cut: log is put away as log.1, that as
# log.2 …, and who still reads one has it by its descriptor.
#
# Python is slow where it takes a call for each line; so both ways, all lines that there
# are at the moment, up to 64 kB or 1 MB, are made into text or into objects by one.

NEWLINE = "\udc0a"  # in a text that was decoded, nothing else is this
ORDINARY = bytes({*range(32, 127), 10} - {*b'"\\'})  # what JSON does not quote
BETWEEN = b'"}\n{"log":"'  # two objects of a log
OF_STDOUT = b'","stream":"stdout","time":"'  # in an object; in a line quotes have a \


def log_files(path):
    """(path, number) of the files of a log, the newest, number 0, first."""
    top, name = os.path.split(path)
    numbers = [int(entry[len(name) + 1:] or 0) for entry in os.listdir(top)
               if entry == name or entry.startswith(f"{name}.")
               and entry[len(name) + 1:].isdecimal()]
    return [(f"{path}.{n}" if n else path, n) for n in sorted(numbers)]


class Log:
    """What a container writes, as Docker's json-file: an object for each line.

    A file that has reached `most` bytes is put away as PATH.1, that as PATH.2 …, until
    there are as many `files` as may be."""

    LONGEST = 1 << 14  # a line that is longer becomes several

    def __init__(self, path, most=0, files=1):
        self.path, self.most, self.files = path, most, files
        self.begun = {}  # stream: what it wrote since its last newline
        self.failed = ""  # why lines were lost
        self.open(path)

    def open(self, path):
        """Begin at the end of a file, or with a new one."""
        self.fd = os.open(path, O_WRONLY | os.O_APPEND | os.O_CREAT | O_CLOEXEC,
                          0o640)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)

    def add(self, stream, data, last=False):
        """Keep what a stream wrote: its whole lines, now."""
        data = self.begun.pop(stream, b"") + data
        end = data.rfind(b"\n") + 1
        if last or len(data) - end > self.LONGEST:
            end = len(data)
        if data[end:]:
            self.begun[stream] = data[end:]
        if end:
            self.write(self.lines(stream, data[:end]))

    @staticmethod
    def lines(stream, data):
        """The objects of some lines: all of them are spelled at once, for speed."""
        begin = '{"log":"'
        end = f'","stream":"{stream}","time":"{timestamp(time.time_ns())}"}}\n'
        whole_ = data.endswith(b"\n")
        if not data.translate(None, ORDINARY):  # as mostly, and 6 times as fast
            body = data.removesuffix(b"\n").replace(
                b"\n", ("\\n" + end + begin).encode())
        else:
            text = data.decode("utf-8", "replace").replace("\n", NEWLINE)
            body = quote(text[:len(text) - whole_])[1:-1].replace(
                NEWLINE, "\\n" + end + begin).encode()
        return begin.encode() + body + ("\\n" * whole_ + end).encode()

    def write(self, data):
        """Append to the file; of what does not fit nothing stays, not half a line."""
        try:
            while data:
                if self.most and self.size >= self.most:
                    self.put_away()
                end = data.find(b"\n", self.most - self.size) + 1 if self.most else 0
                part, data = data[:end or None], data[end or len(data):]
                left = part
                while left:
                    left = left[os.write(self.fd, left):]
                self.size += len(part)
        except OSError as error:
            os.ftruncate(self.fd, self.size)
            self.failed = f"lines of the log were lost: {error.strerror}"

    def put_away(self):
        """Begin a new file; the oldest goes."""
        old = self.fd
        self.open(f"{self.path}.new")  # first: there may be no room for one
        for path, number in reversed(log_files(self.path)):
            if number + 1 < self.files:
                os.rename(path, f"{self.path}.{number + 1}")
            else:
                os.unlink(path)
        os.rename(f"{self.path}.new", self.path)
        os.close(old)

    def close(self):
        """Keep the lines that were begun."""
        for stream in list(self.begun):
            self.add(stream, b"", last=True)
        os.close(self.fd)


class LogReader:
    """The entries of a log, though its files are put away while they are read."""

    def __init__(self, path, last=None):
        self.path, self.rest, self.files = path, b"", []
        self.open_newer()
        ends = {fd: os.fstat(fd).st_size for fd in self.files}
        for number in reversed(range(0 if last is None else len(self.files))):
            fd = self.files[number]
            last -= self.seek_back(fd, ends[fd], last)
            if not last:
                del self.files[:number]
                break
        self.there = sum(ends[fd] - os.lseek(fd, 0, os.SEEK_CUR) for fd in self.files)

    @staticmethod
    def seek_back(fd, at, count):
        """Go to where the last `count` lines before a place in a file begin; how many
        it has of them."""
        found = 0
        while at:
            start = max(at - MOST, 0)
            part = os.pread(fd, at - start, start)
            at, cut = start, len(part)
            while (cut := part.rfind(b"\n", 0, cut)) >= 0:
                if found == count:
                    os.lseek(fd, start + cut + 1, os.SEEK_SET)
                    return count
                found += 1
        os.lseek(fd, 0, os.SEEK_SET)
        return found

    def open_newer(self):
        """Whether there are files that were begun after ours; they are ours then."""
        ours = os.fstat(self.files[-1]).st_ino if self.files else 0
        newer = []
        try:
            found = log_files(self.path)
        except FileNotFoundError:  # its container was --rm
            return False
        for name, _ in found:
            try:
                fd = os.open(name, os.O_RDONLY | O_CLOEXEC)
            except FileNotFoundError:  # is being put away: there it is seen next time
                continue
            if os.fstat(fd).st_ino == ours:
                os.close(fd)
                break
            newer.insert(0, fd)
        self.files += newer
        return bool(newer)

    def read(self, look=None, to_the_end=True):
        """Lists of the entries that have come since, or look(those lines of the file);
        or only of what was there at first, as some write faster than we read."""
        left = 1 << 62 if to_the_end else self.there
        while left and (self.files or self.open_newer()):
            finished = len(self.files) > 1  # before we read: it will not grow any more
            if data := os.read(self.files[0], min(left, 1 << 20)):
                left -= len(data)
                lines, _, self.rest = (self.rest + data).rpartition(b"\n")
                if lines:
                    yield (look or self.entries)(lines)
            elif finished:
                os.close(self.files.pop(0))
            elif not self.open_newer():
                return

    @staticmethod
    def plain(lines):
        """The bytes that whole lines say were written, without a look at each, if all
        were to stdout and have no escapes but \\n; else their entries."""
        tail = len(OF_STDOUT) + len(timestamp(0))
        parts = lines.removeprefix(BETWEEN[3:]).removesuffix(BETWEEN[:2]).split(BETWEEN)
        text = b"".join([part[:-tail] for part in parts])
        if lines.count(OF_STDOUT) == len(parts) == lines.count(b"\n") + 1 and (
                text.count(b"\\") == text.count(b"\\n")):
            return text.replace(b"\\n", b"\n")
        return LogReader.entries(lines)

    @staticmethod
    def entries(lines):
        """Whole lines as objects: all at once, for speed, or those that are whole."""
        try:
            return from_json(b"[" + lines.replace(b"\n", b",") + b"]")
        except ValueError:  # the machine has been switched off in the middle of one
            found = []
            for line in lines.split(b"\n"):
                try:
                    found.append(from_json(line))
                except ValueError:
                    pass
            return found


# ── the shim ──
#
# A turn is one poll() and what it makes possible.  There is a limit to what waits in
# memory: while a client has messages that its socket would not take, the container's
# output is not read, and while there is input that the container does not take, no
# client is.  Who only wants to know of the end says so (q) and is sent nothing else.
#
#       client → shim   i input, its end   w window   s signal   c close output   q
#       shim → client   r runs, or f failed   o and e output   x the end: what is known

class Shim:
    """Who stays with a container until it has ended, and what it knows.

    A subclass says how the process is made to run (begin), what is to be undone if that
    fails (failed), and what clients are told when it has ended (ended).
    """

    OUTPUTS = {"stdout": b"o", "stderr": b"e", "console": b"o"}
    CROWD = 100  # clients at the same time; more have to wait at the door

    def __init__(self, c, keep_input=False):
        self.c, self.first, self.peers = c, None, []
        self.keep_input = keep_input  # open, though the first client has left
        self.log, self.door, self.signals = None, -1, -1
        self.typed, self.no_more = b"", False  # on its way in
        self.trouble = ""  # of our own
        self.outlives = False  # it has to go on without its first client
        self.parties = []  # who else is served in its turns

    def failed(self, error):
        """There was nothing before."""

    def again(self):
        """The Shim of a next life, if there is to be one."""

    def live(self, first):
        """All of a container's life."""
        self.first = first  # the next life of a container has none
        self.peers += [first] * bool(first)
        try:
            self.begin()
        except BaseException as error:
            self.failed(error)
            fail = diagnose(error)
            if first:
                first.send(b"f", to_json([fail.message, fail.hint, fail.code,
                                          type(error).__name__]).encode())
            return
        os.chdir("/")  # from now on nobody's file system is in use because of us
        if first:
            first.send(b"r")
        try:
            self.signals = open_signals({signal.SIGCHLD})
            while self.c.status is None:
                turn([self, *self.parties])
            for _ in range(64):  # what is left: more than that comes from elsewhere
                if not turn([self], 0):
                    break
        except Exception as error:  # whatever it is, the container has nobody else
            self.trouble = diagnose(error).message
            kill_and_wait(self.c)
        if self.signals >= 0:
            os.close(self.signals)
        news = to_json(self.ended()).encode()
        for peer in self.peers:
            peer.send(b"x", news)

    def wanted(self):
        """What it waits for; when the process has ended, only for what that wrote."""
        over, busy = self.c.status is not None, any(p.waiting for p in self.peers)
        wanted = {self.c.outer[name]: select.POLLIN for name in self.OUTPUTS
                  if name in self.c.outer and (over or not busy)}
        if over:
            return wanted
        for peer in self.peers:
            wanted.update(peer.wanted(not self.typed))
        for fd in (self.signals, self.door if len(self.peers) < self.CROWD else -1):
            if fd >= 0:
                wanted[fd] = select.POLLIN
        if self.typed and self.input() >= 0:
            wanted[self.input()] = wanted.get(self.input(), 0) | select.POLLOUT
        return wanted

    def act(self, ready):
        """Do what can be done; whether the container has written anything."""
        for peer in [peer for peer in self.peers if peer.fd in ready]:
            peer.flush()
            if ready[peer.fd] & (select.POLLIN | TROUBLE) and (found := peer.receive()):
                self.hear(peer, *found)
        if ready.get(self.input(), 0) & (select.POLLOUT | TROUBLE):
            self.pass_in()
        moved = [name for name in self.OUTPUTS if ready.get(
            self.c.outer.get(name), 0) & (select.POLLIN | TROUBLE)]
        for name in moved:
            self.pass_out(name)
        if self.door in ready:
            self.peers.append(Peer(syscall("accept4", self.door, None, None,
                                           O_CLOEXEC | O_NONBLOCK, why="one more")))
            self.peers[-1].send(b"r")
        if self.signals in ready:
            self.reap()
        return moved

    def input(self):
        """The descriptor of the container's input, or -1."""
        return self.c.outer.get("stdin", self.c.outer.get("console", -1))

    def close(self, name):
        """Close one of the outer ends, if it is open: inside, they hear of it."""
        if name in self.c.outer:
            os.close(self.c.outer.pop(name))

    def pass_out(self, name):
        """Take what the container has written to the log, and then to the clients."""
        try:
            data = os.read(self.c.outer[name], MOST)
        except OSError:  # EIO: a terminal that nobody inside has open any more
            data = b""
        if not data:
            self.close(name)
            return
        if self.log:
            self.log.add("stderr" if name == "stderr" else "stdout", data)
        for peer in self.peers:
            if not peer.quiet:
                peer.send(self.OUTPUTS[name], data)

    def pass_in(self):
        """Give the container some of what was typed: no more than a pipe that is ready
        takes without waiting."""
        try:
            self.typed = self.typed[os.write(self.input(), self.typed[:4096]):]
        except BlockingIOError:
            pass
        except OSError:  # it does not read any more
            self.typed = b""
        if not self.typed and self.no_more:
            self.close("stdin")

    def hear(self, peer, letter, data):
        """Do what a client says; no letter is its end."""
        if letter == b"":
            os.close(peer.fd)
            self.peers.remove(peer)
            if peer is self.first:
                self.first_has_left()
        elif letter in self.MEANINGS:
            self.MEANINGS[letter](self, peer, data)

    def first_has_left(self):
        """Hold nothing of what the command was given, and perhaps nothing that only it
        could have typed into."""
        let_go()
        if not self.keep_input and "stdin" in self.c.outer:
            self.take_input(None, b"")

    def take_input(self, peer, data):
        """Input; no data is its end, on a terminal a Ctrl-D, unless others may come."""
        if not data and peer and self.keep_input:
            return
        self.typed += data or (b"\x04" if "console" in self.c.outer else b"")
        self.no_more = not data
        if self.no_more and not self.typed:
            self.close("stdin")

    def take_window(self, peer, data):
        """How large the window is: a struct winsize."""
        import termios

        if "console" in self.c.outer and len(data) == 8:
            fcntl.ioctl(self.c.outer["console"], termios.TIOCSWINSZ, data)

    def take_signal(self, peer, data):
        """A signal for process 1."""
        if self.c.status is None:
            os.kill(self.c.pid, data[0])

    def close_output(self, peer, data):
        """Nobody reads what `run` was to show: the program shall know."""
        for name, letter in self.OUTPUTS.items():
            if letter == data:
                self.close(name)

    def listen_quietly(self, peer, data):
        """This one waits for nothing but the end."""
        peer.quiet = True

    MEANINGS = {b"i": take_input, b"w": take_window, b"s": take_signal,
                b"c": close_output, b"q": listen_quietly}

    def reap(self):
        """Take note of whoever has ended."""
        os.read(self.signals, 128)
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.c.pid:
                    self.c.status = found[1]
        except ChildProcessError:
            pass


def connection(shim):
    """The two ends of a new one: the client's, and that of a shim."""
    ends = (c_int * 2)()
    try:
        syscall("socketpair", AF_UNIX, MESSAGES, 0, ends, why="client and shim")
    except OSError as error:
        shim.failed(error)
        raise
    return map(Peer, ends)


def leave_to(shim):
    """Fork: the child is the shim from here on.  The client's end of the connection."""
    (ours, theirs), c = connection(shim), shim.c
    try:
        child = os.fork()
    except OSError as error:
        shim.failed(error)
        raise
    if child:
        os.close(theirs.fd)
        if c.lock >= 0:
            os.close(c.lock)  # it is the shim's now
        c.lock = -1
        return ours
    try:
        stay_in_users()
        os.close(ours.fd)
        os.setsid()  # Ctrl-C and a hang-up are for the client
        let_go_of_callers()
        shim.live(theirs)
        let_go()  # if that was so short that we have not heard it leave
        while after := shim.again():
            after.peers = [peer for peer in shim.peers if peer.waiting]
            for peer in set(shim.peers) - {*after.peers}:
                os.close(peer.fd)
            shim = after
            shim.live(None)
        while left := [peer for peer in shim.peers if peer.waiting]:
            turn(left)
    finally:
        os._exit(0)


# ── the relay ──
#
# What is sent to 127.0.0.1 cannot be sent on: an address that means "myself" leaves the
# machine by no cable.  So for those who call a published port there the shim is one who
# calls the container and passes on what both say.  It is so, too, where the kernel has
# no way from one family of addresses to the other.


class Pump:
    """One direction of a connection that is passed on, through a pipe: with splice(2)
    its bytes go from socket to socket without ever coming into our memory."""

    ROOM, HOW = 1 << 20, os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.pipe, self.inside = os.pipe2(O_NONBLOCK | O_CLOEXEC), 0
        fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, self.ROOM)
        self.over = self.broken = False  # nothing more is said; or can be

    def wanted(self):
        """Who is listened to: nobody whose last words are still on their way."""
        if self.over:
            return {}
        return {self.target.fileno(): select.POLLOUT} if self.inside else {
            self.source.fileno(): select.POLLIN}

    def act(self, ready):
        """Pass on what can be; that no more is said is passed on, too."""
        if not ready.keys() & self.wanted().keys():
            return
        try:
            for _ in range(32):  # then it is the turn of others
                if self.inside:
                    self.inside -= os.splice(self.pipe[0], self.target.fileno(),
                                             self.inside, flags=self.HOW)
                    continue
                self.inside = os.splice(self.source.fileno(), self.pipe[1], self.ROOM,
                                        flags=self.HOW)
                if not self.inside:
                    self.over = True
                    self.target.shutdown(1)  # SHUT_WR
                    return
        except BlockingIOError:
            pass
        except OSError:  # refused, or broken off
            self.broken = True

    def close(self):
        """Let go of the source, and of the pipe."""
        self.source.close()
        for fd in self.pipe:
            os.close(fd)


class Relay:
    """Who passes on what comes to a container's published ports by no other way."""

    CROWD = 150  # connections, with six descriptors each, or callers of UDP

    def __init__(self, endpoints, is_there):
        import _socket

        self.api, self.is_there = _socket, is_there  # address: whether it is still his
        self.doors, self.pairs = {}, []  # descriptor: (socket, where to); Pumps
        self.callers = {}  # (descriptor of a door of UDP, caller): socket to the inside
        self.answers = {}  # descriptor of such a socket: the same key
        for endpoint in endpoints:
            for kind, outer, port, inner in endpoint["ports"]:
                six = [a for a in endpoint["addresses"] if ":" in a]
                to = (six if ":" in outer and six else endpoint["addresses"])[0], inner
                own = {"0.0.0.0": "127.0.0.1", "::": "::1" if six else "::"}.get(outer)
                if own or is_oneself(outer) or ":" in outer and not six:
                    self.listen(kind, own or outer, port, to)
        # The soft limit of open files; 164 are others', of which 100 are clients.
        room = os.sysconf("SC_OPEN_MAX") - 164 - len(self.doors)
        self.crowd = max(1, min(self.CROWD, room // 7))

    def socket(self, kind, address):
        """One that waits for nothing."""
        return self.api.socket(
            self.api.AF_INET6 if ":" in address else self.api.AF_INET,
            (self.api.SOCK_STREAM if kind == "tcp" else self.api.SOCK_DGRAM)
            | self.api.SOCK_NONBLOCK | self.api.SOCK_CLOEXEC)

    def listen(self, kind, host, port, to):
        """Open a door; a Fail if somebody else has the port."""
        door = self.socket(kind, host)
        try:
            if kind == "tcp":
                door.setsockopt(self.api.SOL_SOCKET, self.api.SO_REUSEADDR, 1)
            if ":" in host:
                door.setsockopt(self.api.IPPROTO_IPV6, self.api.IPV6_V6ONLY, 1)
            door.bind((host, port))
            if kind == "tcp":
                door.listen(128)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and host == "::1":
                return  # this machine knows IPv6, and has no such address
            raise Fail(f"Bind for {host}:{port} failed: " + (
                "port is already allocated" if error.errno == errno.EADDRINUSE else
                error.strerror), "another port, or stop what has this one") from None
        self.doors[door.fileno()] = door, kind, to

    def wanted(self):
        """Who may knock, and what the Pumps and the answers to callers wait for."""
        wanted = dict.fromkeys(self.answers, select.POLLIN)
        if len(self.pairs) < self.crowd:  # who comes after that waits at the door
            wanted.update(dict.fromkeys(self.doors, select.POLLIN))
        for pump in (pump for pair in self.pairs for pump in pair):
            for fd, events in pump.wanted().items():
                wanted[fd] = wanted.get(fd, 0) | events
        return wanted

    def act(self, ready):
        """Let in who is at a door, and pass on what was said; whether there was any."""
        for pair in list(self.pairs):
            for pump in pair:
                pump.act(ready)
            if any(pump.broken for pump in pair) or all(pump.over for pump in pair):
                self.pairs.remove(pair)
                for pump in pair:
                    pump.close()
        for fd in ready.keys() & self.answers.keys():
            if fd in self.answers:
                self.pass_out(*self.answers[fd])
        for fd in ready.keys() & self.doors.keys():
            door, kind, to = self.doors[fd]
            (self.let_in if kind == "tcp" else self.pass_in)(door, to)
        return bool(ready)

    def close(self):
        """Pass on what is left, and let go of everything."""
        for _ in range(64):
            if not turn([self], 0):
                break
        for socket, *_ in self.doors.values():
            socket.close()
        for pair in self.pairs:
            for pump in pair:
                pump.close()
        for socket in self.callers.values():
            socket.close()

    def pass_in(self, door, to):
        """A datagram for the container: each caller has a socket there of its own, by
        which the answer is known; the one who was quiet longest makes room."""
        try:
            data, caller = door.recvfrom(MOST)
            key = door.fileno(), caller
            inside = self.callers.pop(key, None)
            if not inside:
                if not self.is_there(to[0]):
                    return
                inside = self.socket("udp", to[0])
                inside.connect(to)
                self.answers[inside.fileno()] = key
            self.callers[key] = inside
            if len(self.callers) > self.crowd:
                self.forget(next(iter(self.callers)))
            inside.send(data)
        except OSError:  # a datagram may be lost
            pass

    def pass_out(self, door, caller):
        """A datagram from the container."""
        try:
            self.doors[door][0].sendto(self.callers[door, caller].recv(MOST), caller)
        except BlockingIOError:
            pass
        except OSError:  # nobody listens there
            self.forget((door, caller))

    def forget(self, key):
        """A caller of UDP has gone, as far as anybody can tell."""
        inside = self.callers.pop(key)
        del self.answers[inside.fileno()]
        inside.close()

    def let_in(self, door, to):
        """Call the container for somebody."""
        try:
            fd, _ = door._accept()
        except OSError:  # has left again
            return
        if not self.is_there(to[0]):  # somebody else may have it by now
            os.close(fd)
            return
        here, there = self.api.socket(fileno=fd), self.socket("tcp", to[0])
        here.setblocking(False)
        for socket in (here, there):  # pass on at once what may be part of more
            socket.setsockopt(self.api.IPPROTO_TCP, self.api.TCP_NODELAY, 1)
        there.connect_ex(to)  # a Pump hears how it ends
        self.pairs.append((Pump(here, there), Pump(there, here)))


# ── the client ──
#
# What a person's `run`, `start -a`, `attach` and `exec` are once there is a shim.  It
# knows nothing of the container: it shows bytes, and sends bytes, signals and the size
# of its window.  An `exec` without a terminal, that it could leave by keys, plays the
# shim itself: client and shim are two parties of the same turns then.

class raw_terminal:
    """The terminal at `fd`, passing every byte on as it is, until it is restored."""

    def __init__(self, fd):
        import termios
        import tty

        self.fd, self.termios, self.saved = fd, termios, termios.tcgetattr(fd)
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
        tty.setraw(self.fd, termios.TCSADRAIN)  # what was typed already is kept

    def restore(self):
        """Make it what it was."""
        self.termios.tcsetattr(self.fd, self.termios.TCSADRAIN, self.saved)
        os.write(self.alive, b"!")
        os.close(self.alive)
        os.waitpid(self.guard, 0)


def window_size():
    """The struct winsize of our terminal, or nothing."""
    import termios

    for fd in (0, 1, 2):
        if os.isatty(fd):
            return fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
    return b""


def started(letter, data):
    """Whether a message says that the process runs; a Fail if it never will."""
    if letter in (b"f", b""):
        *fail, kind = from_json(data) if data else (
            "the shim died before the container ran", "was it killed?", 125, "")
        raise CannotMapIds(*fail) if kind == "CannotMapIds" else Fail(*fail)
    return letter == b"r"


def see_start(peer):
    """Return when the process runs, and let its shim alone with it."""
    while not (message := peer.receive()):
        turn([peer])
    os.close(peer.fd)
    started(*message)


class Client:
    """Who shows a person what a shim sends, and passes on what is typed."""

    def __init__(self, tty, interactive, keys=b"", owner=False, outputs=b"oe"):
        self.peer = None  # our end of the connection
        self.tty, self.keys = tty, keys
        self.owner = owner  # of the container: `run`, and nobody else
        self.outputs = outputs  # letters of those that are shown
        self.typing = interactive  # until our input ends
        self.held = b""  # what may be the beginning of the detach keys
        self.shown = []  # (descriptor, bytes) on their way to the person
        self.interrupts = 0
        self.runs, self.raw = False, None  # what it is about; our terminal, if raw
        self.end = None  # what the shim said last; {} if the person has left
        self.lost = None  # why some of what it wrote could not be shown
        self.signals = open_signals(WATCHED - {signal.SIGCHLD})

    def stay(self, peer, others=()):
        """What the shim says at the end; {} if the person leaves before that, and None
        if the shim dies."""
        self.peer = peer
        try:
            if self.tty:
                peer.send(b"w", window_size())
            while self.shown or (self.end is None and self.peer):
                turn([self, *(other for other in others if other.waiting)])
            return self.end
        finally:
            if self.raw:
                self.raw.restore()

    def attend(self, shim):
        """Be client and shim in one process; what the shim says at the end."""
        self.peer, theirs = connection(shim)
        shim.parties.append(self)
        shim.live(theirs)
        return self.stay(self.peer, shim.peers)

    def wanted(self):
        """What it waits for: from the shim nothing that there is no room for."""
        wanted = {self.signals: select.POLLIN}
        # There is no end of signals, but of messages: one is shown before the next.
        if self.shown:
            wanted[self.shown[0][0]] = select.POLLOUT
        elif self.peer and self.end is None:
            wanted.update(self.peer.wanted())
        if self.typing and self.peer and not self.peer.waiting:
            wanted[0] = select.POLLIN
        return wanted

    def act(self, ready):
        """Do what can be done."""
        if self.signals in ready:
            self.take_signal(os.read(self.signals, 128))
        if self.shown and self.shown[0][0] in ready:
            self.show()
        elif self.peer and self.peer.fd in ready:
            self.peer.flush()
            if found := self.peer.receive():
                self.hear(*found)
        if 0 in ready and self.typing and self.peer:
            self.type()

    def hear(self, letter, data):
        """Take what the shim sends."""
        if not self.runs:
            self.runs = started(letter, data)
            if self.tty and self.typing and os.isatty(0):
                self.raw = raw_terminal(0)
        elif letter in (b"o", b"e"):
            if letter in self.outputs and self.interrupts < 3:
                self.shown.append((1 if letter == b"o" else 2, data))
        elif letter == b"x":
            self.end = from_json(data)
        elif letter == b"":
            self.peer = None

    def show(self):
        """Write some: no more than a pipe that is ready takes without waiting."""
        fd, data = self.shown.pop(0)
        try:
            data = data[os.write(fd, data[:4096]):]
        except BlockingIOError:
            pass
        except OSError as error:
            data = b""
            if error.errno not in (errno.EPIPE, errno.EIO, errno.ECONNRESET):
                self.lost = error  # somebody would read it
            if not self.owner:
                self.end, self.shown = {}, []
            elif self.peer:
                self.peer.send(b"c", b"o" if fd == 1 else b"e")
        if data:
            self.shown.insert(0, (fd, data))

    def type(self):
        """Pass on what was typed, but for the detach keys."""
        try:
            data = os.read(0, MOST)
        except OSError:  # EIO: the terminal has hung up
            data = b""
        keys = self.keys if self.tty and data else b""
        typed, found = self.held + data, False
        if keys:
            typed, found, _ = typed.partition(keys)
        count = max(n for n in range(len(keys) + 1) if typed.endswith(keys[:n]))
        self.held = keys[:count]  # perhaps the beginning; the next key tells
        if typed := typed[:len(typed) - count]:
            self.peer.send(b"i", typed)
        if not data:
            self.typing = False
            self.peer.send(b"i")
        if found or not (data or self.outputs):  # nothing is left to stay for
            self.end = {}

    def take_signal(self, about):
        """Pass a signal on; process 1 may ignore it, so a third Ctrl-C kills."""
        number = struct.unpack_from("I", about)[0]  # of struct signalfd_siginfo
        if number == signal.SIGWINCH and self.tty:
            self.peer.send(b"w", window_size())
        if number == signal.SIGWINCH or not self.peer or (
                signal.getsignal(number) == signal.SIG_IGN):  # nohup, a shell's `&`
            return
        if number in (signal.SIGINT, signal.SIGTERM):
            self.interrupts += 1
            if self.interrupts == 3:
                say("got 3 SIGTERM/SIGINTs, forcefully exiting")
                number, self.shown = signal.SIGKILL, []
        self.peer.send(b"s", bytes([number]))


def detach_keys(text):
    """The bytes that "ctrl-p,ctrl-q" means."""
    keys = b""
    for word in text.split(",") if text else ():
        letter = word.removeprefix("ctrl-")
        if len(letter) != 1 or not letter.isascii() or letter != word and not (
                letter.isalpha() or letter in "@[\\]^_"):
            raise Fail(f"invalid detach keys {text!r}", "as in ctrl-p,ctrl-q or a,b")
        keys += bytes([ord(letter.upper()) & 31]) if letter != word else letter.encode()
    return keys

# ══ 12. THE ENGINE ════════════════════════════════════════════════════════════════
#
# What Docker's daemon does, without a daemon.  All that is known about a container lies
# in its directory, and each command reads it, does its work and is gone:
#
#       /var/lib/minicontainer/            (or $MINICONTAINER_ROOT)
#           rootfs/default                 what `run` uses when no other is named
#           layers/DIGEST/                 tarballs, unpacked
#           ids/SLOT, ids/SLOT.ID          a range of 65536 ids: links to who has it
#           names/NAME                     the same for a name
#           containers/ID/record.json      what is kept of it: see Record, exchange
#                         config.json      the spec that chapter 6 obeys
#                         attach  log      where its shim listens; what it wrote
#                         upper/  work/    what it changed
#                         rootfs/          or, with vfs, all that it has
#                         hosts hostname resolv.conf
#           workshop/                      always empty, here; see chapter 4
#
# Two locks (flock) make that safe; the kernel drops both when their holder dies, of
# whatever.  The directory is locked by whoever looks after the container: the command
# that makes it, then its shim, or the one who removes it.  So "it can be had" means
# that nobody does, and a record that says "running" is out of date: whoever sees that
# first sets it right (settle).  `hostname`, a file that is never replaced, is locked
# for a moment by whoever changes the record, which is then replaced by rename: all
# others see it as it was or as it is.
#
#       created ──start──▶ running ◀──pause, unpause──▶ paused
#                           │    ▲
#                        it ends └──── restarting      if its policy says so
#                           ▼              ▲
#                         exited ◀─────────┘           any of them ──rm──▶ gone
#
# And this is who does what, of `run -d`:
#
#       the command          its shim, a fork                        process 1
#       create: record … ──▶ start (chapter 6) ────────────────────▶ lives
#       prints the id ◀── r  record: running                           │
#                            takes what it writes to the log ◀──────── │
#                            record: exited ◀───────────────────────── ends
#                            undoes what start did; frees the lock
#       wait, attach … ◀── x

calls(renameat2=(316, 276, "olddirfd old newdirfd new RENAME_"))
RENAME_EXCHANGE = 2
CONTAINER_IDS = 0x70000000, 65536, 4093  # first id, ids each, ranges: below 2**31

DETACH_KEYS = arg("--detach-keys", metavar="KEYS", default="ctrl-p,ctrl-q",
                  help="what to type, with -t, to leave it running")
HEALTH_OPTIONS = (
    arg("--health-cmd", metavar="COMMAND", help="a shell's, that fails if it is ill"),
    arg("--health-interval", metavar="SPAN", help="between two checks (30s)"),
    arg("--health-timeout", metavar="SPAN", help="how long one may take (30s)"),
    arg("--health-retries", metavar="N", help="how often it must fail (3)"),
    arg("--health-start-period", metavar="SPAN", help="in which failures do not count"),
    arg("--no-healthcheck", action="store_true", help="not the image's either"),
)
CREATE_OPTIONS = (
    arg("--rootfs", metavar="X", action="append", default=[],
        help="a directory or tarball to use; repeat it for layers, bottom first"),
    arg("--pull", choices=["always", "missing", "never"], default="missing",
        help="when to fetch the image"), PLATFORM,
    arg("-q", "--quiet", action="store_true", help="say nothing while fetching it"),
    arg("--entrypoint", metavar="PROGRAM", help="instead of the image's own"),
    arg("--rm", action="store_true", help="remove the container when it ends"),
    arg("--init", action="store_true", help="a small process 1 that reaps orphans"),
    arg("--storage-driver", choices=["overlay", "vfs"], default="overlay",
        help="vfs: copy the layers, where there is no overlay"),
    arg("--volumes-from", metavar="CONTAINER[:ro]", action="append", default=[],
        help="the volumes of another, where that has them"),
    arg("--name", metavar="NAME", help="what to call it; else it is given a name"),
    arg("--cidfile", metavar="FILE", help="write its id there"),
    arg("-l", "--label", metavar="KEY[=VALUE]", action="append", default=[],
        help="a note that `ps --filter label=…` finds"),
    arg("--stop-signal", metavar="SIGNAL", help="what `stop` sends"),
    arg("--stop-timeout", metavar="SECONDS", default="10",
        help="how long `stop` waits before it kills"),
    arg("--restart", metavar="POLICY", default="no",
        help="when it ends: always, unless-stopped, on-failure[:TRIES]"),
    *HEALTH_OPTIONS,
    arg("--log-driver", choices=["json-file", "none"], default="json-file",
        help="none: `logs` will have nothing to show"),
    arg("--log-opt", metavar="KEY=VALUE", action="append", default=[],
        help="max-size=10m and max-file=3: how much of it to keep"),
)
RUN_OPTIONS = (
    arg("-d", "--detach", action="store_true", help="print its id, and leave it"),
    arg("-a", "--attach", metavar="STREAM", action="append", default=[],
        help="only stdin, stdout, stderr, whichever are named"), DETACH_KEYS,
    arg("--stats-at-exit", action="store_true", help="print what it used"),
    arg("--stop-after", metavar="STEP", help="a shell, or the COMMAND, in the "
        "half-made container; see `steps` for what there is"),
    arg("--without", metavar="STEP,…", action="append", default=[],
        help="leave out walls: seccomp, userns, mask_paths …"),
)


# ── the record ──
#
# One JSON file says what a container is and how it fares; the spec beside it says how
# it is made.  Nothing is kept anywhere else, and nothing in memory between commands, so
# a machine that was switched off in the middle finds all as it was: what was created
# can be started, and what ran has ended.

RUNNING = "running", "paused"
LIVE = *RUNNING, "restarting"  # somebody looks after it


class Record:
    """What is kept of a container: record.json in its directory.

    Moments are Unix times in nanoseconds, 0 for never."""

    def __init__(self, **known):
        self.id = ""  # 64 hex digits: the name of its directory
        self.name = ""  # a link of that name in names/ leads to the id
        self.created = 0  # when
        self.image = ""  # what it was made of, as the person called it
        self.labels = {}  # KEY: VALUE, the image's and of --label
        self.first_id = 0  # its root's user id on the host; 0 if that is the host's
        self.asked = {}  # all options, as they were given: for `inspect`
        self.volumes = {}  # NAME: where it is mounted
        self.throw_away = False  # --rm
        self.wants_reaper = False  # --init
        self.interactive = False  # -i: it has an input
        self.stop_signal = "SIGTERM"  # what `stop` sends
        self.stop_timeout = 10  # and how long it waits then, in seconds
        self.log = {}  # max-size and max-file of its log; None: it keeps none
        self.restart = "no"  # --restart: always, unless-stopped, on-failure
        self.tries = 0  # of on-failure, at most; 0: ever again
        self.health = {}  # HEALTHCHECK: Test, Interval, Timeout, Retries, StartPeriod
        self.checked = {}  # Status, FailingStreak, Log: what it has found
        self.status = "created"  # or running, paused, restarting, exited
        self.stopped = False  # by a person, who does not want it to start again
        self.restarts = 0  # since a person started it
        self.pid = 0  # of process 1, while it lives
        self.born = 0  # when that began, see born()
        self.started = 0  # when it did, last
        self.finished = 0  # when it ended, last
        self.exit_code = 0  # how; or why it did not start
        self.oom_killed = False  # whether memory was the reason
        self.error = ""  # what else went wrong
        vars(self).update(known)

    def path(self, *names):
        """A path in its directory, or the directory."""
        return "/".join((store("containers", self.id), *names))

    def spec(self):
        """The OCI runtime spec that it is started with."""
        return from_json(read_file(self.path("config.json")))

    def image_id(self):
        """The id of the image that it was made of, which may be gone; "" if of none, or
        if nobody can read that any more."""
        try:
            return self.spec()["annotations"].get(OF_IMAGE, "")
        except (OSError, ValueError):
            return ""

    def layers(self, spec):
        """Directories of the host, bottom first; none if its rootfs is a copy."""
        copied = os.path.isdir(self.path("rootfs"))
        return [] if copied else from_json(spec["annotations"][OF_LAYERS])

    def state(self):
        """The status, in the words of `ps`."""
        since = self.started if self.status in RUNNING else self.finished
        span = how_long((time.time_ns() - since) / 10 ** 9)
        found = self.checked.get("Status", "")
        note = found and f" ({'health: ' * (found == 'starting')}{found})"
        return {"created": "Created", "running": f"Up {span}{note}",
                "paused": f"Up {span} (Paused)",
                "restarting": f"Restarting ({self.exit_code}) {span} ago",
                "exited": f"Exited ({self.exit_code}) {span} ago"}[self.status]

    def wants_again(self):
        """Whether its policy is to start it anew, now that it has ended."""
        return not self.stopped and (
            self.restart in ("always", "unless-stopped") or self.restart == "on-failure"
            and self.exit_code != 0 and not 0 < self.tries <= self.restarts)


def load(id):
    """The record of a container; FileNotFoundError if there is none."""
    return Record(**from_json(read_file(f"{store('containers', id)}/record.json")))


ROOM = 1024  # bytes of a file by which what is written there next may be longer


def exchange(path, document, lasting):
    """What save() does, and the old file stays as PATH.new, to be written to the next
    time: so there is room to say how a container has ended that has filled the disk."""
    data, spare = to_json(document).encode(), f"{path}.new"
    fd = os.open(spare, O_WRONLY | os.O_CREAT | O_CLOEXEC, 0o600)
    try:
        written = os.write(fd, data + b" " * ROOM)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.ftruncate(fd, written)
        if lasting:
            os.fsync(fd)
    finally:
        os.close(fd)
    try:
        syscall("renameat2", AT_FDCWD, spare, AT_FDCWD, path, RENAME_EXCHANGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not every file system can
            raise
        os.rename(spare, path)
    if lasting:
        sync(os.path.dirname(path))


def of_those_there(things, look):
    """look(thing) of each, but for what is being made, or is removed meanwhile."""
    for thing in things:
        try:
            yield look(thing)
        except (FileNotFoundError, NotADirectoryError):
            pass


def known():
    """All records, as they are written."""
    return of_those_there(os.listdir(store("containers", "")), load)


class changing:
    """A context that gives a record to be changed, by nobody else meanwhile; what it
    says after a `lasting` change survives a power cut."""

    def __init__(self, id, lasting=False):
        self.id, self.lasting = id, lasting

    def __enter__(self):
        self.lock = lock(f"{store('containers', self.id)}/hostname", fcntl.LOCK_EX, 0)
        try:
            self.record = load(self.id)
        except BaseException:
            os.close(self.lock)
            raise
        return self.record

    def __exit__(self, failed, *_):
        try:
            if not failed:
                self.keep()
        finally:
            os.close(self.lock)

    def keep(self):
        """Write it; on a full disk what health checks have printed gives its room."""
        path = self.record.path("record.json")
        try:
            exchange(path, vars(self.record), self.lasting)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or (
                    not self.record.checked.get("Log")):
                raise
            self.record.checked["Log"] = []
            exchange(path, vars(self.record), self.lasting)


# ── events ──


def announce(record, action, **more):
    """Note an event of a container."""
    note_event("container", record.id, action, {
        "image": record.image, "name": record.name, **record.labels, **more})


def names_in(event, *keys):
    """The id, and the names, of whom or what an event is about."""
    facts = event["Actor"]["Attributes"]
    return [event["Actor"]["ID"], *(facts[key] for key in keys if key in facts)]


def is_about(kind):
    """The test of an event for one kind: a beginning will do, as in Docker."""
    return lambda event, text: event["Type"] == kind and any(
        name.startswith(text) for name in names_in(event, "name"))


EVENT_FILTERS = {  # of `events`: whether one passes for one of the values
    **{kind: is_about(kind) for kind in ("container", "network", "volume")},
    "event": lambda event, text: event["Action"].partition(":")[0] == text,
    "image": lambda event, text: event["Type"] in ("container", "image") and any(
        text in (name, name.rpartition(":")[0]) for name in names_in(
            event, {"container": "image"}.get(event["Type"], "name"))),
    "label": lambda event, text: has_label(event["Actor"]["Attributes"], text),
    "type": lambda event, text: event["Type"] == text,
    "scope": lambda event, text: text == "local",
}


def event_line(event):
    """An event as a person reads it."""
    about_, facts = event["Actor"]["ID"], event["Actor"]["Attributes"]
    told = ", ".join(f"{key}={text}" for key, text in sorted(facts.items()))
    when = timestamp(event["timeNano"])
    return f"{when} {event['Type']} {event['Action']} {about_} ({told})"


@command("events", FILTER, arg("--format", metavar="FORM", help="json, '{{.Action}}'"),
         arg("--since", metavar="WHEN", help="show what has been, too"),
         arg("--until", metavar="WHEN", help="end when it is that late"))
def events_command(options):
    """Show what happens to containers, images, networks and volumes, while it does."""
    since = moment("--since", options.since) if options.since else time.time_ns()
    until_ = moment("--until", options.until) if options.until else 1 << 62
    wanted = filters_of(options.filter, EVENT_FILTERS)
    show = event_line if not options.format else (
        to_json if options.format == "json" else Template(options.format))
    only_look()
    watch = watch_directory(store("events", ""))  # before the first read, here too
    reader = LogReader(store("events", "log"))
    while True:
        for event in (event for entries in reader.read() for event in entries):
            if since <= event["timeNano"] <= until_ and passes(
                    event, EVENT_FILTERS, wanted):
                print(show(event), flush=True)
        left = (until_ - time.time_ns()) / 10 ** 9
        if left <= 0:
            return
        if select.select([watch], [], [], min(left, 1 << 20))[0]:
            os.read(watch, MOST)


# ── volumes ──
#
# A volume is a directory of the store with a name, which outlives containers.  It is
# mounted like one of the host's, id-mapped, so that it has the owners that containers
# see, whatever range of ids each has.  When the first one gets it, still empty, it is
# filled with what the image has at that place.  One without a name of a person's
# (`-v /DIR`, or VOLUME of an image) goes with its container: --rm, `rm -v`.

VOLUME_NAME = "_data"  # of the directory in which its files are, as Docker calls it
NAMELESS = "com.docker.volume.anonymous"  # the label of one that nobody has named


def volume_facts(name):
    """What `volume inspect` tells; a Fail if there is none."""
    try:
        return from_json(read_file(store("volumes", f"{name}/volume.json")))
    except FileNotFoundError:
        raise NoSuch(f"No such volume: {name}", "`volume ls` lists them", 1) from None


def is_volume(name):
    """Whether there is a volume of that name."""
    return bool(name) and "/" not in name and os.path.exists(
        store("volumes", name, "volume.json"))


def is_word(name):
    """Whether the name of a container or a volume may be that."""
    return name.isascii() and name[:1].isalnum() and all(
        letter.isalnum() or letter in "_.-" for letter in name)


def note_volume(action, name, **more):
    """Note an event of a volume."""
    note_event("volume", name, action, {**more, "driver": "local"})


def no_volume_name(name, code=125):
    """What to raise of a name that no volume may have."""
    return Fail(f'create {name}: "{name}" includes invalid characters for a local '
                'volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you '
                "intended to pass a host directory, use absolute path",
                "-v /SRC:/DST", code)


def make_volume(name, labels=None, anonymous=False):
    """Make a volume, unless there is one of that name."""
    if not is_word(name):
        raise no_volume_name(name)
    with held("volumes", fcntl.LOCK_EX):
        if not is_volume(name):
            note_volume("create", name)
            path = store("volumes", name, VOLUME_NAME)
            os.makedirs(path, 0o755, exist_ok=True)
            os.chmod(os.path.dirname(path), 0o711)
            save(store("volumes", name, "volume.json"), {
                "CreatedAt": timestamp(time.time_ns())[:19] + "Z", "Driver": "local",
                "Labels": {**(labels or {}), **({NAMELESS: ""} if anonymous else {})},
                "Mountpoint": path, "Name": name, "Options": {}, "Scope": "local"})


def users_of(name):
    """The containers that have a volume."""
    return [record for record in known() if name in record.volumes]


def remove_volume(name):
    """Remove a volume that no container has; the bytes that were in it."""
    facts = volume_facts(name)
    with held("volumes", fcntl.LOCK_EX):
        if users := users_of(name):
            raise Fail(f"remove {name}: volume is in use - "
                       f"[{', '.join(record.id for record in users)}]",
                       "`rm` removes containers", 1)
        freed = bytes_in(facts["Mountpoint"])
        remove_tree(store("volumes", name))
    note_volume("destroy", name)
    return freed


def split_volume(text):
    """The source, target and options of a -v; without a source, one is to be made."""
    parts = text.split(":", 2)
    if "" in parts:  # perhaps a variable that was not set: never guess what is meant
        raise Fail(f"invalid spec: {text}: empty section between colons",
                   "-v [SRC:]DST[:OPTIONS]")
    source, target, words = (parts + ["", ""])[:3]
    return (source, target, words) if target else ("", source, "")


def split_mount(text):
    """The same of a --mount; source None if it is not about a volume."""
    keys = mount_keys(text)
    words = ["ro"] * keys["readonly"] + ["nocopy"] * keys["volume-nocopy"]
    return (keys.get("source", "") if keys["type"] == "volume" else None,
            keys.get("target", ""), ",".join(words))


PROPAGATION = "shared", "slave", "private"


def mount_facts(record, mounts):
    """What `inspect` tells of the mounts that were asked for."""
    for mount in mounts:
        words, target = mount["options"], mount["destination"]
        name = next((name for name, at in record.volumes.items() if at == target), "")
        if "ridmap" in words:  # what was asked for; not what every container has
            yield {"Type": "volume" if name else "bind", "Source": mount["source"],
                   **({"Name": name, "Driver": "local"} if name else {}),
                   "Destination": target, "Mode": "", "RW": "rro" not in words,
                   "Propagation": next((word for word in words
                                        if word.endswith(PROPAGATION)), "rprivate")}


def note_mounts(action, record, spec):
    """Note that a container has, or has no more, the volumes that it is given."""
    for facts in mount_facts(record, spec["mounts"]) if record.volumes else ():
        if "Name" in facts:
            more = {} if action == "unmount" else {
                "destination": facts["Destination"], "propagation": "",
                "read/write": str(facts["RW"]).lower()}
            note_volume(action, facts["Name"], container=record.id, **more)


def container_of(record, spec=None):
    """The Container, as the chapters below need it, that a record is about."""
    spec = spec or record.spec()
    c = Container(record.id, spec, record.path(), record.layers(spec))
    c.workshop = store("workshop", "")
    return c


class merged:
    """A context in which the workshop has, read-only at `rootfs`, what an overlay of a
    container's layers shows, or of all that it sees; gives its Container."""

    def __init__(self, record, spec, with_changes=False):
        self.c = container_of(record, spec)
        self.directories = [*self.c.layers, *[record.path("upper")] * with_changes]

    def __enter__(self):
        open_workshop(self.c)
        try:
            self.mount(self.directories)
        except BaseException:
            leave_workshop(self.c)
            raise
        return self.c

    def mount(self, directories):
        """Mount them, bottom first."""
        if len(directories) == 1:
            attach(directories[0], "rootfs", MOUNT_ATTR_RDONLY, -1)
        else:
            for number, layer in enumerate(directories):
                attach(layer, str(number), 0, -1)
            syscall("mkdirat", AT_FDCWD, "rootfs", 0o755)
            lower = ":".join(map(str, reversed(range(len(directories)))))
            syscall("mount", "overlay", "rootfs", "overlay", MS_RDONLY,
                    f"lowerdir={lower}", why="as it is seen inside, for us to read")
        self.c.root_fd = open_fd("rootfs", O_PATH | O_DIRECTORY)

    def __exit__(self, *_):
        os.close(self.c.root_fd)
        leave_workshop(self.c)


def fill_volume(record, spec, name, target):
    """Copy what an image has at a place into the volume that goes there, if that is
    empty."""
    layers, path = from_json(spec["annotations"][OF_LAYERS]), target.lstrip("/")
    with held(f"volumes/{name}", fcntl.LOCK_EX):
        place = store("volumes", name, VOLUME_NAME)
        if os.listdir(place) or not any(os.path.lexists(f"{layer}/{path}")
                                        for layer in layers):
            return
        with merged(record, spec) as c:
            try:
                fd = open_inside(c, target, O_PATH | O_DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):  # a file, a link to nowhere
                return
            copy_layers([f"/proc/self/fd/{fd}"], place, 0)
            os.close(fd)


@command("volume create", arg("--label", metavar="KEY=VALUE", action="append",
                              default=[], help="a note that `ls --filter` finds"),
         arg("-d", "--driver", metavar="DRIVER", default="local",
             help="local, a directory of this machine, is what there is"),
         arg("name", nargs="?", metavar="NAME", help="or it gets a random one"))
def volume_create_command(options):
    """Make a volume."""
    name = options.name or os.urandom(32).hex()
    if options.driver != "local":
        raise Fail(f'error looking up volume plugin {options.driver}: plugin "'
                   f'{options.driver}" not found', "--driver local", 1)
    if not is_word(name):
        raise no_volume_name(name, 1)
    make_volume(name, dict(text.partition("=")[::2] for text in options.label),
                not options.name)
    print(name)


VOLUME_FILTERS = {  # of `volume ls`: whether one passes for one of the values
    "name": lambda facts, text: text in facts["Name"],
    "driver": lambda facts, text: text == facts["Driver"],
    "label": lambda facts, text: has_label(facts["Labels"], text),
    "label!": lambda facts, text: not has_label(facts["Labels"], text),
    "dangling": lambda facts, text: is_true("dangling", text) == (
        not users_of(facts["Name"]))}


def all_volumes():
    """The facts of every volume, by name."""
    names = filter(is_volume, sorted(os.listdir(store("volumes", ""))))
    return [volume_facts(name) for name in names]


@command("volume ls", QUIET, FILTER, FORMAT)
def volume_ls_command(options):
    """List volumes."""
    wanted = filters_of(options.filter, VOLUME_FILTERS)
    print_list({"DRIVER": "Driver", "VOLUME NAME": "Name"}, [
        {**facts, "Labels": label_text(facts["Labels"])} for facts in all_volumes()
        if passes(facts, VOLUME_FILTERS, wanted)], options.format,
        "Name" if options.quiet else "", "CreatedAt Labels Mountpoint Options Scope")


VOLUMES = arg("volumes", nargs="+", metavar="VOLUME", help="names")


@command("volume inspect", arg("-f", "--format", metavar="FORM", help="'{{.A.B}}'"),
         VOLUMES)
def volume_inspect_command(options):
    """Show all that is known of volumes, as JSON."""
    show_facts(options.volumes, volume_facts, options.format)


@command("volume rm", arg("-f", "--force", action="store_true",
                          help="no error if there is none"), VOLUMES)
def volume_rm_command(options):
    """Remove volumes that no container has."""
    def remove(name):
        if is_volume(name) or not options.force:
            remove_volume(name)
        print(name)
    for_each(options.volumes, remove)


# ── names ──
#
# A name, and a range of user ids, is taken by making a symlink, which only one can
# make; where it leads says whose it is, so that what a killed command has left is seen
# to be nobody's.

FIRST_WORDS = """able bold calm deft eager fair glad hardy idle jolly keen lucid mild
    neat open plain quiet ready sound tidy upbeat vivid warm young""".split()
LAST_WORDS = """anchor barge canoe dinghy ensign ferry galley hull iceboat jetty ketch
    lugger mast nautilus oar pilot quay rudder sloop tender vessel wharf yawl""".split()


def take_name(name, id):
    """Give a name to a container; a Fail if another has it."""
    if len(name) < 2 or not is_word(name):
        raise Fail(f"Invalid container name ({name}), only "
                   "[a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", "at least two of them")
    if len(name) > 255:
        raise Fail(f"Invalid container name ({name[:20]}…): it is too long",
                   "at most 255 letters")
    path = store("names", name)
    with held("names", fcntl.LOCK_EX):
        # Two may want a name whose owner is gone, and only one of them may have it.
        if os.path.islink(path):
            owner = os.readlink(path)
            if os.path.exists(store("containers", owner)):
                raise Fail(f'Conflict. The container name "/{name}" is already in use '
                           f'by container "{owner}". You have to remove (or rename) '
                           "that container to be able to reuse that name.")
            os.unlink(path)  # of one whose removal was cut short
        os.symlink(id, path)


def take_any_name(id):
    """Give a container a name that is free: two words by chance, and a number if need
    be; the name."""
    for number in range(1 << 16):
        first, last = os.urandom(2)
        name = (f"{FIRST_WORDS[first % len(FIRST_WORDS)]}_"
                f"{LAST_WORDS[last % len(LAST_WORDS)]}{number if number > 9 else ''}")
        if not os.path.islink(store("names", name)):
            try:
                take_name(name, id)
                return name
            except Fail:  # somebody was quicker
                pass
    raise Fail("there is no free name", "--name takes any")


def owner_of(path):
    """Whose a link of ids/ or names/ is; "" if there is none."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def slot_of(first_id):
    """The name in ids/ of the range of user ids that begins there."""
    return str((first_id - CONTAINER_IDS[0]) // CONTAINER_IDS[1])


def discard(record, volumes=True):
    """Remove a container that has ended, with its ids, its name, and the volumes that
    nobody has named.

    Caller must hold the lock of its directory."""
    image = record.image_id()
    # The directory first: what leads to no directory is seen to be nobody's.
    remove_tree(record.path())
    for name in record.volumes if volumes else ():
        if is_volume(name) and not users_of(name) and (
                NAMELESS in volume_facts(name)["Labels"]):
            remove_volume(name)
    slot = slot_of(record.first_id)
    for path in (store("ids", slot), store("ids", f"{slot}.{record.id}"),
                 store("names", record.name)):
        if owner_of(path) == record.id:
            take_away_file(path)
    if image and not os.path.exists(blob_path(image)):
        forget_lost()
        sweep()  # it was removed by force before, and its layers were kept for this one
    announce(record, "destroy")  # last: the disk may be full


def booted():
    """When this machine was switched on, in nanoseconds of Unix time."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def group_of(id):
    """The control group of a container of ours."""
    if not rootless.uid:
        return Cgroup(f"/minicontainer-{id}")
    try:  # it is where its shim's session was
        return cgroup_of(from_json(read_file(store("containers", f"{id}/config.json"))))
    except FileNotFoundError:
        return Cgroup(group_path(id))


def pidfd_of(record):
    """A descriptor of its process 1; ProcessLookupError if there is none."""
    if record.status in RUNNING:
        fd = syscall("pidfd_open", record.pid, 0, why="its process 1")
        if born(record.pid) == record.born:
            return fd
        os.close(fd)
    raise ProcessLookupError(errno.ESRCH, "its process 1 has ended")


def end_the_rest(record):
    """End what a shim that was killed has left running; whether that can be done.

    The control group tells all of it.  Without one there is process 1: it has a guard,
    who may be a moment late.  If that was killed, too, nobody has kept the user
    namespace, and to the one that there is now it belongs no more."""
    group = group_of(record.id)
    group.remove()
    if group.path:
        return True
    try:
        fd = pidfd_of(record)
    except ProcessLookupError:
        return True
    try:
        signal_by(fd, signal.SIGKILL, "its shim was killed")
        return bool(select.select([fd], [], [], 10)[0])
    except PermissionError:  # or it has ended already, and nobody has reaped it yet
        return bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)


def settle(record):
    """The record as it is true: a container whose shim was killed, or whose machine was
    switched off, has ended with it; nobody can say when, or how."""
    if record.status not in LIVE:
        return record
    guard = lock(record.path(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    if guard is None:  # its shim has it
        return record
    try:
        if not end_the_rest(record):
            return record  # it is true that it runs
        leave_networks(record.id)
        with changing(record.id, lasting=True) as record:
            ran = record.status in RUNNING
            if ran:
                record.exit_code, record.error = (
                    (255, "the machine was switched off") if record.started < booted()
                    else (137, "its shim was killed"))
                record.finished = time.time_ns()
            if record.status in LIVE:
                record.status, record.pid = "exited", 0
        if ran:  # which nobody has told yet
            announce(record, "die", exitCode=str(record.exit_code))
            note_mounts("unmount", record, record.spec())
        if record.throw_away:
            discard(record)
        return record
    finally:
        os.close(guard)


def records():
    """All records as they are true, the newest first."""
    found = [record for record in of_those_there(known(), settle)
             if os.path.exists(record.path())]
    return sorted(found, key=lambda record: -record.created)


class NoContainer(NoSuch):
    """A container that there is not, or not any more."""

    def __init__(self, name):
        super().__init__(f"No such container: {name}", "`ps -a` lists them", 1)


def find(text):
    """The record of the container that a name, an id or the beginning of one means."""
    name, top = text.removeprefix("/"), os.path.dirname(store("containers", "x"))
    ids = [id for id in os.listdir(top) if name and id.startswith(name)]
    if name not in ids and name and "/" not in name and os.path.islink(
            path := store("names", name)):
        ids = [os.readlink(path)]
    if len(ids) > 1 and name not in ids:
        raise Fail(f"multiple IDs found with provided prefix: {name}",
                   "more of its digits, or its name", 1)
    try:
        return settle(load(name if name in ids else ids[0]))
    except (IndexError, FileNotFoundError):
        raise NoContainer(text) from None


def volumes_of(text):
    """What --volumes-from CONTAINER[:ro] asks for, as -v would."""
    name, _, words = text.partition(":")
    with ends_with(125):
        record = find(name)
    for facts in mount_facts(record, record.spec()["mounts"]):
        how = words or ("rw" if facts["RW"] else "ro")
        yield f"{facts.get('Name', facts['Source'])}:{facts['Destination']}:{how}"


def find_volumes(options):
    """(options in which each volume is a directory of the host, {name: place, …}, those
    of the names that are nobody's): of -v, --mount, --volumes-from, and the image."""
    # (as it was given, source, place, options)
    asked = [(text, *split_volume(text)) for text in options.volume]
    asked += [(text, *split_mount(text)) for text in options.mount]
    # What a person puts somewhere is there in place of what others have there.
    taken = {os.path.normpath(target) for _, _, target, _ in asked}
    taken |= {os.path.normpath(text.partition(":")[0]) for text in options.tmpfs}
    for text in (*(text for name in options.volumes_from for text in volumes_of(name)),
                 *options.own_volumes):
        source, target, words = split_volume(text)
        if os.path.normpath(target) not in taken:
            taken.add(os.path.normpath(target))
            asked.append((text, source, target, words))
    wish, named, nameless = type(options)(), {}, []
    vars(wish).update(vars(options), volume=[], mount=[], nocopy=set())
    for text, source, target, words in asked:
        if source is None or source.startswith("/"):  # chapter 4 knows what that is
            (wish.mount if text in options.mount else wish.volume).append(text)
            continue
        if not target.startswith("/"):
            raise Fail(f"invalid volume {text!r}: its place must be absolute",
                       "-v NAME:/DST or -v /DST")
        name = source or os.urandom(32).hex()
        nameless += [] if source else [name]
        named[name] = os.path.normpath(target)
        wish.nocopy.update([name] if "nocopy" in words.split(",") else ())
        path = f"{store('volumes', name, VOLUME_NAME)}:{target}{words and ':' + words}"
        wish.volume.append(path)
    return wish, named, nameless


# ── making and removing ──
#
# Whoever makes or removes has the lock of the directory from its first moment to its
# last.  record.json comes last, and without it there is no such container; a directory
# without one, and without a holder of its lock, is what `system prune` clears away.


def take_ids(id):
    """A range of user ids that no other container has: the first of them."""
    base, count, slots = CONTAINER_IDS

    def taken():
        return [name.partition(".")[0] for name in os.listdir(store("ids", ""))]
    before = set(taken())
    for slot in map(str, range(slots)):
        if slot not in before:
            try:
                os.symlink(id, store("ids", slot))
            except FileExistsError:
                continue
            if taken().count(slot) == 1:  # or it was shared just before it was left
                return base + int(slot) * count
            take_away_file(store("ids", slot))
    raise Fail(f"all {slots} ranges of user ids are taken",
               "remove containers that have ended: system prune")


def share_ids(id, other):
    """Have another container's range of user ids be this one's, too.

    A link SLOT.ID keeps it when its owner has gone.  Who removes a container removes
    its directory first: if that is there, our link came before its own has gone."""
    os.symlink(id, store("ids", f"{slot_of(other.first_id)}.{id}"))
    if not os.path.isdir(other.path()):
        raise NoContainer(other.name)


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


def etc_files(spec, options):
    """{name: text} of the files that Docker puts into every container's /etc."""
    name = spec.get("hostname") or os.uname().nodename
    known = "".join(f"{address}\t{host}\n" for host, address in host_lines(
        options.add_host, "127.0.0.1"))
    at_home = options.network == "host"
    local = ("nameserver 127.", "nameserver ::1")  # not to be reached from inside
    lines = [line for line in host_resolv_conf().splitlines()
             if at_home or not " ".join(line.split()).startswith(local)]
    for word, values in (("nameserver", options.dns), ("search", options.dns_search),
                         ("options", options.dns_option)):
        if values:
            lines = [line for line in lines if line.split()[:1] != [word]]
            lines += ([f"{word} {value}" for value in values] if word == "nameserver"
                      else [f"{word} {' '.join(values)}"] * (values != ["."]))
    if options.network not in ("", "none", "host") and not any(
            line.startswith("nameserver") for line in lines):
        # Docker's choice, too: names are asked for, and nobody is left to be asked.
        say("no name server of the host's can be reached from inside: 8.8.8.8 is asked")
        lines += ["nameserver 8.8.8.8", "nameserver 8.8.4.4"]
    return {
        "hostname": name + "\n",
        "hosts": read_file("/etc/hosts") + known if at_home else
                 "127.0.0.1\tlocalhost\n"
                 "::1\tlocalhost ip6-localhost ip6-loopback\n"
                 "fe00::\tip6-localnet\nff00::\tip6-mcastprefix\n"
                 "ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n" + known,
        "resolv.conf": "".join(line + "\n" for line in lines),
    }


def fit_to_user(spec, options):
    """Change what a spec says to what an ordinary user may have."""
    linux, mounts = spec["linux"], spec["mounts"]
    mounts += device_mounts(linux.pop("devices"))
    linux["devices"] = []
    for mount in mounts if has_one_id() else ():  # no gid=5, the group of terminals
        mount["options"] = [word for word in mount["options"] if word != "gid=5"]
    if not rootless.group:
        if options.pid == "host":
            raise Fail("--pid host takes a control group, by which its processes are "
                       "found, and none is yours", OF_HIS_OWN)
        mounts[:] = [mount for mount in mounts if mount["type"] != "cgroup"]


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
        "process": {**process_spec(options, args, options.like), **privileges},
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": group_path(id),
            "resources": resources_spec(options),
            "devices": devices_spec(options),
            "sysctl": sysctl_spec(options, namespaces),
            "maskedPaths": [] if bare else masked_paths(),
            "readonlyPaths": [] if bare else READONLY_PATHS,
            **seccomp_spec(options, privileges["capabilities"]["bounding"]),
        },
    }
    if rootless.uid:
        fit_to_user(spec, options)
    spec["process"]["user"]["umask"] = whole("--umask", options.umask, 0, 0o777, 8)
    if options.uts != "host":
        spec["hostname"] = options.hostname or id[:12]
        spec["domainname"] = options.domainname or ""
        for name in (spec["hostname"], spec["domainname"]):
            if len(os.fsencode(name)) > 64 or not name.isprintable() or " " in name:
                raise Fail(f"invalid host or domain name: {name!r}",
                           "at most 64 characters, none of them a space")
        spec["process"]["env"].insert(1, f"HOSTNAME={spec['hostname']}")
    spec["annotations"] = options.notes
    if options.memory and (options.memory_swap or "0") == "0":
        spec["annotations"] = {**options.notes, IMPLIED: "memory swap"}
    return spec


def make_directory(path, owner, mode):
    """Make a directory of the host for a container, owned by its root."""
    syscall("mkdirat", AT_FDCWD, path, mode, why="a place for what is this container's")
    if owner:
        syscall("fchownat", AT_FDCWD, path, owner, owner, 0, why="its root's")


def restart_policy(options):
    """The policy that --restart names, and how often it may try."""
    name, colon, tries = options.restart.partition(":")
    if name not in ("", "no", "always", "unless-stopped", "on-failure") or colon and (
            name != "on-failure"):
        raise Fail(f"invalid restart policy {options.restart!r}",
                   "no, always, unless-stopped, on-failure or on-failure:3")
    if options.rm and name not in ("", "no"):
        raise Fail("Conflicting options: --restart and --rm", "leave one of them out")
    return name or "no", whole("--restart", tries, 0) if tries else 0


def log_options(options):
    """{"most": bytes, "files": how many} of --log-opt; None for no log."""
    found = {"most": 0, "files": 1}
    for text in options.log_opt:
        key, _, value = text.partition("=")
        if key == "max-size":
            found["most"] = size(value)
        elif key == "max-file":
            found["files"] = whole("--log-opt max-file", value, 1, 1000)
        else:
            raise Fail(f"unknown log opt {key!r} for json-file log driver",
                       "max-size and max-file")
    return found if options.log_driver == "json-file" else None


def health_spec(options):
    """The check that options and image ask for: Docker's Healthcheck, or {}."""
    found = {"Interval": 30 * 10 ** 9, "Timeout": 30 * 10 ** 9, "StartPeriod": 0,
             "Retries": 3, **{k: v for k, v in options.health.items() if v}}
    if options.health_cmd:
        found["Test"] = ["CMD-SHELL", options.health_cmd]
    for name in ("interval", "timeout", "start_period"):
        if text := getattr(options, f"health_{name}"):
            option = f"--health-{name.replace('_', '-')}"
            span = nanoseconds(option, text)
            if 0 < span < 10 ** 6:
                raise Fail(f"{option} cannot be less than 1ms: {text}", "as in 30s")
            if span:  # 0 is as if it were not there
                found[name.title().replace("_", "")] = span
    if options.health_retries:
        found["Retries"] = whole("--health-retries", options.health_retries, 1)
    none = options.no_healthcheck or found.get("Test", ["NONE"])[0] == "NONE"
    return {} if none else found


def new_record(options, id):
    """What is known of a container before it is made."""
    signal_number(options.stop_signal)
    restart, tries = restart_policy(options)
    return Record(
        id=id, created=time.time_ns(), image=options.image,
        labels={**options.own_labels,
                **dict(text.partition("=")[::2] for text in options.label)},
        asked={name: value for name, value in vars(options).items()
               if value and isinstance(value, (str, bool, list))},
        throw_away=options.rm, wants_reaper=options.init,
        interactive=options.interactive, stop_signal=options.stop_signal,
        stop_timeout=whole("--stop-timeout", options.stop_timeout, -1),
        log=log_options(options), restart=restart, tries=tries,
        health=health_spec(options))


def make_files(record, options, spec, base):
    """What a container has of its own on disk, owned by its root."""
    directory, layers = record.path(), from_json(spec["annotations"][OF_LAYERS])
    copied = options.storage_driver == "vfs"
    for name in ("rootfs",) if copied else ("upper", "work"):
        make_directory(f"{directory}/{name}", base, 0o755)
    if copied:
        copy_layers(layers, f"{directory}/rootfs", base)
    else:
        syscall("fchmodat", AT_FDCWD, f"{directory}/upper",
                stat.S_IMODE(os.stat(layers[-1]).st_mode), why="as / of the image")
    of = options.network.partition(":")[2]  # whose network it shares, and its names
    for name, text in etc_files(spec, options).items():
        directory = store("containers", of) if of and name != "hostname" else (
            record.path())
        if directory == record.path():
            write_file(f"{directory}/{name}", text, f"to be /etc/{name}", 0o644)
            syscall("fchownat", AT_FDCWD, f"{directory}/{name}", base, base, 0)
        if not any(m["destination"] == f"/etc/{name}" for m in spec["mounts"]):
            spec["mounts"].append({
                "destination": f"/etc/{name}", "type": "bind",
                "source": f"{directory}/{name}",
                "options": ["bind", *(["ro"] if options.read_only else [])]})


def share_network(options):
    """Choose the network; with container:NAME, the record of that one.

    What belongs to its network is root's in there, so its root's ids are shared too."""
    choose_network(options)
    mode, colon, name = options.network.partition(":")
    if not colon:
        return None
    if mode != "container":
        raise Fail(f"invalid network mode: {options.network}", "container:NAME")
    with ends_with(125):
        other = find(name)
    if "host" in (other.asked["network"], wants_of(other.spec())["of"] and "host"):
        raise Fail(f"{name} has no network of its own", "join the one that it joins")
    if rootless.uid:
        raise Fail(f"--network {options.network}: only root can join another's network",
                   "--network pasta, slirp4netns, host or none")
    for option in ("hostname", "add_host", "dns", "dns_search", "dns_option"):
        if getattr(options, option):
            raise Fail(f"conflicting options: --{option.replace('_', '-')} and the "
                       "network of another container", "it has that one's")
    options.network = f"container:{other.id}"
    own = namespace_flags(other.spec()) & CLONE_NEWUSER
    options.userns = options.userns or (None if own else "host")
    return other


def join_container(c, id):
    """Have a container be born in the namespaces of another's network, and its ids."""
    try:
        other = settle(load(id))
    except FileNotFoundError:
        raise NoContainer(id[:12]) from None
    if other.status not in RUNNING:
        raise Fail(f"cannot join network of a non running container: {other.name}",
                   f"start {other.name}")
    for namespace in c.spec["linux"]["namespaces"]:
        if namespace["type"] in ("network", "user"):
            file = NAMESPACES[namespace["type"]][1]
            namespace["path"] = f"/proc/{other.pid}/ns/{file}"


def create(options, args):
    """A container that has everything but a life: its record, its spec, and the lock of
    its directory, which is the caller's now."""
    other = share_network(options)
    id, (wish, volumes, nameless) = os.urandom(32).hex(), find_volumes(options)
    if options.cidfile and os.path.lexists(options.cidfile):
        raise Fail("container ID file found, make sure the other container isn't "
                   f"running or delete {options.cidfile}", f"rm {options.cidfile}")
    spec, record = make_spec(wish, id, args), new_record(options, id)
    record.volumes = volumes
    seal_interpreter(spec)
    say_one_id()
    hold_signals()
    guard = lock(os.path.dirname(record.path()), fcntl.LOCK_SH)  # prune waits for us
    try:
        make_directory(record.path(), 0, 0o711)
        held = lock(record.path(), fcntl.LOCK_EX)
    finally:
        os.close(guard)
    try:
        if options.name:
            take_name(options.name, id)
        record.name = options.name or take_any_name(id)
        base = 0
        if namespace_flags(spec) & CLONE_NEWUSER:
            if not rootless.uid:  # an ordinary user's containers have the same
                base = record.first_id = other.first_id if other else take_ids(id)
                if other:
                    share_ids(id, other)
            maps = [{"containerID": 0, "hostID": base, "size": CONTAINER_IDS[1]}]
            spec["linux"].update({f"{kind}Mappings": rootless.maps.get(kind, maps)
                                  for kind in ("uid", "gid")})
        make_files(record, options, spec, base)
        wants = network_spec(options, id, record.name, spec.get("hostname", ""))
        spec["annotations"] = {**spec["annotations"], NETWORK: to_json(wants)}
        for name, target in volumes.items():
            make_volume(name, anonymous=name in nameless)
            if name not in wish.nocopy:
                fill_volume(record, spec, name, target)
        save(record.path("config.json"), spec)
        save(record.path("record.json"), vars(record), room=ROOM)
        announce(record, "create")
        if options.cidfile:
            with about("--cidfile"):
                write_file(options.cidfile, id, create=0o644)
    except BaseException:
        discard(record)
        os.close(held)
        raise
    return record, spec, held


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


def image_for(text, platform):
    """The Image that a name or an id means; one for another platform than was asked
    for, if any was, is as good as none."""
    image, wanted = find_image(text, 125), platform_of(platform)
    actual = list(map(image.config.get, ("os", "architecture", "variant")))
    if platform and normal_platform(*(  # what it does not say may be right
            said or asked for said, asked in zip(actual, [*wanted, ""], strict=False))
            ) not in platforms_for(wanted):
        raise NoImage(f"image with reference {text} was found but does not match the "
                      f"specified platform: wanted {'/'.join(wanted)}, actual: "
                      f"{'/'.join(filter(None, actual))}", "--platform names another",
                      125)
    return image


def image_to_run(options, text):
    """The Image that `run` was asked for, pulled as --pull says."""
    try:
        if options.pull == "always":
            raise NoImage("")
        return image_for(text, options.platform)
    except NoImage as missing:
        if options.pull == "never":
            raise
        ref = full_name(text)
        if missing.message and not options.quiet:
            print(f"Unable to find image '{short_name(ref)}' locally", file=sys.stderr)
    with ends_with(125), telling(options, 2) as out:
        pull_image(ref, platform_of(options.platform), out)
    return image_for(text, options.platform)


def choose(options):
    """The program and its arguments; options get what the image says of them."""
    args, settings = options.words or ["/bin/sh"] * bool(options.stop_after), {}
    options.image, options.like = " ".join(options.rootfs) or "default", None
    options.notes = {AS_IT_STANDS: options.workdir} if options.workdir else {}
    if options.rootfs:
        layers = [layer_of(path) for path in options.rootfs]
    elif args[0].startswith("/"):
        layers = [default_rootfs()]
    else:
        options.image = args[0]
        image = image_to_run(options, args[0])
        layers, settings = image_layers(image), image.settings
        options.like, options.notes = image_process(image), image_notes(image)
        args = image_command(image, options.entrypoint, args[1:])
        options.entry = ([options.entrypoint] if options.entrypoint else [
            ] if options.entrypoint == "" else settings.get("Entrypoint") or [])
    if options.like is None and options.entrypoint:  # no image, but what is said counts
        args = [options.entrypoint, *args]
    options.own_labels = settings.get("Labels") or {}
    options.exposed = list({**(settings.get("ExposedPorts") or {}),
                            **exposed(options.expose)})
    options.own_volumes = list(settings.get("Volumes") or {})
    options.health = settings.get("Healthcheck") or {}
    options.stop_signal = (options.stop_signal or settings.get("StopSignal")
                           or "SIGTERM")
    options.notes = {OF_LAYERS: to_json(layers), **options.notes,
                     **({EXPOSED: ",".join(options.exposed)} if options.expose else {})}
    return args


# What --without may leave out: a step that others do not build on, or a namespace.
WALLS = (no_more_imports, hide_memory, hide_words, join_cgroup, new_session,
         make_devices, set_names, loopback_up, mask_paths, pivot, seal_root,
         drop_bounding, become_user, set_capabilities, no_new_privileges,
         close_descriptors, label_program, reset_signals, install_seccomp)
NAMESPACE_WALLS = {"userns": "userns", "pidns": "pid", "netns": "network",
                   "utsns": "uts", "ipcns": "ipc", "cgroupns": "cgroupns"}
SHELL = take_stdio, die_with_parent, reset_signals, execute  # what one takes at least


def leave_out_walls(options):
    """The steps that --without names, by their whole name or its last word; the
    namespaces that it names are made the host's."""
    steps, names = set(), [name for text in options.without
                           for name in text.split(",") if name]
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


def be_born_outside(c):
    """Outside: without join_cgroup, of which in version 2 the birth is a part."""
    if c.cgroup.birth_fd >= 0:
        os.close(c.cgroup.birth_fd)
        c.cgroup.birth_fd = -1


def choose_steps(options):
    """(BEFORE, OUTSIDE, BIRTH) without what --without names, and no further than
    --stop-after; then the program is a shell, wherever init stands."""
    missing = leave_out_walls(options)
    before, outside, birth = ([step for step in steps if step not in missing]
                              for steps in (BEFORE, OUTSIDE, BIRTH))
    if join_cgroup in missing:
        before.insert(before.index(make_cgroup) + 1, be_born_outside)
    if options.stop_after:
        go = birth.index(wait_for_go) + 1
        taken = [*before, *birth[:go], *outside, *birth[go:]]
        names = [step.__name__ for step in taken]
        if options.stop_after not in names:
            raise Fail(f"--stop-after {options.stop_after}: no such step, or left out "
                       "by --without", "see `minicontainer steps`")
        stop = names.index(options.stop_after) + 1
        say(f"stopped after {options.stop_after}; next is "
            + (names[stop:] or ["nothing"])[0])
        del taken[stop:]
        before = [step for step in before if step in taken or step == open_stdio]
        outside = [step for step in outside if step in taken]
        birth = [step for step in birth if step in taken or step in SHELL]
    return before, outside, birth


# ── starting and ending ──
#
# The end of process 1 is heard by its shim, who does everything in this order: what it
# still wrote goes to the log, the record is written and is on disk, what it had is
# undone, and then those who wait are told.  So whoever has seen `run` return, or its
# output end, finds the truth in `inspect`.
#
# If the shim is killed instead, process 1 dies with it by the kernel's hand, and the
# lock is free: the next command that looks finds a record that says "running" and
# nobody behind it.


class Guest(Shim):
    """The shim of one more process in the container whose process 1 is `target`."""

    def __init__(self, record, spec, target, interactive):
        hold_signals()
        c = container_of(record, spec)
        c.is_new, c.target, c.cgroup = False, target, cgroup_of(spec)
        super().__init__(c)
        self.record, self.interactive, self.id = (
            record, interactive, os.urandom(32).hex())

    def begin(self):
        """Run it."""
        enter(self.c)
        if not self.interactive:
            self.close("stdin")
        for action in "exec_create", "exec_start":
            self.announce(f"{action}: {' '.join(self.c.spec['process']['args'])}")

    def announce(self, action, **more):
        """Note an event of this process."""
        announce(self.record, action, execID=self.id, **more)

    def ended(self):
        """What the clients are told."""
        code = self.c.wait()
        self.announce("exec_die", exitCode=str(code))
        return {"code": code}


# A health check is a second program in the container, now and then, and the shim is
# the one who is there to run it.  Docker's rules: it is "starting" until a first check
# has succeeded, or until so many in a row have failed; failures before StartPeriod is
# over do not count.


class HealthCheck:
    """A party of the shim's turns: runs a command inside now and then, and says in the
    record whether it succeeds.  The command has a shim of its own, as with `exec`."""

    def __init__(self, record, c):
        self.record, self.c, self.peer, self.output = record, c, None, b""
        self.timer = syscall("timerfd_create", 1, O_CLOEXEC, why="CLOCK_MONOTONIC")
        self.set_timer(record.health["Interval"])

    def set_timer(self, span):
        """Be ready after so many nanoseconds."""
        text = struct.pack("4q", 0, 0, *divmod(max(span, 1), 10 ** 9))
        syscall("timerfd_settime", self.timer, 0, text, None)

    def wanted(self):
        """What it waits for."""
        return {self.timer: select.POLLIN, **(self.peer.wanted() if self.peer else {})}

    def act(self, ready):
        """Begin a check, or take note of what it says; too late is ill."""
        if self.timer in ready:
            os.read(self.timer, 8)
            if self.peer:  # it was set to the timeout
                self.peer.send(b"s", bytes([signal.SIGKILL]))
                seconds = self.record.health["Timeout"] / 10 ** 9
                self.output = f"Health check exceeded timeout ({seconds:g}s)".encode()
                self.code = -1
            else:
                self.begin()
        elif self.peer and self.peer.fd in ready and (found := self.peer.receive()):
            letter, data = found
            if letter in (b"o", b"e") and self.code is None:
                self.output = (self.output + data)[:4096]
            elif letter == b"x":
                self.finish(from_json(data)["code"])
            elif letter in (b"f", b""):
                self.output = from_json(data)[0].encode() if data else b""
                self.finish(-1)

    def begin(self):
        """Run the command, unless nothing can run."""
        how, *words = self.record.health["Test"]
        spec = self.record.spec()
        spec["process"].update(terminal=False, args=words if how == "CMD" else
                               ["/bin/sh", "-c", *words])
        self.began, self.output, self.code = time.time_ns(), b"", None
        if load(self.record.id).status == "paused":
            self.set_timer(self.record.health["Interval"])
            return
        self.peer = leave_to(Guest(self.record, spec, self.c.pidfd, False))
        self.set_timer(self.record.health["Timeout"])

    def finish(self, code):
        """Write down how it went, and wait for the next time."""
        os.close(self.peer.fd)
        self.peer, health = None, self.record.health
        code = code if self.code is None else self.code
        with changing(self.record.id) as now:
            found, ill = now.checked, code != 0
            early = time.time_ns() - now.started < health["StartPeriod"]
            if not (ill and early and found["Status"] == "starting"):
                found["FailingStreak"] = (found["FailingStreak"] + 1) * ill
                before = found["Status"]
                if not ill or found["FailingStreak"] >= health["Retries"]:
                    found["Status"] = "unhealthy" if ill else "healthy"
                if found["Status"] != before:
                    announce(now, f"health_status: {found['Status']}")
            found["Log"] = [*found["Log"][-4:], {
                "Start": timestamp(self.began), "End": timestamp(time.time_ns()),
                "ExitCode": code, "Output": self.output.decode("utf-8", "replace")}]
        self.set_timer(health["Interval"])


def open_door(record):
    """A socket in a container's directory for its shim to listen at."""
    take_away_file(record.path("attach"))  # of its last shim
    directory = open_fd(record.path(), O_PATH | O_DIRECTORY)
    door = door_of("bind", directory)
    syscall("listen", door, 64, why="for `attach`")
    os.close(directory)
    return door


class Life(Shim):
    """Who starts a container and stays with it, and says in its record how it fares.

    The lock of its directory, `held`, is the shim's.  If the container does not start,
    it is kept, with the reason, or removed."""

    def __init__(self, record, spec, held, steps=(), keep=True, typing=False, delay=0):
        hold_signals()
        c = container_of(record, spec)
        c.lock, c.throw_away, c.wants_reaper = (
            held, record.throw_away, record.wants_reaper)
        super().__init__(c, record.interactive and not typing)
        self.record, self.keep, self.held = record, keep, held
        self.steps = steps or (BEFORE, OUTSIDE, BIRTH)
        self.delay = delay  # before it was started anew
        self.outlives = True

    def begin(self):
        """Make the container run, and say so in its record."""
        c, (before, outside, birth) = self.c, self.steps
        syscall("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0,
                why="what is left of it without a parent is ours to reap")
        if rootless.uid and c.spec["linux"]["cgroupsPath"] != group_path(c.id):
            c.spec["linux"]["cgroupsPath"] = group_path(c.id)  # this session's
            save(self.record.path("config.json"), c.spec)
        try:
            if of := wants_of(c.spec)["of"]:
                join_container(c, of)
            start(c, before, (*outside, set_guard, connect), birth)
            try:
                self.attend_to(self.record)
            except BaseException:
                end(c)
                raise
        except BaseException:
            end_guard(c)
            leave_networks(c.id)
            raise

    def attend_to(self, record):
        """All that it has beside its process 1, now that this runs."""
        if record.log is not None:
            self.log = Log(record.path("log"), **record.log)
        if self.door < 0:
            self.door = open_door(record)
        if record.health:
            self.parties.append(HealthCheck(record, self.c))
        if any(endpoint["ports"] for endpoint in endpoints_of(record.id)):
            self.parties.append(Relay(endpoints_of(record.id), lambda address: any(
                address in now["addresses"] for now in endpoints_of(record.id))))
        if not record.interactive:
            self.close("stdin")
        with changing(record.id) as now:
            now.status, now.pid, now.started = "running", self.c.pid, time.time_ns()
            now.born = born(now.pid)
            # How the last life ended is no news of this one.
            now.exit_code, now.oom_killed, now.error = 0, False, ""
            now.checked = {"Status": "starting", "FailingStreak": 0, "Log": []} if (
                now.health) else {}
            if now.stopped:  # since we began: whoever did found nobody to tell
                signal_by(self.c.pidfd, signal.SIGKILL, "a person has stopped it")
        note_mounts("mount", record, self.c.spec)
        announce(record, "start")

    def close_relay(self):
        """Nobody is behind the published ports any more."""
        for party in self.parties:
            if isinstance(party, Relay):
                party.close()

    def failed(self, error):
        """It does not start: what there was before is kept, and why."""
        if not self.keep:
            discard(self.record)
            return
        fail = diagnose(error)
        with changing(self.record.id) as now:
            now.exit_code, now.error = fail.code, fail.message
            now.status = "exited" if now.finished else "created"

    def ended(self):
        """When process 1 has ended: the record first, then all is undone; what the
        clients are told."""
        c, record, code, used = self.c, self.record, self.c.wait(), {}
        for do in (lambda: used.update(c.cgroup.measure()),  # while there is something
                   lambda: self.write_end(code, used),
                   self.close_relay, lambda: end(c), lambda: end_guard(c),
                   lambda: leave_unseen(c.id, c.pid),
                   lambda: record.throw_away and discard(record)):
            try:
                do()
            except (OSError, Fail) as failed:  # the others are done all the same
                self.trouble = diagnose(failed).message
        return {"code": code, "used": used, "error": self.trouble}

    def write_end(self, code, used):
        """Keep the rest of the log, and say in the record how it ended; then it is
        true."""
        now = self.record
        if self.log:
            self.log.close()
            self.trouble = self.trouble or self.log.failed
        if not now.throw_away:
            with changing(now.id, lasting=True) as now:
                now.pid, now.finished, now.exit_code = 0, time.time_ns(), code
                now.error = self.trouble
                now.oom_killed = code == 137 and bool(used.get("oom_kills"))
                now.status = "restarting" if now.wants_again() else "exited"
        if used.get("oom_kills"):
            announce(now, "oom")
        announce(now, "die", exitCode=str(code))
        note_mounts("unmount", now, self.c.spec)

    def rest(self):
        """Wait as its policy says; whether it is to start again.

        The pause is 0.1 s, then twice as long each time, 1 minute at most; what has run
        for 10 s begins with 0.1 s again."""
        try:
            watch = watch_directory(self.record.path())  # first, or a `stop` is missed
            now = load(self.record.id)
        except FileNotFoundError:  # --rm
            return False
        if now.status != "restarting":
            return False
        lived_long = now.finished - now.started > 10 ** 10
        self.delay = min(2 * self.delay, 60) if self.delay and not lived_long else 0.1
        end_ = time.monotonic() + self.delay
        while not now.stopped and (left := end_ - time.monotonic()) > 0:
            if select.select([watch], [], [], left)[0]:
                os.read(watch, MOST)
                now = load(now.id)
        os.close(watch)
        with changing(now.id) as now:
            now.restarts += not now.stopped
            now.status = "exited" if now.stopped else now.status
        return not now.stopped

    def again(self):
        """The shim of its next life, if there is one."""
        if not self.rest():
            os.close(self.held)  # a person may start it again now, or remove it
            return None
        record = load(self.record.id)
        after = Life(record, record.spec(), self.held, delay=self.delay)
        after.door = self.door
        return after


def report_end(news, options):
    """What a person should know about how it ended; the exit code."""
    code, used = news["code"], news.get("used")
    if news.get("error"):
        say(f"{news['error']}\n  hint: `system prune` clears what may be left")
    if used and used["oom_kills"]:
        limit = used["memory_limit"]
        what = "the container" if code == 137 else "a process of the container"
        where = f"its memory limit of {human(limit)}" if limit else "the host's memory"
        say(f"the kernel's OOM killer ended {what}: {where} was not enough")
    if used and getattr(options, "stats_at_exit", False):
        for line in show_stats(used):
            print(line, file=sys.stderr)
    return code


def conclude(client, news, options, name):
    """Tell how it ended, if it did; the exit code."""
    if news is None:
        raise Fail(f"the shim of {name} was killed, and it ended with it",
                   "`ps -a` tells what is left of it", 137)
    code = report_end(news, options) if news else 0
    if client.lost:
        raise Fail(f"what {name} wrote could not be written: {client.lost.strerror}",
                   "is there room where our output goes?", code or 125)
    return code


def accompany(client, shim, options, name):
    """Show what a process writes until it ends or the person leaves; the exit code.

    A container outlives its client, also one that is killed: its shim is a fork.  For
    an `exec` without a terminal one process will do, which saves 3 ms (6 %)."""
    if client.tty or shim.outlives or not client.outputs:
        news = client.stay(leave_to(shim))
    else:
        news = client.attend(shim)
    return conclude(client, news, options, name)


OF_CREATE = (*CREATE_OPTIONS, *PROCESS_OPTIONS, *NAMESPACE_OPTIONS, *ENDPOINT_OPTIONS,
             *CGROUP_OPTIONS,
             *MOUNT_OPTIONS, *PRIVILEGE_OPTIONS, arg(
                 "words", nargs="A...", unless="stop_after", metavar="IMAGE|COMMAND",
                 help="an image and its command; or a command, with its path, of the "
                 "default root file system"))


def run_it(options, made, steps, client):
    """Start what create() has made, and stay with it if there is a client; the exit
    code."""
    record, spec, held_ = made
    shim = Life(record, spec, held_, steps, keep=False, typing=client and client.typing)
    if client:
        code = accompany(client, shim, options, record.name)
    else:
        code = see_start(leave_to(shim))
    if not (client and client.outputs):
        print(record.id)
    return code or 0


def attached(options):
    """The streams that `run` attaches to: those that --attach names, or all."""
    names = {text.lower() for text in options.attach}
    if names - {"stdin", "stdout", "stderr"}:
        raise Fail(f"invalid argument {options.attach[-1]!r} for -a, --attach: valid "
                   "streams are STDIN, STDOUT and STDERR", options.hint)
    for name, given in ("-a", names), ("--stats-at-exit", options.stats_at_exit):
        if given and options.detach:
            raise Fail(f"Conflicting options: {name} and -d", "leave one of them out")
    return names or {"stdin", "stdout", "stderr"}


@command("run", *RUN_OPTIONS, *OF_CREATE)
def run_command(options):
    """Run a command in a new container."""
    keys, streams = detach_keys(options.detach_keys), attached(options)
    if not options.detach:
        check_terminal(options)
    with adding():  # nothing is swept away that this container is about to use
        args = choose(options)
        if not (options.tty or options.interactive or options.detach
                or narration.style == "sh") and at_a_terminal():
            options.tty = options.interactive = True  # whoever sits at one wants -it
        steps = choose_steps(options)
        if options.tty and open_console not in steps[-1]:
            options.tty = False
            args += ["-i", "+m"] * (not options.words)  # --stop-after: a prompt even so
        client = None if options.detach else Client(
            options.tty, options.interactive and "stdin" in streams, keys, True,
            b"".join(Shim.OUTPUTS[name] for name in streams - {"stdin"}))
        made = create(options, args)
    try:
        return run_it(options, made, steps, client)
    except CannotMapIds as error:
        if narration.style == "sh":  # half of another script has been told
            raise Fail(error.message, "--userns host does without") from None
        say(f"{error.message}: using the host's user namespace (root inside is "
            "root outside)")
        options.userns = "host"
        take_away_file(options.cidfile or "")
        made = create(options, args)  # starts anew, sealed, and comes by again
        return run_it(options, made, steps, client)


@command("create", *OF_CREATE)
def create_command(options):
    """Make a container, without starting it; prints its id."""
    options.stop_after, options.without = None, []
    with ends_with(1), adding():
        record, _, held = create(options, choose(options))
    os.close(held)
    print(record.id)


# ── containers by name ──
#
# Each of these finds the record, and then works on what lives: a signal goes to a pidfd
# of a process that began when process 1 did, for a number alone may be somebody else's
# by now; "has ended" is the lock that can be had; and what a person has
# stopped is marked so before it is stopped, or its policy would start it again.

CONTAINERS = arg("containers", nargs="+", metavar="CONTAINER…",
                 help="names, ids, or what ids begin with")
CONTAINER = arg("container", metavar="CONTAINER",
                help="its name, its id, or the beginning of it")


def do_to(name, act):
    """Do act(record) to the container of that name, and print the name."""
    record = find(name)
    try:
        act(record)
    except OSError as error:
        if not os.path.exists(record.path()):
            raise NoContainer(name) from None
        raise diagnose(error) from None
    print(name, flush=True)


def for_containers(names, act, all_failed=""):
    """Do act(record) to each container and print its name, also if some fail."""
    for_each(names, lambda name: do_to(name, act), all_failed)


def on_each(words, *options):
    """Declare a command that does something to each CONTAINER, also if it fails with
    some, and prints what it has done it to."""
    def declare(act):
        def do(options):
            for_containers(options.containers, lambda record: act(record, options))
        do.__doc__ = act.__doc__
        command(words, *options, CONTAINERS)(do)
        return act
    return declare


def claim(record):
    """The lock of its directory; None if it runs.

    Between the two, when it is just starting or just ending, is a moment to wait."""
    got = []

    def settled():
        got.append(lock(record.path(), fcntl.LOCK_EX | fcntl.LOCK_NB))
        return got[-1] is not None or load(record.id).status in LIVE
    wait_for(settled)  # that it has started, or that its end is over
    if got[-1] is not None:
        record = load(record.id)
        if not end_the_rest(record):  # what a shim that was killed has left
            os.close(got[-1])
            raise Fail(f"{record.name} runs, has lost its shim, and cannot be killed "
                       "from here", f"as root: kill -9 {record.pid}", 1)
    return got[-1]


def await_end(record):
    """Return when nobody looks after a container: it has ended, or is gone."""
    try:
        os.close(lock(record.path(), fcntl.LOCK_SH))
    except FileNotFoundError:
        pass


def visit(record):
    """Our end of a new connection with the shim of a container that lives."""
    directory = open_fd(record.path(), O_PATH | O_DIRECTORY)
    try:
        return Peer(door_of("connect", directory))
    finally:
        os.close(directory)


def hear_end(record):
    """What the shim says when its container ends; None if it was killed."""
    try:
        peer = visit(record)
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    peer.send(b"q")
    letter = b"r"
    while letter not in (b"x", b""):
        turn([peer])
        letter, data = peer.receive() or (b"r", b"")
    os.close(peer.fd)
    return from_json(data) if data else None


def send_signal(record, number):
    """Send a signal to process 1; a pidfd of it, or None if there is none."""
    try:
        fd = pidfd_of(record)
        syscall("pidfd_send_signal", fd, number, None, 0, why="for process 1")
    except ProcessLookupError:
        return None
    announce(record, "kill", signal=str(number))
    return fd


def not_running(record):
    """What to raise of a container that does not run."""
    if record.status == "restarting":
        return Fail(f"Container {record.id} is restarting, wait until the container is "
                    "running", "`ps` tells", 1)
    return Fail(f"Container {record.id} is not running", "`start` starts it", 1)


def set_frozen(record, frozen):
    """Pause a container, or let it go on."""
    with changing(record.id) as now:
        if frozen and now.status not in RUNNING:
            raise not_running(now)
        if (now.status == "paused") == frozen:
            raise Fail(f"Container {now.id} is {'already' if frozen else 'not'} paused",
                       "", 1)
        group_of(now.id).freeze(frozen)
        now.status = "paused" if frozen else "running"
    announce(record, "pause" if frozen else "unpause")


def thaw(record):
    """Let a paused container go on, so that it can end; perhaps it has."""
    if record.status == "paused":
        try:
            set_frozen(record, False)
        except Fail:  # version 2 kills what is frozen, too
            pass


def end_it(record, number, seconds):
    """Ask a container to end, kill it after `seconds`, and return when it has ended for
    good."""
    if (held_ := claim(record)) is not None:
        os.close(held_)
        return
    with changing(record.id) as record:
        record.stopped = True  # whoever waits to start it again reads that
    if fd := send_signal(record, number):
        thaw(record)
        if not select.select([fd], [], [], seconds)[0]:
            send_signal(record, signal.SIGKILL)
        os.close(fd)
    await_end(record)


def fresh(record):
    """The record of a container that a person starts."""
    with changing(record.id) as record:
        record.stopped, record.restarts = False, 0
    return record


def start_it(record):
    """Start a container, unless it runs, and leave it to its shim."""
    if (held := claim(record)) is not None:
        see_start(leave_to(Life(fresh(record), record.spec(), held)))


def sealed(names):
    """Be an interpreter that nobody can write to, if one of the containers needs that:
    we may start anew for it, so this comes before anything is done."""
    for name in names:
        try:
            seal_interpreter(find(name).spec())
        except (Fail, FileNotFoundError):  # who starts it will say so
            pass


def remove_it(record, force=False, volumes=True):
    """Remove a container; one that runs only by force."""
    if record.status in LIVE:
        if not force:
            first = "Unpause and then stop" if record.status == "paused" else "Stop"
            raise Fail(f"You cannot remove a {record.status} container {record.id}. "
                       f"{first} the container before attempting removal or force "
                       "remove", "rm -f", 1)
        end_it(record, signal.SIGKILL, 10)
    try:
        held = claim(record)
    except FileNotFoundError:  # it was --rm
        return
    if held is None:
        raise Fail(f"container {record.id} was started meanwhile", "rm -f", 1)
    discard(record, volumes)
    os.close(held)


STOP_OPTIONS = (
    arg("-t", "--time", metavar="SECONDS", help="to wait before killing; -1: ever"),
    arg("-s", "--signal", metavar="SIGNAL", help="what to send first"))


def take_time(options):
    """Read --time, before anything is done."""
    if options.time is not None:
        options.time = whole("--time", options.time, -1)


def stop_it(record, options):
    """Ask a container to end, and kill it if it does not."""
    seconds = record.stop_timeout if options.time is None else options.time
    lived = record.status in LIVE
    end_it(record, signal_number(options.signal or record.stop_signal),
           seconds if seconds >= 0 else 1 << 20)
    if lived:
        announce(record, "stop")


@command("stop", *STOP_OPTIONS, CONTAINERS)
def stop_command(options):
    """Ask containers to end, and kill those that do not."""
    take_time(options)
    for_containers(options.containers, lambda record: stop_it(record, options))


@command("restart", *STOP_OPTIONS, CONTAINERS)
def restart_command(options):
    """Stop containers and start them again."""
    take_time(options)
    sealed(options.containers)

    def restart(record):
        stop_it(record, options)
        start_it(record)
        announce(record, "restart")
    for_containers(options.containers, restart)


def kill_it(record, number):
    """Send a signal to process 1 of a container."""
    if number in (signal.SIGKILL, signal_number(record.stop_signal)):
        with changing(record.id) as record:
            record.stopped = True
    if record.status == "restarting":  # nobody is there; nor will be, if it is to stop
        return
    fd = send_signal(record, number)
    if fd is None:
        raise not_running(record)
    if number == signal.SIGKILL:
        thaw(record)
        await_end(record)
    os.close(fd)


@command("kill", arg("-s", "--signal", metavar="SIGNAL", default="KILL",
                     help="another signal than KILL"), CONTAINERS)
def kill_command(options):
    """Send a signal to process 1 of containers."""
    number = signal_number(options.signal, "Invalid signal: ")
    if not number:
        raise Fail("Invalid signal: 0", "`inspect` tells whether it runs", 1)

    def kill(name):
        try:
            do_to(name, lambda record: kill_it(record, number))
        except Fail as fail:
            fail.message = f"Cannot kill container: {name}: {fail.message}"
            raise
    for_each(options.containers, kill)


@on_each("pause")
def pause_it(record, options):
    """Stop all processes of containers where they stand."""
    set_frozen(record, True)


@on_each("unpause")
def unpause_it(record, options):
    """Let paused containers go on."""
    set_frozen(record, False)


@command("wait", CONTAINERS)
def wait_command(options):
    """Wait until containers have ended; prints their exit codes."""
    def wait(name):
        record = find(name)
        if record.status in LIVE and not (news := hear_end(record)):
            await_end(record)  # that the kernel has taken its shim down
            news = {"code": settle(load(record.id)).exit_code}
        print(news["code"] if record.status in LIVE else record.exit_code, flush=True)
    for_each(options.containers, wait)


# ── what there is to see ──
#
# Lists and facts, under the titles, keys and templates that scripts know from Docker.


def command_line(record, spec):
    """The program and its arguments, as `ps` shows them."""
    return " ".join(f"'{word}'" if " " in word else word for word in
                    spec["process"]["args"])


def sizes(record, spec):
    """The bytes that a container has written, and all that it sees."""
    copied = os.path.isdir(record.path("rootfs"))
    own = bytes_in(record.path("rootfs" if copied else "upper"))
    return own, own + sum(map(bytes_in, record.layers(spec)))


def network_names(record, spec):
    """The networks that a container is on, or what it has instead."""
    return [wish["network"] for wish in wants_of(spec)["networks"]] or [
        record.asked.get("network", "none")]


def ports_of(record):
    """[protocol, address, port of the host, port inside] of what leads to it."""
    if rootless.uid:
        return wants_of(record.spec())["ports"] if record.status in LIVE else []
    return [port for endpoint in (endpoints_of(record.id) if record.status in LIVE else
                                  ()) for port in endpoint["ports"]]


def ports_inside(record, spec):
    """The ports at which it listens, or so its image or --expose says, as "80/tcp",
    while it is on a network of ours."""
    wants = wants_of(spec)
    if record.status not in LIVE or not (wants["networks"] or wants["program"]):
        return []
    return [text for text in spec["annotations"].get(EXPOSED, "").split(",")
            if text.partition("/")[0].isdecimal()]  # an image may say anything


def port_bindings(ports, listens=()):
    """The same as Docker's JSON has it."""
    found = dict.fromkeys(listens)
    for kind, address, port, inner in ports:
        some = f"{port[0]}-{port[-1]}" if isinstance(port, list) else str(port)
        found[f"{inner}/{kind}"] = [*(found.get(f"{inner}/{kind}") or ()),
                                    {"HostIp": address, "HostPort": some}]
    return found


UNCONNECTED = {"NetworkID": "", "MacAddress": "", "Aliases": None, "Gateway": "",
               "IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "",
               "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0}


def network_settings(record, spec):
    """The part of `inspect` that is about the network."""
    settings = dict.fromkeys(network_names(record, spec), UNCONNECTED)
    for endpoint in endpoints_of(record.id) if record.status in LIVE else ():
        network = from_json(read_file(store("networks", f"{endpoint['network']}.json")))
        found = {**UNCONNECTED, "NetworkID": network["id"],
                 "MacAddress": endpoint["mac"], "Aliases": endpoint["names"][1:]}
        for six, pool, address in zip(("", "v6"), network["pools"],
                                      endpoint["addresses"], strict=False):
            bits = int(pool["subnet"].partition("/")[2])
            found.update({"IPv6Gateway": pool["gateway"], "GlobalIPv6Address": address,
                          "GlobalIPv6PrefixLen": bits} if six else
                         {"Gateway": pool["gateway"], "IPAddress": address,
                          "IPPrefixLen": bits})
        settings[endpoint["network"]] = found
    first = next(iter(settings.values()))
    return {"Ports": port_bindings(ports_of(record), ports_inside(record, spec)),
            **{key: first[key] for key in (
                "IPAddress", "Gateway", "GlobalIPv6Address")},
            "Networks": settings}


IMAGES_NOW = {}  # what now means an image, a full name or an id: its id


def image_shown(record, id, whole_):
    """What `ps` calls the image of a container: as the person did, or by its id if that
    means another one by now, or none."""
    text, digits = record.image, record.image.removeprefix("sha256:")
    if not id:
        return text
    if not IMAGES_NOW:
        for image in sound_images():
            IMAGES_NOW.update({name_of(image.entry): image.id, image.id: image.id})
    is_id = id[7:].startswith(digits)
    if IMAGES_NOW.get(id if is_id else spelled_out(text)) != id:
        text, digits, is_id = id, id[7:], True
    if whole_:
        return text
    return digits[:12] if is_id else short_name(text.partition("@")[0])


def container_row(record, whole_=False, with_size=False):
    """What `ps` shows of a container."""
    spec = record.spec()

    def short(text, length):
        return text if whole_ or len(text) <= length else f"{text[:length - 1]}…"
    row = {
        "ID": record.id if whole_ else record.id[:12],
        "Image": image_shown(record, spec["annotations"].get(OF_IMAGE, ""), whole_),
        "Command": f'"{short(command_line(record, spec), 20)}"',
        "CreatedAt": time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC",
                                   time.gmtime(record.created // 10 ** 9)),
        "RunningFor": ago(record.created / 10 ** 9),
        "Ports": ports_text(ports_of(record), ports_inside(record, spec)),
        "State": record.status, "Status": record.state(), "Names": record.name,
        "Labels": label_text(record.labels),
        "Mounts": ",".join(short(facts.get("Name", facts["Source"]), 15)
                           for facts in mount_facts(record, spec["mounts"])),
        "LocalVolumes": str(len(record.volumes)),
        "Networks": ",".join(network_names(record, spec))}
    if with_size:
        own, all_of_it = sizes(record, spec)
        row["Size"] = f"{decimal(own)} (virtual {decimal(all_of_it)})"
    return row


def of_image(record, text):
    """Whether a container was made of an image, by the name or id that it has now."""
    if record.image == text:
        return True
    try:
        return record.spec()["annotations"].get(OF_IMAGE) == find_image(text).id
    except Fail:
        return False


def is_named(record, pattern):
    """Whether a regular expression finds something in its name."""
    import re

    try:
        return any(re.search(pattern, name)
                   for name in (record.name, f"/{record.name}"))
    except re.error as error:
        raise Fail(f"Invalid filter 'name={pattern}': {error}", "a regular expression",
                   1) from None


def has_port(text, ports):
    """Whether one of some ports, each "80/tcp", is among those that 80, 80/tcp or
    80-90/udp means."""
    span, _, kind = text.partition("/")
    with ends_with(1):
        numbers = port_range(span, "--filter")
    return any(int(port) in numbers and its == (kind or "tcp")
               for port, _, its in (port.partition("/") for port in ports))


def has_status(record, text):
    """Whether a container is in a state; a Fail if there is no such."""
    if text not in (*LIVE, "created", "exited", "removing", "dead"):
        raise Fail(f"Invalid filter 'status={text}'", "created, running, exited …", 1)
    return record.status == text


FILTERS = {  # of `ps`: whether a record passes for one of the values
    "id": lambda record, text: record.id.startswith(text), "name": is_named,
    "label": lambda record, text: has_label(record.labels, text),
    "status": has_status, "ancestor": of_image,
    "exited": lambda record, text: record.status == "exited" and (
        record.exit_code == whole("--filter exited", text, 0, 255)),
    "before": lambda record, text: record.created < find(text).created,
    "since": lambda record, text: record.created > find(text).created,
    "health": lambda record, text: record.checked.get("Status", "none") == text,
    "network": lambda record, text: text in network_names(record, record.spec()),
    "publish": lambda record, text: has_port(text, [
        f"{port}/{kind}" for kind, _, port, _ in ports_of(record)]),
    "expose": lambda record, text: has_port(text, [
        *ports_inside(record, record.spec()), *(
            f"{inner}/{kind}" for kind, _, _, inner in ports_of(record))]),
    "volume": lambda record, text: text in record.volumes or any(
        text in (facts["Source"], facts["Destination"])
        for facts in mount_facts(record, record.spec()["mounts"])),
}


PS_OPTIONS = (
    arg("-a", "--all", action="store_true", help="also those that do not run"),
    arg("-n", "--last", metavar="N", help="the N newest, whatever they do"),
    arg("-l", "--latest", action="store_true", help="the newest, whatever it does"),
    arg("-s", "--size", action="store_true", help="show what they have written"),
    QUIET, NO_TRUNC, FILTER, FORMAT)


@command("container ls", *PS_OPTIONS)
@command("ps", *PS_OPTIONS)
def ps_command(options):
    """List containers."""
    import itertools

    last = 1 if options.latest else whole("--last", options.last or "-1", -1)
    wanted = filters_of(options.filter, FILTERS)
    with_size = options.size or options.format and (
        "Size" in Template(options.format, 1).fields)
    any_state = options.all or last >= 0 or wanted.keys() & {"status", "exited"}
    found = (record for record in records() if any_state or record.status in LIVE)
    rows = of_those_there(found, lambda record: passes(record, FILTERS, wanted)
                          and container_row(record, options.no_trunc, with_size))
    columns = {"CONTAINER ID": "ID", "IMAGE": "Image", "COMMAND": "Command",
               "CREATED": "RunningFor", "STATUS": "Status", "PORTS": "Ports",
               "NAMES": "Names", **({"SIZE": "Size"} if options.size else {})}
    print_list(columns, list(itertools.islice(
        filter(None, rows), last if last > 0 else None)), options.format,
        "ID" if options.quiet else "",
        "CreatedAt Labels LocalVolumes Mounts Networks Size State")


HOST_CONFIG = {  # key of `inspect`: the option that it shows, and what stands for none
    "Binds": ("volume", None), "VolumesFrom": ("volumes_from", None),
    "ContainerIDFile": ("cidfile", ""), "NetworkMode": ("network", "none"),
    "CapAdd": ("cap_add", None), "CapDrop": ("cap_drop", None),
    "GroupAdd": ("group_add", None), "SecurityOpt": ("security_opt", None),
    "CgroupnsMode": ("cgroupns", "private"), "IpcMode": ("ipc", "private"),
    "PidMode": ("pid", ""), "UTSMode": ("uts", ""), "UsernsMode": ("userns", ""),
    "Privileged": ("privileged", False)}
HOST_LIMITS = {  # the same of the limits in the spec
    "Memory": ("memory", "limit", 0), "MemorySwap": ("memory", "swap", 0),
    "MemoryReservation": ("memory", "reservation", 0),
    "CpuShares": ("cpu", "shares", 0), "CpusetCpus": ("cpu", "cpus", ""),
    "CpusetMems": ("cpu", "mems", ""), "PidsLimit": ("pids", "limit", None),
    "BlkioWeight": ("blockIO", "weight", 0)}


def host_config(record, spec):
    """The part of `inspect` that is about what the host gives."""
    asked, linux = record.asked, spec["linux"]
    limits = linux["resources"]
    return {
        **{key: asked.get(name, none) for key, (name, none) in HOST_CONFIG.items()},
        **{key: limits.get(section, {}).get(name, none)
           for key, (section, name, none) in HOST_LIMITS.items()},
        "NanoCpus": limits.get("cpu", {}).get("quota", 0) * 10 ** 4,
        "LogConfig": {"Type": asked["log_driver"], "Config": dict(
            text.partition("=")[::2] for text in asked.get("log_opt", ()))},
        "PortBindings": port_bindings([port for wish in wants_of(spec)["networks"]
                                       for port in wish["ports"]]),
        "AutoRemove": record.throw_away,
        "RestartPolicy": {"Name": record.restart, "MaximumRetryCount": record.tries},
        "OomScoreAdj": spec["process"].get("oomScoreAdj", 0),
        "ReadonlyRootfs": spec["root"]["readonly"], "Init": record.wants_reaper,
        "Sysctls": linux.get("sysctl") or {}, "Runtime": "minicontainer",
        "MaskedPaths": linux["maskedPaths"], "ReadonlyPaths": linux["readonlyPaths"]}


def date(moment_):
    """A moment of a record as `inspect` shows it."""
    return timestamp(moment_) if moment_ else "0001-01-01T00:00:00Z"


def container_facts(record, with_sizes=False):
    """What `inspect` tells of a container, under Docker's keys.

    What Docker has besides, and a container here has not, is left out, not made up."""
    spec, asked = record.spec(), record.asked
    process, entry = spec["process"], asked.get("entry") or []
    host = host_config(record, spec)
    listens = spec["annotations"].get(EXPOSED, "").split(",")
    ports = {port: {} for port in [*listens, *host["PortBindings"]] if port}
    found = {
        "Id": record.id, "Created": timestamp(record.created),
        "Path": process["args"][0], "Args": process["args"][1:],
        "State": {
            "Status": record.status, "Running": record.status in LIVE,
            "Paused": record.status == "paused",
            "Restarting": record.status == "restarting",
            "OOMKilled": record.oom_killed, "Dead": False, "Pid": record.pid,
            "ExitCode": record.exit_code, "Error": record.error,
            "StartedAt": date(record.started), "FinishedAt": date(record.finished),
            **({"Health": record.checked} if record.checked else {})},
        "Image": spec["annotations"].get(OF_IMAGE, ""),
        "ResolvConfPath": record.path("resolv.conf"),
        "HostnamePath": record.path("hostname"), "HostsPath": record.path("hosts"),
        "LogPath": record.path("log"), "Name": f"/{record.name}",
        "RestartCount": record.restarts, "Platform": "linux",
        "Driver": asked["storage_driver"], "HostConfig": host,
        "GraphDriver": {"Name": asked["storage_driver"], "Data": {
            "LowerDir": ":".join(reversed(record.layers(spec))),
            "UpperDir": record.path("upper"), "WorkDir": record.path("work")}},
        "Mounts": list(mount_facts(record, spec["mounts"])),
        "Config": {
            "Hostname": spec.get("hostname", ""),
            "Domainname": spec.get("domainname", ""),
            "User": process["user"].get("username", ""),
            "Tty": process["terminal"], "OpenStdin": record.interactive,
            "Env": process["env"], "Entrypoint": entry or None,
            "Cmd": process["args"][len(entry):], "Image": record.image,
            "WorkingDir": process["cwd"], "Labels": record.labels,
            **({"ExposedPorts": ports} if ports else {}),
            **({"Healthcheck": record.health} if record.health else {}),
            "StopSignal": record.stop_signal, "StopTimeout": record.stop_timeout},
        "NetworkSettings": network_settings(record, spec)}
    if with_sizes:
        found["SizeRw"], found["SizeRootFs"] = sizes(record, spec)
    return found


INSPECT_OPTIONS = (
    arg("-f", "--format", metavar="FORM", help="'{{.A.B}}'"),
    arg("-s", "--size", action="store_true", help="add up the files of containers"),
    arg("--type", choices=["container", "image", "network", "volume"],
        help="what it is"),
    arg("names", nargs="+", metavar="NAME", help="names or ids"))


@command("inspect", *INSPECT_OPTIONS)
def inspect_command(options):
    """Show all that is known of containers, images, networks and volumes, as JSON."""
    def network(name):
        with held("networks", fcntl.LOCK_EX):
            return network_document(find_network(name, only_seen=True), endpoints())

    kinds = {"container": lambda name: container_facts(find(name), options.size),
             "image": lambda name: inspected(find_image(name)),
             "network": network, "volume": volume_facts}

    def look(name):
        for kind in [options.type] if options.type else kinds:
            try:
                return kinds[kind](name)
            except NoSuch:
                pass
        raise Fail(f"No such {options.type or 'object'}: {name}",
                   "`ps -a`, `images`, `network ls` and `volume ls` list them", 1)
    show_facts(options.names, look, options.format)


@command("container inspect", *INSPECT_OPTIONS)
def container_inspect_command(options):
    """Show all that is known of containers, as JSON."""
    options.type = "container"
    inspect_command(options)


# `top` reads /proc, where the line NSpid of a process has its number in each namespace
# that it is in, ours first.  `stats` takes two samples, since the kernel counts and it
# is a rate that is wanted: CPU % is of one processor, as in Docker.


class rewiring:
    """A context for a change of what a container wants of networks, which is kept if
    all goes well: (its record, what it wants, the name of the network)."""

    def __init__(self, options):
        record = find(options.container)
        if record.asked["network"].startswith(("host", "container:")):
            raise Fail("container sharing network namespace with another container or "
                       "host cannot be connected to any other network",
                       "start it with --network none", 1)
        self.change = changing(record.id)
        with held("networks", fcntl.LOCK_EX):
            try:
                self.name = find_network(options.network)["name"]
            except NoSuch:  # it was removed while the container did not run
                self.name = options.network
                if all(wish["network"] != self.name
                       for wish in wants_of(record.spec())["networks"]):
                    raise

    def __enter__(self):
        self.record = self.change.__enter__()
        self.spec = self.record.spec()
        self.wants = wants_of(self.spec)
        return self.record, self.wants, self.name

    def __exit__(self, failed, *how):
        if not failed:
            self.spec["annotations"][NETWORK] = to_json(self.wants)
            save(self.record.path("config.json"), self.spec)
        self.change.__exit__(failed, *how)


@command("network connect", *ADDRESS_OPTIONS,
         arg("--alias", metavar="NAME", action="append", default=[],
             help="one more name there"),
         arg("network", metavar="NETWORK", help="its name, or the beginning of its id"),
         CONTAINER)
def network_connect_command(options):
    """Put a container on one more network; if it runs, at once."""
    with rewiring(options) as (record, wants, name):
        if any(wish["network"] == name for wish in wants["networks"]):
            raise Fail(f"endpoint with name {record.name} already exists in network "
                       f"{name}", "`network disconnect` first", 1)
        wish = wish_for(name, options, aliases=options.alias)
        try:
            if record.status in RUNNING:
                with held("networks", fcntl.LOCK_EX):
                    gone = free_places()
                    join_network(record.id, record.pid, wants, wish, gone)
        except BaseException:
            leave_network(record.id, name, record.pid)
            raise
        if not any(other["ports"] for other in wants["networks"]) and (
                wants.get("ports")):
            wish["ports"] = wants["ports"]  # it had left the network they were of
            if record.status in RUNNING:
                say(f"the published ports of {record.name} lead to it again when it is "
                    "started again")
        wants["networks"].append(wish)


@command("network disconnect", arg("-f", "--force", action="store_true",
                                   help="which takes no force here"),
         arg("network", metavar="NETWORK", help="its name, or the beginning of its id"),
         CONTAINER)
def network_disconnect_command(options):
    """Take a container off a network; if it runs, at once."""
    with rewiring(options) as (record, wants, name):
        left = [wish for wish in wants["networks"] if wish["network"] != name]
        # It is there without a wish if the `network connect` was killed half-way.
        if left == wants["networks"] and not any(
                endpoint["network"] == name for endpoint in endpoints_of(record.id)):
            raise Fail(f"container {record.name} is not connected to network {name}",
                       "see `inspect`", 1)
        if record.status in RUNNING:
            leave_network(record.id, name, record.pid)
        wants["networks"] = left


@command("port", CONTAINER, arg("port", nargs="?", metavar="PORT[/PROTOCOL]",
                                help="only of this one of the container's"))
def port_command(options):
    """Show which ports of the host lead to a container."""
    record = find(options.container)
    found = [(f"{inner}/{kind}", f"{f'[{address}]' if ':' in address else address}:"
              f"{port}") for kind, address, port, inner in ports_of(record)]
    wanted = options.port and (options.port if "/" in options.port
                               else f"{options.port}/tcp")
    if wanted and wanted not in dict(found):
        raise Fail(f"No public port {wanted!r} published for {record.name}",
                   "see `port` without it", 1)
    for inner, outer in found:
        if wanted in (None, inner):
            print(outer if wanted else f"{inner} -> {outer}")


def process_row(pid, record):
    """What `top` shows of a process; ProcessLookupError if it has ended."""
    facts = dict(line.partition(":\t")[::2]
                 for line in lines_of(f"/proc/{pid}/status"))
    ticks = read_file(f"/proc/{pid}/stat").rpartition(") ")[2].split()[11:13]
    line = read_file(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
    seconds = sum(map(int, ticks)) // os.sysconf("SC_CLK_TCK")
    user = int(facts["Uid"].split()[1])
    return {"UID": str(user - record.first_id * (user >= record.first_id)),
            "PID": str(pid), "INNER": facts["NSpid"].split()[-1],
            "PPID": facts["PPid"], "CMD": line or f"[{facts['Name']}]", "TIME":
            f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"}


def processes_of(record):
    """The processes of a container; who has no control group is found by its pid
    namespace."""
    group = cgroup_of(record.spec())
    if group.path:
        return group.pids()
    where, found = os.stat(f"/proc/{record.pid}/ns/pid").st_ino, []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}/ns/pid").st_ino == where:
                found.append(int(pid))
        except (FileNotFoundError, PermissionError):  # gone, or somebody else's
            pass
    return found


@command("top", CONTAINER, arg("words", nargs="A*", metavar="PS-OPTIONS",
                               help="show what the host's `ps` shows, with these"))
def top_command(options):
    """Show the processes of a container, with their numbers outside and inside."""
    record, rows = find(options.container), []
    if record.status not in RUNNING:
        raise not_running(record)
    pids = processes_of(record)
    announce(record, "top")
    if options.words:
        print("\n".join(shown_by_ps(pids, ["-A", *options.words])))
        return
    for pid in pids:
        try:
            rows.append(process_row(pid, record))
        except (FileNotFoundError, ProcessLookupError):  # has just ended
            pass
    print_list({"UID": "UID", "PID": "PID", "INNER PID": "INNER", "PPID": "PPID",
                "TIME": "TIME", "CMD": "CMD"}, rows, "")


def sample(record):
    """What a container has used until now, and when that was."""
    cgroup = cgroup_of(record.spec())
    cgroup.must_be("measuring")
    used = cgroup.measure()
    traffic = [0, 0]
    try:
        for line in lines_of(f"/proc/{record.pid}/net/dev")[2:]:
            name, _, numbers = line.partition(":")
            if name.strip() != "lo" and record.asked["network"] != "host":
                traffic = [traffic[n] + int(numbers.split()[8 * n]) for n in (0, 1)]
    except FileNotFoundError:
        pass
    return {**used, "net": traffic, "at": time.monotonic()}


def stats_row(record, before, now, short):
    """What `stats` shows of a container, of two samples."""
    span = now["at"] - before["at"]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # or no limit
    cpu = ((now["cpu_usec"] or 0) - (before["cpu_usec"] or 0)) / 10 ** 4 / span
    memory, limit = now["memory"] or 0, now["memory_limit"] or host
    id = record.id[:12] if short else record.id
    return {"ID": id, "Container": id, "Name": record.name,
            "CPUPerc": f"{cpu:.2f}%", "MemUsage": f"{human(memory)} / {human(limit)}",
            "MemPerc": f"{100 * memory / limit:.2f}%",
            "NetIO": " / ".join(map(decimal, now["net"])), "PIDs": now["pids"] or 0,
            "BlockIO": f"{decimal(now['io_read'] or 0)} / "
                       f"{decimal(now['io_written'] or 0)}"}


@command("stats", arg("-a", "--all", action="store_true", help="also what has ended"),
         arg("--no-stream", action="store_true", help="once, and no more"), NO_TRUNC,
         FORMAT,
         arg("containers", nargs="*", metavar="CONTAINER", help="else all"))
def stats_command(options):
    """Show what containers use, each second anew."""
    columns = {"CONTAINER ID": "ID", "NAME": "Name", "CPU %": "CPUPerc",
               "MEM USAGE / LIMIT": "MemUsage", "MEM %": "MemPerc", "NET I/O": "NetIO",
               "BLOCK I/O": "BlockIO", "PIDS": "PIDs"}
    only_look()
    before = None
    while True:
        found = list(map(find, options.containers or ())) or [
            record for record in records() if options.all or record.status in RUNNING]
        now = dict(of_those_there(found, lambda record: (record.id, sample(record))))
        if before is not None:
            print("\033[H\033[J" * os.isatty(1), end="")
            print_list(columns, [stats_row(record, before[record.id], now[record.id],
                                           not options.no_trunc) for record in found
                                 if record.id in before.keys() & now.keys()],
                       options.format, more="Container")
            sys.stdout.flush()
            if options.no_stream:
                return
        before = now  # a rate takes two looks
        time.sleep(0.2 if options.no_stream else 1)


@command("update", *CGROUP_OPTIONS, arg("--restart", metavar="POLICY",
                                        help="what to do when it ends"), CONTAINERS)
def update_command(options):
    """Change the limits of containers, also of those that run."""
    options.rm = False
    with ends_with(1):
        resources = {key: section for key, section in resources_spec(options).items()
                     if section and key != "devices"}
    if options.pids_limit in ("-1", "0"):  # of a new container: as if it were not there
        resources["pids"] = {"limit": -1}
    if not resources and not options.restart:
        raise Fail("you must provide one or more flags when using this command",
                   options.hint, 1)

    def update(record):
        with changing(record.id) as now:
            if options.restart:
                if now.throw_away and restart_policy(options)[0] != "no":
                    raise Fail("Restart policy cannot be updated because AutoRemove is "
                               "enabled for the container", "it was --rm", 1)
                now.restart, now.tries = restart_policy(options)
            spec = now.spec()
            kept = spec["linux"]["resources"]  # of the next start, too
            for key, section in resources.items():
                kept[key] = {**kept.get(key, {}), **section}
            if now.status in RUNNING:
                change_limits(cgroup_of(spec), resources)
            save(now.path("config.json"), spec)
        announce(record, "update")
    for_containers(options.containers, update)


def about_host():
    """What `info` tells, under Docker's keys."""
    found, kernel_ = [record.status for record in records()], os.uname()
    release = dict(line.split("=", 1) for line in read_file(
        "/etc/os-release").splitlines() if "=" in line) if os.path.exists(
            "/etc/os-release") else {}
    return {
        "Containers": len(found), "ContainersRunning": found.count("running"),
        "ContainersPaused": found.count("paused"),
        "ContainersStopped": sum(status not in LIVE for status in found),
        "Images": len(all_images()), "ServerVersion": VERSION, "Driver": "overlay",
        "LoggingDriver": "json-file", "CgroupDriver": "cgroupfs",
        "CgroupVersion": "1" if cgroup_trees() else "2",
        "SecurityOptions": ["name=seccomp,profile=default", "name=userns"],
        "KernelVersion": kernel_.release, "OSType": "linux",
        "OperatingSystem": release.get("PRETTY_NAME", "Linux").strip('"'),
        "Architecture": kernel_.machine, "NCPU": os.cpu_count(),
        "MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "Name": kernel_.nodename, "DockerRootDir": STORE}


INFO_TITLES = {  # of `info`, where its lines are called otherwise than its keys
    **{f"Containers{state}": f" {state}" for state in ("Running", "Paused", "Stopped")},
    "Driver": "Storage Driver", "NCPU": "CPUs", "OSType": "OSType",
    "MemTotal": "Total Memory"}


def show_document(document, form, titles=(), indent=""):
    """Print facts a line each, or as --format says."""
    if form:
        print(to_json(document) if form == "json" else Template(form)(document))
        return
    for key, value in document.items():
        title = indent + dict(titles).get(key, spaced(key))
        if isinstance(value, dict):
            print(f"{title}:")
            show_document(value, "", titles, f"{indent} ")
        else:
            print(f"{title}: {', '.join(value) if isinstance(value, list) else value}")


@command("info", arg("-f", "--format", metavar="FORM", help="json, or '{{.NCPU}}'"))
def info_command(options):
    """Show what is known of this host and its containers."""
    facts = about_host()
    show_document(facts if options.format else {"Server": {
        **facts, "MemTotal": human(facts["MemTotal"])}}, options.format, INFO_TITLES)


@command("version", arg("-f", "--format", metavar="FORM",
                        help="json, '{{.Server.Version}}'"))
def version_command(options):
    """Show which minicontainer this is: client and server are the same program."""
    facts = {"Version": VERSION, "Python": sys.version.split()[0],
             "OCIVersion": OCI_VERSION, "KernelVersion": os.uname().release,
             "Os": "linux", "Arch": os.uname().machine}
    show_document({"Client": facts, "Server": facts}, options.format)


def show_entries(entries, stamped, since, until_):
    """Write entries of a log to where they had been written to.

    Times in one form and one zone compare as text."""
    import itertools

    if isinstance(entries, bytes):
        write_all(1, memoryview(entries))
        return
    if since or until_ != "~":
        entries = [entry for entry in entries if since <= entry["time"] <= until_]
    for stream, some in itertools.groupby(entries, lambda entry: entry["stream"]):
        lines = [f"{entry['time']} {entry['log']}" if stamped else entry["log"]
                 for entry in some]
        data = "".join(lines).encode("utf-8", "surrogatepass")
        write_all(1 if stream == "stdout" else 2, memoryview(data))


def follow_log(record, reader, look, end):
    """What comes in a log, until the container ends, of which its shim says when all is
    there, or until a moment.

    The file is watched, and not the output: who reads a log slowly, or not at all, is
    waited for by nobody."""
    try:
        watch = watch_directory(record.path())  # before we read: nothing is missed
        peer = visit(record)
    except (ConnectionRefusedError, FileNotFoundError):  # its shim is gone, or all is
        return
    peer.send(b"q")
    over = False
    while not over:
        left = max(end - time.time_ns(), 0)
        if watch in (ready := select.select([watch, peer.fd], [], [],
                                            min(left / 10 ** 9, 1 << 20))[0]):
            os.read(watch, MOST)
        over = not left
        if peer.fd in ready:
            found = peer.receive()
            over = over or found and found[0] in (b"x", b"")
        yield from reader.read(look)


@command("logs", arg("-f", "--follow", action="store_true", help="wait for more"),
         arg("-n", "--tail", metavar="N", default="all", help="only the last N lines"),
         arg("--since", metavar="WHEN", help="a date, Unix time, or span as 10m"),
         arg("--until", metavar="WHEN", help="the same"),
         arg("-t", "--timestamps", action="store_true", help="show when"), CONTAINER)
def logs_command(options):
    """Show what a container has written."""
    record = find(options.container)
    if record.log is None:
        raise Fail("configured logging driver does not support reading",
                   "it was made with --log-driver none", 1)
    since = timestamp(moment("--since", options.since)) if options.since else ""
    end = moment("--until", options.until) if options.until else 1 << 62
    until_ = timestamp(end) if options.until else "~"
    # As in Docker, what is no number is "all".
    last = int(options.tail) if options.tail.isdecimal() else None
    only_look()
    reader = LogReader(record.path("log"), last)
    follows = options.follow and record.status in LIVE
    bare = not (options.timestamps or since or options.until)
    look = reader.plain if bare else reader.entries
    for source in (reader.read(look, follows),
                   follow_log(record, reader, look, end) if follows else ()):
        for entries in source:
            show_entries(entries, options.timestamps, since, until_)
            if not bare and entries and entries[-1]["time"] > until_:
                return  # it may write faster than we read


@command("rm", arg("-f", "--force", action="store_true", help="also one that runs"),
         arg("-v", "--volumes", action="store_true", help="also its volumes that have "
             "no name of yours"), CONTAINERS)
def rm_command(options):
    """Remove containers that have ended, with all that they wrote."""
    def remove(name):
        try:
            do_to(name, lambda record: remove_it(record, options.force,
                                                 options.volumes))
        except NoContainer as fail:
            if not options.force:
                raise
            say(fail.message)
    for_each(options.containers, remove)


def rename(record, name):
    """Give a container another name, in its record and where its networks know it."""
    name = name.removeprefix("/")
    if name == record.name:
        raise Fail("Renaming a container with the same name as its current name", "", 1)
    guard = lock(store("containers", ""), fcntl.LOCK_SH)  # `gc` waits for us
    try:
        with changing(record.id) as record:
            try:
                take_name(name, record.id)
            except Fail as fail:
                raise Fail(f"Error when allocating new name: {fail.message}", fail.hint,
                           1) from None
            old, record.name = record.name, name
            spec = record.spec()
            spec["annotations"][NETWORK] = to_json(rename_there(record.id, spec, name))
            save(record.path("config.json"), spec)
        os.unlink(store("names", old))
    finally:
        os.close(guard)
    announce(record, "rename", oldName=f"/{old}")


@command("rename", CONTAINER, arg("name", metavar="NAME", help="its new name"))
def rename_command(options):
    """Give a container another name."""
    for_each([options.container], lambda old: rename(find(old), options.name),
             "failed to rename container named ")


def attach_to(record, keys, typing):
    """Be one more client of a container that runs; its exit code, or 0 if we leave."""
    if record.status != "running":
        state, cure = {"paused": ("paused", "unpause it first"), "restarting": (
            "restarting", "wait until it is running")}.get(
                record.status, ("stopped", "start it first"))
        raise Fail(f"You cannot attach to a {state} container, {cure}", "", 1)
    tty = record.spec()["process"]["terminal"]
    if tty and typing and not os.isatty(0):
        raise Fail("the input device is not a TTY", "--no-stdin only looks on", 1)
    hold_signals()
    peer = visit(record)
    announce(record, "attach")
    client = Client(tty, typing, keys)
    return conclude(client, client.stay(peer), None, record.name)


@command("start",
         arg("-a", "--attach", action="store_true", help="show what it writes"),
         arg("-i", "--interactive", action="store_true", help="pass on what is typed"),
         DETACH_KEYS, CONTAINERS)
def start_command(options):
    """Start containers that were made or that have ended."""
    sealed(options.containers)
    keys = detach_keys(options.detach_keys)
    if not (options.attach or options.interactive):
        return for_containers(options.containers, start_it,
                              "failed to start containers: ")
    if len(options.containers) > 1:
        raise Fail("you cannot start and attach multiple containers at once", "", 1)
    record = find(options.containers[0])
    held, typing = claim(record), options.interactive and record.interactive
    if held is None:
        return attach_to(record, keys, typing)
    record, spec = fresh(record), record.spec()
    return accompany(Client(spec["process"]["terminal"], typing, keys),
                     Life(record, spec, held, typing=typing), options, record.name)


@command("attach", arg("--no-stdin", action="store_true", help="only look on"),
         DETACH_KEYS, CONTAINER)
def attach_command(options):
    """Show what a running container writes from now on, and pass on what is typed."""
    keys, record = detach_keys(options.detach_keys), find(options.container)
    return attach_to(record, keys, record.interactive and not options.no_stdin)


@command("exec", arg("-d", "--detach", action="store_true", help="do not wait for it"),
         DETACH_KEYS, *PROCESS_OPTIONS, PRIVILEGED, CONTAINER,
         arg("words", nargs="A...", metavar="COMMAND", help="program and arguments"))
def exec_command(options):
    """Run a command in a running container."""
    keys = detach_keys(options.detach_keys)
    if not options.detach:
        check_terminal(options)
    record = find(options.container)
    if record.status == "paused":
        raise Fail(f"Container {options.container} is paused, unpause the container "
                   "before exec", "", 1)
    try:
        target = pidfd_of(record)
    except ProcessLookupError:
        raise not_running(record) from None
    spec = record.spec()
    seal_interpreter(spec)
    process = {**spec["process"],
               **process_spec(options, options.words, spec["process"])}
    if options.privileged:
        process["capabilities"] = capability_sets(available_capabilities(
            bool(namespace_flags(spec) & CLONE_NEWUSER)))
    shim = Guest(record, {**spec, "process": process}, target, options.interactive)
    if options.detach:
        see_start(leave_to(shim))
        return 0
    return accompany(Client(options.tty, options.interactive, keys, owner=True), shim,
                     options, f"a process in {record.name}")


# ── the files of a container ──
#
# What a container has changed lies in `upper`, with overlay's marks for what is gone;
# what it sees is an overlay of that and its layers.  A container that runs has one
# mounted, and is looked at through /proc/PID/root; for another one is mounted in the
# workshop, which nobody else sees.  Paths are resolved inside by openat2 (P4), and no
# program of the container takes part.  Ids are counted from the container's first.


def write_files(record, file):
    """Write all files of a container to a tarball, but for what is mounted in it."""
    spec = record.spec()
    if not record.layers(spec):
        pack(record.path("rootfs"), file, record.first_id)
        return
    with merged(record, spec, with_changes=True):
        pack("rootfs", file, record.first_id)


@command("export", arg("-o", "--output", metavar="FILE", help="not to standard output"),
         CONTAINER)
def export_command(options):
    """Write all files of a container to a tarball."""
    record = find(options.container)
    with output(options.output) as file:
        write_files(record, file)
    announce(record, "export")


def is_there(c, path):
    """Whether a container has something at a path."""
    try:
        parent = open_inside(c, os.path.dirname(path), O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        os.stat(os.path.basename(path), dir_fd=parent, follow_symlinks=False)
        return True
    except FileNotFoundError:
        return False
    finally:
        os.close(parent)


def names_inside(c, path):
    """The names in a directory of a container; none if it is something else."""
    try:
        fd = open_inside(c, path, FOLDER)  # which waits for no pipe, and is no link's
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def changes(record):
    """{path: A, C or D} of all that a container has added, changed or deleted."""
    spec, found, upper = record.spec(), {}, record.path("upper")
    anew = set()  # directories that hide what is below them: so do those in there
    if not record.layers(spec):
        raise Fail("what a copy (--storage-driver vfs) has changed is not known",
                   "`export` writes all of it", 1)
    with merged(record, spec) as c:
        for top, directories, files in os.walk(upper):
            inner = top[len(upper):]
            if os.path.dirname(top) in anew or OPAQUE in os.listxattr(top):
                anew.add(top)
                found.update(
                    {f"{inner}/{name}": "D" for name in names_inside(c, inner)})
            for path in (os.path.join(top, name) for name in directories + files):
                inner, facts = path[len(upper):], os.lstat(path)
                gone = stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0
                found[inner] = "D" if gone else "C" if is_there(c, inner) else "A"
    for mount in spec["mounts"]:  # a place to mount on, and the way there, do not count
        place = mount["destination"]
        # Making /a/b to mount on has copied /a up, too, if nothing else has.
        while found.get(place, "D") != "D" and not any(
                path.startswith(f"{place}/") for path in found):
            del found[place]
            place = os.path.dirname(place)
    return found


@command("diff", CONTAINER)
def diff_command(options):
    """Show what a container has added (A), changed (C) and deleted (D)."""
    found = changes(find(options.container))
    print("".join(f"{found[path]} {path}\n" for path in sorted(found)), end="")


def committed(record, image):
    """The config of an image that is made of a container: what it was started with,
    options and all, but for what is of this one container alone."""
    found, old = container_facts(record)["Config"], image.settings if image else {}
    its_own = ("HOSTNAME=", "TERM=") if found["Tty"] else ("HOSTNAME=",)
    found["Env"] = [line for line in found["Env"] if not line.startswith(its_own)]
    for key, default in ("WorkingDir", "/"), ("StopSignal", "SIGTERM"):
        if found[key] == default and not old.get(key):
            found[key] = ""
    if "Healthcheck" in old and not record.health:
        found["Healthcheck"] = {"Test": ["NONE"]}
    return {**old, **{key: found.get(key) for key in (
        "User Env Entrypoint Cmd WorkingDir Labels ExposedPorts StopSignal Healthcheck"
        ).split() if found.get(key) or old.get(key)}}


@command("commit",
         arg("-a", "--author", metavar="TEXT", default="", help="who made it"),
         arg("-c", "--change", metavar="LINE", action="append", default=[],
             help="a line of a Dockerfile, as 'CMD [\"sh\"]'"),
         arg("-m", "--message", metavar="TEXT", default="", help="shown by history"),
         arg("-p", "--pause", metavar="BOOL", optional="true", default="true",
             help="pause the container meanwhile (true)"), CONTAINER,
         arg("name", nargs="?", metavar="NAME[:TAG]", help="of the new image"))
def commit_command(options):
    """Make an image of what a container has changed, on top of its own."""
    record = find(options.container)
    refs, spec = [new_name(options.name)] if options.name else [""], record.spec()
    base = spec["annotations"].get(OF_IMAGE)
    image = find_image(base) if base and record.layers(spec) else None
    settings = committed(record, image)
    for text in options.change:
        take_change(settings, text)
    with adding():
        still = options.pause != "false" and record.status == "running"
        if still and not cgroup_of(spec).path:
            say("not paused meanwhile: that takes a control group, and none is yours")
            still = False
        if still:
            set_frozen(record, True)
        try:  # the default root file system is no image: all of it is one layer
            spooled = spool((), lambda file: pack(record.path("upper"), file,
                                                  record.first_id)
                            if image else write_files(record, file))
        finally:
            if still:
                set_frozen(record, False)
        made = keep_layer(*spooled, record.name)
        below = list(zip(image.layers, image.diff_ids, image.sizes, strict=True)
                     ) if image else []
        config = image.config if image else dict(zip(
            ("os", "architecture", "variant"), platform_of(), strict=False))
        print(new_image({**config, "config": settings, "author": options.author},
                        below, made, refs, {"created_by": " ".join(
                            spec["process"]["args"]), "comment": options.message}))
    announce(record, "commit")


class looking_into:
    """A context that gives (open, base): open(path, flags) opens a path as a container
    has it, and base is the id of its root there.

    A path below a volume is looked up in the volume itself, with its own owners: seen
    from the container's mounts, nobody outside has an id that could write to it."""

    def __init__(self, record, path):
        self.path = os.path.normpath(f"/{path.lstrip('/')}")
        self.lock = claim(record)
        self.record = record if self.lock is not None else load(record.id)

    def __enter__(self):
        record, cut = self.record, ""
        self.c, base = container_of(record), record.first_id
        for mount in self.c.spec["mounts"]:  # what is mounted there, or will be
            if f"{self.path}/".startswith(f"{mount['destination']}/") and (
                    "ridmap" in mount["options"] and os.path.isdir(mount["source"])):
                top, base, cut = mount["source"], 0, mount["destination"]
        if not cut and record.status in RUNNING:
            top = f"/proc/{record.pid}/root"
        elif not cut:
            open_workshop(self.c)
            top = "rootfs"
            build_rootfs(self.c)
        self.c.root_fd = open_fd(top, O_PATH | O_DIRECTORY)
        return lambda path, flags: open_inside(self.c, path[len(cut):] or "/",
                                               flags), base

    def __exit__(self, *_):
        os.close(self.c.root_fd)
        leave_workshop(self.c)
        if self.lock is not None:
            os.close(self.lock)


# Docker's rules of `cp`, which are not quite those of cp(1):
#
#       what there is        copied to a directory     to what is not there, or a file
#       a file               into it, by its name      as that; not if it ends with /
#       a directory          into it, by its name      as that; not over a file
#       a directory, DIR/.   all that is in it         as that
#
# On the way a copy is a stream of entries, whatever it comes from and goes to, and what
# unpacks layers writes it: below a descriptor, and through no symlink.


def followed(open_, path):
    """Where the symlinks lead that a path may end in."""
    for _ in range(40):  # as many as the kernel follows
        top, name = os.path.split(path.rstrip("/"))
        parent = open_(top or "/", O_PATH | O_DIRECTORY)
        try:
            path = os.path.join(top, os.readlink(name, dir_fd=parent))
        except OSError as error:
            if error.errno != errno.EINVAL:  # what is no symlink
                raise
            return path
        finally:
            os.close(parent)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def read_tree(open_, path, follow):
    """(name, only what is in it, entries) of what there is to copy at a path."""
    inside_only = path.endswith("/.") or path == "."
    name = os.path.basename(os.path.normpath(path)) or "."
    whole_ = os.path.normpath(followed(open_, path) if follow else path)
    parent = open_(os.path.dirname(whole_) or ".", O_PATH | O_DIRECTORY)
    there = os.path.basename(whole_) or "."
    os.stat(there, dir_fd=parent, follow_symlinks=False)
    return name, inside_only or name == ".", tree_entries(parent, there, 0)


def write_tree(open_, path, name, inside_only, entries):
    """Put entries at a path, by Docker's rules: into a directory, or as that name."""
    is_new = exists = False
    # What is not there, or is a file, is to be made anew in the directory above.
    try:
        top = open_(path, O_PATH | O_DIRECTORY)
        name = "" if inside_only else name
    except (FileNotFoundError, NotADirectoryError) as error:
        name, is_new = os.path.basename(path.rstrip("/")), True
        exists = isinstance(error, NotADirectoryError)
        top = open_(os.path.dirname(path.rstrip("/")) or ".", O_PATH | O_DIRECTORY)

    def placed():
        for number, entry in enumerate(entries):
            is_directory = stat.S_ISDIR(entry.mode)
            if not number and is_new and (path.endswith("/") and not is_directory or (
                    exists and is_directory)):
                raise Fail("not a directory" if exists else "no such directory",
                           f"{path} is not one", 1)
            if name:
                entry.name = os.path.normpath(f"{name}/{entry.name}")
                entry.hard = entry.hard and f"{name}/{entry.hard}"
            if name or entry.name != ".":
                yield entry
    with Layer(f"/proc/self/fd/{top}") as layer:
        layer.add_all(placed(), path)
    os.close(top)


def owned(entries, owner, change):
    """Entries with other owners: `owner` plus what change(id) returns."""
    for entry in entries:
        entry.uid, entry.gid = owner + change(entry.uid), owner + change(entry.gid)
        yield entry


def copy_outside(record, path, target, options):
    """Copy from a container to a path of the host, or to a tarball."""
    import tarfile

    with looking_into(record, path) as (open_, base):
        try:
            name, inside_only, entries = read_tree(open_, f"/{path.lstrip('/')}",
                                                   options.follow_link)
        except (FileNotFoundError, NotADirectoryError):
            raise Fail(f"Could not find the file {path} in container {record.name}",
                       "see `diff` and `export`", 1) from None
        kept = options.archive or target == "-"
        entries = owned(entries, 0, lambda id: (id - base * (id >= base)) * kept)
        if target != "-":
            home = os.path.abspath(target) + "/" * target.endswith("/")
            write_tree(os.open, home, name, inside_only, entries)
            return
        with output("") as file, tarfile.open(fileobj=file, mode="w|",
                                              format=tarfile.PAX_FORMAT) as out:
            for entry in entries:
                entry.name = os.path.normpath(f"{name}/{entry.name}")
                entry.hard = entry.hard and f"{name}/{entry.hard}"
                out.addfile(tar_header(entry), entry.stream)


def check_writable(spec, path):
    """Refuse to write what the container itself may not write."""
    over = max((mount for mount in spec["mounts"] if f"{path}/".startswith(
        f"{mount['destination']}/")), key=lambda mount: len(mount["destination"]),
        default=None)
    if over and {"ro", "rro"} & {*over["options"]}:
        raise Fail("mounted volume is marked read-only", f"{over['destination']} is", 1)
    if not over and spec["root"]["readonly"]:
        raise Fail("container rootfs is marked read-only", "it is --read-only", 1)


def copy_inside(record, source, path, options):
    """Copy from a path of the host, or from a tarball, to a container."""
    path = f"/{path.lstrip('/')}"
    check_writable(record.spec(), os.path.normpath(path))
    with looking_into(record, path) as (open_, base):
        if source != "-":
            name, inside_only, entries = read_tree(
                os.open, os.path.abspath(source) + "/." * source.endswith(("/.", "/")),
                options.follow_link)
            entries = owned(entries, base, lambda id: id * options.archive)
            write_tree(open_, path, name, inside_only, entries)
            return
        try:
            os.close(open_(path, O_PATH | O_DIRECTORY))
        except (FileNotFoundError, NotADirectoryError):
            raise Fail(f'destination "{record.name}:{path}" must be a directory',
                       "what is in a tarball is put there", 1) from None
        with open(0, "rb", closefd=False) as stdin:
            spooled = spool(pieces(stdin))[0]
        try:
            with Tarball(spooled, "standard input") as tarball:
                entries = owned(tarball, base, lambda id: id)
                write_tree(open_, path, "", True, entries)
                tarball.digest()
        except (ValueError, EOFError) as error:
            raise damaged("standard input", error) from None
        finally:
            os.unlink(spooled)


@command("cp", arg("-a", "--archive", action="store_true", help="keep owners"),
         arg("-L", "--follow-link", action="store_true",
             help="of a symlink, copy what it leads to"),
         arg("-q", "--quiet", action="store_true", help="there is no progress here"),
         arg("source", metavar="CONTAINER:PATH|PATH|-", help="what"),
         arg("target", metavar="CONTAINER:PATH|PATH|-", help="where to"))
def cp_command(options):
    """Copy files between a container and the host; - is a tarball."""
    ends = [("", text) if text.startswith(("/", ".", "-")) or ":" not in text else
            text.split(":", 1) for text in (options.source, options.target)]
    (name, source), (other, target) = ends
    if bool(name) == bool(other):
        raise Fail("copying between containers is not supported" if name else
                   "must specify at least one container source", "NAME:PATH", 1)
    try:
        record = find(name or other)
        if name:
            copy_outside(record, source, target, options)
            announce(record, "archive-path", path=source)
        else:
            copy_inside(record, source, target, options)
            announce(record, "extract-to-dir", path=target)
    except (Fail, OSError) as error:
        fail = diagnose(error)
        fail.code = 1
        raise fail from None


# ── clearing up ──


ENDED_FILTERS = prune_filters(lambda record: record.labels,
                              lambda record: record.created)


def remove_ended(wanted):
    """Remove the containers that have ended; {id: bytes that each had written}."""
    def remove(record):
        own = sizes(record, record.spec())[0]
        try:
            remove_it(record, volumes=False)
            return record.id, own
        except Fail:  # it was started meanwhile
            return None
    return dict(filter(None, of_those_there(
        (record for record in records() if record.status not in LIVE
         and passes(record, ENDED_FILTERS, wanted)), remove)))


@command("container prune", FORCE, ONLY)
def container_prune_command(options):
    """Remove all containers that have ended."""
    wanted = filters_of(options.filter, ENDED_FILTERS)
    if confirm(options, "all stopped containers"):
        tell_gone({"Containers": remove_ended(wanted)})


def remove_idle_volumes(named, wanted):
    """Remove volumes that no container has, those with a name of a person's too if they
    are `named` as well; {name: bytes that were in it}."""
    return {facts["Name"]: remove_volume(facts["Name"]) for facts in all_volumes()
            if (named or NAMELESS in facts["Labels"]) and not users_of(facts["Name"])
            and passes(facts, VOLUME_FILTERS, wanted)}


@command("volume prune", arg("-a", "--all", action="store_true", help="named ones too"),
         FORCE, ONLY)
def volume_prune_command(options):
    """Remove volumes that no container has."""
    wanted = filters_of(options.filter, ("label", "label!"))
    kind = "all local volumes" if options.all else "anonymous local volumes"
    if confirm(options, f"{kind} not used by at least one container"):
        tell_gone({"Volumes": remove_idle_volumes(options.all, wanted)})


def cache_usage():
    """(what it is called, its kind, whether an image has it, bytes, when it was made)
    of all that `build` keeps: layers of steps, and what its RUNs have mounted."""
    of_images = {hex_of(diff_id) for image in all_images() for diff_id in
                 image.diff_ids}
    steps = {layer[1]: (name, parts, layer) for name, parts, layer in cached_steps()
             if layer}
    for name, parts, layer in steps.values():
        made = os.stat(store("steps", name)).st_mtime
        yield name[:12], parts["instruction"].split()[0], layer[1] in of_images, layer[
            2], made
    for name in os.listdir(store("mounts", "")):
        path = store("mounts", name)
        yield name[:12], "mount", False, bytes_in(path), os.stat(path).st_mtime


USAGE_COLUMNS = {  # of the lists of `system df -v`, under Docker's titles
    "Images": {"REPOSITORY": "Repository", "TAG": "Tag", "IMAGE ID": "ID",
               "CREATED": "CreatedSince", "SIZE": "Size", "SHARED SIZE": "SharedSize",
               "UNIQUE SIZE": "UniqueSize", "CONTAINERS": "Containers"},
    "Containers": {"CONTAINER ID": "ID", "IMAGE": "Image", "COMMAND": "Command",
                   "LOCAL VOLUMES": "LocalVolumes", "SIZE": "Size",
                   "CREATED": "RunningFor", "STATUS": "Status", "NAMES": "Names"},
    "Volumes": {"VOLUME NAME": "Name", "LINKS": "Links", "SIZE": "Size"},
    "BuildCache": {"CACHE ID": "ID", "CACHE TYPE": "CacheType", "SIZE": "Size",
                   "CREATED": "CreatedSince", "SHARED": "Shared"}}


def usage_rows():
    """What `system df -v` shows, a list for each kind of thing."""
    there, images = all_images(), []
    used = [notes.get(OF_IMAGE) for _, notes in containers()]
    layers = [diff_id for image in there for diff_id in image.diff_ids]
    for image in there:
        shared = sum(length for diff_id, length in zip(
            image.diff_ids, image.sizes, strict=False) if layers.count(diff_id) > 1)
        images += [{**row, "SharedSize": decimal(shared, 4), "UniqueSize": decimal(
            sum(image.sizes) - shared, 4), "Containers": str(used.count(image.id))}
            for row in image_rows(image, False)]
    return {
        "Images": images,
        "Containers": list(of_those_there(records(), lambda record: {
            **container_row(record), "Size": decimal(
                sizes(record, record.spec())[0])})),
        "Volumes": [{"Name": facts["Name"], "Links": str(len(users_of(facts["Name"]))),
                     "Size": decimal(bytes_in(facts["Mountpoint"]), 4)}
                    for facts in all_volumes()],
        "BuildCache": [{"ID": id, "CacheType": kind, "Size": decimal(length, 4),
                        "CreatedSince": ago(made), "Shared": str(shared).lower()}
                       for id, kind, shared, length, made in cache_usage()]}


def show_usage(form):
    """Print what `system df -v` shows."""
    found = usage_rows()
    if form:
        print(to_json(found) if form == "json" else Template(form, 1)(found))
        return
    total = sum(length for _, _, _, length, _ in cache_usage())
    for kind, title in (("Images", "Images space usage:"),
                        ("Containers", "Containers space usage:"),
                        ("Volumes", "Local Volumes space usage:"),
                        ("BuildCache", f"Build cache usage: {decimal(total, 4)}")):
        print(f"{title}\n")
        print_list(USAGE_COLUMNS[kind], found[kind], "")
        print("\n" * (kind != "BuildCache"), end="")


@command("system df", FORMAT,
         arg("-v", "--verbose", action="store_true", help="one line for each thing"))
def system_df_command(options):
    """Show what takes how much of the disk."""
    if options.verbose:
        return show_usage(options.format)
    rows, used = [], {notes.get(OF_IMAGE) for _, notes in containers()}
    images = [(image.id in used, sum(image.sizes)) for image in all_images()]
    cache = [(shared, length) for _, _, shared, length, _ in cache_usage()]
    own = list(of_those_there(records(), lambda record: (
        record.status in LIVE, sizes(record, record.spec())[0])))
    volumes = [(bool(users_of(facts["Name"])), bytes_in(facts["Mountpoint"]))
               for facts in all_volumes()]
    for kind, found in (("Images", images), ("Containers", own),
                        ("Local Volumes", volumes), ("Build Cache", cache)):
        total = sum(length for _, length in found)
        free = sum(length for active, length in found if not active)
        rows.append({"Type": kind, "TotalCount": str(len(found)), "Active": str(sum(
            active for active, _ in found)), "Size": decimal(total, 4), "Reclaimable":
            decimal(free, 4) + (f" ({100 * free // total}%)" if total else "")})
    print_list({"TYPE": "Type", "TOTAL": "TotalCount", "ACTIVE": "Active",
                "SIZE": "Size", "RECLAIMABLE": "Reclaimable"}, rows, options.format)


@command("system start-restart-policies")
def start_restart_policies_command(options):
    """Start what its policy wants to run, after the machine was switched on.

    Docker's rule: `always` means that, also if a person had stopped it before."""
    names = [record.name for record in records()
             if record.status not in LIVE and record.started and (
                 record.restart == "always" or record.wants_again())]
    sealed(names)
    for_containers(reversed(names), start_it)


# What a killed command has left is found by comparing all that there is with who is
# there: the locks of the containers' directories say that.


def take_away_half(path):
    """Remove what a killed command was writing, while nobody else is."""
    with held("networks", fcntl.LOCK_EX):
        take_away_file(path)


def leftovers():
    """(what it is, what takes it away) of all that nobody looks after.

    Caller must hold the lock of containers/, or it may just be being made."""
    top, owners, alive = store("containers", ""), set(), set()
    for id in os.listdir(top):
        try:
            if is_held(top + id):
                owners.add(id)
                alive.add(id)
                continue
        except FileNotFoundError:  # has just been removed
            continue
        if (group := group_of(id)).exists():
            yield (f"control group {group.path}, with {len(group.pids())} processes",
                   group.remove)
        try:
            record = load(id)
            owners.add(id)
            if record.status in LIVE:
                yield (f"record of {record.name}: {record.status}, and nobody looks "
                       "after it", lambda record=record: settle(record))
        except FileNotFoundError:
            yield (f"directory {top}{id}: without a record",
                   lambda id=id: remove_tree(top + id))
    for line in lines_of("/proc/self/mountinfo"):
        place = line.split(" ")[4]
        if place.startswith((top, store("workshop", ""))):
            yield f"mount {place}", lambda at=place: syscall(
                "umount2", at, MNT_DETACH, why="it is nobody's")
    with held("endpoints", fcntl.LOCK_EX):  # who leaves just now has left
        with held("networks", fcntl.LOCK_EX):  # an ordinary user's has none
            places, bridges = all_endpoints(), [] if rootless.uid else idle_bridges()
            halves = [store(kind, name) for kind in ("endpoints", "networks")
                      for name in os.listdir(store(kind, "")) if name.endswith(".new")]
    for what in (*(f"endpoint of {place['id']} on network {place['network']}"
                   for place in places if place["id"] not in alive),
                 *(f"bridge {bridge}: nobody is on it" for bridge in bridges)):
        yield what, sweep_networks
    for path in halves:
        yield f"unfinished {path}", lambda at=path: take_away_half(at)
    for path in (store(kind, name) for kind in ("ids", "names")
                 for name in os.listdir(store(kind, ""))):
        owner, (kind, name) = owner_of(path), path.split("/")[-2:]
        renamed = kind == "names" and any(
            record.name != name for record in of_those_there([owner], load))
        if owner not in owners or renamed:
            yield f"link {path}: of no container", lambda at=path, was=owner: (
                owner_of(at) == was and take_away_file(at))  # if it is still that one's
    for path in (store(kind, name) for kind in ("layers", "rootfs", "ingest")
                 for name in os.listdir(store(kind, "")) if name.startswith(".new-")):
        if not os.path.exists(f"/proc/{os.path.basename(path).split('-')[1]}"):
            yield f"unfinished {path}", lambda at=path: (
                remove_tree if os.path.isdir(at) else take_away_file)(at)


def clear_away(say_it, only_look=False):
    """Take away what nobody looks after; whether there was anything."""
    def clear(found):
        what, take = found
        if say_it:
            print(what, flush=True)
        try:
            if not only_look:
                take()
        except OSError as error:
            raise diagnose(error) from None
    with held("containers", fcntl.LOCK_EX):
        found = list(leftovers())
        for_each(found, clear)
    return bool(found)


@command("gc", arg("--check", action="store_true",
                   help="only tell; the exit code is 1 if there is anything"))
def gc_command(options):
    """Take away what killed commands have left, and tell what that was."""
    return int(clear_away(True, options.check) and options.check)

# ══ 13. BUILD ═════════════════════════════════════════════════════════════════════
#
# A Dockerfile is a list of instructions, and each makes an image of the one before:
# most change only its config, the others add a layer.
#
#       text ── read ──▶ instructions ── divide ──▶ stages ── build ──▶ layers, config
#
# Reading turns text into data.  Which instructions there are, with which flags and in
# which form, is one table, INSTRUCTIONS, whose lines stand beside what each means; and
# nothing is done before all of the text has been taken apart.  What a variable may have
# made, the value of a flag or a port, is looked at when its step has come.
#
# A stage is done step by step on a State, the layers and the config so far.  What
# changes files writes to a directory that lies on top of an overlay of those layers:
# RUN is a container like any other (P6); COPY and ADD write with the code that unpacks
# layers, at a place that is found as the container would find it (P4).  What has come
# to lie in that directory is the layer.  Stages that the target does not need are left
# out, and those that do not need each other are built at the same time.
#
# The cache has a file for each such step.  Its name, the key, is a digest of all that
# the result depends on: the key before, the instruction after expansion, the content
# of what is copied; not times.  The key is noted in the image's history too, so that an
# image from elsewhere is a cache as well (--cache-from).  What `RUN --mount=type=cache`
# keeps lies beside it, and `builder prune` removes both.
#
# Docker's rules are many and old, and each is written where it is followed.  Where two
# of its builders differ, ours does what the newer one (BuildKit) does.  What it does
# not do: contexts and sources from git, `--ssh`, building for other processors than
# the kernel's.  A bind of --mount is a copy: what .dockerignore leaves out is not in
# it, and what is in it is root's, as with COPY.  A source that leads out of the
# context, by .. or a symlink, is refused, where BuildKit looks for it inside.
#
# https://docs.docker.com/reference/dockerfile; the OCI image specification, config.md.

# ── reading ──


# A form makes a value of the text that follows the flags, without knowing any variable
# yet.  What an instruction means is a function, far below, that is declared with it.

INSTRUCTIONS = {}  # name: (form, at least so many words, flags, function)


def instruction(name, form, least=1, flags=""):
    """Declare that the decorated function is what `name` means."""
    def declare(function):
        INSTRUCTIONS[name] = form, least, flags.split(), function
        return function
    return declare


def unquoted(word):
    """A word without the quotes around its parts, and what escapes a letter."""
    import re

    return re.sub(r"""\\(.)|'([^']*)'|"([^"]*)\"""",
                  lambda found: "".join(filter(None, found.groups())), word)


class Instruction:
    """One instruction as it was read: its name, its flags, and the text after them."""

    def __init__(self, file, whole, spots):
        self.file = file  # the Dockerfile it stands in
        self.whole = whole  # all its lines, as one
        self.spots = spots  # (where in that, line, column) at which each line begins
        self.name = whole.split()[0].upper()
        self.at = len(whole) - len(whole[len(self.name):].lstrip())  # of `text`
        self.flags = []  # (name, value)
        self.documents = []  # here-documents: (name, text, whether it is expanded)
        self.value = None  # what its form makes of the text

    @property
    def text(self):
        """What stands after the flags."""
        return self.whole[self.at:].strip()

    def fail(self, message, hint="", at=0):
        """A Fail that shows the place: where in the text, or which flag, is wrong."""
        at = max(self.whole.find(at), 0) if isinstance(at, str) else at
        start, line, column = [spot for spot in self.spots if spot[0] <= at][-1]
        return self.file.fail(message, hint, line, column + at - start)

    def words(self):
        """(where, word) of the text, split at spaces that are in no quotes."""
        import re

        found, begin, quote_, at = [], None, "", self.at
        while at < len(self.whole):
            letter = self.whole[at]
            if letter.isspace() and not quote_ and not (  # << EOF is one word of RUN
                    begin is not None and self.name in ("RUN", "ONBUILD") and
                    re.fullmatch(r"\d*<<-?\s*", self.whole[begin:at])):
                found += [] if begin is None else [(begin, self.whole[begin:at])]
                begin = None
            else:
                begin = at if begin is None else begin
                if letter == self.file.escape and quote_ != "'":
                    at += 1
                elif letter in ("'", '"') and quote_ in ("", letter):
                    quote_ = "" if quote_ else letter
            at += 1
        return found + ([] if begin is None else [(begin, self.whole[begin:])])

    def documents_named(self):
        """(name, whether tabs go, whether it is expanded) of each here-document that
        the text announces; ONBUILD may keep an instruction that has some."""
        import re

        announces = re.match(r"(ONBUILD\s+)?(RUN|COPY|ADD)\s", self.whole, re.I)
        for _, word in self.words() if announces else ():  # but $((1 <<2)) is a number
            if match := re.fullmatch(
                    r"""\d*<<(-?)(\s+(?!\d))?((?:\\.|'[^']*'|"[^"]*"|[^<()\s'"])+)""",
                    word):
                name = unquoted(match[3])
                if match[2] and name not in map(
                        str.strip, self.file.lines[self.file.number:]):
                    continue  # $((a << b )) is a number, too
                yield name, bool(match[1]), not re.search(
                    "['\"]", re.sub(r"\\.", "", match[3]))


def quoted(word, escape):
    """A word as it has to be written to mean itself, but for its variables."""
    return "".join(escape + c if c in f"'\"{escape}" else c for c in word)


NO_NUL = "neither a path nor a word of a command can have one"  # it would end there


def exec_form(step, at=None):
    """The list that JSON gives, or None: then it is a shell's."""
    words = json_list(step.text if at is None else step.whole[at:].strip())
    if not all(isinstance(word, str) for word in words or ()):
        raise step.fail("arrays must be comprised of strings only", "quote each",
                        step.at if at is None else at)
    if "\0" in "".join(words or ()):
        raise step.fail("a NUL character in an array", NO_NUL,
                        step.at if at is None else at)
    return words


def sources_in(name, value):
    """The stages, or images, that a flag copies or mounts from."""
    if name == "mount":
        return [word.removeprefix("from=") for word in fields_of(value)
                if word.startswith("from=")]
    return [value] * (name == "from")


def understand(step):
    """Take an instruction apart, as the table says; or say where it is wrong."""
    form, least, flags, _ = INSTRUCTIONS[step.name]
    known = {flag.rstrip("!"): flag.endswith("!") for flag in flags}  # !: yes or no
    for at, word in step.words() if flags else ():
        if not word.startswith("--"):
            break
        after = at + len(word)
        after += len(step.whole[after:]) - len(step.whole[after:].lstrip())
        if word == "--":  # what follows is none, whatever it looks like
            step.at = after
            break
        name, equals, value = unquoted(word[2:]).partition("=")
        if name not in known:
            raise step.fail(f"unknown flag: --{name}",
                            f"{step.name} has --{', --'.join(known)}", at)
        if not equals and not known[name]:
            raise step.fail(f"missing a value on flag: --{name}", f"--{name}=…", at)
        try:
            sources = "".join(sources_in(name, value))
        except Fail as fail:
            raise step.fail(fail.message, fail.hint, at) from None
        if "$" in sources:
            raise step.fail("variable expansion is not supported for --from", "which "
                            "stages are needed has to be known before any is built: "
                            "FROM $NAME AS x, and --from=x", at)
        if known[name] and value.lower() not in ("", "true", "false"):
            raise step.fail(f"expecting boolean value for flag {name}, not: {value}",
                            f"--{name}, or --{name}=false", at)
        if name in dict(step.flags) and name not in ("mount", "exclude"):
            raise step.fail(f"duplicate flag specified: {name}", "say it once", at)
        step.flags.append((name, value.lower() or "true" if known[name] else value))
        step.at = after
    step.value = form(step) if step.text else []
    if not step.text or least > 1 and len(step.value) < least or (
            step.name in ("RUN", "SHELL", "VOLUME") and not step.value):
        raise step.fail(f"{step.name} requires at least {least} argument"
                        f"{'s' * (least > 1)}", "", step.at)


def as_command(step):
    """Form: a list to execute, or a text for the shell."""
    words = exec_form(step)
    return step.text if words is None else words


def as_words(step):
    """Form: (where, word) each; JSON where there are spaces in one."""
    words = exec_form(step)
    return step.words() if words is None else [
        (step.at, quoted(word, step.file.escape)) for word in words]


def as_one(step):
    """Form: all of it, one word."""
    return [(step.at, step.text)]


def as_pairs(step):
    """Form: (where, name, value) each of NAME=VALUE …, or of the older NAME VALUE; for
    ARG just a NAME is fine, and has no value."""
    words = step.words()
    if step.name != "ARG" and "=" not in words[0][1]:
        at, name = words[0]
        if len(words) == 1:
            raise step.fail(f"{step.name} must have two arguments", f"{name}=VALUE", at)
        return [(at, name, step.whole[words[1][0]:].strip())]
    for at, word in words:
        if word.startswith("="):
            raise step.fail(f"{step.name} names can not be blank", "NAME=VALUE", at)
        if "=" not in word and step.name != "ARG":
            raise step.fail(f"Syntax error - can't find = in {word!r}. Must be of the "
                            "form: name=value", "quotes keep spaces together", at)
    return [(at, name, value if equals else None) for at, word in words
            for name, equals, value in [word.partition("=")]]


NO_TRIGGER = "ONBUILD", "FROM", "MAINTAINER"


def as_trigger(step):
    """Form: an instruction, for those who build on the image."""
    name = step.text.split()[0].upper()
    if name in NO_TRIGGER:
        raise step.fail(f"{name} isn't allowed as an ONBUILD trigger", "", step.at)
    if name not in INSTRUCTIONS:
        raise step.fail(f"unknown instruction: {name}", "", step.at)
    understand(Instruction(step.file, step.text, [
        (at - step.at, line, column) for at, line, column in step.spots]))
    return step.text + "".join(f"\n{text}{name}" for name, text, _ in step.documents)


class Dockerfile:
    """A Dockerfile: its lines, and the instructions that they are."""

    def __init__(self, name, text):
        self.name, self.escape = name, "\\"
        self.lines = text.removeprefix("\ufeff").split("\n")
        self.number = 0  # of the line that was read last
        self.take_directives()
        self.instructions = list(self.read())

    def fail(self, message, hint, line, column=1):
        """A Fail that shows a place in the text."""
        shown = self.lines[line - 1].rstrip()
        blank = "".join(c if c == "\t" else " " for c in shown[:column - 1])
        return Fail(f"{self.name}:{line}:{column}: {message}\n{line:6} | {shown}\n"
                    f"       | {blank}^", hint, 1)

    def take_directives(self):
        """Take `# escape=…` and its like, which stand above all else."""
        import re

        seen = set()
        for number, line in enumerate(self.lines, 1):
            match = re.fullmatch(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.+?)\s*", line)
            key = match[1].lower() if match else ""
            if key not in ("escape", "syntax", "check"):
                return
            if key in seen:
                raise self.fail(f"only one {key} parser directive can be used", "",
                                number)
            seen.add(key)
            if key == "escape" and match[2] not in ("\\", "`"):
                raise self.fail(f"invalid escape token {match[2]!r} does not match ` "
                                "or \\", "# escape=`", number, match.start(2) + 1)
            self.escape = match[2] if key == "escape" else self.escape

    def read(self):
        """Every instruction."""
        while found := self.logical_line():
            step = Instruction(self, *found)
            if step.name not in INSTRUCTIONS:
                import difflib

                near = difflib.get_close_matches(step.name, INSTRUCTIONS, 1)
                raise step.fail(f"unknown instruction: {step.name}",
                                f"do you mean {near[0]}?" if near else
                                f"known are {' '.join(INSTRUCTIONS)}")
            step.documents = [self.document(step, *named)
                              for named in step.documents_named()]
            scripts = [text for _, text, _ in step.documents if step.name == "RUN"]
            if "\0" in step.whole + "".join(scripts):
                at = max(step.whole.find("\0"), 0)
                raise step.fail("a NUL character", NO_NUL, at)
            understand(step)
            yield step

    def logical_line(self):
        """(text, spots) of the next lines that are one; None at the end."""
        text, spots, goes_on = "", [], False
        while self.number < len(self.lines):
            line = self.lines[self.number].rstrip("\r")
            self.number += 1
            bare = line.lstrip()
            if not bare or bare.startswith("#"):  # also between lines that are one
                continue
            begin = 0 if goes_on else len(line) - len(bare)
            spots.append((len(text), self.number, begin + 1))
            line = line[begin:]
            ending = line.rstrip(" \t")
            run = len(ending) - len(ending.rstrip(self.escape))
            goes_on = run == 1  # two of them are one, escaped
            text += ending[:-1] if goes_on else line
            if not goes_on:
                break
        return (text.rstrip(), spots) if text.strip() else None

    def document(self, step, name, strips, expands):
        """A here-document: the lines from here to the one that is its name."""
        found = []
        while self.number < len(self.lines):
            line = self.lines[self.number].rstrip("\r")
            self.number += 1
            line = line.lstrip("\t") if strips else line
            if line == name:
                return name, "".join(f"{text}\n" for text in found), expands
            found.append(line)
        raise step.fail("unterminated heredoc", f"a line {name} ends it",
                        step.whole.index("<<"))


def expand(step, at, text, known, document=False):
    """What a text that stands at a place of an instruction means, with variables.  In a
    here-document quotes are nothing special, and \\ escapes whatever the file says."""
    expansion = Expansion(text, known, "\\" if document else step.file.escape,
                          not document)
    try:
        return expansion.word()
    except ValueError as error:
        raise step.fail(f"{error}", "quotes, or an escape, make a character itself",
                        at + min(expansion.at, len(text)) - 1 if not document else at
                        ) from None
    except RecursionError:
        raise step.fail("variables are nested too deeply in each other",
                        "ENV and ARG give a name to what is inside", at) from None


# ── what is copied from ──
#
# A .dockerignore is a list of rules of which the last that matches a path decides; one
# with a ! takes back.  What matches a directory matches all that is in it, so a rule
# with ! may bring back a file of a directory that is itself left out.  But `*/*.log`
# and then `!keep` bring back nothing in keep: the ! came to it when it was not left
# out, had nothing to do, and does not come again.  In a rule ** is any number of
# directories.  The wildcards of COPY are those of Go's filepath.Match.
#
# A path is opened below the descriptor of a directory, once to be named in the key of
# the cache and once to be copied.


def has_wildcard(text):
    """Whether a name in a path means several."""
    return any(letter in text for letter in "*?[\\")


# What filepath.Match takes besides *; a class has to escape its - and its ].
MATCH_PART = r"[^*[\\]|\\.|\[\^?(?:(?:\\.|[^]\\-])(?:-(?:\\.|[^]\\-]))?)+\]"


def compiled(pattern, syntax, text, flags=0):
    """The regular expression that a pattern has become, if its syntax was right."""
    import re

    hint = "[ ] and \\ are special"
    if re.match(syntax, pattern, re.S):
        try:
            return re.compile(text, flags | re.ASCII)
        except re.error as error:
            hint = f"{error}"
    raise Fail(f"syntax error in pattern {pattern!r}", hint, 1)


def name_pattern(pattern):
    """The regular expression of a name, as filepath.Match takes it."""
    import re

    def meaning(found):
        if not found[2]:
            return {"*": "\0", "?": "."}.get(found[0], re.escape(found[0][-1]))
        return found[1] + re.sub(r"\\(.)|[^-]", lambda one: re.escape(
            one[1] or one[0]), found[2], flags=re.S) + "]"
    parts = re.sub(r"(\[\^?)((?:\\.|[^]\\])+)\]|\\?.", meaning, pattern, flags=re.S
                   ).split("\0")
    return compiled(pattern, rf"(?:{MATCH_PART}|\*)*\Z", joined_by_stars(parts), re.S)


class AllWays:
    """A regular expression that is matched as Go does it, going all ways at once: no
    rule, whoever wrote it, takes longer than its length times that of the path.

    It has to be one of rule_pattern(): what repeats in it is a letter."""

    def __init__(self, text, flags):
        import re

        self.any = re.compile(".*", flags)
        # Of three, a part is: any directories; a letter that repeats; letters.
        kinds = (r"(\(\.\*/\)\?)|((?:\.|\[(?:\\.|[^]\\])*\])\*)|"
                 r"((?:\\.|\[(?:\\.|[^]\\])*\](?!\*)|[^\\[.(])+)")
        self.parts = [[part and re.compile(part, flags) for part in parts]
                      for parts in re.findall(kinds, text, re.S)]

    def fullmatch(self, path):
        """Whether it matches all of a path."""
        places = {0}  # where we may be in it
        for any_depth, repeated, once in self.parts:
            if any_depth:
                places |= {at + 1 for at in self.beyond(places, self.any, path)
                           if path[at:at + 1] == "/"}
            elif repeated:
                places = self.beyond(places, repeated, path)
            else:
                places = {found.end() for at in places
                          if (found := once.match(path, at))}
        return len(path) in places

    @staticmethod
    def beyond(places, repeated, path):
        """These places, and where any number of such letters leads from them."""
        reach = set()
        for at in sorted(places):
            if at not in reach:
                reach.update(range(at, repeated.match(path, at).end() + 1))
        return reach


def rule_pattern(pattern):
    """The regular expression of a rule, made letter by letter as Docker makes it: what
    is escaped is what that is in one, \\d a digit, and in a class * is no star.  Plain
    text with ** at one end is whatever begins or ends so."""
    import re

    plain = any(not re.search(r"[][*?\\]", rest) for rest in (
        pattern.removeprefix("**"), pattern.removesuffix("**")))

    def meaning(found):
        text = found[0]
        if text.startswith("**"):
            return ".*" if found.end() == len(pattern) or plain and text == "**" else (
                "(.*/)?")
        return {"*": "[^/]*", "?": "[^/]", "\\z": "\\Z"}.get(text) or (
            re.escape(text) if plain or text in ".+()|{}$&~" else text)
    # Go knows no more escapes than these; [[:digit:]] it knows, and Python does not.
    odd = re.search(r"\\(?![aAbBdDfnrsStvwWxz0])([^\W_]|[^\0-\x7f])|\[[^]]*\[:.*:\]",
                    re.sub(r"\\\\", "", pattern))
    if odd:
        raise Fail(f"syntax error in pattern {pattern!r}", f"{odd[0]} means nothing", 1)
    text = re.sub(r"\*\*/?|\\?.", meaning, pattern, flags=re.S)
    text = re.sub(r"(\\.)|\[(?=\[)",  # to Python [[ is to be something of its own
                  lambda found: found[1] or "[\\", text, flags=re.S)
    # Docker has filepath.Match look at it only up to a * that follows on something.
    compiled(pattern, rf"\**(?!\*)(?:{MATCH_PART})*(\*|\Z)", text)
    return AllWays(text, re.S * plain | re.ASCII)


class IgnoreRules(list):
    """(a pattern, whether it takes back) each, and what they said of directories."""

    def __init__(self, rules):
        super().__init__(rules)
        self.known = {"": [False] * len(rules)}

    def matches(self, path):
        """Which of them match a path, or have matched a directory that it is in.  Who
        would take back what is not left out, or the reverse, is not asked."""
        above, found, out = os.path.dirname(path), [], False
        if above not in self.known:
            self.known[above] = self.matches(above)
        for (pattern, back), match in zip(self, self.known[above], strict=True):
            match = match or back == out and bool(pattern.fullmatch(path))
            out = not back if match else out
            found.append(match)
        return found


def rules_of(text):
    """What a .dockerignore says: (a pattern to match, whether it takes back)."""
    rules = []
    for line in text.removeprefix("\ufeff").split("\n"):
        pattern = "" if line.startswith("#") else line.strip()
        sign = pattern[:1] if pattern.startswith("!") else ""
        if pattern := pattern[len(sign):].strip():
            pattern = os.path.normpath(pattern).lstrip("/")
        pattern = (sign + pattern).strip()  # so /!x is !x
        back = pattern.startswith("!")
        if pattern == "!":
            raise Fail('illegal exclusion pattern: "!"', "! and what is to stay", 1)
        if pattern:
            rules.append((rule_pattern(pattern[back:]), back))
    return IgnoreRules(rules)


def is_excluded(rules, path):
    """Whether rules leave out a path: the last one that matches decides."""
    if not rules or path == ".":
        return False
    matching = [back for (_, back), match in zip(
        rules, rules.matches(path), strict=True) if match]
    return not (matching or [True])[-1]


def file_entry(fd):
    """The Entry of one file, by its descriptor."""
    status, path = os.fstat(fd), f"/proc/self/fd/{fd}"
    entry = Entry(".", status.st_mode, (status.st_uid, status.st_gid),
                  status.st_size * stat.S_ISREG(status.st_mode), status.st_mtime_ns)
    entry.device = status.st_rdev
    entry.xattrs = {key: os.getxattr(path, key) for key in sorted(os.listxattr(path))}
    entry.stream = open(path if entry.size else os.devnull, "rb")
    return entry


def text_entry(text, when):
    """The Entry of a file with that text."""
    import io

    data = text.encode("utf-8", "surrogateescape")
    entry = Entry(".", stat.S_IFREG | 0o644, (0, 0), len(data), when)
    entry.stream = io.BytesIO(data)
    return entry


def is_archive(fd):
    """Whether ADD unpacks a file: a tarball, compressed or not."""
    path = f"/proc/self/fd/{fd}"
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # a pipe would be waited for
            return False
        parts = plain_pieces(path, path)
        head = next(parts, b"")[:512]
        parts.close()
        return len(head) == 512 and tar_number(head[148:156]) == (
            sum(head) - sum(head[148:156]) + 8 * 32)
    except (Fail, ValueError):
        return False
    finally:
        os.close(fd)


class Tree:
    """Files that can be copied from: the context, or all that a stage has made.

    A path leads nowhere else, whatever symlinks are on the way (P4): out of the context
    it is refused, and / of a stage is its own."""

    def __init__(self, fd, rules=(), of_stage=""):
        self.fd, self.rules = fd, rules
        self.of_stage = of_stage  # the directory that its overlay needs, or ""

    def close(self):
        """Give it back; that unmounts it."""
        os.close(self.fd)
        remove_tree(self.of_stage)

    def open(self, path, flags=O_PATH):
        """A descriptor of what is there, symlinks followed."""
        how = open_how(flags=flags | O_CLOEXEC, resolve=RESOLVE_NO_MAGICLINKS | (
            RESOLVE_IN_ROOT if self.of_stage else RESOLVE_BENEATH))
        return syscall("openat2", self.fd, path.lstrip("/") or ".", how,
                       sizeof(how), why="what is to be copied")

    def find(self, step, at, text, wild=True):
        """(path, whether it is a directory) of each that a source of COPY means; with
        wildcards that may be none: so a file is named that need not be, `yarn.lock*`.
        """
        path = os.path.normpath(f"/{text}")[1:]
        if not self.of_stage and ".." in text.split("/") and os.path.normpath(
                text.lstrip("/")).startswith(".."):
            raise self.outside(step, at, text)
        wild = wild and has_wildcard(path)
        names = path.split("/") if ("parents", "true") in step.flags else [
            "*" if name == "**" else name for name in path.split("/")]  # as in Go
        found = sorted(self.matching("", names)) if wild else [path]
        there = []
        for one in found:
            try:
                fd = self.open(one)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise self.outside(step, at, one) from None
                continue  # a dead link; another may be alive
            whole_ = stat.S_ISDIR(os.fstat(fd).st_mode)
            if not is_excluded(self.rules, self.real_path(one, fd)) or (
                    whole_ and any(entry.name != "." for entry in self.entries(one))):
                there.append((one, whole_))
            os.close(fd)
        if not there and not wild:
            where = "stage" if self.of_stage else "build context or excluded by " \
                ".dockerignore"
            raise step.fail(f"{step.name} failed: file not found in {where}: stat "
                            f"{text}: file does not exist", "paths are relative to the "
                            "context, not to the Dockerfile", at)
        return there

    def outside(self, step, at, path):
        """What is said of a source that is not in the context."""
        return step.fail(f"{step.name} failed: forbidden path outside the build "
                         f"context: {path}", "what is copied has to be in the context",
                         at)

    def real_path(self, path, fd):
        """Where in the context a descriptor has led to, with symlinks followed."""
        if self.of_stage or not self.rules:
            return path
        top, there = (os.readlink(f"/proc/self/fd/{n}") for n in (self.fd, fd))
        return os.path.relpath(there, top)

    def matching(self, above, parts):
        """The paths that a pattern means, name by name; ** is any number of names.  A
        symlink that only a wildcard has found is not followed on the way."""
        if not parts:
            yield above
            return
        name, *rest = parts
        if not has_wildcard(name):
            yield from self.matching(os.path.join(above, name), rest)
            return
        yield from self.matching(above, rest) if name == "**" else ()
        try:
            fd = self.open(above, os.O_RDONLY | O_DIRECTORY)
        except OSError as error:
            if error.errno == errno.EXDEV:
                yield above  # find() refuses what leads out
            return
        try:
            names = sorted((entry.name, entry.is_dir(follow_symlinks=False))
                           for entry in os.scandir(fd))
        finally:
            os.close(fd)
        pattern = name_pattern(name)
        below = parts if name == "**" else rest
        for found, goes_on in names:
            if (name == "**" or pattern.fullmatch(found)) and (goes_on or not below):
                yield from self.matching(os.path.join(above, found), below)

    def entries(self, path, excluding=()):
        """An Entry for each file at a place, in the order of their names."""
        fd = self.open(path)
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                yield from self.entries_in(fd, self.real_path(path, fd), excluding)
            elif not is_excluded(excluding, os.path.basename(path)):
                yield self.made_ours(file_entry(fd))
        finally:
            os.close(fd)

    def with_parents(self, path, name, excluding):
        """entries() of a place that is to be called `name`; before them the directories
        that are in that name, as .. and ../.., with the modes and owners they have."""
        for way in (depth * "/.." for depth in range(name.count("/"), 0, -1)):
            fd = self.open(os.path.normpath(path + way))
            entry = self.made_ours(file_entry(fd))
            os.close(fd)
            entry.name = way[1:]
            yield entry
        yield from self.entries(path, excluding)

    def made_ours(self, entry):
        """An entry of the context as if root had made it."""
        if not self.of_stage:
            entry.uid = entry.gid = 0
            entry.xattrs = {}
        return entry

    def entries_in(self, fd, base, excluding):
        """The same for a directory, without what is left out."""

        def left_out(inner):
            return is_excluded(self.rules, os.path.normpath(os.path.join(base, inner))
                               ) or is_excluded(excluding, inner)

        def worth_a_look(inner):  # with a ! among the rules anything may come back
            return any(back for _, back in (*self.rules, *excluding)) or (
                not left_out(inner))
        passed = {}  # directories that are there only for what may be in them
        for entry in tree_entries(fd, ".", 0, worth_a_look):
            if entry.name != "." and left_out(entry.name):
                if stat.S_ISDIR(entry.mode):
                    passed[entry.name] = entry
                continue
            above = os.path.dirname(entry.name)
            for name in [name for name in passed
                         if f"{above}/".startswith(f"{name}/")]:
                yield self.made_ours(passed.pop(name))
            if entry.hard and left_out(entry.hard):
                entry.hard = ""  # what it is a link to is not there: it is the file
            yield self.made_ours(entry)


class Item:
    """One thing to copy: what it is called, and its entries, as often as needed."""

    def __init__(self, name, entries, is_tree=False, open_archive=None):
        self.name = name  # below the place it goes to, if that is a directory
        self.entries = entries  # a function
        self.is_tree = is_tree  # a directory, of which the content is copied
        self.open_archive = open_archive  # a function, if its content is unpacked

    def times(self, entries):
        """The entries, one by one; from then on is_as_it_was() knows of what time and
        size each file was, before anybody has read it."""
        import hashlib

        seen = hashlib.sha256()
        for entry in entries:
            if stat.S_ISREG(entry.mode):
                seen.update(to_json([entry.name, entry.size, entry.when]).encode())
            yield entry
        self.seen = seen.hexdigest()

    def is_as_it_was(self):
        """Whether nobody has written to it since digest()."""
        before = self.seen
        for _ in self.times(self.entries()):
            pass
        return self.seen == before

    def digest(self):
        """A digest of all that matters of it: no times."""
        import hashlib

        found = hashlib.sha256()
        for entry in self.times(self.entries()):
            found.update(to_json([
                entry.name, entry.mode, entry.uid, entry.gid, entry.size, entry.link,
                entry.hard, entry.device, {key: value.hex() for key, value in sorted(
                    entry.xattrs.items())}]).encode())
            if stat.S_ISREG(entry.mode) and not entry.hard:
                while part := entry.stream.read(1 << 20):
                    found.update(part)
        return found.hexdigest()


# ── the state, and its files ──
#
# Docker's rules of COPY, which are not those of `cp`:
#
#       a file         into a target that ends with / or is a directory; else as that
#       a directory    what is in it, into the target, which becomes one
#       several        only into a target that ends with /
#       an archive     with ADD, if it is one by its content: what is in it; --chown
#                      counts for that, --chmod does not
#
# Directories that are missing are made, and belong to whom --chown says, else to root,
# with mode 755.  What comes from the context is root's; from a stage it is whose it
# was.  Modes are kept, also setuid; a target that is there keeps its own.


def unpacked(descriptor, diff_id):
    """The directory of a layer; it is unpacked again if it is missing."""
    if not os.path.isdir(layer_path(diff_id)):
        unpack_layer(diff_id, blob_path(descriptor["digest"]))
    return layer_path(diff_id)


class State:
    """What a stage has come to: layers, config, history, variables, the cache's key."""

    def __init__(self, **known):
        self.layers = []  # (descriptor, diff_id, bytes of its files), bottom first
        self.config = {}  # os, architecture …
        self.settings = {}  # the part of it called "config": Env, Cmd …
        self.history = []
        self.key = ""
        self.args = {}  # ARG: name and value; who begins with this stage has them too
        vars(self).update(known)

    def copy(self):
        """One like it, to go on from."""
        return State(**from_json(to_json(vars(self))))

    def directories(self):
        """Where its layers are, bottom first; see image_layers()."""
        found = {}
        for descriptor, diff_id, _ in self.layers:
            found.pop(diff_id, None)
            found[diff_id] = unpacked(descriptor, diff_id)
        return list(found.values())

    def env(self):
        """{name: value} of ENV."""
        return dict(line.partition("=")[::2] for line in self.settings.get("Env") or ())


def mounted(state, directory):
    """A Container of which only / is there, and open: the layers of a state, below what
    is written to `upper` in a directory.  It is mounted nowhere but in a workshop that
    has been left: with the last descriptor it is gone."""
    c = Container("build", {"root": {"path": "upper"}, "linux": {}}, directory,
                  state.directories())
    c.workshop, c.throw_away = store("workshop", ""), True
    open_workshop(c)
    try:
        build_rootfs(c)
        c.root_fd = open_fd("rootfs", O_PATH | O_DIRECTORY)
        return c
    finally:
        leave_workshop(c)


def keep_changes(upper, base, when):
    """Bring what an upper directory holds into the store as a layer: what keep_layer()
    says of it, or None if that is nothing."""
    if not os.listdir(upper):
        return None
    return keep_layer(*spool((), lambda file: pack(upper, file, base, when)),
                      "what a step has made")


def new_upper(state):
    """A new directory with an `upper`, to which / is like that of a state, and `work`.
    """
    layers = state.directories()
    like = os.stat(layers[-1]) if layers else None
    path = temporary_directory("layers")
    for name in ("upper", "work"):
        os.mkdir(f"{path}/{name}", 0o755)
    if like:
        os.chown(f"{path}/upper", like.st_uid, like.st_gid)
        os.chmod(f"{path}/upper", stat.S_IMODE(like.st_mode))
    return path


def with_files(state, write, when, alone=False):
    """The layer that write(c) makes, given the files so far as in mounted(); or, if it
    has to be `alone`, given none."""
    path = new_upper(state)
    try:
        c = mounted(State() if alone else state, path)
        try:
            write(c)
        finally:
            os.close(c.root_fd)
        return keep_changes(f"{path}/upper", 0, when)
    finally:
        remove_tree(path)


def make_way(c, path, owner=(0, 0), links=0):
    """A descriptor of a directory of the container; it is made if it is missing, and
    so are those above it, which belong to the same owner."""
    try:
        return open_inside(c, path, O_PATH | O_DIRECTORY)
    except NotADirectoryError:
        raise Fail(f"cannot copy to non-directory: {path}", "", 1) from None
    except FileNotFoundError:
        above = make_way(c, os.path.dirname(path), owner, links)
    try:
        os.mkdir(os.path.basename(path), 0o755, dir_fd=above)
        set_owner(os.path.basename(path), owner, above)
    except ValueError as error:
        raise Fail(f"{path}: {error}", "a smaller number, or more ids", 1) from None
    except FileExistsError:  # a symlink to what is not there
        if links == 40:
            raise Fail(f"{path}: too many levels of symbolic links", "", 1) from None
        name = os.path.join(os.path.dirname(path), os.readlink(
            os.path.basename(path), dir_fd=above))
        return make_way(c, os.path.normpath(name), owner, links + 1)
    finally:
        os.close(above)
    return open_inside(c, path, O_PATH | O_DIRECTORY)


def owner_inside(c, text):
    """(user id, group id) of --chown, by the image's own files; a user without a group
    has the one of passwd, a number without one has itself."""
    name, _, group = text.partition(":")
    name = name or "0"
    row = look_up(image_table(c, "/etc/passwd"), name, "user", 4)
    user = int(row[2]) if row else int(name)
    if not group:
        return user, int(row[3]) if row and not name.isdecimal() else user
    row = look_up(image_table(c, "/etc/group"), group, "group", 3)
    return user, int(row[2]) if row else int(group)


def mode_change(text):
    """What --chmod makes of a mode, a function: octal digits are it, and u=rwX,go=rX
    changes it as chmod(1) does with a umask of 022; None if it is neither."""
    import re

    if re.fullmatch("0*[0-7]{1,4}", text):
        return lambda mode: int(text, 8)
    clauses = []
    for clause in text.split(","):
        match = re.fullmatch(r"([ugoa]*)((?:[-+=](?:[ugo]|[rwxXst]*))+)", clause)
        if not match:
            return None
        clauses += [(match[1], *action) for action in re.findall(
            r"([-+=])([ugo]|[rwxXst]*)", match[2])]

    def change(mode):
        new, some_x = stat.S_IMODE(mode), stat.S_ISDIR(mode) or mode & 0o111
        for who, sign, what in clauses:
            who_ = "ugo" if not who or "a" in who else who
            bits = sum({"r": 4, "w": 2, "x": 1, "X": bool(some_x)}.get(c, 0)
                       for c in set(what)) if what not in tuple("ugo") else (
                           new >> "ogu".index(what) * 3 & 7)
            value, mask = (sum(n << "ogu".index(c) * 3 for c in set(who_))
                           for n in (bits & 7, 7))
            for c, flag, whose in (("s", 0o4000, "u"), ("s", 0o2000, "g"),
                                   ("t", 0o1000, "o")):
                mask |= flag * (whose in who_)
                value |= flag * (whose in who_ and c in what)
            value &= -1 if who else ~0o022
            new = {"+": new | value, "-": new & ~value, "=": new & ~mask | value}[sign]
        return new
    return change


class Target(Layer):
    """A directory of the image that entries are copied into.  On their way symlinks
    lead where they do inside, and nowhere else (P4)."""

    def __init__(self, c, path, fd):
        super().__init__(f"/proc/self/fd/{fd}")
        self.c, self.path = c, path

    def walk(self, parts):
        """A descriptor of a directory below, as Layer's."""
        try:
            return open_inside(self.c, os.path.join(self.path, *parts),
                               os.O_RDONLY | O_DIRECTORY)
        except OSError:
            return super().walk(parts)


def check_kind(entry, path, parent=None, name=""):
    """Refuse to put a file in place of a directory, or the reverse; what is there has
    that path, or that name in a directory that is open."""
    try:
        there = os.stat(name or path, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(entry.mode) and not stat.S_ISDIR(there):
        raise Fail(f"cannot copy to non-directory: {path}",
                   "remove it; if it is a symlink, name where it leads", 1)
    if stat.S_ISDIR(there) and not stat.S_ISDIR(entry.mode):
        raise Fail(f"cannot overwrite directory with non-directory: {path}",
                   "remove the directory, or choose another target", 1)


class Copying:
    """A COPY or ADD once all words are known: what goes where, as whose."""

    def __init__(self, items, target, owner="", mode=None, parents=False):
        self.items, self.target, self.owner = items, target, owner
        self.mode, self.parents = mode, parents  # mode: a function, or None

    def write(self, c):
        """Copy it all into the files of a stage."""
        owner = owner_inside(c, self.owner) if self.owner else None
        for item in self.items:
            path, name = self.target, item.name
            if item.is_tree and not self.parents or item.open_archive:
                name = ""  # it is what is in it that is copied
            elif not (path.endswith("/") or self.parents or len(self.items) > 1 or
                      self.is_directory(c, path)):
                path, name = os.path.split(self.without_links(c, path, owner))
            fd = make_way(c, path.rstrip("/") or "/", owner or (0, 0))
            with Target(c, path, fd) as target:
                self.copy(item, target, name, owner)
            os.close(fd)

    def is_directory(self, c, path):
        """Whether there is a directory already."""
        try:
            os.close(open_inside(c, path, O_PATH | O_DIRECTORY))
            return True
        except (FileNotFoundError, NotADirectoryError):
            return False

    def without_links(self, c, path, owner):
        """Where a file comes to be that is to have that name: if there is a symlink,
        where it leads.  They are in no circle: is_directory() has followed them."""
        above, name = os.path.split(path)
        fd = make_way(c, above, owner or (0, 0))
        try:
            link = os.readlink(name, dir_fd=fd)
        except OSError:  # it is none, or not there
            return path
        finally:
            os.close(fd)
        return self.without_links(c, os.path.normpath(os.path.join(above, link)), owner)

    def copy(self, item, target, name, owner):
        """Copy one item into a directory, by a name or what is in it."""
        def placed(entries):
            for entry in entries:
                if owner:
                    entry.uid, entry.gid = owner
                if self.mode and not item.open_archive and (
                        not stat.S_ISLNK(entry.mode)):
                    entry.mode = stat.S_IFMT(entry.mode) | self.mode(entry.mode)
                entry.name = os.path.normpath(f"{name}/{entry.name}".lstrip("/"))
                entry.hard = entry.hard and f"{name}/{entry.hard}".lstrip("/")
                if entry.name == ".":  # the directory itself is not copied
                    continue
                if os.path.basename(entry.name).startswith(".wh."):
                    raise Fail(f"{entry.name}: a name that layers keep to themselves",
                               "it says that a file is gone: call it otherwise", 1)
                if not item.open_archive:
                    check_kind(entry, os.path.join(target.path, entry.name),
                               *target.parent(entry.name))
                yield entry
        if not item.open_archive:
            target.add_all(placed(item.entries()), item.name or ".")
            return
        fd = item.open_archive()
        try:
            with Tarball(f"/proc/self/fd/{fd}", item.name) as tarball:
                target.add_all(placed(tarball), item.name)
                tarball.digest()
        except (ValueError, EOFError) as error:
            raise damaged(item.name, error) from None
        finally:
            os.close(fd)


# ── the cache ──
#
# steps/KEY.json holds the parts that the key was made of, to be compared with when a
# step is not found, and the layer that the step has made.  The layer belongs to the
# store, as an image's does, and is not swept away while a step leads to it.
#
# What was damaged is told by sizes, times, modes and owners, which are noted beside it:
# to read all of a cache at each build would cost more than it saves.  So a disk that
# returns other bytes than were written, with no time changed, is not found out.


def digest_of(document):
    """A short digest of a document."""
    import hashlib

    return hashlib.sha256(to_json(document).encode()).hexdigest()[:32]


def tree_digest(top):
    """A digest of what lstat(2) says of all in a directory: it changes when anybody
    writes there, as a layer's files have the times of their tarball."""
    import hashlib

    found, waiting = hashlib.sha256(), [top]
    for directory in waiting:  # grows while we read it
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            facts = entry.stat(follow_symlinks=False)
            found.update(os.fsencode(to_json([entry.path[len(top):], facts.st_mode, [
                facts.st_uid, facts.st_gid], facts.st_size, facts.st_mtime_ns])))
            if stat.S_ISDIR(facts.st_mode):
                waiting.append(entry.path)
    return found.hexdigest()


def seen_of(layer):
    """What can be seen of a layer of the store without reading all of it: whether its
    blob, and its directory, are as they were left."""
    blob, top = blob_path(layer[0]["digest"]), layer_path(layer[1])
    facts = os.stat(blob) if os.path.exists(blob) else None
    return {"blob": facts and [facts.st_size, facts.st_mtime_ns],
            "tree": tree_digest(top) if os.path.isdir(top) else ""}


def repair(layer, known):
    """Look closer at a layer that is not as it was seen: a blob counts if its digest is
    right, and a directory is unpacked from it again."""
    descriptor, diff_id, _ = layer
    now, top = seen_of(layer), layer_path(diff_id)
    if now["tree"] != known["tree"] and now["tree"]:
        say(f"{top} is not as it was: it is unpacked again")
        remove_tree(top)
    if now["blob"] != known["blob"]:
        with open(blob_path(descriptor["digest"]), "rb") as file:
            if sha256(file) != descriptor["digest"]:
                raise ValueError("its layer is not what it was")
    unpacked(descriptor, diff_id)


def remembered(key):
    """(whether the cache has a step, its layer or None): what is damaged is repaired
    from the layer's blob, or was never there."""
    path = store("steps", f"{key}.json")
    if not os.path.exists(path):
        return False, None
    try:
        step = from_json(read_file(path))
        if digest_of(step["parts"]) != key:
            raise ValueError("these are not the parts of that key")
        layer = step["layer"]
        if layer and step["seen"] != seen_of(layer):
            repair(layer, step["seen"])
            save(path, {**step, "seen": seen_of(layer)})
        return True, layer
    except (OSError, ValueError, LookupError, TypeError, AttributeError, Fail) as error:
        say(f"the cache of a step was damaged, and is made anew: {error}")
        take_away_file(path)
        return False, None


def why_missed(parts):
    """In words, all that differs from the step in the cache that is most like this one.
    """
    verb, least, words = parts["instruction"].split()[0], [], {}
    for _, known, _ in cached_steps():
        differing = [name for name in {**parts, **known}
                     if known.get(name) != parts.get(name)]
        if known["instruction"].split()[0] == verb and differing and (
                not least or len(differing) < len(least)):
            least = differing
            words = {"parent": "what it builds on has changed",
                     "instruction": f"the instruction was {known['instruction']!r:.99}",
                     "epoch": "SOURCE_DATE_EPOCH has changed"}
    return "; ".join(words.get(name, f"{name} has changed") for name in least) or (
        "nothing like it is in the cache")


# ── what a person sees of it ──


LAST_LINES = 3  # of what a step writes, on a terminal


class View:
    """The steps that run now, on a terminal: what each is, for how long, and the last
    lines it has written.  Those that have ended stand above, and move no more.

    The cursor waits below; so whatever ends us, it is where a shell wants it."""

    def __init__(self):
        self.height = 0
        self.rows = {}  # who: [title, since when, what it wrote] of each step begun

    def hear(self, who, news, text):
        """Take what a stage tells: that a step begins, writes, ends, or has failed."""
        above = []
        if news == "begin":
            self.rows.setdefault(who, []).append([text, time.monotonic(), ""])
        elif news == "write":  # draw() will show it, soon enough
            self.rows[who][-1][2] = (self.rows[who][-1][2] + text)[-(1 << 12):]
            return
        elif news == "end":
            title, began, _ = self.rows[who].pop()
            note, *why = text.split("\n")
            above = [(f" => {title}", note or f"{time.monotonic() - began:.1f}s"),
                     *((f"    {line}", "") for line in why)]
        else:
            above = [(line, "") for line in text.splitlines()]
        self.draw(above)

    def draw(self, above=()):
        """Show how it is now, below the lines that are to stay."""
        high, wide = struct.unpack("4H", window_size() or b"\0" * 8)[:2]
        high, wide, lines = high or 24, wide or 80, []
        for title, began, tail in sum(self.rows.values(), []):
            lines.append((f" => {title}", f"{time.monotonic() - began:.1f}s"))
            lines += [(f"    | {line}", "") for line in tail.splitlines()[-LAST_LINES:]]
        above, shown = ("".join(self.fitting(*line, wide - 1) for line in part)
                        for part in (above, lines[:high - 1]))
        write_all(2, (f"\x1b[{self.height}A" * bool(self.height) + f"\x1b[J{above}"
                      f"\x1b[?7l{shown}\x1b[?7h").encode())  # 7: no line is wrapped
        self.height = len(lines[:high - 1])

    def fitting(self, line, note, wide):
        """A line and a note; if both do not fit, the end of the line goes."""
        if note:
            line = f"{line[:max(wide - len(note) - 2, 9)]}  {note}"
        return "".join(c if c.isprintable() else " " for c in line) + "\n"


class Report:
    """Tells how the steps of a stage get on, on standard error: as lines, to a View, or
    not at all but for what a step that failed has written.  Why a step was not in the
    cache is told in any case if the kernel's calls are, with --explain."""

    def __init__(self, style, explain=False):
        self.style, self.explain = style, explain
        self.prefix, self.tail, self.rest, self.why = "", b"", b"", ""
        self.view = View()
        self.hear = lambda *news: self.view.hear("", *news)  # or in_parallel's tell

    def begin(self, title):
        """A step begins."""
        self.tail, self.why = b"", ""
        if self.style == "plain":
            self.line(title)
        if self.style == "tty":
            self.hear("begin", self.prefix + title)

    def line(self, text):
        """Print a line, in a write of its own."""
        write_all(2, f"{self.prefix}{text}\n".encode("utf-8", "surrogateescape"))

    def missed(self, why):
        """Say why a step is not in the cache."""
        self.why = f"\nnot in the cache: {why}"
        if self.style == "plain" or self.style == "quiet" and self.explain:
            self.line(f" ---> {self.why[1:]}")

    def write(self, data):
        """Show what a step writes."""
        self.tail = (self.tail + data)[-(1 << 14):]
        if self.style == "tty":
            self.hear("write", data[-300:].decode("utf-8", "replace"))
        elif self.style == "plain" and self.prefix:
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                self.line(line.decode("utf-8", "surrogateescape"))
        elif self.style == "plain":
            write_all(2, data)
            self.rest = data.rpartition(b"\n")[2]

    def end(self, note):
        """A step has ended, and how."""
        if self.rest:  # its last line had no end
            self.write(b"\n")
        if self.style == "plain" and note:
            self.line(f" ---> {note}")
        if self.style == "tty":
            self.hear("end", note + self.why)

    def failed(self):
        """Show what has not been shown so far."""
        if self.rest:
            self.write(b"\n")
        if self.style == "quiet":
            write_all(2, self.tail)
        if self.style == "tty":
            self.hear("end", "ERROR")
            for line in self.tail.decode("utf-8", "replace").splitlines():
                self.hear("failed", line[:600])  # a message has to be short


class Listener(Client):
    """Who hears what a RUN writes.  Unlike a person's `run` it does not ask its process
    to end, which as process 1 may not listen: Ctrl-C kills it."""

    def __init__(self, report):
        super().__init__(False, False, owner=True)
        self.report, self.stopped = report, 0

    def hear(self, letter, data):
        """Take what the shim sends."""
        if self.runs and letter in (b"o", b"e"):
            self.report.write(data)
        else:
            super().hear(letter, data)

    def take_signal(self, about):
        """Kill the process if a person wants to stop; other signals are not for it."""
        number = struct.unpack_from("I", about)[0]
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) and self.peer and (
                signal.getsignal(number) != signal.SIG_IGN):  # nohup, a shell's `&`
            self.stopped = number
            self.peer.send(b"s", bytes([signal.SIGKILL]))


# ── RUN ──
#
# The container is one of chapter 12, with its record, its range of ids and its network;
# only it has no name that anybody asked for, and is removed when its upper directory
# has become the layer.  An id beyond its 65,536, which COPY may give to a file, is
# nobody's to a RUN, and there is no such user, but with --userns host.
#
# To mount something makes a place to mount on in that directory, which is taken out
# again: /etc/hosts of a build is in no image.


# Which of the options of `run` a build has too, for each of its containers.
LIMITS_OF_RUN = tuple(option for option in OF_CREATE if {*option[0]} & {*"""
    --memory --memory-swap --cpu-shares --cpus --cpuset-cpus --cpuset-mems --shm-size
    --pids-limit --ulimit --add-host --dns --network --userns
    --security-opt""".split()})


RUN_MOUNT_WORDS = {  # of --mount of RUN: the keys that each type may have
    "bind": "target from source rw", "tmpfs": "target size",
    "cache": "target id ro sharing mode uid gid from source",
    "secret": "target id required mode uid gid env"}


SAME_WORDS = {"dst": "target", "destination": "target", "src": "source",
              "readwrite": "rw", "readonly": "ro"}


YES, NO = "1 t T TRUE true True".split(), "0 f F FALSE false False".split()  # as in Go


def mount_words(step, text, at):
    """{key: value} of a --mount of RUN, checked."""
    words = {}
    for part in fields_of(text):
        key, equals, value = part.partition("=")
        words[SAME_WORDS.get(key, key)] = value if equals else "true"
    kind = words.setdefault("type", "bind")
    if kind not in RUN_MOUNT_WORDS:
        raise step.fail(f"unsupported mount type {kind!r}",
                        f"known are {', '.join(RUN_MOUNT_WORDS)}", at)
    known = RUN_MOUNT_WORDS[kind].split()
    for key in sorted({*words} - {"type", "ro", "rw", *known}):
        raise step.fail(f"unexpected key {key!r} for mount type {kind!r}",
                        f"it has {', '.join(known)}", at)
    if kind == "cache" and "source" in words and "from" not in words:
        raise step.fail("source= of a cache mount needs from=", "from=STAGE", at)
    for key in sorted({"mode", "uid", "gid"} & {*words}):
        digits = {*"01234567"} if key == "mode" else {*"0123456789"}
        if {*words[key]} - digits or not words[key] or len(words[key]) > 20 or (
                int(words[key], 8 if key == "mode" else 10) > (
                    0o7777 if key == "mode" else (1 << 32) - 2)):
            raise step.fail(f"invalid {key} of a mount: {words[key]!r}", "a number", at)
    for key in sorted({"rw", "ro", "required"} & {*words}):
        if words[key] not in (*YES, *NO):
            raise step.fail(f"invalid value for {key}: {words[key]}", "true or false",
                            at)
        words[key] = words[key] in YES
    if words.get("sharing", "shared") not in ("shared", "private", "locked"):
        raise step.fail(f"unsupported sharing value {words['sharing']!r}",
                        "shared, private or locked", at)
    named = kind == "secret" and (words.get("id") or words.get("env"))
    if not words.get("target") and not named:
        raise step.fail(f"invalid mount: {text!r} has no target", "target=/DIR", at)
    return {**words, "at": at}  # the flag, as it stands there


def options_of_run(given):
    """The options of a `run`: their defaults, and those that the build was given."""
    options = Options()
    for names, how in (*RUN_OPTIONS, *OF_CREATE):
        name = max(names[:2], key=len).lstrip("-").replace("-", "_")
        empty = False if how.get("action") == "store_true" else None
        default = how.get("default", empty)
        setattr(options, name, default[:] if default == [] else default)
    for names, _ in LIMITS_OF_RUN:
        name = max(names[:2], key=len).lstrip("-").replace("-", "_")
        setattr(options, name, getattr(given, name))
    options.health, options.own_volumes, options.exposed = {}, [], []
    options.own_labels, options.image, options.stop_signal = {}, "build", "SIGKILL"
    options.no_healthcheck, options.log_driver = True, "none"
    return options


def choose_users(options):
    """Find out whether each RUN can have ids of its own, and if not start anew now:
    later we have read our input, and may be one process of several."""
    if not options.userns and not rootless.uid:
        layers, first = store("layers", ""), CONTAINER_IDS[0]
        maps = [{"containerID": 0, "hostID": first, "size": CONTAINER_IDS[1]}]
        tree = syscall("open_tree", AT_FDCWD, layers, OPEN_TREE_CLONE
                       | OPEN_TREE_CLOEXEC, why="a copy of this mount, to try it")
        try:
            users = user_namespace(maps, maps)
            set_attributes(tree, 0, 0, users, layers)
            os.close(users)
        except CannotMapIds as error:
            say(f"{error.message}: using the host's user namespace (root inside is "
                "root outside)")
            options.userns = "host"
        except OSError:  # there are no user namespaces: a RUN will say so
            pass
        os.close(tree)
    if options.userns:
        seal_interpreter({"linux": {"namespaces": []}})


def check_limits(given):
    """Refuse what no container could have, before any step is done."""
    options = options_of_run(given)
    options.like, options.notes = None, {}
    choose_network(options)
    host_lines(options.add_host, "127.0.0.1")
    make_spec(options, "0" * 64, [])


def is_noise(facts, path, layers, base):
    """Whether a directory of an upper one that is empty says nothing: it is not there
    below, or is there with the same mode and owner."""
    below = next((os.lstat(there) for layer in reversed(layers)
                  if os.path.lexists(there := f"{layer}/{path}")), None)
    return not below or (below.st_mode, shifted_id(below.st_uid, base), shifted_id(
        below.st_gid, base)) == (facts.st_mode, facts.st_uid, facts.st_gid)


def clear_stubs(upper, mounts, layers, base):
    """Remove from an upper directory what was only made to mount on, and the way there
    if nothing else is on it."""
    top = os.open(upper, os.O_RDONLY | O_DIRECTORY)
    for mount in sorted(mounts, key=lambda m: -m["destination"].count("/")):
        path = mount["destination"].strip("/")
        while path:
            above, name = os.path.split(path)
            try:
                parent = open_beneath(top, above or ".")
            except OSError:  # it is not there, or no directory
                break
            try:
                facts = os.stat(name, dir_fd=parent, follow_symlinks=False)
                hides = stat.S_ISDIR(facts.st_mode) and OPAQUE in (
                    os.listxattr(f"/proc/self/fd/{parent}/{name}"))  # what is below
                if stat.S_ISREG(facts.st_mode) and not facts.st_size:
                    os.unlink(name, dir_fd=parent)
                elif not hides and is_noise(facts, path, layers, base):
                    os.rmdir(name, dir_fd=parent)
            except OSError:  # not there, or not empty
                pass
            finally:
                os.close(parent)
            path = above
    os.close(top)


def run_in(options, args, report, when):
    """Run a command in a container: (exit code, the layer that it leaves or None).

    There will be more after it, so we stand where we stood before in the end, and
    signals are as they were."""
    mask, home = signal.pthread_sigmask(signal.SIG_BLOCK, ()), open_fd(".", O_PATH)
    record, spec, held_ = create(options, args)
    asked = {long_mount(text)["destination"] for text in options.mount} | {
        text.partition(":")[0] for text in options.tmpfs}
    # What a step mounts comes last, and hides what is ours: on /etc, our /etc/hosts.
    spec["mounts"].sort(key=lambda mount: mount["destination"] in asked)
    try:
        listener = Listener(report)
        shim = Life(record, spec, held_)
        shim.c.throw_away = True  # its overlay need not be synced: we read it at once
        try:
            news = listener.attend(shim)
        finally:
            ends = {peer.fd for peer in (listener.peer, *shim.peers) if peer}
            for fd in {listener.signals, shim.door, *ends} - {-1}:
                os.close(fd)
        if listener.stopped:
            raise SystemExit(128 + listener.stopped)
        code = report_end(news, options)
        if code:
            return code, None
        layers = from_json(spec["annotations"][OF_LAYERS])
        clear_stubs(record.path("upper"), spec["mounts"], layers, record.first_id)
        return 0, keep_changes(record.path("upper"), record.first_id, when)
    finally:
        os.fchdir(home)  # a shim goes to /, and PATH, -o and --iidfile may be relative
        os.close(home)
        discard(record)
        os.close(held_)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def tree_item(tree, path, is_tree, name="", excluding=(), unpacks=False):
    """The Item of a place in a Tree."""
    archive = unpacks and not is_tree and is_archive(tree.open(path))
    return Item(name or os.path.basename(path), lambda: tree.with_parents(
        path, name, excluding), is_tree, (lambda: tree.open(path)) if archive else None)


class Mounts:
    """What --mount shows a RUN: directories of the host, for as long as it runs."""

    def __init__(self, worker, step):
        self.worker, self.step = worker, step
        self.wanted = [mount_words(step, worker.word(step, step.at, value),
                                   f"--mount={value}")
                       for name, value in step.flags if name == "mount"]
        self.items = [self.item(words) if words["type"] == "bind" or "from" in words
                      else None for words in self.wanted]
        self.caches = {}  # path: whether others may have it at the same time
        self.locks, self.top = [], ""

    def target(self, words):
        """Where one goes."""
        path = words.get("target") or (
            f"/run/secrets/{os.path.basename(words.get('id', 'default'))}")
        return os.path.normpath(os.path.join(
            self.worker.state.settings.get("WorkingDir") or "/", path))

    def item(self, words):
        """What a bind shows, or a new cache begins with."""
        tree = self.worker.tree(self.step, words.get("from"))
        source = words.get("source", ".")
        (path, is_tree), = tree.find(self.step, words["at"], source, wild=False)
        if words["type"] == "cache" and not is_tree:
            raise self.step.fail(f"{source}: Not a directory", "a cache is one",
                                 words["at"])
        return tree_item(tree, path, is_tree)

    def digests(self):
        """What of them decides about the result."""
        return {f"the mount {self.target(words)}": item.digest()
                for words, item in zip(self.wanted, self.items, strict=True) if item}

    def __enter__(self):
        self.top = temporary_directory("layers")
        return self

    def __exit__(self, *_):
        for fd in self.locks:
            os.close(fd)
        remove_tree(self.top)

    def add_to(self, options):
        """Add them to the options of a container.  Caches are locked once each, and in
        one order, or two steps could wait for each other, and one for itself."""
        for number, words in enumerate(self.wanted):
            place = f"{self.top}/{number}"
            source = getattr(self, words["type"])(options, words, place, number)
            if source:
                ro = words.get("ro", not words.get("rw", words["type"] == "cache"))
                options.mount.append(f"type=bind,source={source},target="
                                     f"{self.target(words)}{',readonly' * ro}")
        for path, shared in sorted(self.caches.items()):
            self.locks.append(lock(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX))

    def bind(self, options, words, place, number):
        """A copy: what is written there is of no consequence."""
        os.mkdir(place)
        self.fill(place, self.items[number])
        return place if self.items[number].is_tree else f"{place}/file"

    def fill(self, place, item):
        """Copy what an item is into a directory."""
        def placed():
            for entry in item.entries():
                entry.name = entry.name if item.is_tree else "file"
                yield entry
        with Layer(place) as layer:
            layer.add_all(placed(), item.name or ".")

    def tmpfs(self, options, words, place, number):
        """Nothing of the host's."""
        options.tmpfs.append(self.target(words) + (
            f":size={size(words['size'])}" if "size" in words else ""))

    def cache(self, options, words, place, number):
        """A directory that stays; `locked` and `private` wait for who has it."""
        item, name = self.items[number], words.get("id") or self.target(words)
        name = digest_of([name, item and item.digest(), *(
            words.get(key, "") for key in ("mode", "uid", "gid"))])
        path = store("mounts", name)

        def make(top):
            os.mkdir(f"{top}/{name}")
            self.set_owner(f"{top}/{name}", words, "755")
            if item:
                self.fill(f"{top}/{name}", item)
        if not os.path.isdir(path):
            new_directories("mounts", make)
        self.caches[path] = self.caches.get(path, True) and (
            words.get("sharing", "shared") == "shared")
        return path

    def secret(self, options, words, place, number):
        """A file that is in no layer, or a variable."""
        id = next(filter(None, (words.get("id"), os.path.basename(
            words.get("target", "")), words.get("env"))))
        value = self.worker.build.secrets.get(id)
        if value is None:
            if words.get("required"):
                raise self.step.fail(f"secret {id}: not found", f"--secret id={id},"
                                     "src=FILE", words["at"])
            return None
        if "env" in words:
            options.like["env"].append(
                f"{words['env']}={value.decode('utf-8', 'surrogateescape')}")
            if "target" not in words:
                return None
        fd = os.open(place, O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        write_all(fd, value)
        os.close(fd)
        self.set_owner(place, words, "400")
        return place

    def set_owner(self, path, words, mode):
        """Give a cache or a secret the owner and the mode that were asked for."""
        os.chmod(path, int(words.get("mode", mode), 8))
        os.chown(path, int(words.get("uid", 0)), int(words.get("gid", 0)))


# ── a stage, step by step ──
#
# A step that changes the config alone is a function of what came before, and costs
# nothing; it is in no cache, but part of the key of all that follow.  ARG is not: it
# counts where a RUN can see it, or a word is made of it.


class Worker:
    """Who builds a stage: its State, and what is known only in the middle of it."""

    def __init__(self, build, stage, state):
        self.build, self.stage, self.state = build, stage, state
        self.own_cmd = False  # whether CMD is this stage's own, not its base's
        self.missed = False  # whether the cache has no more to say
        self.opened = []  # Trees

    def known(self):
        """All variables; of an ENV and an ARG the later one counts, as in BuildKit."""
        return {**self.state.env(), **self.state.args}

    def word(self, step, at, text):
        """What a word means."""
        return expand(step, at, text, self.known())

    def words(self, step):
        """What the words of an instruction mean; none of them may be empty."""
        found = [self.word(step, at, text) for at, text in step.value]
        if not all(found):
            raise step.fail(f"{step.name} can not be empty", "a variable is?", step.at)
        return found

    def flag(self, step, name, default=None):
        """What a flag says that comes once."""
        return next((self.word(step, step.at, value) for key, value in
                     reversed(step.flags) if key == name), default)

    def yes(self, step, name):
        """Whether a flag is there that says yes or no."""
        return self.flag(step, name) == "true"

    def path(self, text):
        """A path in full, with the / at its end that tells a directory."""
        cwd = self.state.settings.get("WorkingDir") or "/"
        path = os.path.normpath(os.path.join(cwd, text)).replace("//", "/")
        return path + "/" * (path != "/" and (
            text in (".", "..") or text.endswith(("/", "/.", "/.."))))

    def shell(self, command):
        """A command as a list: of the shell, if it is a text."""
        shell = self.state.settings.get("Shell") or ["/bin/sh", "-c"]
        return [*shell, command] if isinstance(command, str) else command

    def tree(self, step, source=None):
        """The Tree to copy from: the context, an earlier stage, or an image."""
        if source is None:
            return self.build.context()
        state = self.build.state_named(step, source, self.stage)
        if not state.layers:
            raise step.fail(f"{source} has no files", "nothing was copied into it",
                            step.at)
        path = new_upper(state)
        self.opened.append(Tree(mounted(state, path).root_fd, of_stage=path))
        return self.opened[-1]

    def set(self, key, value):
        """Change the config."""
        self.state.settings[key] = value

    def note(self, text, layer=None, key=""):
        """Write a step into the history; with its layer and its key if it has some."""
        entry = {"created": self.build.created, "created_by": text,
                 "comment": f"minicontainer {key}".rstrip()}
        if layer:
            self.state.layers.append(layer)
        else:
            entry["empty_layer"] = True
        self.state.history.append(entry)

    def say_that(self, step, meaning):
        """End a step that changes the config and no file.  The key has what the config
        has become: in the history's words, ENV A="1 B=2" and ENV A=1 B=2 are one."""
        state = self.state
        state.key = digest_of([state.key, state.config, state.settings])
        self.note(f"{step.name} {meaning}")

    def change(self, words, parts, make, items=(), alone=False):
        """Take the step's layer from the cache, or from what make() leaves; one that
        stands `alone` is the same whatever is below it.

        The key tells of the items as they were when they were read for it.  If somebody
        has written to them since, the layer is of another content than that: then it
        gets a key that nobody will ever ask for."""
        build, parent = self.build, "" if alone else self.state.key
        parts = {"parent": parent, "instruction": f"{words[0]} {to_json(words[1:])}",
                 **parts}
        if build.epoch is not None:
            parts["epoch"] = build.epoch
        key = digest_of(parts)
        found, layer = build.cached(key)
        began = time.monotonic()
        if not found:
            build.report.missed(
                "--no-cache" if build.options.no_cache else
                why_missed(parts) if alone or not self.missed else
                "what it builds on has changed")  # the cache need not be read for that
            self.missed = True
            layer = make()
            if all(item.is_as_it_was() for item in items):
                save(store("steps", f"{key}.json"), {
                    "parts": parts, "layer": layer, "seen": layer and seen_of(layer)})
            else:
                say("what was copied has changed meanwhile: the cache does not keep it")
                key = digest_of([key, os.urandom(16).hex()])
        self.state.key = digest_of([self.state.key, key]) if alone else key
        self.note(" ".join(words), layer, key)
        size_ = f", {decimal(layer[2])}" if layer else ""
        return "CACHED" if found else f"{time.monotonic() - began:.1f}s{size_}"

    def do(self, step):
        """Carry out an instruction, which may be one of ONBUILD's."""
        report = self.build.report
        report.begin(self.build.title(step))
        try:
            report.end(INSTRUCTIONS[step.name][3](self, step) or "")
        except (Fail, OSError) as error:
            report.failed()
            fail = diagnose(error)
            if not fail.message.startswith(f"{step.file.name}:"):
                fail = step.fail(fail.message, fail.hint)
            raise fail from None
        finally:
            while self.opened:
                self.opened.pop().close()


@instruction("FROM", as_words, flags="platform")
def begin_stage(w, step):
    """Begin with an image, an earlier stage, or nothing; next is what it left to us."""
    w.state = w.build.base_of(w.stage)
    triggers = [
        trigger for text in w.state.settings.pop("OnBuild", None) or []
        for trigger in Dockerfile(f"ONBUILD of {w.stage.base}", text).instructions]
    for trigger in triggers:
        if trigger.name in NO_TRIGGER:  # a builder would not have left it
            raise step.fail(f"{trigger.name} isn't allowed as an ONBUILD trigger", "",
                            step.at)
    w.stage.steps[1:1] = triggers


@instruction("ARG", as_pairs)
def name_argument(w, step):
    """Name a variable of the build: a value from the command line, or the default that
    stands here, or one from above the first FROM."""
    known = w.known()  # what stands in the same line does not count yet
    for at, name, default in step.value:
        given = w.build.given_args.get(name)
        if given is None:
            given = w.build.args.get(name) if default is None else (
                expand(step, at, default, known))
        if given is not None:
            w.state.args[name] = given
    w.note(f"ARG {step.text}")  # it is part of no key but those of RUN


@instruction("ENV", as_pairs)
@instruction("LABEL", as_pairs)
def set_pairs(w, step):
    """Set variables of the build and of the image, or add notes to it.  What one line
    sets counts from the next line on."""
    pairs = {w.word(step, at, name): w.word(step, at, value)
             for at, name, value in step.value}
    if step.name == "LABEL":
        w.set("Labels", {**(w.state.settings.get("Labels") or {}), **pairs})
    else:
        w.set("Env", [f"{k}={v}" for k, v in {**w.state.env(), **pairs}.items()])
        w.state.args = {k: v for k, v in w.state.args.items() if k not in pairs}
    w.say_that(step, " ".join(f"{k}={v}" for k, v in pairs.items()))


@instruction("CMD", as_command)
@instruction("ENTRYPOINT", as_command)
@instruction("SHELL", as_command)
def set_command(w, step):
    """What to run when nobody says, what to run in any case, and what runs a command
    that is a text.  A CMD of the base's was meant for another ENTRYPOINT, and goes."""
    if step.name == "SHELL" and isinstance(step.value, str):
        raise step.fail("SHELL requires the arguments to be in JSON form",
                        'SHELL ["/bin/sh", "-c"]', step.at)
    w.own_cmd = w.own_cmd or step.name == "CMD"
    if step.name == "ENTRYPOINT" and not w.own_cmd:
        w.state.settings.pop("Cmd", None)
    w.set(step.name.title(), w.shell(step.value))
    w.say_that(step, to_json(w.shell(step.value)))


@instruction("USER", as_one)
@instruction("STOPSIGNAL", as_one)
@instruction("MAINTAINER", as_one)
def set_word(w, step):
    """As whom what follows runs, and the image; what `stop` sends; who made it."""
    if step.name == "MAINTAINER":  # a name, like O'Reilly, in which nothing is special
        w.state.config["author"] = word = step.text
    else:
        word = w.word(step, *step.value[0])  # of USER it may be empty, which is root
        if step.name == "STOPSIGNAL" and not signal_number(word):
            raise step.fail(f"invalid signal: {word}", "0 is none", step.at)
        w.set({"USER": "User", "STOPSIGNAL": "StopSignal"}[step.name], word)
    w.say_that(step, word)


@instruction("EXPOSE", as_words)
def expose(w, step):
    """Say at which ports it listens."""
    words = " ".join(w.word(step, at, text) for at, text in step.value).split()
    ports = exposed([word.rpartition(":")[2] for word in words])  # as -p has them
    w.set("ExposedPorts", {**(w.state.settings.get("ExposedPorts") or {}), **ports})
    w.say_that(step, " ".join(words))


@instruction("VOLUME", as_words)
def name_volumes(w, step):
    """Name places that get a volume when a container is made."""
    old = w.state.settings.get("Volumes") or {}
    w.set("Volumes", {**old, **{word: {} for word in w.words(step)}})
    w.say_that(step, to_json(w.words(step)))


@instruction("HEALTHCHECK", as_one,
             flags="interval timeout start-period start-interval retries")
def set_healthcheck(w, step):
    """How to find out whether it is well."""
    at, kind = step.words()[0]
    rest, found = step.whole[at + len(kind):].strip(), {"Test": ["NONE"]}
    if kind.upper() == "CMD" and rest:
        words = exec_form(step, at + len(kind))
        found["Test"] = ["CMD-SHELL", rest] if words is None else ["CMD", *words]
    elif kind.upper() != "NONE" or rest:
        raise step.fail(f"Unknown type {kind!r} in HEALTHCHECK (try CMD)",
                        "HEALTHCHECK CMD command, or NONE", at)
    for name, value in step.flags:
        value, key = w.word(step, step.at, value), name.title().replace("-", "")
        found[key] = whole(f"--{name}", value, 0) if name == "retries" else (
            nanoseconds(f"--{name}", value))
        if name != "retries" and 0 < found[key] < 10 ** 6:
            raise step.fail(f"--{name}={value} cannot be less than 1ms", "30s",
                            f"--{name}")
    w.set("Healthcheck", found)
    w.say_that(step, to_json(found))


@instruction("ONBUILD", as_trigger)
def leave_trigger(w, step):
    """Leave an instruction to those who build on the image."""
    w.set("OnBuild", [*(w.state.settings.get("OnBuild") or []), step.value])
    w.say_that(step, step.value)


@instruction("WORKDIR", as_one)
def set_workdir(w, step):
    """Where what follows happens; a directory is made if there is none, and belongs to
    whom USER says, who is to work there."""
    path = w.path(w.words(step)[0]).rstrip("/") or "/"
    user = w.state.settings.get("User")
    w.set("WorkingDir", path)

    def write(c):
        os.close(make_way(c, path, owner_inside(c, user) if user else (0, 0)))
    return w.change(["WORKDIR", path], {}, lambda: with_files(
        w.state, write, w.build.epoch))


def run_documents(w, step):
    """(args, script) of a RUN with here-documents: what stands alone is the program, a
    script with an interpreter of its own, or the shell's; else the shell reads them."""
    name, text, _ = step.documents[0]
    if len(step.documents) > 1 or len(step.words()) > 1:
        return w.shell("".join([step.text, "\n", *(
            f"{text}{name}\n" for name, text, _ in step.documents)])), ""
    if text.startswith("#!"):
        return [f"/dev/pipes/{name}"], text
    return w.shell(text), ""


def network_for(w, step):
    """The network that a RUN asks for, or that the build was given."""
    if w.flag(step, "security", "sandbox") != "sandbox":
        raise step.fail(f"--security={w.flag(step, 'security')} is not allowed",
                        "no build step is privileged here", "--security")
    network = w.flag(step, "network", "default")
    if network not in ("default", "none", "host"):
        raise step.fail(f"unsupported network mode {network!r}",
                        "default, none or host", "--network")
    return w.build.options.network if network == "default" else network


def layer_of_run(w, step, options, args, script, mounts):
    """The layer that a RUN leaves; a Fail with its exit code if that is not 0."""
    layers = w.state.directories()
    options.notes = {OF_LAYERS: to_json(layers)}
    if not layers:
        raise step.fail("there is nothing to run in an empty image",
                        "COPY a program into it, or FROM an image")
    with mounts:
        mounts.add_to(options)
        if script:
            write_file(f"{mounts.top}/script", script, create=0o755)
            options.mount.append(f"type=bind,source={mounts.top}/script,"
                                 f"target={args[0]},readonly")
        code, layer = run_in(options, args, w.build.report, w.build.epoch)
    if code:
        fail = step.fail(f"The command {' '.join(args)!r} returned a non-zero code: "
                         f"{code}")
        fail.code = code
        raise fail
    return layer


@instruction("RUN", as_command, flags="mount network security")
def run_step(w, step):
    """Run a command in a container, and keep what it has changed.

    It sees ARG as variables, too, so the key has their values: |1 NAME=VALUE."""
    options, mounts = options_of_run(w.build.options), Mounts(w, step)
    options.network = network_for(w, step)
    args, script = w.shell(step.value), ""
    if step.documents and isinstance(step.value, str):
        args, script = run_documents(w, step)
    env, used = w.state.env(), w.state.args
    seen = [f"|{len(used)}", *(f"{name}={value}" for name, value in used.items())]
    options.like = {"cwd": w.state.settings.get("WorkingDir") or "/", "env": [
        f"{name}={value}" for name, value in {
            "PATH": DEFAULT_PATH, **w.build.proxies(), **env, **used}.items()],
        "user": {"username": w.state.settings.get("User") or ""}}
    return w.change(["RUN", *seen * bool(used), *args], {
        **mounts.digests(), "the network": options.network, "the here-document": script,
        "--add-host": options.add_host,
        "what --mount says": [value for name, value in step.flags if name == "mount"]},
        lambda: layer_of_run(w, step, options, args, script, mounts),
        [item for item in mounts.items if item])


def remote_item(w, step, at, url):
    """What ADD gets from elsewhere; its digest is checked if --checksum has one."""
    if not url.startswith(("http://", "https://")) or url.endswith(".git"):
        raise step.fail(f"ADD {url}: only http and https", "git clone, then COPY", at)
    from email.utils import parsedate_to_datetime
    from urllib.parse import unquote, urlsplit

    headers = {}
    path, digest = spool(import_pieces(url, headers))
    changed = headers.get("last-modified", "")  # the file's time, to Docker
    try:
        os.utime(path, (parsedate_to_datetime(changed).timestamp(),) * 2)
    except (ValueError, TypeError, OverflowError):  # a server may say anything
        pass
    wanted = w.flag(step, "checksum", digest)
    if wanted != digest:
        raise step.fail(f"ADD {url}: wrong digest, what has come is {digest}",
                        f"--checksum says {wanted}", at)
    name = os.path.basename(unquote(urlsplit(url).path).rstrip("/"))
    if name in ("", ".", "..") and step.value[-1][1].endswith("/"):
        raise step.fail(f"cannot determine filename for source {url!r}",
                        "name the file, not the directory", at)

    def entries():
        with open(path, "rb") as file:
            entry = file_entry(file.fileno())
        entry.mode, entry.xattrs = stat.S_IFREG | 0o600, {}
        return [entry]
    return Item(name, entries)


def items_of(w, step, sources):
    """The Items that the sources of a COPY or ADD mean."""
    documents, items, now = [*step.documents], [], time.time_ns()
    rules = rules_of("\n".join(w.word(step, step.at, value)
                               for name, value in step.flags if name == "exclude"))
    tree = None
    if w.flag(step, "checksum") and (len(sources) > 1 or "://" not in sources[0][1]):
        raise step.fail("checksum can't be specified for non-HTTP(S) sources",
                        "it is that of one URL", "--checksum")
    for at, text in sources:
        if documents and text in (f"<<{documents[0][0]}", f"<<-{documents[0][0]}"):
            name, data, expands = documents.pop(0)
            data = expand(step, at, data, w.known(), True) if expands else data
            items.append(Item(name, lambda data=data: [text_entry(data, now)]))
            continue
        if step.name == "ADD" and ("://" in text or text.startswith("git@")):
            items.append(remote_item(w, step, at, text))
            continue
        tree = tree or w.tree(step, w.flag(step, "from"))
        text, _, below = text.partition("/./") if w.yes(step, "parents") else (
            text, "", "")
        for path, is_tree in tree.find(step, at, text + f"/{below}" * bool(below)):
            name = os.path.relpath(f"/{path}", f"/{text}") if below else path
            items.append(tree_item(tree, path, is_tree, name * w.yes(step, "parents"),
                                   rules, step.name == "ADD"))
    return items


@instruction("COPY", as_words, 2, "from chown chmod link! parents! exclude")
@instruction("ADD", as_words, 2, "chown chmod link! checksum keep-git-dir! exclude")
def copy_(w, step):
    """Copy files, of the context, of a stage, or (ADD) of elsewhere."""
    *sources, (at, target) = [(at, w.word(step, at, text)) for at, text in step.value]
    target, mode = w.path(target), w.flag(step, "chmod")
    owner, alone = w.flag(step, "chown", ""), w.yes(step, "link")
    items = items_of(w, step, sources)
    if mode is not None and not mode_change(mode):
        raise step.fail(f"invalid chmod parameter: {mode!r}", "octal digits, as in "
                        "755, or as in u=rwX,go=rX", "--chmod")
    if alone:  # it must not depend on what is below it, so not on a passwd there
        owner = ":".join("0" if part == "root" else part for part in owner.split(":"))
        if owner.strip("0123456789:"):
            raise step.fail(f"--chown={owner} is not possible with --link: no passwd "
                            "is looked at", "numbers, or no --link",
                            "--chown")
    parents = w.yes(step, "parents")
    if len(sources) > 1 and not target.endswith("/") and not parents and target != "/":
        raise step.fail(f"When using {step.name} with more than one source file, the "
                        "destination must be a directory and end with a /", "", at)
    copying = Copying(items, target, owner, mode and mode_change(mode), parents)
    words = [step.name, *(f"--{name}={w.flag(step, name)}" for name in dict(step.flags)
                          if name != "exclude"), *(text for _, text in sources), target]
    content = {f"source {number}, {item.name or '.'},": item.digest()
               for number, item in enumerate(items, 1)}
    return w.change(words, content, lambda: with_files(
        w.state, copying.write, w.build.epoch, alone), items, alone)


# ── all stages ──
#
# A stage needs the stage it begins with and those that it copies or mounts from.  So
# what the target needs is found by following the names; that is why a name in --from
# has no variables.  A stage is begun when the last one that it needs is done, in a
# process of its own if others run then.


def stage_named(text, stages, by_number=True):
    """The last stage of that name, or number; None if it is an image's name."""
    for stage in reversed(stages):
        if text.lower() == stage.name or by_number and text == str(stage.number):
            return stage
    return None


class Stage:
    """What a FROM begins: its name, its number, its base, its instructions."""

    def __init__(self, number, step, args):
        import re

        words = [expand(step, at, text, args) for at, text in step.value]
        if len(words) not in (1, 3) or len(words) == 3 and words[1].lower() != "as":
            raise step.fail("FROM requires either one or three arguments",
                            "FROM IMAGE AS NAME", step.at)
        if not words[0]:
            raise step.fail("base name should not be blank", "an ARG is empty", step.at)
        self.base, self.number = words[0], number
        self.name = words[2].lower() if len(words) == 3 else ""
        if words[2:] and (self.name == "scratch" or not re.fullmatch(
                r"[a-z][a-z0-9_.-]*", self.name)):
            raise step.fail(f"invalid name for build stage: {words[2]!r}",
                            "it begins with a letter; then also digits - _ .; scratch "
                            "is what is empty", step.at)
        self.platform = next((expand(step, step.at, value, args)
                              for _, value in step.flags), None)
        self.steps = [step]

    def source(self, step, text, stages):
        """The earlier stage that a step copies or mounts from; None if the name is an
        image's."""
        found = stage_named(text, stages[:self.number])
        later = None if found else stage_named(text, stages)
        if not later and (found or not text.isdecimal()):
            return found
        raise step.fail(
            f"invalid stage index {text}" if not later else
            f"circular dependency detected on stage: {text}" if later is self else
            f"cannot copy from stage {text!r}, it needs to be defined before current "
            f"stage {self.name or str(self.number)!r}", "a stage that stands above, or "
            "an image", f"from={text}")

    def needs(self, stages):
        """The earlier stages that it is made of."""
        found = [stage_named(self.base, stages[:self.number], False)] + [
            self.source(step, text, stages) for step in self.steps
            for flag in step.flags for text in sources_in(*flag)]
        return {stage.number for stage in found if stage}


def given_pair(option, text, unsaid):
    """(name, value) of an option; without a value, what unsaid(name) gives."""
    name, equals, value = text.partition("=")
    if not name:
        raise Fail(f"invalid argument {text!r} for {option}: it has no name",
                   "NAME=VALUE")
    return name, value if equals else unsaid(name)


def secret_of(text):
    """(id, its bytes) of --secret id=…,src=FILE, or env=NAME."""
    words = dict(part.partition("=")[::2] for part in fields_of(text))
    id, kind, name = (words.get(key, "") for key in ("id", "type", "env"))
    source = words.get("src") or words.get("source")
    if not id or set(words) - {"id", "src", "source", "env", "type"} or (
            kind not in ("", "file", "env")):
        raise Fail(f"--secret {text!r}: not possible", "id=NAME,src=FILE", 1)
    if kind == "env" and not name:
        source, name = "", source
    if name or not source and id in os.environ:  # one that is not set is empty
        return id, os.environb.get(os.fsencode(name or id), b"")
    try:
        with open(source or id, "rb") as file:
            return id, file.read()
    except OSError as error:
        raise Fail(f"--secret {text}: {error.strerror}", "is the file there?", 1
                   ) from None


def remove_unfinished():
    """Remove what this process has in the store that has no name yet: what ADD fetched,
    and what a Ctrl-C has kept from being removed where it was made."""
    for parent in ("ingest", "layers"):
        for name in os.listdir(store(parent, "")):
            if name.startswith(f".new-{os.getpid()}-"):
                path = store(parent, name)
                (remove_tree if os.path.isdir(path) else take_away_file)(path)


def without_container(work, *words):
    """What work(*words) returns.  An error of it ends with 1, as in Docker: 125 is for
    those who wait for a program's own code."""
    try:
        return work(*words)
    except (Fail, OSError) as error:
        fail = diagnose(error)
        raise Fail(fail.message, fail.hint, 1) from None


class Build:
    """One build: what the command line asked, and how far it has come."""

    def __init__(self, options, file, context, report):
        self.options, self.file, self.report = options, file, report
        self.context = context  # a function that opens it
        given = [given_pair("--build-arg", text, os.environ.get)
                 for text in options.build_arg]  # what is nowhere was not given
        self.given_args = {name: value for name, value in given if value is not None}
        self.secrets = dict(map(secret_of, options.secret))
        self.labels = dict(given_pair("--label", text, lambda _: "")
                           for text in options.label)
        if os.environ.get("SOURCE_DATE_EPOCH"):  # an ARG of that name has it too
            self.given_args.setdefault("SOURCE_DATE_EPOCH",
                                       os.environ["SOURCE_DATE_EPOCH"])
        epoch = self.given_args.get("SOURCE_DATE_EPOCH")
        last = 253402300799  # of the year 9999: a date has no room for more
        self.epoch = without_container(whole, "SOURCE_DATE_EPOCH", epoch, 0, last
                                       ) * 10 ** 9 if epoch else None
        self.created = rfc3339(self.epoch)
        self.done = {}  # number of a stage: its State
        self.divide()
        self.total, self.number = 0, 0
        self.seeds = self.from_images()

    def divide(self):
        """Divide the instructions into stages."""
        self.args, self.stages = self.platform_args(), []
        for step in self.file.instructions:
            if step.name == "FROM":
                self.stages.append(Stage(len(self.stages), step, self.args))
            elif self.stages:
                self.stages[-1].steps.append(step)
            elif step.name == "ARG":
                for at, name, value in step.value:
                    if name in self.given_args:  # a value that a shell has read
                        self.args[name] = self.given_args[name]
                    elif value is not None:
                        self.args[name] = expand(step, at, value, self.args)
            else:
                raise step.fail("no build stage in current context",
                                "FROM begins one; only ARG may stand before")
        if not self.stages:
            raise Fail(f"{self.file.name}: file with no instructions", "FROM IMAGE", 1)

    def platform_args(self):
        """The variables that tell for what, and on what, is built."""
        ours, wanted = platform_of(), platform_of(self.options.platform)
        found = {"TARGETSTAGE": self.options.target or "default"}
        for name, parts in (("BUILD", ours), ("TARGET", wanted)):
            parts = [*parts, ""][:3]
            found |= {f"{name}PLATFORM": "/".join(filter(None, parts)),
                      f"{name}OS": parts[0], f"{name}ARCH": parts[1],
                      f"{name}VARIANT": parts[2]}
        return found | {name: self.given_args[name] for name in found
                        if name in self.given_args}

    def proxies(self):
        """Those of --build-arg that need no ARG and are in no history, in both of the
        spellings that programs look for."""
        known = [f"{kind}_proxy" for kind in ("http", "https", "ftp", "no", "all")]
        return {spelt: value for name, value in self.given_args.items()
                if name.lower() in known for spelt in (name.lower(), name.upper())}

    def warn_of_args(self):
        """Say which --build-arg nobody asked for."""
        asked = {name for step in self.file.instructions if step.name == "ARG"
                 for _, name, _ in step.value}
        asked.update(*(state.args for state in self.done.values()))  # of ONBUILD, too
        left = {*self.given_args} - asked - {*self.proxies(), "SOURCE_DATE_EPOCH"}
        if left:
            say(f"[Warning] One or more build-args {sorted(left)} were not consumed")

    def from_images(self):
        """{key: layer} of the images of --cache-from, as their histories have it."""
        found = {}
        for text in self.options.cache_from:
            try:
                image = self.image(text)
            except Fail as fail:
                say(f"--cache-from {text}: {fail.message}")
                continue
            layers = iter(zip(image.layers, image.diff_ids, image.sizes, strict=True))
            for entry in image.config.get("history") or ():
                layer = None if entry.get("empty_layer") else next(layers, None)
                mark, _, key = (entry.get("comment") or "").partition(" ")
                if mark == "minicontainer" and key:
                    found[key] = list(layer) if layer else None
        return found

    def cached(self, key):
        """(whether the step of a key is known, its layer or None)."""
        if self.options.no_cache:
            return False, None
        found = remembered(key)
        if not found[0] and key in self.seeds:
            return True, self.seeds[key]
        return found

    def title(self, step):
        """A step and its number, for a person."""
        self.number += step.file is self.file
        text = " ".join(step.whole.split())
        return f"Step {self.number}/{self.total} : {text}"

    def target(self):
        """The stage that is wanted."""
        text = self.options.target
        stage = stage_named(text, self.stages) if text else self.stages[-1]
        if not stage:
            raise Fail(f"target stage {text!r} could not be found", "stages are "
                       f"{', '.join(s.name or str(s.number) for s in self.stages)}", 1)
        return stage

    def state_named(self, step, text, stage):
        """The State of an earlier stage, or of an image."""
        found = stage.source(step, text, self.stages)
        return self.state_of(found) if found else self.image_state(text, stage.platform)

    def image(self, text, platform=None):
        """An Image of the store, pulled if need be, or in any case with --pull."""
        wish = Options()
        wish.pull = "always" if self.options.pull else "missing"
        wish.platform = platform or self.options.platform
        wish.quiet = self.report.style != "plain"  # a View has the terminal for itself
        return image_to_run(wish, text)

    def image_state(self, text, platform):
        """The State that an image is."""
        image = self.image(text, platform)
        config = {key: value for key, value in image.config.items()
                  if key not in ("config", "history", "rootfs", "created")}
        history = image.config.get("history") or [
            {"created": image.config.get("created") or ""} for _ in image.layers]
        env = image.settings.get("Env") or []
        if not any(line.startswith("PATH=") for line in env):
            env = [*env, f"PATH={DEFAULT_PATH}"]  # for what $PATH is added to
        return State(config=config, settings={**image.settings, "Env": env},
                     history=history,
                     key=digest_of(image.id), layers=[list(layer) for layer in zip(
                         image.layers, image.diff_ids, image.sizes, strict=True)])

    def base_of(self, stage):
        """The State that a stage begins with."""
        if stage.base == "scratch":
            keys = "os", "architecture", "variant"
            config = dict(zip(keys, platform_of(
                stage.platform or self.options.platform), strict=False))
            return State(config=config, key=digest_of(config),
                         settings={"Env": [f"PATH={DEFAULT_PATH}"]})
        earlier = stage_named(stage.base, self.stages[:stage.number], False)
        return self.state_of(earlier).copy() if earlier else self.image_state(
            stage.base, stage.platform or self.options.platform)

    def state_of(self, stage):
        """The State of a stage, which is built if it is not yet."""
        if stage.number not in self.done:
            worker = Worker(self, stage, State())
            for step in stage.steps:  # the first may add some
                worker.do(step)
            self.done[stage.number] = worker.state
        return self.done[stage.number]

    def run(self):
        """Build all that the target needs; its State."""
        wanted, target = set(), self.target()
        waiting = [target.number]
        for number in waiting:  # grows while we read it
            wanted.add(number)
            waiting += self.stages[number].needs(self.stages) - wanted
        self.total = sum(len(self.stages[number].steps) for number in wanted)
        while wanted - set(self.done):
            if len(ready := self.ready(wanted)) == 1 and self.report.style != "tty":
                self.state_of(ready[0])
            else:
                self.build_all(wanted)
        return self.state_of(target)

    def ready(self, wanted):
        """The stages that can be built now: what they need is there."""
        return [stage for stage in self.stages if stage.number in wanted - set(
            self.done) and not stage.needs(self.stages) - set(self.done)]

    def build_all(self, wanted):
        """Build stages that do not need each other at the same time, and as soon as one
        has ended those that have waited for it; what comes alone is left to be done."""
        begun, several = [], len(wanted) > 1

        def job(stage, number):
            def work(tell):
                self.report.prefix = f"[{stage.name or stage.number}] " * several
                self.report.hear, self.number = tell, number
                try:
                    return vars(self.state_of(stage))
                finally:
                    remove_unfinished()
            return stage.name or str(stage.number), work

        def jobs():
            ready = self.ready(wanted)
            fresh = [stage for stage in ready if stage not in begun]
            for stage in fresh if len(ready) > 1 or self.report.style == "tty" else ():
                begun.append(stage)
                yield job(stage, self.number)
                self.number += len(stage.steps)

        def ended(number, known):
            self.done[begun[number].number] = State(**known)
            return list(jobs())
        in_parallel(list(jobs()), lambda id, news, text, _: self.report.view.hear(
            id, news, text), tick=self.report.view.draw if self.report.style == "tty"
            else None, ended=ended)

    def finish(self, state, refs):
        """Make an image of a State; its id."""
        if self.labels:
            old = state.settings.get("Labels") or {}
            state.settings["Labels"] = {**old, **self.labels}
        layers, diff_ids, sizes_ = (list(column) for column in zip(
            *state.layers, strict=True)) if state.layers else ([], [], [])
        raw = to_json({
            **state.config, "created": self.created, "config": state.settings,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": state.history}).encode()
        id = keep(raw)
        manifest = oci_manifest({"mediaType": OCI_CONFIG, "digest": id,
                                 "size": len(raw)}, layers)
        entry = {"mediaType": OCI_MANIFEST, "digest": keep(manifest), "size":
                 len(manifest), "annotations": {SIZES: " ".join(map(str, sizes_))}}
        with changed_index() as entries:
            for ref in refs or [""]:  # a moment of our own could not be reproduced
                point(entries, ref, tagged(entry) if ref and self.epoch is None
                      else entry)
        return id


# ── the command ──


def save_id(path, id):
    """Write an image's id to a file."""
    with open(path, "w") as file:
        file.write(id)


def output_of(text):
    """(whether it is a directory, its path) of an -o."""
    words = dict(part.partition("=")[::2] for part in fields_of(text))
    if "=" not in text:
        words = {"type": "tar" if text == "-" else "local", "dest": text}
    kind, place = words.get("type"), words.get("dest", "")
    if kind not in ("local", "tar") or kind == "local" and not place:
        raise Fail(f"-o {text}: not possible",
                   "type=local,dest=DIR or type=tar,dest=FILE", 1)
    return kind == "local", place


def export_files(state, is_local, place, when):
    """Write the files of a State where -o says."""
    def callers(entry):  # as with Docker, in a directory all is whose the build is
        entry.uid, entry.gid = os.getuid(), os.getgid()
        return entry

    path = temporary_directory("layers")
    try:
        copy_layers(state.directories(), path, 0)
        if is_local:  # what a layer says is gone may be the user's own there
            os.makedirs(place, exist_ok=True)
            for entry in layer_entries(path, 0):  # before anything is written
                check_kind(entry, os.path.join(place, entry.name))
            with Layer(place) as target:
                target.add_all((callers(entry) for entry in layer_entries(path, 0)
                                if entry.name != "."), place)
            return
        with output("" if place == "-" else place) as file:
            pack(path, file, 0, when)
    finally:
        remove_tree(path)


class Context:
    """What COPY copies from: a directory, or a tarball that is unpacked for a while."""

    def __init__(self, text, file):
        self.path, self.text, self.temporary, self.tree = text, "", "", None
        if text == file == "-":
            raise Fail("invalid argument: can't use stdin for both build context and "
                       "dockerfile", "name a file for one of them", 1)
        if text == "-":
            self.take_input()
        elif os.path.isfile(text):
            self.unpack(text, text)
        elif not os.path.isdir(text):
            raise Fail(f"unable to prepare context: path {text!r} not found",
                       "a directory, a tarball, or - for standard input", 1)
        self.file = file

    def take_input(self):
        """Standard input: a tarball, or a Dockerfile without a context."""
        with open(0, "rb", closefd=False) as stdin:
            spooled = spool(pieces(stdin))[0]
        try:
            with open(spooled, "rb") as file:
                packed = compression(file.read(512))
            if packed or is_archive(os.open(spooled, os.O_RDONLY | O_CLOEXEC)):
                self.unpack(spooled, "standard input")
            else:
                self.text = read_file(spooled)
                self.path = self.temporary = temporary_directory("layers")
        finally:
            os.unlink(spooled)

    def unpack(self, path, title):
        """Unpack a tarball."""
        self.path = self.temporary = temporary_directory("layers")
        try:
            unpack(path, self.path, title)
        except BaseException:
            self.close()
            raise

    def dockerfile(self):
        """The Dockerfile, read.  In an archive it is one of its files; else one that is
        named is a path like any other, in the context or not."""
        name = self.file or "Dockerfile"
        if name == "-":
            return Dockerfile("Dockerfile", os.fsdecode(sys.stdin.buffer.read()))
        if self.text and not self.file:
            return Dockerfile("Dockerfile", self.text)
        if not self.file or self.temporary:
            text = self.text_inside(name)
            if text is None and not self.file:
                name = "dockerfile"
                text = self.text_inside(name)
        else:
            name, text = os.path.basename(name), self.text_at(name)
        if text is None:
            raise Fail(f"failed to read {self.file or 'Dockerfile'}: No such file or "
                       "directory", "-f FILE names another", 1)
        return Dockerfile(name, text)

    def text_at(self, path):
        """The text of a file that the user has named, or None."""
        try:
            return read_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Fail(f"failed to read {path}: {error.strerror}", "", 1) from None

    def text_inside(self, name):
        """The text of a file of the context, or None.  A symlink of it may lead to no
        other place of the host: who has sent a tarball is not who runs this (P4)."""
        top, fd = os.open(self.path, O_PATH | O_CLOEXEC), -1
        try:
            fd = Tree(top).open(name)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Fail(f"failed to read {name}: it is no file", "", 1)
            return read_file(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            return None
        except OSError as error:
            out = error.errno == errno.EXDEV
            raise Fail(f"failed to read {name}: " + (
                "it leads out of the context" if out else error.strerror),
                "what belongs to it has to be in it" if out else "", 1) from None
        finally:
            for fd_ in {top, fd} - {-1}:
                os.close(fd_)

    def open(self):
        """The Tree, without what .dockerignore leaves out; a Dockerfile may have one of
        its own beside it, that counts instead."""
        if not self.tree:
            own = f"{self.file or 'Dockerfile'}.dockerignore"
            text = self.text_inside(own) if self.temporary or not self.file else (
                self.text_at(own))
            if text is None:
                text = self.text_inside(".dockerignore") or ""
            fd = os.open(self.path, O_PATH | O_DIRECTORY | O_CLOEXEC)
            self.tree = Tree(fd, rules_of(text))
        return self.tree

    def close(self):
        """Remove what was unpacked."""
        if self.tree:
            os.close(self.tree.fd)
        if self.temporary:
            remove_tree(self.temporary)


@command("build",
         arg("-t", "--tag", metavar="NAME[:TAG]", action="append", default=[],
             help="what to call the image"),
         arg("-f", "--file", metavar="FILE|-", help="instead of PATH/Dockerfile"),
         arg("--target", metavar="STAGE", help="build that one, not the last"),
         arg("--build-arg", metavar="NAME[=VALUE]", action="append", default=[],
             help="a value for ARG"),
         arg("--label", metavar="KEY=VALUE", action="append", default=[],
             help="a note in the image"),
         arg("--secret", metavar="id=NAME,src=FILE", action="append", default=[],
             help="what RUN --mount=type=secret may see"),
         arg("--no-cache", action="store_true", help="do every step anew"),
         arg("--pull", action="store_true", help="fetch images even if they are here"),
         arg("--cache-from", metavar="IMAGE", action="append", default=[],
             help="one whose steps are as good as done"),
         arg("--iidfile", metavar="FILE", help="write the image's id there"),
         arg("-q", "--quiet", action="store_true", help="print only its id"),
         arg("--progress", choices=["auto", "plain", "tty"], default="auto",
             help="lines, or one that shows the time"),
         arg("-o", "--output", metavar="type=local|tar,dest=PATH", action="append",
             default=[], help="write its files there, and make no image"),
         PLATFORM, *LIMITS_OF_RUN,
         arg("path", metavar="PATH|-", help="of the context: a directory or tarball"))
def build_command(options):
    """Make an image as a Dockerfile says."""
    check_limits(options)
    choose_users(options)
    refs = [new_name(text) for text in options.tag]
    outputs = [output_of(text) for text in options.output]
    style = "quiet" if options.quiet else options.progress
    if style == "auto":
        style = "tty" if os.isatty(2) else "plain"
    id_file = options.iidfile or ""
    if os.path.isfile(id_file) and not os.path.islink(id_file):
        os.unlink(id_file)  # if we fail, nobody shall take an older one for ours
    with adding():
        context = without_container(Context, options.path, options.file)
        try:
            build = Build(options, context.dockerfile(), context.open,
                          Report(style, bool(options.explain)))
            state = build.run()
            build.warn_of_args()
            for output_ in outputs:
                without_container(export_files, state, *output_, build.epoch)
            if outputs:
                return
            id = build.finish(state, refs)
        finally:
            context.close()
            remove_unfinished()
    if id_file:
        without_container(save_id, id_file, id)
    if options.quiet:
        print(id)
        return
    build.report.line(f"Successfully built {id[7:19]}")
    for ref in refs:
        build.report.line(f"Successfully tagged {short_name(ref)}")


def remove_cache():
    """Remove what builds have kept; the bytes that were freed."""
    freed = 0
    for name in os.listdir(store("steps", "")):
        take_away_file(store("steps", name))
    for name in os.listdir(store("mounts", "")):
        with held(f"mounts/{name}", fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
            if mine is not None:  # no RUN has it
                freed += bytes_in(store("mounts", name))
                remove_tree(store("mounts", name))
    return freed + sweep()


@command("builder prune", arg("-a", "--all", action="store_true", help="all there is"),
         FORCE)
def builder_prune_command(options):
    """Remove the cache of builds."""
    if confirm(options, "all build cache"):
        print(f"Total reclaimed space: {decimal(remove_cache(), 4)}")


@command("system prune", FORCE, ONLY,
         arg("-a", "--all", action="store_true", help="also images with a name"),
         arg("--volumes", action="store_true", help="also volumes without a name"))
def system_prune_command(options):
    """Remove all that nobody uses, and what killed commands have left behind."""
    idle = "not used by at least one container"
    wanted = filters_of(options.filter, ENDED_FILTERS)
    if options.volumes and "until" in wanted:
        raise Fail('The "until" filter is not supported with "--volumes"', "", 1)
    if not confirm(options, "all stopped containers", f"all networks {idle}",
                   *[f"anonymous volumes {idle}"] * options.volumes,
                   IDLE_IMAGES[options.all], "all build cache",
                   *[f"of these only what has {text}" for text in options.filter]):
        return
    before = os.listdir(store("containers", ""))
    clear_away(False)
    ended = remove_ended(wanted)
    gone = {id: ended.get(id, 0) for id in before
            if not os.path.exists(store("containers", id))}  # --rm, a killed `create`
    networks = dict.fromkeys(remove_idle_networks(wanted), 0)
    volumes = remove_idle_volumes(False, wanted) if options.volumes else {}
    freed = remove_cache() if "label" not in "".join(wanted) else 0  # it has none
    images, more = remove_idle(options.all, wanted)
    tell_gone({"Containers": gone, "Networks": networks, "Volumes": volumes,
               "Images": images}, freed + more)

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
made=  # to be removed at the end, whatever the end is
trap 'last=$?
    for at in $made; do rmdir "$at" 2>/dev/null || rm -r "$at"; done
    exit $((code ? code : last))' EXIT
exec 5<&0  # where the container's input is, as each shell below reads its own text"""
SECOND_SHELL = """\
unshare --mount --propagation slave sh -eu <<'END OF WORKSHOP' || code=$?
code=0
trap 'exit $((code ? code : $?))' EXIT
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

        self.shlex = shlex
        if self.quote(STORE) != STORE:
            raise Fail(f"--explain=sh: {STORE!r} cannot stand in a script as it is",
                       "a MINICONTAINER_ROOT without spaces and the like")
        self.result = 0  # of the call that is told
        self.made = []  # directories of the host, below STORE, and control groups
        self.groups = []  # its control groups: their lists of processes
        self.trees = {}  # descriptor of a mount that is nowhere yet: what it shows
        self.born, self.base = 0, 0  # init's namespaces, and its root's id
        self.pivoted = self.ended = False
        self.dropped, self.more, self.cwd = [], [], "/"  # for capsh
        self.ids = 0, 0, []
        self.host, self.loader = host_programs(
            ("umount", "mount", "prlimit", "env", "capsh"))

    def quote(self, text):
        """A word as a shell reads it; none may look like the end of a here-document."""
        if "\nEND OF" in f"\n{text}":
            raise Fail("--explain=sh: a line that begins with END OF is how the script "
                       "ends its parts", "run it without that line")
        return self.shlex.quote(text)

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
        """The first directory that it makes is the container's, and named like it: by
        an id that is new each time, as the one that was told of may still be there."""
        first = not self.made and (f"{FIRST_SHELL}\nexport id=$(od -An -vtx1 -N32 "
                                   "/dev/urandom | tr -d ' \\n')\n")
        line = f"{first or ''}mkdir -m {mode:o} {self.path(path, dirfd)}"
        if dirfd == AT_FDCWD and path.startswith("/"):
            if os.path.dirname(path) not in self.made:
                line += f"; made=\"{path} $made\""
            self.made.append(path)
        return line

    def mknodat(self, dirfd, path, mode, dev):
        """A node, or an empty file to mount on."""
        at = self.path(path, dirfd)
        if stat.S_ISREG(mode):
            return f"touch {at}"
        return (f"mknod {at} {'b' if stat.S_ISBLK(mode) else 'c'} "
                f"{os.major(dev)} {os.minor(dev)}")

    def symlinkat(self, target, dirfd, path):
        """A link in the new /dev."""
        return f"ln -s {target} {self.path(path, dirfd)}"

    def fchownat(self, dirfd, path, owner, group, flags):
        """An owner, by number: the host has no name for it."""
        return f"chown {owner}:{group} {self.path(path)}"

    def fchmodat(self, dirfd, path, mode):
        """A mode, whatever the umask is."""
        return f"chmod {mode:o} {self.path(path)}"

    def write(self, path, text):
        """An order to the kernel, or one of the files for /etc."""
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
        """Noted: a shell cannot hold a mount that is nowhere yet."""
        self.trees[self.result] = path, "r" * bool(flags & AT_RECURSIVE) + "bind", False

    def mount_setattr(self, fd, path, flags, attr, size):
        """mount(8) remounts; ids it maps only while it mounts."""
        words = ",".join(word for word, bit in OPTION_WORDS.items()
                         if attr.attr_set & bit & 15)
        if attr.attr_set & MOUNT_ATTR_IDMAP:
            source, how, _ = self.trees[fd]
            self.trees[fd] = source, how, True
            if not attr.propagation:  # a volume: it has been put down already
                return (f"mount --{how} -o X-mount.idmap=/proc/$users/ns/user "
                        f"{self.quote(source)} volume-{fd}")
        elif words == "ro" and flags & AT_RECURSIVE:
            return f"read_only {self.path(fd)}"
        elif words:
            mount = self.host["mount"] if self.pivoted else "mount"
            return f"{mount} -o remount,bind,{words} {self.path(fd)}"

    def move_mount(self, tree, path, to_dirfd, to_path, flags):
        """The mount that was noted, now made where it belongs."""
        source, how, mapped = self.trees[tree]
        if to_dirfd != AT_FDCWD:
            return f"mount --rbind volume-{tree} {self.path(to_dirfd)}"
        if mapped:
            return f"layer {self.quote(source)} {to_path} {self.base}"
        return f"mount --{how} {self.quote(source)} {to_path}"

    def mount(self, source, target, type, flags, data):
        """mount(8) has a word for each flag; propagation is a call of its own."""
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
        """Before the pivot a step on the way, after it the program's directory."""
        if self.pivoted:
            self.cwd = os.readlink(f"/proc/self/fd/{fd}")
        elif narration.who == "init":
            return f"cd {self.path(fd)}"

    def chdir(self, path):
        """After the pivot the shell stays in the old root: its programs are there."""
        return "" if self.pivoted else f"cd {path}"

    def pivot_root(self, new_root, put_old):
        """From here on a program of the host's is to be found under "."."""
        self.pivoted = True
        return ("pivot_root . .\n"
                "cd -P /..  # the old root lies on top of the new one\n"
                f'host="{self.loader}"')

    def umount2(self, target, flags):
        """By the name "." and no other: / is the new root already."""
        return f"{self.host['umount']} --no-canonicalize --lazy ."

    # ── processes ──

    def openat(self, dirfd, path, flags, mode):
        """Noted: the shell that will become the container joins the groups."""
        if path.endswith("/tasks"):
            self.groups.append(path)
        elif path in self.made:
            self.groups.append(f"{path}/cgroup.procs")

    def unshare(self, flags):
        """The parent's begins the second shell, init's the third."""
        if narration.who == "parent":
            return SECOND_SHELL
        kinds = [UNSHARE_WORDS.get(kind, kind) for kind, row in NAMESPACES.items()
                 if (self.born | flags) & row[0] and kind != "user"]
        users = "nsenter --user=/proc/$users/ns/user --setuid 0 --setgid 0 "
        return (users * bool(self.born & CLONE_NEWUSER)
                + f"unshare --{' --'.join(kinds)} --fork --kill-child {THIRD_SHELL}")

    def clone3(self, args, size):
        """As clone, which has its flags elsewhere."""
        return self.clone(args.flags)

    def clone(self, flags, *_):
        """Nothing is born yet: groups, volumes, and a holder of the ids."""
        self.born = flags
        lines = [f"echo $$ > {self.quote(group)}" for group in self.groups]
        for fd, (source, how, _) in self.trees.items():
            lines += [f"{'mkdir' if os.path.isdir(source) else 'touch'} volume-{fd}",
                      f"mount --{how} {self.quote(source)} volume-{fd}"]
        if flags & CLONE_NEWUSER:
            lines += ["unshare --user sleep 1000000 &", "users=$!",
                      "trap 'last=$?; kill $users; wait $users 2>/dev/null || :",
                      "    exit $((code ? code : last))' EXIT",
                      "in_new_namespace $users"]
        return "\n".join(lines)

    def setns(self, fd, flags):
        """The parent goes home: what it does now is for us alone."""
        self.ended = True

    def sethostname(self, name, length):
        """hostname(1) does just that."""
        return f"hostname {self.quote(name)}"

    def setdomainname(self, name, length):
        """And domainname(1) this."""
        return f"domainname {self.quote(name)}"

    def ioctl(self, fd, request, argument):
        """Of all that is done so, only the loopback interface is a shell's affair."""
        return "ip link set lo up" if request == SIOCSIFFLAGS else ""

    # ── privileges ──

    def setgroups(self, count, groups):
        """Noted for capsh."""
        self.ids = *self.ids[:2], groups[:count]

    def setresgid(self, gid, *_):
        """Noted for capsh."""
        self.ids = self.ids[0], gid, self.ids[2]

    def setresuid(self, uid, *_):
        """Noted for capsh."""
        self.ids = uid, *self.ids[1:]

    def umask(self, mode):
        """A word of the shell's own."""
        return f"umask {mode:04o}"

    def prctl(self, option, value, *_):
        """Noted for capsh: what leaves the bounding set, and the promise."""
        if option == PR_CAPBSET_DROP:
            self.dropped.append(CAPABILITIES[value].lower())
        elif option == PR_SET_NO_NEW_PRIVS:
            self.more = ["--no-new-privs"]

    def prlimit64(self, pid, resource, new, old):
        """Of this shell, which its program inherits."""
        low, high = (value if value < 1 << 63 else "unlimited" for value in new)
        return f"{self.host['prlimit']} --pid $$ --{RLIMITS[resource]}={low}:{high}"

    def seccomp(self, operation, flags, program):
        """No program takes a filter from a shell: the one wall that is missing."""
        return f"# a filter of {program.len} instructions, that no shell can install"

    def execve(self, path, argv, envp):
        """The last line of the third shell, and the ends of all three."""
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
                 "END OF INIT", "exit $code", "END OF WORKSHOP", "exit $code"]
        return "\n".join(lines)


BY_HAND = []  # the script of this process, once it has begun


@style("sh")
def as_shell(name, args, at, took, result, why):
    """A request as the line of a shell script, if it has one."""
    if not BY_HAND:
        if name != "mkdirat":  # its directory is the first thing that is its own
            return ""
        narration.style = ""  # what it takes is not told
        BY_HAND.append(ByHand())
        narration.style = "sh"
    hand, tell = BY_HAND[0], getattr(BY_HAND[0], name, None)
    if not tell or not (result.isdecimal() or name == "execve"):
        return ""
    hand.result = int(result) if result.isdecimal() else 0
    lines, id = tell(*args) or "", os.path.basename(hand.made[0])
    why = f"  # {why}" * bool(lines and why and "\n" not in lines)
    return lines.replace(id, "$id").replace("id=$id", f"id={id}") + why


def end_script(code):
    """Print what a script that was not told to its end shall end with."""
    print(f"exit {code}", file=sys.stderr)


def above_ours(limit):
    """Whether a limit is above our own, which an ordinary program cannot raise."""
    import resource

    most = resource.getrlimit(getattr(resource, limit["type"]))[1]
    return most != -1 and not 0 <= limit["hard"] <= most


def check_script(words, options):
    """Refuse, in words, to tell as a script what no script does."""
    if words != "run":
        raise Fail("--explain=sh prints the script of a `run`, and of nothing else",
                   "--explain tells about any command")
    for option, given in (("--tty", options.tty), ("--init", options.init),
                          ("--storage-driver vfs", options.storage_driver == "vfs"),
                          ("a network of its own", options.publish or
                           options.network not in ("", "none", "host")),
                          ("--without pivot", "pivot" in ",".join(options.without)),
                          ("a --ulimit above ours", any(
                              map(above_ours, map(rlimit_spec, options.ulimit)))),
                          ("--stop-after", options.stop_after)):
        if given:
            raise Fail(f"--explain=sh with {option}: no script does that",
                       "leave it out; the script has the terminal that it is given")


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


COMMON_OPTIONS = (
    arg("--explain", optional="text", choices=list(STYLES), metavar="STYLE",
        help="narrate every request to the kernel; bpf: disassemble filters; json; sh: "
             "print `run` as a shell script"),
    arg("--help", action="store_true", help="show this"),
)


# ── what the Tab key offers ──
#
# The shells' part is a line that asks us: the table of commands is here, and so are the
# names of containers, images and volumes.

COMPLETION = {
    "bash": """\
_minicontainer() {  # to bash a word ends at a colon, to us it does not
    local words
    read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:COMP_POINT-1:1} == " " ]] && words+=("")
    mapfile -t COMPREPLY < <(minicontainer completion words "${words[@]:1}" 2>/dev/null)
    local begun=${words[-1]}
    COMPREPLY=("${COMPREPLY[@]#"${begun%"${begun##*:}"}"}")
}
complete -o bashdefault -o default -F _minicontainer minicontainer
""",
    "zsh": """\
#compdef minicontainer
_minicontainer() {
    compadd -- ${(f)"$(minicontainer completion words "${(@)words[2,CURRENT]}" 2>&-)"}
}
compdef _minicontainer minicontainer
""",
    "fish": """\
complete -c minicontainer -a '(minicontainer completion words \
    (commandline -opc)[2..] (commandline -ct | string collect -a) 2>/dev/null)'
"""}
NAMED = {  # what an operand of that name may be
    "CONTAINER": lambda: [record.name for record in known()],
    "IMAGE": lambda: [tag for image in all_images() for tag in image.tags()],
    "VOLUME": lambda: [facts["Name"] for facts in all_volumes()],
}


def candidates(before, begun):
    """The words that may stand after others and begin like this."""
    words = next((" ".join(before[:n]) for n in (2, 1)
                  if " ".join(before[:n]) in COMMANDS), None)
    if words is None or before == [words.split()[0]] != words.split():
        found = {text.split()[len(before)] for text in COMMANDS
                 if text.split()[:len(before)] == before != text.split()}
    elif begun.startswith("-"):
        found = {name for names, _ in (*COMMANDS[words][1], *COMMON_OPTIONS)
                 for name in names if name.startswith("-")}
    else:
        wanted = " ".join(how.get("metavar", "") for _, how in COMMANDS[words][1])
        found = {name for kind, list_ in NAMED.items()
                 if kind in wanted and os.geteuid() == 0 for name in list_()}
    return sorted(word for word in found if word.startswith(begun))


@command("completion", arg("shell", choices=[*COMPLETION, "words"],
                           metavar="bash|zsh|fish", help="for which shell"),
         arg("words", nargs="A*", metavar="WORD", help="asked by what it prints"))
def completion_command(options):
    """Print what makes a shell complete our commands: source <(… completion bash)."""
    if options.shell == "words":
        *before, begun = options.words or [""]
        print("".join(f"{word}\n" for word in candidates(before, begun)), end="")
    elif options.shell in COMPLETION:
        print(COMPLETION[options.shell], end="")
    else:
        raise Fail(f"no completion for {options.shell!r}", ", ".join(COMPLETION), 1)


# ── on the PATH ──
#
# Of a start as a file, more than half is spent compiling it; `python3 -m minicontainer`
# keeps the bytecode.  A launcher loads what `install` compiled, and leaves out what a
# start pays for and has no use of: looking for site-packages (-S), the environment's
# PYTHON… (-I), the locale (utf8), and collecting garbage, of which there is hardly any.
# "Unchecked" bytecode is not compared with the file, so that a start never compiles,
# whoever it is for: a change takes `install`.
#
# And a start pays for every line that it loads, used or not, and a shim keeps them all
# in memory.  So for the commands that are used the most, `install` also writes files of
# only those statements that they can reach: the command's function, what it names, what
# that names, and so on.  Nothing here looks up a name that it has put together, but the
# narration, which spells flags by the numbers of this file: all of those are kept.  And
# functions that a decorator enters into a table can be reached if the table can.  That
# leaves 260 to 540 kB of bytecode of 910, a sixth of the processor's time for `exec`.

LAUNCHER_FLAG = "-ISXutf8"
LAUNCHER = """\
#!{python} {flag}
# minicontainer install: runs the bytecode of the file named here
import _signal, gc, sys; gc.set_threshold(100_000)
if callable(_signal.getsignal(2)): _signal.signal(2, 0)  # Ctrl-C from here on
__file__ = {lib!r} + {name} + ".py"
exec(type(__loader__)("__main__", __file__).get_code("__main__"))
"""
CUTS = {  # a file beside minicontainer.py: the commands that it is for
    "minicontainer.run": "create restart run start".split(),
    "minicontainer.exec": "attach exec kill logs pause ps rm stop unpause wait".split(),
    "minirunc": ["oci"]}  # and all that belong to it
CHOICE = f"""["minicontainer", *(name for name, words in {CUTS}.items()
    if sys.argv[1:2] and sys.argv[1] in words)][-1]"""
PREFIX_OPTION = arg("--prefix", metavar="DIR", default="/usr/local",
                    help="files go to DIR/bin and DIR/lib (default: /usr/local)")


# minirunc has one more in front of that.  A Python that seals itself (chapter 5) starts
# twice, which is long for an `exec`; so what does it first is a program of 25 words of
# the processor's:
#
#       fd = open_tree(AT_FDCWD, "/usr/bin", OPEN_TREE_CLONE …)       else: plain
#       mount_setattr(fd, "", AT_EMPTY_PATH …, {MOUNT_ATTR_RDONLY})   else: plain
#       execveat(fd, "python3", {"python3", "-IS…", launcher, argv[1] …}, envp)
#     plain:
#       execve("/usr/bin/python3", …)                and that one says what is amiss
#       exit(127)
#
# When a program begins, its stack holds argc, argv[0], argv[1] … 0, envp[0] …: with
# Python, its flag and the launcher over what is before argv[1], that is Python's argv.

calls(execveat=(322, 281, "dirfd path argv envp AT_"), exit=(60, 93, "status"))
SEALED_START = (  # put, copy: into the first to fifth argument of the next call
    ("put", 0, AT_FDCWD), ("put", 1, "directory"),
    ("put", 2, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE),
    ("call", "open_tree"), ("unless_failed",), ("keep",),
    ("copy", 0, "fd"), ("put", 1, "empty"), ("put", 2, AT_EMPTY_PATH | AT_RECURSIVE),
    ("put", 3, "attr"), ("put", 4, sizeof(mount_attr)),
    ("call", "mount_setattr"), ("unless_failed",),
    ("copy", 0, "fd"), ("put", 1, "name"), ("copy", 2, "argv"), ("copy", 3, "envp"),
    ("put", 4, 0), ("call", "execveat"),
    ("plain",), ("put", 0, "python"), ("copy", 1, "argv"), ("copy", 2, "envp"),
    ("call", "execve"), ("put", 0, 127), ("call", "exit"))


class x86_64_words:
    """How x86_64 is told them; fd, argv and envp are kept in r15, r14 and r13."""

    machine, kept = 62, {"fd": 7, "argv": 6, "envp": 5}
    argument = 7, 6, 2, 10, 8  # rdi, rsi, rdx, r10, r8

    def begin(self, python, flag, launcher):
        """The stack as it is to be, and where argv and envp are in it."""
        return (bytes.fromhex("4c8b2424 4e8d6ce410")  # r13 = rsp + 8 * [rsp] + 16
                + b"\x68" + struct.pack("<i", python)  # push
                + b"\x48\xc7\x44\x24\x08" + struct.pack("<i", flag)  # mov [rsp+8]
                + b"\x48\xc7\x44\x24\x10" + struct.pack("<i", launcher)
                + b"\x49\x89\xe6")  # r14 = rsp

    def put(self, place, value):
        """mov register, constant"""
        register = self.argument[place]
        prefix = b"\x41" if register > 7 else b""
        return prefix + struct.pack("<Bi", 0xB8 | register & 7, value)

    def copy(self, place, what):
        """mov register, register"""
        register = self.argument[place]
        return bytes((0x4C | register >> 3, 0x89, 0xC0 | self.kept[what] << 3
                      | register & 7))

    def call(self, number):
        """mov eax, number; syscall"""
        return struct.pack("<Bi2s", 0xB8, number, b"\x0f\x05")

    def unless_failed(self, distance):
        """test eax, eax; js plain"""
        return b"\x85\xc0\x0f\x88" + struct.pack("<i", distance - 8)

    def keep(self):
        """mov r15, rax"""
        return b"\x49\x89\xc7"


class aarch64_words:
    """How aarch64 is told them; fd, argv and envp are kept in x22, x21 and x20."""

    machine, kept = 183, {"fd": 22, "argv": 21, "envp": 20}

    def begin(self, python, flag, launcher):
        """The stack as it is to be, and where argv and envp are in it."""
        words = [0xF94003F3, 0x8B336FF4, 0x91004294,  # x20 = sp + 8 * [sp] + 16
                 0xD10023F5]  # x21 = sp - 8
        code = struct.pack("<4I", *words)
        for at, address in enumerate((python, flag, launcher)):  # str x0, [x21, 8 * at]
            code += self.put(0, address) + struct.pack("<I", 0xF90002A0 | at << 10)
        return code

    def put(self, place, value):
        """movz register, low half; movk register, high half"""
        return struct.pack("<2I", 0xD2800000 | (value & 0xFFFF) << 5 | place,
                           0xF2A00000 | (value >> 16 & 0xFFFF) << 5 | place)

    def copy(self, place, what):
        """mov register, register"""
        return struct.pack("<I", 0xAA0003E0 | self.kept[what] << 16 | place)

    def call(self, number):
        """mov x8, number; svc"""
        return self.put(8, number) + struct.pack("<I", 0xD4000001)

    def unless_failed(self, distance):
        """tbnz x0, 63, plain"""
        return struct.pack("<I", 0xB7F80000 | (distance // 4 & 0x3FFF) << 5)

    def keep(self):
        """mov x22, x0"""
        return struct.pack("<I", 0xAA0003F6)


def sealed_start(python, launcher, words=None):
    """The bytes of an ELF program that starts a launcher in a sealed interpreter."""
    base, head, data = 0x400000, 64 + 56, b""
    words = words or {"x86_64": x86_64_words, "aarch64": aarch64_words}[
        os.uname().machine]()
    at = {name: number for name, (number, _) in CALLS.items()}
    for name, text in (("mark", "# minicontainer install:"), ("python", python),
                       ("flag", LAUNCHER_FLAG), ("launcher", launcher), ("empty", ""),
                       ("directory", os.path.dirname(python)),
                       ("name", os.path.basename(python))):
        at[name] = base + head + len(data)
        data += os.fsencode(text) + b"\0"
    data += bytes(-len(data) % 8)
    at["attr"] = base + head + len(data)
    data += bytes(mount_attr(attr_set=MOUNT_ATTR_RDONLY))
    at["plain"] = 0
    for _ in "found", "used":  # where `plain` is
        code = words.begin(at["python"], at["flag"], at["launcher"])
        for how, *operands in SEALED_START:
            if how == "plain":
                at["plain"] = len(code)
            elif how == "unless_failed":
                code += words.unless_failed(at["plain"] - len(code))
            else:
                code += getattr(words, how)(*(at.get(name, name) for name in operands))
    size_ = head + len(data) + len(code)
    return struct.pack(  # elf(5): the file's header, and that of its one segment
        "<4s3B9xHHIQQQIHHHHHHIIQQQQQQ", b"\x7fELF", 2, 1, 1, 2, words.machine, 1,
        base + head + len(data), 64, 0, 0, 64, 56, 1, 0, 0, 0,
        1, 5, 0, base, base, size_, size_, 0x10000) + data + code


UNIT = """\
# minicontainer install: starts containers whose --restart says so
[Unit]
Description=Containers that are to run whenever the machine does
After=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
KillMode=process
ExecStart={launcher} system start-restart-policies
[Install]
WantedBy=multi-user.target
"""


def given_by(node):
    """The names that a statement gives to what stands below it.  Its symbol table has
    more: from Python 3.12 on what a comprehension calls its items, too."""
    import ast

    if isinstance(node, ast.Import | ast.ImportFrom):
        return {each.asname or each.name.partition(".")[0] for each in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = [*getattr(node, "targets", ()), getattr(node, "target", ast.Pass())]
    targets += [each.target for each in ast.walk(node)
                if isinstance(each, ast.NamedExpr)]
    return {each.id for target in targets for each in ast.walk(target)
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}.union(
                *map(given_by, getattr(node, "body", ())))


class Statement:
    """A statement of this file's outermost level, and what it has to do with others."""

    def __init__(self, text, node, decorators):
        import symtable

        self.text, self.gives, self.asks = text, given_by(node), set()
        self.enters = [(by.func.id, by.args[0].value) for by in decorators]
        tables = [symtable.symtable(text, "", "exec")]
        self.asks.update(symbol.get_name() for symbol in tables[0].get_symbols()
                         if symbol.is_referenced())
        for table in tables:  # it grows: functions in functions
            tables += table.get_children()
            if table is not tables[0]:
                self.asks.update(symbol.get_name() for symbol in table.get_symbols()
                                 if symbol.is_global())


def statements_of(text):
    """The statements of a text like this file, without the comments between them."""
    import ast

    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in (node, *decorators))
        yield Statement("".join(lines[first - 1:node.end_lineno]), node, decorators)


def reachable(statements, words):
    """The text of those statements that the commands `words` can reach."""
    given = {name: each for each in statements for name in each.gives}
    numbers = [name for name, value in globals().items() if isinstance(value, int)]
    reached, kept, before = {"console", *numbers}, set(), None

    def entered(decorator, word):
        """Can the table be reached in which a decorator enters its function?"""
        if decorator in ("command", "on_each", "oci"):
            return (word if decorator != "oci" else "oci") in words
        return given[decorator].asks & given.keys() & reached
    while before != len(kept):  # each time round there may be more to reach
        before = len(kept)
        for each in statements:
            if each not in kept and (not each.gives or each.gives & reached or any(
                    entered(*one) for one in each.enters)):
                kept.add(each)
                reached |= each.asks
    return "\n\n".join(each.text for each in statements if each in kept)


def installed(prefix):
    """What `install` puts under a prefix: the file, and cut ones; bytecode of each;
    a record of the directories that were made for them; launchers; systemd's unit."""
    import importlib.util

    if not prefix or any(ord(character) < 32 for character in prefix):
        raise Fail(f"invalid --prefix: {prefix!r}", "a directory, as /usr/local", 1)
    top = os.path.abspath(prefix)
    lib = f"{top}/lib/minicontainer"
    files = [f"{lib}/{name}.py" for name in ("minicontainer", *CUTS)]
    return (files, [*map(importlib.util.cache_from_source, files)],
            f"{lib}/minicontainer.directories",
            [f"{top}/bin/minicontainer", f"{lib}/minirunc", f"{top}/bin/minirunc"],
            f"{top}/lib/systemd/system/minicontainer.service")


def check_ours(paths):
    """Refuse to replace or remove a file that `install` has not written."""
    for path in filter(os.path.lexists, paths):
        begin = open_program(path)[:500] if os.path.exists(path) else b""
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


# What a start reads, and a shim keeps in memory, is smaller by a fourth without what
# only a traceback shows, where a line begins, and what nobody asks for at run time: the
# docstrings, but for those of commands, which are decorated, and are the help.

COMPILER = """\
import ast, importlib.util, marshal, sys
source, target, name = sys.argv[1:]
with open(source, "rb") as file:
    text = file.read()
tree, kinds = ast.parse(text), (ast.FunctionDef, ast.ClassDef)
for node in ast.walk(tree):
    if isinstance(node, kinds) and not node.decorator_list and ast.get_docstring(node):
        node.body[0].value.value = None
def lean(code):
    return code.replace(co_linetable=b"", co_consts=tuple(
        lean(const) if isinstance(const, type(code)) else const
        for const in code.co_consts))
with open(target, "wb") as file:  # flags 1: nobody compares the hash
    file.write(importlib.util.MAGIC_NUMBER + bytes((1, 0, 0, 0))
               + importlib.util.source_hash(text)
               + marshal.dumps(lean(compile(tree, name, "exec", dont_inherit=True))))
"""


def compile_lean(python, files, bytecodes):
    """Compile what is to become these files, side by side."""
    import subprocess

    at_work = [subprocess.Popen([python, "-IS", "-c", COMPILER, f"{file}.new",
                                 f"{bytecode}.new", file])
               for file, bytecode in zip(files, bytecodes, strict=True)]
    if any([compiler.wait() for compiler in at_work]):
        raise Fail(f"{python} could not compile this file", "see what it printed", 1)


@command("install", PREFIX_OPTION,
         arg("--unit", action="store_true", help="and a unit of systemd's, that starts "
             "at boot what --restart says"))
def install_command(options):
    """Put minicontainer and minirunc on the PATH, compiled."""
    import pathlib

    python = os.path.realpath("/proc/self/exe")  # what a link or a shim has led to
    files, bytecodes, record, launchers, unit = installed(options.prefix)
    with open(__file__, encoding="utf-8") as file:
        whole = file.read()
    statements = list(statements_of(whole))
    contents = {files[0]: whole}
    contents.update((file, reachable(statements, words))
                    for file, words in zip(files[1:], CUTS.values(), strict=True))
    for path, name in zip(launchers, (CHOICE, "'minirunc'"), strict=False):
        contents[path] = LAUNCHER.format(python=python, flag=LAUNCHER_FLAG, name=name,
                                         lib=os.path.dirname(files[0]) + "/")
        if contents[path].index("\n") > 254 or any(map(str.isspace, python)):
            raise Fail(f"the kernel takes no #! line with {python!r}",
                       "use a Python with a shorter path, without spaces", 1)
    contents[launchers[2]] = os.fsdecode(sealed_start(python, launchers[1]))
    if options.unit:
        contents[unit] = UNIT.format(launcher=launchers[0])
    made, paths = set(), [*bytecodes, record, *contents]
    try:
        check_ours([*files, *launchers, unit])
        made.update(str(top) for path in paths for top in pathlib.Path(path).parents
                    if not top.exists())
        for path in paths:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        earlier = read_file(record).splitlines() if os.path.exists(record) else []
        write_file(f"{record}.new", "\n".join([*earlier, *made]), create=0o644)
        for path, content in contents.items():
            write_file(f"{path}.new", content,
                       create=0o755 if path in launchers else 0o644)
        compile_lean(python, files, bytecodes)
        for path in paths:  # a start in this moment finds the old one or the new (P3)
            os.replace(f"{path}.new", path)
            print(f"installed {path}")
    except PermissionError as error:
        raise Fail(f"{error.filename}: {error.strerror}",
                   "sudo, or --prefix with a directory of your own", 1) from None
    except OSError as error:
        fail = diagnose(error)
        raise Fail(fail.message, fail.hint or "another --prefix", 1) from None
    finally:
        take_away([f"{path}.new" for path in paths], made)


@command("uninstall", PREFIX_OPTION)
def uninstall_command(options):
    """Remove what `install` has put under a prefix, and nothing else."""
    files, bytecodes, record, launchers, unit = installed(options.prefix)
    if not os.path.exists(record):
        raise Fail(f"nothing is installed under {options.prefix}",
                   "--prefix as it was given to `install`", 1)
    check_ours([*files, *launchers, unit])
    cache = os.path.dirname(bytecodes[0])
    names = os.listdir(cache) if os.path.isdir(cache) else []
    files = list(filter(os.path.lexists, (
        *launchers, unit, *(f"{cache}/{name}" for name in names  # of any Python
                      if name.startswith(("minicontainer.", "minirunc."))),
        *files, record)))
    take_away(files, read_file(record).splitlines())
    print("\n".join(f"removed {path}" for path in files))


# ── the words of the command line ──

def usage(group=""):
    """What `minicontainer --help` prints, or `minicontainer GROUP`."""
    lines = [f"Usage: minicontainer {group or '[--explain]'} COMMAND [OPTIONS]", "",
             "The container engine you can read.", "", "Commands:"]
    lines += [f"  {words:14} {function.__doc__.splitlines()[0]}"
              for words, (function, _) in COMMANDS.items()
              if not group or words.split()[0] == group]
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
    elif "once" in how and getattr(options, attribute):
        raise Fail(f"more than one {name}", how["once"])
    else:
        setattr(options, attribute, value)


def check_count(words, options, operands, count):
    """Refuse too few or too many operands, as Docker words it."""
    kinds = [how.get("nargs", "") for _, how in operands]
    least = sum(kind not in ("?", "*", "A*") for kind in kinds) - any(
        getattr(options, how.get("unless", ""), None) for _, how in operands)
    most = 1 << 30 if {*kinds} & {"A...", "A*", "+", "*"} else len(kinds)
    if not least <= count <= most:
        exactly = ("exactly" if least == most else
                   "at least" if count < least else "at most")
        bound = most if exactly == "at most" else least
        raise Fail(f'"minicontainer {words}" ' + (
            f"requires {exactly} {bound} argument{'s' * (bound != 1)}." if most else
            "accepts no arguments."), options.hint, 1)


def take_operands(options, operands, given):
    """Give each operand its share of the words that are no options."""
    for name, how in operands:
        many = how.get("nargs") in ("A...", "A*", "+", "*")
        if given:
            setattr(options, name, given if many else given[0])
            given = [] if many else given[1:]


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
    check_count(words, options, operands, len(given))
    take_operands(options, operands, given)
    return function, options


# Commands that touch nothing of the store; minirunc says itself what it may not.
FOR_ANYBODY = "completion install login logout ns oci steps uninstall version".split()


START_NOTHING = {*"image images history import load login logout network pull push rmi "
                 "save tag".split()}


def short_form(argv):
    """A command as it is declared: `image build` is `build`, `list` is `ls`."""
    group, name = (*argv, "")[:2]
    if group in ("container", "image", "network", "volume"):
        name = {"list": "ls", "remove": "rm"}.get(name, name)
        if f"{group} {name}" in COMMANDS:
            return [group, name, *argv[2:]]
        if group in ("container", "image") and name in COMMANDS:
            return [name, *argv[2:]]
    return argv


def dispatch(argv):
    """Do what the command line asks; its exit code."""
    if os.path.basename(sys.argv[0]) == "minirunc":
        argv = ["oci", *argv]
    if argv[:1] == ["oci"]:
        argv = ["oci", *oci_words(argv[1:])]
    style = os.environ.get("MINICONTAINER_EXPLAIN", "").lower()
    style = style if style in STYLES else "text" if style not in ("", "0") else ""
    while argv and argv[0].partition("=")[0] == "--explain":
        style = argv.pop(0).partition("=")[2] or "text"
    if not argv or argv[0] in ("help", "--help", "-h"):
        print(usage())
        return 0
    argv = short_form(argv)
    words = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else argv[0]
    if words in ("--version", "-v"):
        print(f"minicontainer version {VERSION}")
        return 0
    if words not in COMMANDS:
        group = any(known.startswith(f"{words} ") for known in COMMANDS)
        if group and argv[1:] in ([], ["--help"]):
            print(usage(words))
            return 0
        raise Fail(f"{' '.join(argv[:1 + group])!r} is not a minicontainer command",
                   f"see `minicontainer {f'{words} ' * group}--help`", 1)
    if os.uname().machine not in KERNEL_NAMES:
        raise Fail(f"the system calls of {os.uname().machine} are not known here",
                   f"known are {' and '.join(KERNEL_NAMES)}")
    try:
        function, options = parse(words, argv[len(words.split()):])
    except Fail as fail:
        if argv[0] == "oci":
            return refuse_words(argv, fail)
        raise
    style = options.explain or style
    if style not in ("", *STYLES):
        raise Fail(f"invalid argument {style!r} for --explain",
                   "one of: " + ", ".join(STYLES))
    if style == "sh":
        check_script(words, options)
        need_root("run what such a script asks for")
    if words.startswith("network ") and not options.help:
        need_root("make networks, and see them")
    if style:
        start_narration(style)
    if words.split()[0] not in FOR_ANYBODY and not options.help:
        be_root()
    try:
        return function(options) or 0
    except (Fail, OSError) as error:
        if words.split()[0] not in START_NOTHING or isinstance(error, BrokenPipeError):
            raise
        fail = diagnose(error)
        if fail.code == 125:
            fail.code = 1  # as in Docker, where 125 is said by what starts containers
        raise fail from None


def stop(number, _):
    """A signal while there is something to undo: unwind, as after an error."""
    raise SystemExit(128 + number)


def as_bytes(error):
    """What is not quite text: the byte of a name as it is, else what Go puts there."""
    return b"".join(bytes((ord(letter) - 0xDC00,)) if "\udc80" <= letter <= "\udcff"
                    else b"\xef\xbf\xbd" for letter in error.object[
                        error.start:error.end]), error.end


def main(argv=None):
    """Run one command line; its exit code.  No traceback ever reaches the person."""
    os.umask(0o022)  # what we make is as readable as it is meant to be
    codecs.register_error("as_bytes", as_bytes)
    for file in filter(None, (sys.stdout, sys.stderr)):
        file.reconfigure(errors="as_bytes")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        while (fd := os.open("/dev/null", os.O_RDWR)) < 3:
            pass  # the caller had closed it, and anything of ours could land there
        os.close(fd)
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not error.filename:
            return 128 + signal.SIGPIPE  # nobody reads what we print: `| head`
        fail = diagnose(error)
        say(f"{fail.message}" + (f"\n  hint: {fail.hint}" if fail.hint else ""))
        if narration.style == "sh":
            end_script(fail.code)
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
        code = code or 128 + signal.SIGPIPE
    os._exit(code)  # taking the interpreter down in order would cost 10 ms


if __name__ == "__main__":
    console()
