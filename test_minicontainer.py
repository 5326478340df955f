"""What minicontainer promises, one sentence a test, in the order of its chapters.

    sudo python3 -m pytest          everything, on this kernel and its cgroup version
    python3 -m pytest -m 'not root' what can be shown without making a container

Every test that makes a container ends by asserting that the host is as it was found:
mounts, control groups, network links, processes, and the store.
"""
import ast
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import pty
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "minicontainer.py")
STORE = tempfile.mkdtemp(prefix="minicontainer-test-")
os.chmod(STORE, 0o755)
os.environ["MINICONTAINER_ROOT"] = STORE
os.environ.pop("MINICONTAINER_EXPLAIN", None)
sys.path.insert(0, HERE)

import minicontainer as m  # noqa: E402  (its store is the one above)

IS_ROOT = os.geteuid() == 0
PYTHON = os.path.realpath(sys.executable)
V2 = not m.cgroup_trees()
SOURCE = open(PROGRAM, encoding="utf-8").read()
LINES = SOURCE.splitlines()

root = pytest.mark.root


# ── helpers ──

def command(*args):
    """The command line that runs minicontainer."""
    return [PYTHON, PROGRAM, *map(str, args)]


def mini(*args, stdin="", env=None, timeout=60):
    """Run minicontainer to its end; its output as text, and its exit code."""
    return subprocess.run(command(*args), input=stdin, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **(env or {})})


def run(*args, **how):
    """`minicontainer run --rm …`, which must succeed: what the container printed."""
    result = mini("run", "--rm", *args, **how)
    assert result.returncode == 0, result.stderr
    return result.stdout


def sh(script, *options, **how):
    """What a shell script prints in a container of the default root file system."""
    return run(*options, "/bin/sh", "-c", script, **how)


def refused(*args, code=125):
    """The one clear line (and its hint) with which a command is refused."""
    result = mini(*args)
    assert result.returncode == code, (result.returncode, result.stderr)
    assert result.stderr.startswith("minicontainer: "), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def until(condition, seconds=30):
    """Wait until condition() is true, and return what it returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        select.select((), (), (), 0.01)
    return found


def tree(top):
    """Every path below a directory, without following links."""
    return sorted(os.path.join(at, name) for at, dirs, files in os.walk(top)
                  for name in dirs + files)


def our_processes():
    """Processes of minicontainer or in one of its control groups."""
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cgroup") as file:
                inside = "/minicontainer-" in file.read()
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                ours = PROGRAM.encode() in file.read()
            if inside or ours:
                found.add(pid)
    return found


def our_cgroups():
    """Control groups of minicontainer's containers, in every tree."""
    return sorted(top for top, _, _ in os.walk("/sys/fs/cgroup")
                  if "/minicontainer-" in top)


def host():
    """What a container must leave as it was."""
    with open("/proc/self/mountinfo") as file:
        mounts = sorted(line.split(" ", 1)[1] for line in file)
    sysctls = {}
    for name in ("hostname", "domainname", "core_pattern", "shmmax", "msgmax"):
        with contextlib.suppress(OSError), open(f"/proc/sys/kernel/{name}") as file:
            sysctls[name] = file.read()
    return {"mounts": mounts, "cgroups": our_cgroups(),
            "links": sorted(os.listdir("/sys/class/net")),
            "processes": sorted(our_processes()), "sysctls": sysctls,
            "directory": os.getcwd(), "terminals": sorted(os.listdir("/dev/pts")),
            "containers": tree(f"{STORE}/containers"), "ids": tree(f"{STORE}/ids"),
            "workshop": tree(f"{STORE}/workshop"),
            "unfinished": [p for p in tree(STORE) if "/.new-" in p]}


@pytest.fixture(autouse=True)
def the_host_is_left_as_it_was(request):
    if not request.node.get_closest_marker("root"):
        yield
        return
    if not IS_ROOT:
        pytest.skip("makes real containers, which takes root: sudo python3 -m pytest")
    before = host()
    yield
    until(lambda: set(our_processes()) <= set(before["processes"]))
    assert host() == before


@pytest.fixture(scope="session", autouse=True)
def the_store_is_temporary():
    yield
    shutil.rmtree(STORE)


