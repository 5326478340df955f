#!/usr/bin/env python3
"""How long does `run /bin/true` take, beside the programs that do the same?

    sudo python3 bench/startup.py                  # everything that is installed
    sudo python3 bench/startup.py -n 50 --only launcher,runc,crun

Every contender starts /bin/true on the same root file system, with no network but
an empty namespace of its own, in one run, in turns: A B C, B C A, C A B, ...  Times
taken minutes apart on a busy machine differ by more than the contenders do; times
taken in the same round are neighbours, so beside the ratio of two medians stands
the median of the ratios round by round.

What is measured, per start:
  wall    from just before posix_spawn to just after wait4, the whole process
  cpu     user and system time of that process and of what it waited for
  peak    the largest resident set among those processes (not their sum)

What that leaves out: podman's conmon and everything that the Docker daemon does are
nobody's children by the time they end, so their cpu and peak are not in those rows;
their wall time is whole, since the client waits.

Then phases.py: where the time of our own start goes, and how little it could be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import phases  # beside this file

REPO = Path(__file__).resolve().parent.parent
PROGRAM = REPO / "minicontainer.py"
# sys.executable may be a link or, in a virtual environment, a link to a link.  A
# shim (pyenv, asdf) is a shell script that looks for the interpreter at each start
# and would add some 100 ms to our rows: main() refuses one.
PYTHON = os.path.realpath(sys.executable)
# No PYTHON* variable: PYTHONDONTWRITEBYTECODE would compile the file at each start,
# PYTHONUNBUFFERED and PYTHONPATH change what is measured.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
UNIFIED = "/sys/fs/cgroup/unified"  # exists where cgroups are "hybrid": v1 beside v2
FIRST_ID, IDS = 100000, 65536  # the container's ids on the host, for all who map them
NAMESPACES = ["pid", "network", "ipc", "uts", "mount", "cgroup", "user", "time"]


# ══ 1. The starter ══════════════════════════════════════════════════════════════════
# posix_spawn is vfork inside: until exec, the child borrows its parent's memory, and
# the kernel then counts the parent's resident set into the child's ru_maxrss.  From
# this process every contender would seem to need the 15 MB that *we* need.  So a bare
# interpreter that imports nothing (8 MB) starts them: a command in, a line of numbers
# out.  What needs no more than the starter itself is shown as "≤8".

STARTER = r"""
import posix, sys, time
null = [(posix.POSIX_SPAWN_OPEN, fd, "/dev/null", posix.O_RDWR, 0) for fd in (0, 1, 2)]
for line in sys.stdin:
    argv = line.rstrip("\n").split("\0")
    begin = time.perf_counter_ns()
    pid = posix.posix_spawn(argv[0], argv, posix.environ, file_actions=null)
    _, status, used = posix.wait4(pid, 0)
    wall = time.perf_counter_ns() - begin
    print(posix.waitstatus_to_exitcode(status), wall / 1e6,
          (used.ru_utime + used.ru_stime) * 1e3, used.ru_maxrss / 1024, flush=True)
