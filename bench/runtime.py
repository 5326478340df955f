#!/usr/bin/env python3
"""How long do minirunc's commands take, beside runc's and crun's?

    sudo python3 bench/runtime.py             # whichever are installed
    sudo python3 bench/runtime.py -n 50

All three get the same bundle: runc's own example, /bin/true on a small root file
system, Docker's capabilities, six namespaces, so without a user namespace.  In turns,
and in one run (see startup.py), three things are measured:

  run      `run` of that bundle, from its begin to its end
  exec     `exec` of /bin/true in a container that runs already
  create   `create`, `start` and `delete --force`, one after the other: their sum

and with them the floors: the interpreter that does nothing, and the launcher that only
prints its version, so Python, reading bytecode, and what its statements define.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import startup  # beside this file

KINDS = ["pid", "network", "ipc", "uts", "mount", "cgroup"]


class Runtime:
    """One of the three, with a container that sleeps, to execute in."""

    def __init__(self, name: str, program: str, prefix: list[str], scratch: Path):
        self.name, self.starter = name, startup.Starter(prefix)
        self.base = [program, "--root", f"{scratch}/{name}"]
        self.times: dict[str, list[float]] = {"run": [], "exec": [], "create": []}
        self.peaks: list[float] = []
        self.call("run", "--detach", "--bundle", f"{scratch}/sleeps", f"sleeps-{name}")

    def call(self, *words: str) -> float:
        """Milliseconds that a command took, which must go well."""
        done = self.starter.measure([*self.base, *words])
        if done["exit"]:
            again = startup.run([*self.base, *words])
            sys.exit(f"runtime.py: {self.name} {words[0]}: exit {done['exit']}; once "
                     f"more: {startup.last_error(again.stderr)}")
        self.peaks.append(done["peak"])
        return done["wall"]

    def measure(self, bundle: str, id: str) -> None:
        """One round."""
        self.times["run"].append(self.call("run", "--bundle", bundle, id))
        self.times["exec"].append(self.call("exec", f"sleeps-{self.name}", "/bin/true"))
        self.times["create"].append(
            self.call("create", "--bundle", bundle, id) + self.call("start", id)
            + self.call("delete", "--force", id))

    def close(self) -> None:
        """Remove what it has made."""
        self.call("delete", "--force", f"sleeps-{self.name}")
        self.starter.close()


def bundles(scratch: Path) -> None:
    """The bundle that ends at once, and the one that sleeps."""
    rootfs = scratch / "rootfs"
    startup.make_rootfs(rootfs)
    (rootfs / "bin/sleep").symlink_to("busybox")
    for name, args in (("true", ["/bin/true"]), ("sleeps", ["/bin/sleep", "1000000"])):
        startup.make_bundle("runc", scratch / name, rootfs, KINDS, None)
        path = scratch / name / "config.json"
        config = json.loads(path.read_text())
        config["process"]["args"] = args
        path.write_text(json.dumps(config))


def works(program: str, prefix: list[str], scratch: Path) -> str:
    """The error of a first run, or "" if it went well."""
    done = startup.run([*prefix, program, "--root", f"{scratch}/first", "run",
                        "--bundle", f"{scratch}/true", "first"])
    return startup.last_error(done.stderr) or "?" if done.returncode else ""


def print_table(runtimes: list[Runtime], floors: dict[str, list[float]]) -> None:
    """Medians with their quartiles, and the ratio to runc's median."""
    print(f"\n{'':22}{'median ms':>10}{'q1':>8}{'q3':>8}{'× runc':>8}{'× crun':>8}")
    for what in ("run", "exec", "create"):
        medians = {r.name: statistics.median(r.times[what]) for r in runtimes}
        for r in runtimes:
            first, third = startup.quartiles(r.times[what])
            two = [f"{medians[r.name] / medians[peer]:8.2f}" if peer in medians else
                   f"{'–':>8}" for peer in ("runc", "crun")]
            print(f"{what:9}{r.name:13}{medians[r.name]:10.1f}{first:8.1f}{third:8.1f}"
                  + "".join(two))
    for name, times in floors.items():
        print(f"{'floor':9}{name:13}{statistics.median(times):10.1f}")
    for r in runtimes:
        print(f"peak of {r.name}: {max(r.peaks):.0f} MB")


def compare(rounds: int, scratch: Path) -> None:
    """Measure those that work here, and print."""
    if not shutil.which("runc"):
        sys.exit("runtime.py: no runc on PATH (Debian: runc)")
    bundles(scratch)
    minirunc = str(Path(startup.make_launcher(scratch)[0]).with_name("minirunc"))
    programs = {"minirunc": minirunc, "runc": shutil.which("runc"),
                "crun": shutil.which("crun")}
    machine = startup.describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    runtimes = []
    for name, program in programs.items():
        for prefix in startup.hybrid_prefixes() if program else ():
            error = works(program, prefix, scratch)
            if not error:
                hidden = ", the v2 half of the hybrid cgroups hidden" if prefix else ""
                print(f"{name}: {startup.run([program, '--version']).stdout.split()[2]}"
                      f"{hidden}")
                runtimes.append(Runtime(name, program, prefix, scratch))
                break
        else:
            print(f"{name}: " + (f"cannot run here: {error}" if program else "absent"))
    floors = {"python3 -IS": [startup.PYTHON, "-IS", "-c", "pass"],
              "--version": [minirunc, "--version"]}
    times: dict[str, list[float]] = {name: [] for name in floors}
    serials = itertools.count()
    try:
        for number in range(-1, rounds):
            shift = number % len(runtimes)
            for r in runtimes[shift:] + runtimes[:shift]:
                r.measure(f"{scratch}/true", f"bench-{os.getpid()}-{next(serials)}")
            for name, argv in floors.items():
                times[name].append(runtimes[0].starter.measure(argv)["wall"])
    finally:
        for r in runtimes:
            r.close()
    for r in runtimes:
        r.times = {what: taken[1:] for what, taken in r.times.items()}  # a warm-up
    print_table(runtimes, times)


def main() -> None:
    """Measure in a scratch directory that is gone afterwards."""
    parser = argparse.ArgumentParser(
        description="Measure minirunc beside runc and crun.")
    parser.add_argument("-n", dest="rounds", type=int, default=20, metavar="ROUNDS",
                        help="rounds (20), after a warm-up")
    rounds = parser.parse_args().rounds
    if os.geteuid() or rounds < 1:
        parser.error("needs root, and at least one round")
    with tempfile.TemporaryDirectory(prefix="minicontainer-bench-") as scratch:
        compare(rounds, Path(scratch))


if __name__ == "__main__":
    main()