def forked(function, stdin=None):
    """Run function() in a fork of this process; (exit code, standard output, error).

    Faster than a new interpreter, and it can change minicontainer before it runs."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                signal.alarm(0)
                os.dup2(os.open("/dev/null", os.O_RDONLY) if stdin is None else stdin, 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                sys.stderr = os.fdopen(2, "w", closefd=False)
                code = function()
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException as error:
                os.write(2, f"Traceback: {error!r}".encode())
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(), err.read().decode()


def main(*args):
    """minicontainer's main with these arguments, as a function for forked()."""
    return lambda: m.main([str(a) for a in args])


class Terminal:
    """minicontainer on a terminal of its own, typed at and read from by a test."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(PYTHON, command(*args))
        self.seen = ""

    def expect(self, pattern, seconds=30):
        """Read until `pattern` appears; what was matched."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    part = os.read(self.fd, 4096)
                except OSError:
                    part = b""
                assert part, f"ended without {pattern!r}: {self.seen!r}"
                self.seen += part.decode(errors="replace")
        self.seen = self.seen[found.end():]
        return found

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self):
        """Read to the end; the exit code."""
        with contextlib.suppress(OSError):
            while part := os.read(self.fd, 4096):
                self.seen += part.decode(errors="replace")
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def running(*options, script="echo up; read x"):
    """A container that runs until the block ends: (Popen, id, pid of its process 1)."""
    before = set(os.listdir(f"{STORE}/containers")) if os.path.isdir(
        f"{STORE}/containers") else set()
    process = subprocess.Popen(
        command("run", "--rm", "-i", *options, "/bin/sh", "-c", script),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line == "up\n", (line, process.stderr.read())
        (id,) = set(os.listdir(f"{STORE}/containers")) - before
        until(lambda: os.path.exists(f"{STORE}/containers/{id}/state.json"))
        with open(f"{STORE}/containers/{id}/state.json") as file:
            pid = json.load(file)["pid"]
        yield process, id, pid
    finally:
        with contextlib.suppress(OSError, ValueError):
            process.stdin.close()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()
            process.stderr.close()


def make_tar(path, *members, mode="w"):
    """A tarball of (name, content or dict of TarInfo's attributes) entries."""
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for name, what in members:
            info = tarfile.TarInfo(name)
            data = None
            if isinstance(what, bytes):
                info.size, data = len(what), io.BytesIO(what)
            else:
                for key, value in what.items():
                    setattr(info, key, value)
                if "data" in what:
                    info.size, data = len(what["data"]), io.BytesIO(what["data"])
                    del info.data
            tar.addfile(info, data)
    return path


@pytest.fixture
def busybox():
    """A static busybox, to build tiny layers of."""
    path = shutil.which("busybox")
    if not path or m.interpreter_of(m.open_program(path)):
        pytest.skip("no static busybox on this host: apt-get install busybox-static")
    with open(path, "rb") as file:
        return file.read()


def binary(content, mode=0o755, **more):
    """The attributes of a file in a tarball."""
    return {"data": content, "mode": mode, **more}


# ══ 0. THE TEXT ITSELF ══

BANNER = re.compile(r"# ══ (\d+)\. ([A-Z ]+) ═+$")
TREE = ast.parse(SOURCE)


def chapters():
    """{number: (title, first line, last line)}."""
    found = [(int(match[1]), match[2].strip(), number)
             for number, line in enumerate(LINES, 1) if (match := BANNER.match(line))]
    ends = [line - 1 for _, _, line in found[1:]] + [len(LINES)]
    return {n: (title, line, end)
            for (n, title, line), end in zip(found, ends, strict=True)}


def test_the_table_of_contents_names_the_chapters_that_are_there():
    listed = re.findall(r"^ +(\d+)\. ([A-Z ]+?) {2,}", m.__doc__, re.M)
    assert [(int(n), title) for n, title in listed] == [
        (n, title) for n, (title, _, _) in chapters().items()]


def test_every_chapter_opens_with_an_essay():
    for number, (title, line, _) in chapters().items():
        essay = 0
        while LINES[line + essay].startswith("#"):
            essay += 1
        assert 3 <= essay <= 40, f"{number}. {title}: {essay} lines"


def test_no_line_is_wider_than_88_columns():
    assert [n for n, line in enumerate(LINES, 1) if len(line) > 88] == []


def top_level():
    """{name: line} of everything that is defined at the top level."""
    names = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        names.setdefault(name.id, node.lineno)
    return names


def test_nothing_refers_to_a_name_that_is_defined_further_down():
    defined, wrong = top_level(), []
    for node in TREE.body:
        own = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
               and isinstance(n.ctx, ast.Store)}
        own |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
        start = chapter_of(node.lineno)
        for name in ast.walk(node):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load):
                line = defined.get(name.id, 0)
                if name.id not in own and chapter_of(line) > start:
                    wrong.append(f"line {name.lineno}: {name.id} of line {line}")
    assert wrong == []


