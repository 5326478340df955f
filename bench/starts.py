#!/usr/bin/env python3
"""Many starts, several at a time: does one hang, and is anything left?

    sudo python3 bench/starts.py                   # 10,000, 8 at a time
    sudo python3 bench/starts.py -n 400 -j 16

Every start is a whole `run --rm` of a container whose program exits with 42, from the
launcher that `install` makes, with a store of its own.  One that takes longer than 30 s
hangs: what it waits for is printed, and it is killed.  What a machine must not gain by
it is noted before and after: processes, mounts, control groups, network links, and in
the store containers, ranges of ids, mount points and unfinished directories.

Exits with 1 if a start failed or hung, or if anything is left.  Start nothing else with
minicontainer meanwhile.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "minicontainer.py"
PYTHON = os.path.realpath(sys.executable)
HANG = 30  # seconds
FIRST_ID = 0x70000000  # of the ranges that containers' users have on the host
ANSWER = 42  # only the program says that; no error of ours or of the kernel's does


# ══ 1. What a start must not leave ══════════════════════════════════════════════════


def is_ours(pid: str, scratch: Path) -> bool:
    """Whether a process is one of minicontainer's or of a container's."""
    try:
        cgroups = Path(f"/proc/{pid}/cgroup").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError:  # it has just ended
        return False
    return ("/minicontainer-" in cgroups or os.fsencode(scratch) in command
            or owner >= FIRST_ID)


def traces(scratch: Path) -> dict[str, set[str]]:
    """All that a start makes, as it is now."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    store = scratch / "store"
    return {
        "processes": {pid for pid in os.listdir("/proc")
                      if pid.isdecimal() and is_ours(pid, scratch)},
        "mounts": {line.split(" ", 1)[1] for line in mounts},
        "control groups": {top for top, _, _ in os.walk("/sys/fs/cgroup")
                           if "/minicontainer-" in top},
        "links": set(os.listdir("/sys/class/net")),
        "containers": set(map(str, store.glob("containers/*"))),
        "ranges of ids": set(map(str, store.glob("ids/*"))),
        "in the workshop": set(map(str, store.glob("workshop/*"))),
        "unfinished": set(map(str, store.glob("*/.new-*"))),
    }


def left(before: dict[str, set[str]], scratch: Path) -> dict[str, set[str]]:
    """What there is more, or less, than before; the kernel gets two seconds to bury
    its dead."""
    end = time.monotonic() + 2
    while True:
        now = traces(scratch)
        differ = {what: before[what] ^ now[what] for what in before
                  if before[what] != now[what]}
        if not differ or time.monotonic() > end:
            return differ
        select.select([], [], [], 0.05)


# ══ 2. The starts ═══════════════════════════════════════════════════════════════════


class Start:
    """One start that is under way."""

    def __init__(self, argv: list[str], environment: dict[str, str]):
        self.errors = tempfile.TemporaryFile()
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=self.errors)
        self.fd = os.pidfd_open(self.process.pid)  # readable when it has ended
        self.hung = False

    def age(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def kill(self) -> None:
        """It hangs: say what it and its children wait for, and end it."""
        self.hung = True
        print(f"\nhangs: process {self.process.pid}, started {self.age():.0f} s ago")
        told = subprocess.run(
            ["ps", "-o", "pid,ppid,stat,wchan:30,args", "-p", str(self.process.pid),
             "--ppid", str(self.process.pid)], capture_output=True, text=True)
        print(told.stdout, flush=True)
        self.process.kill()

    def end(self) -> tuple[float, str]:
        """Reap it: how long it took in ms, and what went wrong, if anything."""
        took, code = self.age() * 1e3, self.process.wait()
        os.close(self.fd)
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip()
        self.errors.close()
        if self.hung:
            return took, "hung"
        return took, "" if code == ANSWER else f"exit code {code}: {said}"


def start_all(argv: list[str], environment: dict[str, str], count: int,
              at_once: int) -> tuple[list[float], list[str]]:
    """Start `count` times, never more than `at_once` at a time: how long each took, in
    ms, and what went wrong."""
    times, wrong, running = [], [], {}
    poll, begun = select.poll(), 0
    while begun < count or running:
        while begun < count and len(running) < at_once:
            start = Start(argv, environment)
            running[start.fd] = start
            poll.register(start.fd, select.POLLIN)
            begun += 1
        for fd, _ in poll.poll(1000):
            poll.unregister(fd)
            took, error = running.pop(fd).end()
            times.append(took)
            wrong += [error] if error else []
        for start in running.values():
            if start.age() > HANG and not start.hung:
                start.kill()
        if sys.stderr.isatty():
            print(f"\r{len(times)}/{count} ", end="", file=sys.stderr)
    return times, wrong


# ══ 3. The command line ═════════════════════════════════════════════════════════════


def measure(count: int, at_once: int, scratch: Path) -> int:
    """Install, start, compare, print; the exit code."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["MINICONTAINER_ROOT"] = str(scratch / "store")
    subprocess.run([PYTHON, PROGRAM, "install", "--prefix", scratch], check=True,
                   stdout=subprocess.DEVNULL)
    launcher = str(scratch / "bin/minicontainer")
    argv = [launcher, "run", "--rm", "/bin/sh", "-c", f"exit {ANSWER}"]
    # The first one makes the root file system, and what stays for good.
    first = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL,
                           capture_output=True, text=True, check=False)
    if first.returncode != ANSWER:
        sys.exit(f"starts.py: the first start failed: {first.stderr.strip()}")

    before, began = traces(scratch), time.monotonic()
    times, wrong = start_all(argv, environment, count, at_once)
    seconds = time.monotonic() - began
    differ = left(before, scratch)

    print(f"{count} starts, {at_once} at a time, in {seconds:.1f} s: "
          f"{count / seconds:.1f} a second")
    print(f"of each: median {statistics.median(times):.0f} ms, slowest "
          f"{max(times):.0f} ms")
    print(f"failed: {len(wrong)}, of these hung: {wrong.count('hung')}")
    for error in sorted(set(wrong)):
        print(f"  {wrong.count(error)} × {error}")
    print("left: " + ("nothing" if not differ else ""))
    for what, names in differ.items():
        print(f"  {what}: {len(names)}, as {min(names)}")
    if differ:
        subprocess.run([launcher, "system", "prune", "-f"], env=environment,
                       check=False, stdout=subprocess.DEVNULL)
    return int(bool(wrong or differ))


def main() -> int:
    """The options, and a scratch directory that is gone afterwards."""
    parser = argparse.ArgumentParser(
        description="Start many containers, several at a time: none may hang, and "
        "nothing may be left.  Needs root.")
    parser.add_argument("-n", dest="count", type=int, default=10_000, metavar="STARTS",
                        help="how many (10000)")
    parser.add_argument("-j", dest="at_once", type=int, default=8, metavar="JOBS",
                        help="how many at a time (8)")
    options = parser.parse_args()
    if options.count < 1 or options.at_once < 1:
        parser.error("-n and -j: at least 1")
    if os.geteuid():
        parser.error("needs root: it makes containers")
    with tempfile.TemporaryDirectory(prefix="minicontainer-starts-") as scratch:
        os.chmod(scratch, 0o755)  # the containers' root is nobody here, and must enter
        return measure(options.count, options.at_once, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