"""

# The prefix that hides the v2 half of a hybrid layout, in a mount namespace of its own.
HIDE_UNIFIED = ["unshare", "--mount", "sh", "-c", f'umount {UNIFIED}; exec "$@"', "sh"]


class Starter:
    """A bare interpreter that starts commands and measures them."""

    def __init__(self, prefix: list[str]):
        self.process = subprocess.Popen(
            [*prefix, PYTHON, "-IS", "-c", STARTER], text=True, env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def measure(self, argv: list[str]) -> dict:
        """Run argv to its end: exit code, wall and cpu in ms, peak in MB."""
        self.process.stdin.write("\0".join(argv) + "\n")
        self.process.stdin.flush()
        code, wall, cpu, peak = self.process.stdout.readline().split()
        return {"exit": int(code), "wall": float(wall), "cpu": float(cpu),
                "peak": float(peak)}

    def close(self) -> None:
        """End it, by ending its input."""
        self.process.stdin.close()
        self.process.wait()


# ══ 2. The contenders ═══════════════════════════════════════════════════════════════
# A contender is a list of ways to start it, the fullest first.  The first way that
# exits with 0 is the one measured; what it lacks beside the fullest is said in the
# output, with the error that the fuller way ended in.


class Way:
    """One command line to try, and what to say if it is the one that is used."""

    def __init__(self, argv, note: str = "", prefix=()):
        self.argv = argv  # a list of strings; "{id}" in it becomes a fresh name
        self.note = note
        self.prefix = list(prefix)  # [] or HIDE_UNIFIED

    def command(self, serial: int) -> list[str]:
        """The argument list for the serial-th start (runc wants a new id each)."""
        name = f"bench-{os.getpid()}-{serial}"
        return [word.replace("{id}", name) for word in self.argv]


class Contender:
    """One row of the table."""

    def __init__(self, name: str, program: str | None, ways, version=("--version",)):
        self.name = name
        self.program = program  # its path; None: absent
        self.ways = ways  # called with a scratch directory, once: yields Ways
        self.version_argument = version
        self.way: Way | None = None  # the one that works
        self.trouble = ""  # why it is not measured
        self.notes: list[str] = []
        self.starts: list[dict | None] = []  # one per round; None: it failed there

    def version(self) -> str:
        """The first line of what it says about itself."""
        told = run([self.program, *self.version_argument])
        lines = (told.stdout + told.stderr).splitlines()
        return lines[0].strip() if lines else "?"

    def choose(self, scratch: Path, serials) -> None:
        """Find the first way that works, or say in self.trouble why there is none."""
        if self.program is None:
            self.trouble = "absent"
            return
        refused: list[str] = []
        try:
            for way in self.ways(scratch):
                done = run([*way.prefix, *way.command(next(serials))])
                if done.returncode == 0:
                    self.way = way
                    self.notes += [way.note] if way.note else []
                    self.notes += [f"since otherwise: {error}" for error in refused]
                    return
                error = last_error(done.stderr) or f"exit {done.returncode}, no word"
                refused += [error] if error not in refused else []
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            refused.append(str(error))
        self.trouble = f"cannot run here: {refused[-1]}"


def run(argv, seconds=60, **more) -> subprocess.CompletedProcess:
    """Run argv to its end and keep what it says; never hangs for good."""
    try:
        return subprocess.run(
            argv, check=False, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", env=ENVIRONMENT, timeout=seconds,
            **more)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "",
                                           f"no end within {seconds} s")


def last_error(text: str) -> str:
    """The last line that speaks of an error, or the last that says anything."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
    text = re.sub(r'^time="[^"]*" level=\w+ msg=', "", text, flags=re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error|fail|refus", line, re.I)]
    return (errors or lines or [""])[-1]


def ours(prefix: list[str], rootfs: Path, word: str):
    """Our own way: what `run` does by default."""

    def ways(_scratch: Path):
        if not PROGRAM.exists():
            raise ValueError(f"no {PROGRAM.name} beside bench/")
        start = [*prefix, "run", "--rm", "--network", "none", "--rootfs", str(rootfs)]
        yield Way([*start, "/bin/true"], f"{word}, {filtered(start)}")

    return ways


def filtered(start: list[str]) -> str:
    """Whether what `start` starts has a seccomp filter, in words: it is asked."""
    script = 'while read key value; do [ $key = Seccomp: ] && echo $value; done'
    mode = run([*start, "/bin/sh", "-c", f"{script} </proc/self/status"]).stdout
    return {"2": "a seccomp filter", "0": "no seccomp filter"}.get(
        mode.strip(), "seccomp unknown")


# Docker's, which ours are too.
CAPABILITIES = ["CAP_" + name for name in """
    CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP
    NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE""".split()]
ARCHITECTURES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"),
                 "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}


def oci_seccomp(profile: dict) -> dict:
    """A seccomp profile of Docker's as OCI's config.json has it, by Docker's rules:
    a rule counts if all that it includes and nothing that it excludes is the case."""
    arch, native = ARCHITECTURES[platform.machine()]
    kernel = [int(n) for n in re.findall(r"\d+", platform.release())[:2]]

    def is_case(rule: dict, key: str, every) -> bool:
        """Whether every (or any) condition of an `includes` or `excludes` holds."""
        told, found = rule.get(key) or {}, []
        if told.get("arches"):
            found.append(arch in told["arches"])
        found += [name in CAPABILITIES for name in told.get("caps") or ()]
        if told.get("minKernel"):
            least = [int(n) for n in told["minKernel"].split(".")[:2]]
            found.append(kernel >= least)
        return every(found)

    chosen = {"defaultAction": profile["defaultAction"], "architectures": [native]}
    if "defaultErrnoRet" in profile:
        chosen["defaultErrnoRet"] = profile["defaultErrnoRet"]
    for row in profile.get("archMap") or ():
        if row["architecture"] == native:
            chosen["architectures"] += row.get("subArchitectures") or []
    chosen["syscalls"] = [
        {key: rule[key] for key in ("names", "action", "errnoRet", "args")
         if rule.get(key) is not None}
        for rule in profile["syscalls"]
        if is_case(rule, "includes", all) and not is_case(rule, "excludes", any)]
    return chosen


def oci(program: str, rootfs: Path, seccomp: dict | None):
    """runc and crun: a bundle from their own `spec`, all the namespaces they take, and
    Docker's capabilities."""
    walls = "Docker's capabilities, " + (
        "its seccomp filter" if seccomp else "no seccomp (see --seccomp)")

    def ways(scratch: Path):
        for prefix in hybrid_prefixes():
            # Leave out, one after the other, what a version may not know.
            for left_out in ([], ["time"], ["time", "cgroup"],
                             ["time", "cgroup", "user"]):
                bundle = scratch / "-".join(["bundle", *left_out])
                kinds = [kind for kind in NAMESPACES if kind not in left_out]
                make_bundle(program, bundle, rootfs, kinds, seccomp)
                notes = [f"`run`, {walls}"]
                notes += [f"no {kind} namespace" for kind in left_out]
                notes += ["the v2 half of the hybrid cgroups hidden"] if prefix else []
                yield Way([program, "--root", f"{scratch}/state", "run",
                           "--bundle", str(bundle), "{id}"],
                          ", ".join(notes), prefix)

    return ways


def make_bundle(program: str, bundle: Path, rootfs: Path, kinds: list[str],
                seccomp: dict | None) -> None:
    """Write bundle/config.json: the program's own template, with our few changes."""
    bundle.mkdir(parents=True, exist_ok=True)
    config_json = bundle / "config.json"
    config_json.unlink(missing_ok=True)
    run([program, "spec"], cwd=bundle).check_returncode()
    config = json.loads(config_json.read_text())
    config["process"].update(args=["/bin/true"], terminal=False, noNewPrivileges=False,
                             rlimits=[])
    config["process"]["capabilities"] = {
        name: CAPABILITIES for name in ("bounding", "effective", "permitted")}
    config["root"]["path"] = str(rootfs)
    config["linux"]["namespaces"] = [{"type": kind} for kind in kinds]
    if "user" in kinds:
        # The rootfs stays root's, which inside is nobody's: readable, and with every
        # mount point there beforehand it need not be written.
        ids = [{"containerID": 0, "hostID": FIRST_ID, "size": IDS}]
        config["linux"].update(uidMappings=ids, gidMappings=ids)
    if seccomp:
        config["linux"]["seccomp"] = seccomp
    config_json.write_text(json.dumps(config))


def hybrid_prefixes() -> list[list[str]]:
    """crun refuses hybrid cgroups whose v2 half has controllers: hide that half."""
    return [[], HIDE_UNIFIED] if os.path.ismount(UNIFIED) else [[]]


def bwrap(program: str, rootfs: Path):
    """bubblewrap: the smallest of them, one id mapped, no cgroup of its own."""

    def ways(_scratch: Path):
        view = ["--ro-bind", str(rootfs), "/", "--proc", "/proc", "--dev", "/dev"]
        yield Way([program, "--unshare-all", *view, "/bin/true"],
                  "no cgroup, no time namespace, one id mapped")

    return ways


def nspawn(program: str, rootfs: Path):
    """systemd-nspawn: registers with systemd where there is one."""

    def ways(_scratch: Path):
        common = ["--quiet", "--private-network", "--read-only", "--resolv-conf=off",
                  "--timezone=off", "--link-journal=no", "-D", str(rootfs)]
        own_ids = [f"--private-users={FIRST_ID}:{IDS}", "--private-users-ownership=map"]
        for bus in ([], ["--register=no", "--keep-unit"]):
            for ids in (own_ids, []):
                flags = " ".join([*bus, *ids]) or "no user namespace"
                yield Way([program, *common, *bus, *ids, "/bin/true"], flags)

    return ways


def podman(program: str, rootfs: Path):
    """podman: with a store of its own in the scratch directory."""

    def ways(scratch: Path):
        # vfs: nothing is stored, and the overlay driver would leave a mount behind.
        store = ["--root", f"{scratch}/store", "--runroot", f"{scratch}/run",
                 "--storage-driver", "vfs"]
        # podman raises two limits, which takes CAP_SYS_RESOURCE.
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        ids = ["--uidmap", f"0:{FIRST_ID}:{IDS}"]
        for prefix in hybrid_prefixes():
            for flags in (ids, [*ids, *limits], limits,
                          [*ids, *limits, "--cgroups=disabled"],
                          [*limits, "--cgroups=disabled"]):
                note = "--storage-driver vfs " + " ".join(flags)
                if prefix:
                    note += ", the v2 half of the hybrid cgroups hidden"
                yield Way([program, *store, "run", "--rm", "--network", "none", *flags,
                           "--rootfs", str(rootfs), "/bin/true"], note, prefix)

    return ways


DOCKER_IMAGE = "minicontainer-bench"


def docker(program: str, rootfs: Path):
    """docker: knows no --rootfs, so the directory becomes an image first."""

    def ways(_scratch: Path):
        # The daemon is asked first, so that its absence is what is reported.
        make_image = f"tar -C '{rootfs}' -c . | {program} import - {DOCKER_IMAGE}"
        for ask in (f"{program} version", make_image):
            done = run(["sh", "-c", ask])
            if done.returncode:
                raise ValueError(last_error(done.stderr))
        yield Way([program, "run", "--rm", "--network", "none", DOCKER_IMAGE,
                   "/bin/true"], "through its daemon")

    return ways


def just(*argv: str, note: str = ""):
    """A fixed command: a floor."""
    return lambda _scratch: iter([Way(list(argv), note)])


def only_compiled(scratch: Path):
    """Start our file, but end before its first line: what compiling it costs."""
    file = scratch.with_suffix(".py")
    file.write_text("import os; os._exit(0)\n" + PROGRAM.read_text())
    yield Way([PYTHON, str(file)], "no container: only compiled, the floor of direct")


def all_contenders(rootfs: Path, launcher: list[str],
                   seccomp: dict | None) -> list[Contender]:
    """The rows, in the order in which they are printed."""
    true = shutil.which("true") or "/bin/true"
    rows = [
        Contender("true", true, just(true, note="no container: what measuring costs")),
        Contender("python", PYTHON, just(PYTHON, "-IS", "-c", "pass",
                  note="no container: a bare interpreter, the floor of launcher")),
        Contender("compiled", PYTHON, only_compiled),
        Contender("launcher", PYTHON, ours(launcher, rootfs,
                  "as `install` makes it, bytecode cached")),
        Contender("module", PYTHON, ours([PYTHON, "-m", PROGRAM.stem], rootfs,
                  "python3 -m minicontainer, which keeps the bytecode")),
        Contender("direct", PYTHON, ours([PYTHON, str(PROGRAM)], rootfs,
                  "python3 minicontainer.py, compiled at each start")),
    ]
    def walled(program, rootfs):
        return oci(program, rootfs, seccomp)

    peers = {"runc": walled, "crun": walled, "bwrap": bwrap, "systemd-nspawn": nspawn,
             "podman": podman, "docker": docker}
    for name, make in peers.items():
        program = shutil.which(name)
        rows.append(Contender(name, program, program and make(program, rootfs)))
    return rows


OURS = ("launcher", "module", "direct")


def make_launcher(scratch: Path) -> list[str]:
    """What `minicontainer.py install` makes, in the scratch directory."""
    run([PYTHON, str(PROGRAM), "install", "--prefix", f"{scratch}/installed"],
        seconds=600).check_returncode()  # it is long in an emulated machine
    return [f"{scratch}/installed/bin/minicontainer"]


def make_rootfs(rootfs: Path) -> None:
    """The smallest root file system that all accept: busybox and mount points."""
    busybox = shutil.which("busybox")
    if not busybox:
        sys.exit("startup.py: no busybox on PATH (Debian: busybox-static); "
                 "or name a root file system with --rootfs")
    for directory in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr",
                      "var/tmp", "var/log"):
        (rootfs / directory).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox, rootfs / "bin/busybox")
    for name in ("sh", "true"):
        (rootfs / "bin" / name).symlink_to("busybox")
    # Files that one or the other mounts over: with ids of its own it cannot make them.
    for file in ("hostname", "hosts", "resolv.conf", "localtime"):
        (rootfs / "etc" / file).touch()
    (rootfs / "run/.containerenv").touch()  # podman's mark
    (rootfs / "etc/mtab").symlink_to("/proc/mounts")
    (rootfs / "etc/os-release").write_text("ID=bench\n")  # nspawn looks for it
    if run(["chroot", str(rootfs), "/bin/true"]).returncode:
        sys.exit(f"startup.py: {busybox} is not static (Debian: busybox-static); "
                 "or name a root file system with --rootfs")