def chapter_of(line):
    """The number of the chapter that a line is in; 0 before the first."""
    return max([n for n, (_, first, last) in chapters().items()
                if first <= line <= last], default=0)


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def test_no_function_is_longer_than_60_lines():
    assert [f.name for f in functions() if f.end_lineno - f.lineno >= 60] == []


def test_the_median_function_is_at_most_12_lines_of_code():
    def length(f):
        first = f.body[1] if ast.get_docstring(f) and len(f.body) > 1 else f.body[0]
        return f.end_lineno - first.lineno + 2
    lengths = sorted(map(length, functions()))
    assert lengths[len(lengths) // 2] <= 12


def test_every_top_level_definition_says_its_result_in_a_docstring():
    missing = [node.name for node in TREE.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))
               and not ast.get_docstring(node)]
    assert missing == []


def test_chapter_6_is_at_most_100_lines_of_code():
    _, first, last = chapters()[6]
    code = [line for line in LINES[first:last]
            if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 100


def test_a_fifth_to_a_third_of_the_lines_explain():
    explained = sum(line.strip().startswith("#") for line in LINES)
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            if ast.get_docstring(node):
                explained += node.body[0].end_lineno - node.body[0].lineno + 1
    assert 0.2 <= explained / len(LINES) <= 0.34


def test_only_lean_modules_are_imported_at_the_top():
    heavy = ("argparse dataclasses typing subprocess pathlib logging urllib http ssl "
             "tarfile tempfile shutil hashlib socket inspect threading").split()
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import minicontainer;"
            "print(*sorted(set(sys.argv[2:]) & set(sys.modules)))")
    result = subprocess.run([PYTHON, "-IS", "-c", code, HERE, *heavy],
                            capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_only_the_standard_library_is_imported():
    names = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in ast.walk(TREE)
              if isinstance(node, ast.ImportFrom)}
    assert {n.partition(".")[0] for n in names} <= set(sys.stdlib_module_names)


def test_help_is_there_for_every_command_and_every_option():
    everything = mini("--help").stdout
    for words, (function, options) in m.COMMANDS.items():
        assert words in everything and function.__doc__.splitlines()[0] in everything
        shown = mini(*words.split(), "--help")
        assert shown.returncode == 0
        for names, _ in options:
            assert names[-1] in shown.stdout or "metavar" in dict(options)[names]


def test_the_readme_tells_where_each_chapter_begins():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    for number, (title, line, _) in chapters().items():
        assert re.search(rf"\| *{number} *\| *{title} *\| *{line} *\|", text), (
            f"README: chapter {number}, {title}, begins on line {line}")


def test_the_main_job_can_be_tested_here():
    """A run that selected the containers but cannot make any must not look green."""
    selected = " ".join(sys.argv)
    assert IS_ROOT or "not root" in selected, "run as root, or with -m 'not root'"


# ══ 1. THE DOORS ══

def recorded(function):
    """What function() asks of the kernel, every answer being 0: (name, args, why)."""
    asked = []

    def record(name, args, ask, why):
        asked.append((name, args, why))
        if name == "read":
            return ask()
        return len(args[1]) if name == "write" else 0

    original, m.request = m.request, record
    try:
        function()
    finally:
        m.request = original
    return asked


def spec_for(*argv):
    """The spec that `run …` writes."""
    _, options = m.parse("run", list(argv))
    return m.make_spec(options, "f" * 64, [options.command, *options.args])


