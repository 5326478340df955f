#!/usr/bin/env python3
"""Where does the time of one start go, and how little could it be?

    sudo python3 bench/phases.py
    sudo python3 bench/phases.py -n 50 --rootfs DIR

prints each phase of `run --rm /bin/true`, from the interpreter's start to the end of
the process, in the order in which they happen: its time, beside it the floor, and how
many calls of the kernel it made.  Medians of many starts.

The floor is what the same calls would take in a bare loop: the time between the entry
and the return of each call, in place, with its arguments converted beforehand.  (They
cannot be replayed alone: a mount needs the namespace that the call before it made, and
a second mkdir finds the first one's.)  What is above the floor is Python: ours, which
decides what to ask, and the call of C that asks it.

What the floor leaves out: calls that os.path and other modules make by themselves, and
those that the interpreter makes for imports.  The floor of the interpreter is a bare
one, started and ended: `python3 -IS -c 'import os; os._exit(0)'`.  Phases without a
floor wait for another process, or never return: execve, and the end of the process.
"Between them" is what no phase has: chiefly one process waking the other.

The program is not changed for this: the functions that it calls by name are replaced
by ones that look at the clock, as its tests replace them; that costs it about 1 ms.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "minicontainer.py"
PYTHON = os.path.realpath(sys.executable)
FLAGS = "-ISXutf8"  # the launcher's

# ══ 1. One start, timed from inside ═════════════════════════════════════════════════
# This runs in a bare interpreter, in place of the launcher.  Init is a fork, so what
# both processes note goes to memory that they share.  A slot of it is a phase: when it
# began and ended, nanoseconds in the kernel, number of calls.  The clock is the same in
# both; a phase inside another counts for both.

DRIVER = r"""
import time; clock = time.monotonic_ns; entered = clock()
import gc; gc.set_threshold(100_000)
import sys, mmap
file, modules, report, begun, *argv = sys.argv[1:]
slots, names, stack = memoryview(mmap.mmap(-1, 1 << 16)).cast("Q"), [], []
clone3 = None

def timed(name, function):
    at = 4 * len(names)
    names.append(name)
    def timed_function(*args, **more):
        stack.append(at)
        slots[at] = clock()
        caller = function is clone3 and os.getpid()
        try:
            return function(*args, **more)
        finally:
            if caller and os.getpid() != caller:
                stack.clear()  # this is init now
            else:
                slots[at + 1] = clock()
                stack.pop()
    return timed_function

def count(nanoseconds):
    for at in stack:
        slots[at + 2] += nanoseconds
        slots[at + 3] += 1

def counted(function):
    def counted_function(*args, **more):
        begin = clock()
        try:
            return function(*args, **more)
        finally:
            count(clock() - begin)
    return counted_function

def load():
    return type(__loader__)("minicontainer", file).get_code("minicontainer")

timed("interpreter", lambda: None)()
slots[0], slots[1] = int(begun), entered
timed("imports", lambda: [__import__(module) for module in modules.split()])()
code = timed("bytecode", load)()
m = type(sys)("minicontainer")
m.__file__ = file
timed("definitions", lambda: exec(code, m.__dict__))()

# Every request goes through kernel(), or is a function of the os module in C.
import os, posix
clone3 = m.clone3
NO_REQUESTS = ("_exit fork getpid strerror fspath major minor makedev "
               "waitstatus_to_exitcode").split()

def kernel(name, args):
    ready = m.c_long(m.CALLS[name][0]), *map(m.c_argument, args)
    begin = clock()
    result = m.C_SYSCALL(*ready)
    if name != "clone3" or result:  # once, by the parent
        count(clock() - begin)
    if result < 0:
        number = m.get_errno()
        raise OSError(number, os.strerror(number))
    return result

m.kernel, m.os = kernel, type(sys)("os")
vars(m.os).update(vars(os))
for name, function in vars(posix).items():
    if type(function) is type(len) and name not in NO_REQUESTS:
        setattr(m.os, name, counted(function))

m.start.__defaults__ = tuple(
    tuple(timed(f"{group}: {step.__name__}", step) for step in steps)
    for group, steps in zip(("before", "outside", "birth"), m.start.__defaults__))
for group in ("BEFORE", "OUTSIDE", "BIRTH"):  # what `run` chooses from
    setattr(m, group, tuple(timed(f"{group.lower()}: {step.__name__}", step)
                            for step in getattr(m, group)))
for name in FUNCTIONS:
    if name in vars(m):
        setattr(m, name, timed(name, getattr(m, name)))
m.Container.listen = timed("listen", m.Container.listen)
m.Cgroup.measure = timed("measure", m.Cgroup.measure)
status = timed("main", m.main)(argv)
with open(report, "w") as out:
    out.write(repr({"names": names, "slots": slots[:4 * len(names)].tolist()}))
    out.flush()
    out.write(f"\n{clock()}")