# ══ 3. Measuring ════════════════════════════════════════════════════════════════════


def measure(contenders: list[Contender], rounds: int, warm_ups: int, serials) -> None:
    """Fill in every contender's starts, in turns, the order rotated round by round."""
    starters = {}
    for contender in contenders:
        key = tuple(contender.way.prefix)
        if key not in starters:
            starters[key] = Starter(contender.way.prefix)
    try:
        for number in range(-warm_ups, rounds):
            shift = number % len(contenders)
            for contender in contenders[shift:] + contenders[:shift]:
                starter = starters[tuple(contender.way.prefix)]
                start = starter.measure(contender.way.command(next(serials)))
                if number >= 0:
                    contender.starts.append(start if start["exit"] == 0 else None)
            if sys.stderr.isatty():
                print(f"\rround {number + 1}/{rounds} ", end="", file=sys.stderr)
    finally:
        for starter in starters.values():
            starter.close()
        if sys.stderr.isatty():
            print("\r", end="", file=sys.stderr)


def column(contender: Contender, key: str) -> list[float]:
    """One number of each start that went well."""
    return [start[key] for start in contender.starts if start]


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third quartile (of one value: that value, twice)."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def ratios(contender: Contender, base: Contender | None) -> tuple[float, float] | None:
    """Ratio of the medians, and median of the ratios of the same round."""
    if base is None or not column(base, "wall"):
        return None
    pairs = [mine["wall"] / theirs["wall"]
             for mine, theirs in zip(contender.starts, base.starts, strict=True)
             if mine and theirs]
    if not pairs:
        return None
    medians = [statistics.median(column(c, "wall")) for c in (contender, base)]
    return medians[0] / medians[1], statistics.median(pairs)