def test_the_sequence_of_requests_can_be_recorded_without_root():
    c = m.Container("f" * 64, spec_for("/bin/true"), "/nowhere", ["/a", "/b"])
    c.users, c.pid, c.workshop, c.home = 9, 4242, "/workshop", None
    original = os.open, os.close, m.open_inside
    os.open, os.close, m.open_inside = (lambda *a, **k: 3), (lambda fd: None), (
        lambda *a: 3)
    try:
        asked = recorded(lambda: m.build_rootfs(c))
        c.root_fd, c.cgroup = 3, m.Cgroup("/x", {})
        names = [[name for name, *_ in recorded(lambda s=step: s(c))] for step in
                 (m.own_the_mounts, m.hold_rootfs, m.pivot, m.set_names)]
    finally:
        os.open, os.close, m.open_inside = original
    mounts = [args for name, args, _ in asked if name == "mount"]
    assert mounts[-1] == ("overlay", "rootfs", "overlay", m.MS_NODEV,
                          "lowerdir=1:0,upperdir=changes/upper,workdir=changes/work")
    assert [n for n, *_ in asked].count("mount_setattr") == 2
    assert names == [["unshare", "mount"], ["mount"],
                     ["fchdir", "pivot_root", "umount2", "chdir"], ["sethostname"]]


def test_the_order_of_birth_keeps_its_invariants():
    order = [step.__name__ for step in m.BIRTH]

    def before(*names):
        assert [order.index(n) for n in names] == sorted(order.index(n) for n in names)

    before("no_more_imports", "wait_for_go", "own_the_mounts", "mount_all", "pivot",
           "find_user", "execute")
    before("join_cgroup", "own_the_mounts")
    before("mount_all", "make_devices", "mask_paths", "pivot", "seal_root")
    before("drop_bounding", "become_user", "set_capabilities", "no_new_privileges",
           "die_with_parent", "execute")
    assert order[-1] == "execute"
    assert tuple(m.BIRTH[-len(m.TAIL):]) == m.TAIL == m.JOIN[-len(m.TAIL):]


def test_flags_are_spelled_by_the_kernels_names():
    assert m.spell_flags(m.MS_REC | m.MS_PRIVATE, "MS_") == "MS_REC|MS_PRIVATE"
    assert m.spell_flags(0, "MS_") == "0"
    assert "CLONE_NEWTIME|" in m.spell_flags(m.CLONE_NEWTIME | m.CLONE_NEWPID, "CLONE_")
    assert m.spell("mount", ("proc", "/proc", "proc", m.MS_NOSUID, None)) == (
        'mount("proc", "/proc", "proc", MS_NOSUID, NULL)')
    assert m.spell("mkdirat", (m.AT_FDCWD, "x", 0o755)) == 'mkdirat(AT_FDCWD, "x", 0755)'


def test_a_failed_request_says_what_was_asked():
    with pytest.raises(OSError) as caught:
        m.syscall("chdir", "/no/such/place")
    assert caught.value.filename == 'chdir("/no/such/place")'
    assert caught.value.errno == errno.ENOENT


@root
def test_explain_narrates_parent_and_init_in_order_with_reasons():
    result = mini("run", "--rm", "--explain", "/bin/true")
    assert result.returncode == 0 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if " ms " in line]
    form = re.compile(r" *\d+\.\d{3} ms +\d+\.\d{3} ms  (parent|init) +(\w+)\(.*\) = ")
    parsed = [form.match(line) for line in lines]
    assert all(parsed), [x for x, p in zip(lines, parsed, strict=True) if not p]
    calls = [(p[1], p[2]) for p in parsed]
    for who, call in (("parent", "clone3"), ("parent", "unshare"), ("init", "unshare"),
                      ("init", "pivot_root"), ("init", "capset"), ("init", "execve")):
        assert (who, call) in calls
    assert calls.index(("init", "pivot_root")) < calls.index(("init", "execve"))
    assert "CLONE_NEWUSER|" in result.stderr and "  # " in result.stderr
    assert "\033[" not in result.stderr