os._exit(status)
"""

# The functions that make up a start beside its steps, by name; those of them that a
# version of the program does not have are left out.
FUNCTIONS = ("parse", "choose", "create", "clone3", "turn", "write_end", "end",
             "discard")
NO_FLOOR = {  # waits for another process, or is over before a clock could be looked at
    "birth: wait_for_go", "turn", "birth: execute", "exit"}


def one_start(argv: list[str]) -> dict[str, tuple[float, float, int]]:
    """{phase: (ms, ms in the kernel, calls)} of one start."""
    report = Path(argv[5])
    begin = time.monotonic_ns()
    argv[6] = str(begin)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, check=False)
    end = time.monotonic_ns()
    if done.returncode:
        sys.exit(f"phases.py: exit code {done.returncode}: {done.stderr.strip()}")
    table, _, reported = report.read_text().partition("\n")
    told = ast.literal_eval(table)
    rows = {name: told["slots"][4 * i:4 * i + 4]
            for i, name in enumerate(told["names"])}
    heard = rows.pop("listen")[1]  # that init's pipe was closed, by execve
    rows["birth: execute"][1] = heard
    whole = rows.pop("main")
    rows["exit"] = [int(reported), end, 0, 0]
    found = {name: ((last - first) / 1e6, inside / 1e6, calls)
             for name, (first, last, inside, calls) in rows.items() if first}
    # What the driver does before main and after it is not the program's.
    own = whole[0] - rows["definitions"][1] + int(reported) - whole[1]
    return found | {"whole": ((end - begin - own) / 1e6, 0, 0)}


# ══ 2. The table ════════════════════════════════════════════════════════════════════

GROUPS = (  # what is printed, in the order in which it happens
    ("Python", ("interpreter",)),
    ("the file", ("imports", "bytecode", "definitions")),
    ("the command", ("parse", "choose", "create")),
    ("the parent, before", ("before:",)),
    ("birth", ("clone3",)),
    ("the parent, outside", ("outside:",)),
    ("init, until it is the program", ("birth:",)),
    ("the program, and the end", ("turn", "measure", "write_end", "end",
                                "discard", "exit")),
)


def bare_interpreter(rounds: int) -> float:
    """The floor of the first phase: started and ended, in ms."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        subprocess.run([PYTHON, FLAGS, "-c", "import os; os._exit(0)"], check=True)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def print_table(starts: list[dict], bare: float) -> dict:
    """A row for each phase, medians; the rows of a group that take less than 0.1 ms
    are one.  Returns what was printed."""
    def median(name: str, column: int) -> float:
        return statistics.median(start[name][column] for start in starts)

    rows = {name: [median(name, column) for column in range(3)] for name in starts[0]}
    rows["interpreter"][1] = bare
    print(f"\n  {'':40}{'ms':>8}{'floor':>8}{'calls':>7}")
    total, floors = 0.0, 0.0

    def line(label: str, ms: float, floor: float | None, calls: float) -> None:
        shown = "" if floor is None else f"{floor:.2f}"
        print(f"  {label:40}{ms:8.2f}{shown:>8}{f'{calls:.0f}' if calls else '':>7}")

    for title, wanted in GROUPS:
        mine = [name for name in rows if name in wanted
                or any(name.startswith(word) for word in wanted if word[-1] == ":")]
        counts = [name for name in mine if name != "birth: wait_for_go"]
        if not counts:
            continue
        sums = [sum(rows[name][column] for name in counts) for column in range(3)]
        floor = sum(rows[name][1] for name in counts if name not in NO_FLOOR)
        total, floors = total + sums[0], floors + floor
        line(title, sums[0], floor, sums[2])
        large = [name for name in counts if rows[name][0] >= 0.1] if mine[1:] else []
        for name in large:
            line("    " + name.partition(": ")[2] if ": " in name else "    " + name,
                 rows[name][0], None if name in NO_FLOOR else rows[name][1],
                 rows[name][2])
        rest = [rows[name] for name in counts if name not in large] if mine[1:] else []
        if rest:
            line(f"    {len(rest)} shorter ones", *map(sum, zip(*rest, strict=True)))
    line("between them", rows["whole"][0] - total, None, 0)
    line("all", rows["whole"][0], floors, 0)
    return rows


def measure(rootfs: Path, rounds: int, scratch: Path) -> dict:
    """Start `rounds` times with the clock in hand, print the table, return it."""
    subprocess.run([PYTHON, PROGRAM, "install", "--prefix", scratch / "installed"],
                   check=True, stdout=subprocess.DEVNULL)
    file = scratch / "installed/lib/minicontainer/minicontainer.run.py"
    modules = [alias.name for node in ast.parse(file.read_text()).body
               if isinstance(node, ast.Import) for alias in node.names]
    driver = scratch / "driver"
    driver.write_text(DRIVER.replace("in FUNCTIONS:", f"in {FUNCTIONS!r}:"))
    argv = [PYTHON, FLAGS, str(driver), str(file), " ".join(modules),
            str(scratch / "report"), "0", "run", "--rm", "--rootfs", str(rootfs),
            "/bin/true"]
    bare = bare_interpreter(rounds)
    starts = [one_start(argv) for _ in range(rounds + 2)][2:]
    print(f"\nphases of a start, medians of {len(starts)}; the floor is the same calls "
          "of the kernel alone")
    return print_table(starts, bare)


def main() -> int:
    """Measure in a scratch directory that is gone afterwards."""
    import startup  # makes the same root file system as for its table

    parser = argparse.ArgumentParser(
        description="Where the time of one start goes, phase by phase, and beside each "
        "what its calls of the kernel take alone.  Needs root.")
    parser.add_argument("-n", dest="rounds", type=int, default=30, metavar="STARTS",
                        help="how many (30), after 2 warm-ups")
    parser.add_argument("--rootfs", type=Path, metavar="DIR",
                        help="a root file system with a /bin/true (default: a "
                        "temporary one, made from a static busybox)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write FILE")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("needs root: it makes containers")
    with tempfile.TemporaryDirectory(prefix="minicontainer-bench-") as name:
        os.chmod(name, 0o755)  # the containers' root is nobody here, and must enter
        scratch = Path(name)
        if not options.rootfs:
            startup.make_rootfs(scratch / "rootfs")
        rows = measure(options.rootfs or scratch / "rootfs", options.rounds, scratch)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