def summarize(contender: Contender, base: Contender | None) -> dict:
    """Everything about one row, as it goes into the table and into --json."""
    walls = column(contender, "wall")
    summary = {"name": contender.name, "notes": contender.notes,
               "command": " ".join(contender.way.command(0)),
               "failed": contender.starts.count(None), "starts": contender.starts,
               "version": contender.version()}
    if walls:
        first, third = quartiles(walls)
        both = ratios(contender, base)
        summary |= {
            "median_ms": statistics.median(walls), "min_ms": min(walls),
            "q1_ms": first, "q3_ms": third, "max_ms": max(walls),
            "ratio": both and both[0], "ratio_pairs": both and both[1],
            "cpu_ms": statistics.median(column(contender, "cpu")),
            "peak_mb": max(column(contender, "peak")),
        }
    return summary


def print_table(summaries: list[dict], base: Contender | None) -> None:
    """The table, and below it each row's notes."""
    to = f"× {base.name}" if base else "×"
    print(f"\n{'':15}{'wall ms':>9}{'':31}{to:>8}{'by':>8}{'cpu':>9}{'peak':>7}")
    print(f"{'':15}{'median':>9}{'min':>7}{'q1':>8}{'q3':>8}{'max':>8}"
          f"{'medians':>8}{'pairs':>8}{'ms':>9}{'MB':>7}")
    # Every contender inherits the starter's size (chapter 1), give or take a page.
    floor = min((s["peak_mb"] for s in summaries if "peak_mb" in s), default=0) + 0.3
    for s in summaries:
        if "median_ms" not in s:
            print(f"{s['name']:15}failed in every round")
            continue
        two = [f"{s[key]:8.2f}" if s[key] else f"{'–':>8}"
               for key in ("ratio", "ratio_pairs")]
        peak = f"≤{floor:.0f}" if s["peak_mb"] <= floor else f"{s['peak_mb']:.0f}"
        print(f"{s['name']:15}{s['median_ms']:9.1f}{s['min_ms']:7.1f}{s['q1_ms']:8.1f}"
              f"{s['q3_ms']:8.1f}{s['max_ms']:8.1f}{two[0]}{two[1]}{s['cpu_ms']:9.1f}"
              f"{peak:>7}")
        if s["failed"]:
            print(f"{'':15}  failed in {s['failed']} of {len(s['starts'])} rounds")
    print()
    for s in summaries:
        print(f"{s['name']:15}{s['version']}")
        for note in s["notes"]:
            print(f"{'':15}  {note}")