@root
def test_explain_can_be_asked_for_by_a_variable_and_as_json():
    result = mini("run", "--rm", "/bin/true", env={"MINICONTAINER_EXPLAIN": "json"})
    rows = [json.loads(line) for line in result.stderr.splitlines()]
    assert {row["who"] for row in rows} == {"parent", "init"}
    assert {"at_ms", "took_ms", "who", "call", "result", "why"} == set(rows[0])
    assert "pivot_root(" in mini("run", "--rm", "/bin/true",
                                 env={"MINICONTAINER_EXPLAIN": "1"}).stderr


@root
def test_explain_is_in_colour_on_a_terminal_unless_no_color_is_set():
    for variable, coloured in (("X", True), ("NO_COLOR", False)):
        os.environ[variable] = "1"
        terminal = Terminal("--explain", "run", "--rm", "/bin/true")
        assert terminal.end() == 0
        assert ("\033[2m" in terminal.seen) == coloured
        del os.environ[variable]


def test_nothing_is_narrated_unless_asked_for():
    assert m.narration.style == ""
    assert mini("ns").stderr == ""


def count_requests(*args):
    """How many requests a command makes, in all its processes."""
    counter = mmap.mmap(-1, 8)

    def counted():
        original = m.request

        def request(*asked):
            counter[:8] = struct.pack("q", struct.unpack("q", counter[:8])[0] + 1)
            return original(*asked)
        m.request = request
        return m.main(list(args))
    code, _, err = forked(counted)
    assert code == 0, err
    return struct.unpack("q", counter[:8])[0]


def fail_request(n, *args):
    """The outcome of a command whose n-th request to the kernel fails with EIO."""
    counter = mmap.mmap(-1, 8)

    def failing():
        original = m.request

        def request(name, arguments, ask, why):
            count = struct.unpack("q", counter[:8])[0] + 1
            counter[:8] = struct.pack("q", count)
            if count == n:
                def ask():
                    raise OSError(errno.EIO, "injected fault")
            return original(name, arguments, ask, why)
        m.request = request
        return m.main(list(args))
    return forked(failing)


@root
@pytest.mark.timeout(1200)
def test_whichever_request_fails_the_host_is_as_it_was():
    args = ("run", "--rm", "--memory", "64m", "-v", f"{STORE}:/v:ro", "--ulimit",
            "nofile=64", "/bin/true")
    run("/bin/true")  # the default root file system is there
    total, step = count_requests(*args), 1 if "IN_TEST_VM" not in os.environ else 5
    before, survived = host(), []
    for n in range(1, total + 1, step):
        code, _, err = fail_request(n, *args)
        assert "Traceback" not in err and "internal error" not in err, (n, err)
        assert code == 0 or "injected fault" in err, (n, code, err)
        if code == 0:
            survived.append(n)
        assert our_cgroups() == before["cgroups"], n
        assert tree(f"{STORE}/containers") == before["containers"], n
        assert tree(f"{STORE}/ids") == before["ids"], n
    assert len(survived) < total / 5  # most requests matter


# ══ 2. NAMESPACES ══

ALL = ("user", "mnt", "pid", "uts", "ipc", "net", "cgroup", "time")
HAVE = [kind for kind in ALL if os.path.exists(f"/proc/self/ns/{kind}")]


def inner_namespaces(*options):
    text = sh("cd /proc/self/ns; for n in *; do ls -l $n; done", *options)
    return dict(re.findall(r" (\w+) -> (\S+)", text))


def host_namespaces():
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in HAVE}


@root
def test_a_container_has_all_namespaces_of_its_own():
    inner, outer = inner_namespaces(), host_namespaces()
    assert [kind for kind in HAVE if inner[kind] == outer[kind]] == []
    if len(HAVE) == len(ALL):
        assert len({inner[kind] for kind in ALL}) == 8


@root
@pytest.mark.parametrize("option, kind", [
    ("--userns", "user"), ("--pid", "pid"), ("--network", "net"), ("--uts", "uts"),
    ("--ipc", "ipc"), ("--cgroupns", "cgroup")])
def test_one_namespace_can_be_the_hosts(option, kind):
    inner, outer = inner_namespaces(option, "host"), host_namespaces()
    assert [k for k in HAVE if inner[k] == outer[k]] == [kind]