# ══ 4. The command line ═════════════════════════════════════════════════════════════


def path(text: str) -> Path:
    """A path that means the same wherever we go."""
    return Path(text).resolve()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description="Measure the start-up of `run /bin/true`, ours beside runc, crun, "
        "bwrap, systemd-nspawn, podman and docker: whichever are installed, in turns, "
        "in one run.  Needs root.",
        epilog="rows: true, python, compiled (the floors), launcher, module, direct "
        "(ours), runc, crun, bwrap, systemd-nspawn, podman, docker.  Exits with 1 if "
        "one of ours, or one named with --only, could not be measured.",
    )
    parser.add_argument("-n", dest="rounds", type=int, default=20, metavar="ROUNDS",
        help="measured starts of each (20), after 2 warm-ups")
    parser.add_argument("--rootfs", type=path, metavar="DIR",
        help="the root file system, with a /bin/true and directories for /proc, /sys, "
        "/dev, /tmp, readable to all; some programs create missing mount points in it "
        "(default: a temporary one, made from a static busybox)")
    parser.add_argument("--seccomp", type=path, metavar="FILE",
        help="a seccomp profile in Docker's form, for runc and crun (default: they run "
        "without)")
    parser.add_argument("--only", metavar="NAME,...", default="",
        help="measure these rows only")
    parser.add_argument("--json", type=path, metavar="FILE",
        help="also write every single start to FILE")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("-n: at least 1")
    if options.rootfs and not options.rootfs.is_dir():
        parser.error(f"--rootfs: {options.rootfs} is not a directory")
    if options.seccomp and not options.seccomp.is_file():
        parser.error(f"--seccomp: {options.seccomp} is not a file")
    if options.seccomp and platform.machine() not in ARCHITECTURES:
        parser.error(f"--seccomp: {platform.machine()} is not known here")
    if os.geteuid():
        parser.error("needs root: most of the contenders do")
    with open(PYTHON, "rb") as file:
        if file.read(2) == b"#!":
            parser.error(f"{PYTHON} is a script, not an interpreter: start this with "
                         "the interpreter itself")
    return options