@root
def test_a_kernel_without_a_namespace_is_announced(monkeypatch):
    def without_time():
        m.os.listdir = lambda path, real=os.listdir: [
            n for n in real(path) if not (path == "/proc/self/ns" and n == "time")]
        return m.main(["run", "--rm", "/bin/true"])
    code, _, err = forked(without_time)
    assert code == 0
    assert "this kernel has no time namespaces" in err


@root
def test_the_program_is_process_1():
    assert sh("echo $$") == "1\n"


@root
def test_the_containers_root_is_nobody_on_the_host():
    assert sh("id -u").strip() == "0"
    inside, outside, count = map(int, sh("cat /proc/self/uid_map").split())
    assert inside == 0 and count == 65536 and outside >= 0x70000000
    with running() as (_, _, pid):
        assert os.stat(f"/proc/{pid}").st_uid >= 0x70000000


@root
def test_two_containers_have_ranges_of_ids_of_their_own():
    with running() as (_, _, one), running() as (_, _, two):
        maps = [open(f"/proc/{pid}/uid_map").read().split()[1] for pid in (one, two)]
        assert abs(int(maps[0]) - int(maps[1])) >= 65536


@root
def test_the_host_name_is_the_short_id_unless_given():
    assert re.fullmatch(r"[0-9a-f]{12}\n", sh("hostname"))
    assert sh("hostname; cat /proc/sys/kernel/domainname /etc/hostname", "--hostname",
              "box", "--domainname", "example.org") == "box\nexample.org\nbox\n"


@root
def test_loopback_is_up_and_alone():
    text = sh("cat /proc/net/dev; cat /sys/class/net/lo/operstate; ping -c1 127.0.0.1 "
              ">/dev/null 2>&1 && echo answered")
    assert re.findall(r"^ *(\w+):", text, re.M)[0] == "lo"
    assert "answered" in text or "ping" not in " ".join(os.listdir(rootfs_bin()))


def rootfs_bin():
    return f"{STORE}/rootfs/default/bin"


@root
def test_network_host_is_the_hosts_network():
    inside = set(sh("ls /sys/class/net", "--network", "host").split())
    assert inside == set(os.listdir("/sys/class/net"))


@root
def test_ns_shows_what_a_process_is_isolated_from():
    with running() as (_, _, pid):
        shown = mini("ns", pid).stdout
        for kind in HAVE:
            inode = re.search(r"\d+", os.readlink(f"/proc/{pid}/ns/{kind}"))[0]
            assert inode in shown
        base = open(f"/proc/{pid}/uid_map").read().split()[1]
        assert f"uid map: 0-65535 inside is {base}-" in shown
        assert f"{pid} → 1" in shown
    assert "no such process" in refused("ns", "4194999", code=1)
    assert "not a process number" in refused("ns", "one", code=1)


@root
def test_where_clone3_is_refused_the_older_clone_does_it():
    def refusing():
        original = m.kernel

        def kernel(name, args):
            if name == "clone3":
                raise OSError(errno.ENOSYS, "Function not implemented")
            return original(name, args)
        m.kernel = kernel
        return m.main(["run", "--rm", "--explain", "/bin/sh", "-c",
                       "echo $$; cat /proc/self/cgroup"])
    code, out, err = forked(refusing)
    assert code == 0, err
    assert out.splitlines()[0] == "1" and "clone(" in err
    assert "minicontainer-" not in out


@root
def test_a_second_program_joins_all_the_namespaces_of_a_container():
    with running("--hostname", "box") as (_, id, pid):
        result = mini("exec", id[:12], "/bin/sh", "-c",
                      "hostname; cat /proc/1/comm; echo $$; ls -l /proc/self/ns")
        assert result.returncode == 0, result.stderr
        name, comm, own, *links = result.stdout.splitlines()
        assert (name, comm) == ("box", "sh") and int(own) > 1
        found = dict(re.findall(r" (\w+) -> (\S+)", "\n".join(links)))
        for kind in HAVE:
            assert found[kind] == os.readlink(f"/proc/{pid}/ns/{kind}"), kind
        assert mini("exec", id, "/bin/sh", "-c", "exit 9").returncode == 9
        assert "no such file" in refused("exec", id, "/nosuch", code=127)
        assert mini("exec", "-u", "7:8", "-w", "/tmp", "-e", "A=b", id, "/bin/sh", "-c",
                    "id -u; id -g; pwd; echo $A").stdout == "7\n8\n/tmp\nb\n"
    assert "no such container" in refused("exec", id, "/bin/true")


# ══ 3. CONTROL GROUPS ══

def limit_file(v2, controller, v1):
    """Where a container sees one of its limits."""
    return f"/sys/fs/cgroup/{v2}" if V2 else f"/sys/fs/cgroup/{controller}/{v1}"


def has_controller(name):
    if V2:
        with open("/sys/fs/cgroup/cgroup.controllers") as file:
            return name in file.read().split()
    return name in m.cgroup_trees()


def needs_controller(name):
    if not has_controller(name):
        pytest.skip(f"this kernel has no {name} controller")


@root
def test_memory_and_swap_are_limited():
    assert sh("cat " + limit_file("memory.max", "memory", "memory.limit_in_bytes"),
              "--memory", "64m") == f"{64 << 20}\n"
    path = limit_file("memory.swap.max", "memory", "memory.memsw.limit_in_bytes")
    text = sh(f"cat {path} 2>&1 || true", "--memory", "64m", "--memory-swap", "80m")
    if "No such file" not in text:
        assert text == f"{(16 if V2 else 80) << 20}\n"


@root
def test_memory_reservation_is_set():
    assert sh("cat " + limit_file("memory.low", "memory", "memory.soft_limit_in_bytes"),
              "--memory-reservation", "32m") == f"{32 << 20}\n"


@root
def test_processor_time_is_limited_and_weighed():
    if V2:
        text = sh("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu.weight",
                  "--cpus", "0.5", "--cpu-shares", "512")
        assert text == "50000 100000\n20\n"
    else:
        text = sh("cd /sys/fs/cgroup/cpu; cat cpu.cfs_quota_us cpu.shares",
                  "--cpus", "0.5", "--cpu-shares", "512")
        assert text == "50000\n512\n"


@root
def test_processors_can_be_chosen():
    needs_controller("cpuset")
    assert sh("cat " + limit_file("cpuset.cpus", "cpuset", "cpuset.cpus"),
              "--cpuset-cpus", "0") == "0\n"
    assert sh("grep Cpus_allowed_list /proc/self/status", "--cpuset-cpus",
              "0").split()[1] == "0"
    assert "cpuset controller" in refused("run", "--rm", "--cpuset-cpus", "4000",
                                          "/bin/true")


@root
def test_a_fork_bomb_stays_within_the_pids_limit():
    assert sh("cat " + limit_file("pids.max", "pids", "pids.max"), "--pids-limit",
              "6") == "6\n"
    result = mini("run", "--rm", "--pids-limit", "6", "/bin/sh", "-c",
                  "f() { f | f & }; f; for i in 1 2 3 4 5 6 7 8; do sleep 9 & done")
    assert "fork" in result.stderr


@root
def test_a_device_is_throttled_or_the_controller_named():
    device = next((f"/dev/{n}" for n in os.listdir("/sys/block")
                   if os.path.exists(f"/dev/{n}")), None)
    if device is None:
        pytest.skip("no block device here")
    for option, rate, v1, v2 in (
            ("--device-read-bps", "1mb", "read_bps", f"rbps={1 << 20}"),
            ("--device-write-bps", "2m", "write_bps", f"wbps={2 << 20}"),
            ("--device-read-iops", "300", "read_iops", "riops=300"),
            ("--device-write-iops", "400", "write_iops", "wiops=400")):
        path = limit_file("io.max", "blkio", f"blkio.throttle.{v1}_device")
        result = mini("run", "--rm", option, f"{device}:{rate}", "/bin/cat", path)
        if result.returncode == 125:
            assert "blkio controller" in result.stderr
        else:
            assert v2.split("=")[1] in result.stdout and (not V2 or v2 in result.stdout)
    assert "not a block device" in refused("run", "--device-read-bps", "/dev/null:1",
                                           "/bin/true")