def describe_machine() -> dict:
    """What the numbers depend on."""
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        cgroups = "v2"
    else:
        cgroups = "hybrid (v1 and v2)" if os.path.ismount(UNIFIED) else "v1"
    return {"kernel": platform.release(), "machine": platform.machine(),
            "processors": os.cpu_count(), "cgroups": cgroups,
            "python": platform.python_version(), "load": round(os.getloadavg()[0], 2)}


def compare(options: argparse.Namespace, scratch: Path) -> int:
    """Choose, measure, print; the exit code."""
    rootfs = options.rootfs or scratch / "rootfs"
    if not options.rootfs:
        make_rootfs(rootfs)
    launcher = make_launcher(scratch)
    shutil.copy(PROGRAM, scratch)  # where `-m` finds it and keeps its bytecode
    os.chdir(scratch)
    seccomp = oci_seccomp(json.loads(options.seccomp.read_text())
                          ) if options.seccomp else None
    contenders = all_contenders(rootfs, launcher, seccomp)
    wanted = [name for name in options.only.split(",") if name]
    unknown = set(wanted) - {contender.name for contender in contenders}
    if unknown:
        sys.exit(f"startup.py: --only: no row is called {', '.join(sorted(unknown))}")
    if wanted:
        contenders = [c for c in contenders if c.name in wanted]

    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    serials = iter(range(1, 1_000_000_000))
    for contender in contenders:
        contender.choose(scratch / contender.name, serials)
    able = [contender for contender in contenders if contender.way]
    measure(able, options.rounds, 2, serials)

    by_name = {contender.name: contender for contender in able}
    base = by_name.get("runc") or by_name.get("crun")
    summaries = [summarize(contender, base) for contender in able]
    print_table(summaries, base)
    for contender in contenders:
        if contender.trouble:
            print(f"{contender.name:15}{contender.trouble}")
    table = {}
    if "launcher" in by_name:
        table = phases.measure(rootfs, options.rounds, scratch)
    if options.json:
        left_out = {c.name: c.trouble for c in contenders if c.trouble}
        options.json.write_text(json.dumps(
            {"machine": machine, "rows": summaries, "left_out": left_out,
             "phases": table}, indent=1) + "\n")
    must = set(wanted or OURS)
    return int(any(c.name in must and not column(c, "wall") for c in contenders))


def main(argv: list[str] | None = None) -> int:
    """Measure in a scratch directory that is gone afterwards."""
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="minicontainer-bench-") as scratch:
        os.chmod(scratch, 0o755)  # the containers' root is nobody here, and must enter
        try:
            return compare(options, Path(scratch))
        finally:
            if shutil.which("docker"):
                run(["docker", "image", "rm", DOCKER_IMAGE])


if __name__ == "__main__":
    sys.exit(main())