@root
def test_a_limit_that_the_host_cannot_set_names_its_controller():
    result = mini("run", "--rm", "--blkio-weight", "300", "/bin/sh", "-c",
                  "cat /sys/fs/cgroup/io.*weight /sys/fs/cgroup/blkio/*weight "
                  "2>/dev/null")
    if result.returncode == 125:
        assert "blkio controller has no" in result.stderr
    else:
        assert result.stdout.strip()

    def without():
        m.LIMITS = tuple((what, controller, ("memory.nosuch",), ("memory.nosuch",))
                         for what, controller, *_ in m.LIMITS)
        return m.main(["run", "--memory", "64m", "/bin/true"])
    code, _, err = forked(without)
    assert code == 125 and "memory controller has no memory.nosuch" in err


@root
def test_a_container_sees_its_own_group_as_the_root_and_read_only():
    text = sh("cat /proc/self/cgroup; mkdir /sys/fs/cgroup/x /sys/fs/cgroup/memory/x "
              "2>&1 || true; cat " + limit_file("cgroup.procs", "pids", "cgroup.procs"))
    assert "minicontainer" not in text
    assert text.count("Read-only file system") >= 1
    assert "1" in text.splitlines()[-2:]


@root
def test_what_was_used_is_measured():
    shown = mini("run", "--rm", "--memory", "64m", "--pids-limit", "9",
                 "--stats-at-exit", "/bin/sh", "-c", "i=0; while [ $i -lt 3000 ]; do "
                 "i=$((i+1)); done").stderr
    assert re.search(r"cpu +0\.\d*[1-9]\d* s", shown) or re.search(r"cpu +[1-9]", shown)
    assert re.search(r"memory .*limit 64MiB, OOM kills 0", shown)
    assert re.search(r"pids .*limit 9", shown)
    assert re.search(r"io +read \d", shown)


@root
def test_everything_in_a_group_is_frozen_thawed_and_killed_at_once():
    before = os.listdir("/proc/self/fd")
    with running(script="while :; do sleep 0.01; done & echo up; read x") as (p, id, pid):
        group = m.Cgroup(f"/minicontainer-{id}")
        assert pid in group.pids()

        def used():
            return group.measure()["cpu_usec"]
        until(lambda now=used(): used() > now)
        group.freeze()
        frozen = used()
        select.select((), (), (), 0.2)  # a frozen group uses nothing, however long
        assert used() == frozen
        group.freeze(False)
        until(lambda: used() > frozen)
        group.freeze()
        group.kill()
        assert group.pids() == []
        assert p.wait(30) == 137
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1


@root
def test_the_oom_killer_is_named_in_plain_words():
    result = mini("run", "--rm", "--memory", "16m", "/bin/sh", "-c",
                  "exec tail /dev/zero")
    assert result.returncode == 137
    assert "OOM killer ended the container" in result.stderr
    assert "16MiB" in result.stderr


@pytest.mark.parametrize("option, value", [
    ("--memory", "12q"), ("--memory", "-1"), ("--memory", "1k"), ("--cpus", "many"),
    ("--cpus", "0"), ("--cpus", "nan"), ("--pids-limit", "few"), ("--cpu-shares", "1"),
    ("--blkio-weight", "5000"), ("--device-read-bps", "/nosuch:1mb")])
def test_a_limit_that_makes_no_sense_is_refused(option, value):
    with pytest.raises(m.Fail) as caught:
        spec_for(f"{option}={value}", "/bin/true")
    assert value.split(":")[0] in caught.value.message and caught.value.hint


def test_sizes_are_read_as_docker_reads_them():
    assert [m.size(t) for t in ("5", "5b", "2k", "2KB", "2KiB", "1.5m", "3g")] == [
        5, 5, 2048, 2048, 2048, 3 << 19, 3 << 30]


def test_version_2_gets_the_values_that_mean_the_same():
    spec = spec_for("-m", "64m", "--cpu-shares", "1024", "--blkio-weight", "1000",
                    "/bin/true")["linux"]["resources"]
    assert m.swap_only(spec) == 64 << 20
    assert (m.cpu_weight(spec), m.io_weight(spec)) == (39, 10000)
