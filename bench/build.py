#!/usr/bin/env python3
"""How long does a build take: cold, all cached, and with the last COPY changed?

    sudo python3 bench/build.py             # 30 steps and 129 instructions
    sudo python3 bench/build.py --big 2048  # and a context of 2048 MB, for its memory

Beside buildah and podman, where they are installed, with their caches on (--layers) and
a store of its own for each.  The base is a static busybox of this machine.  What RUN
does is next to nothing, so all that is measured is what building costs.  In each round
the contenders take turns; printed are medians, the ratio to buildah by rounds, and the
largest resident set of one process.
"""
import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import startup  # beside this file

JOBS = ("cold", "cached", "changed")
BASE = "FROM scratch\nADD base.tar /\nENV PATH=/bin\n"


def thirty():
    """A Dockerfile of 30 steps, of which the last copies what will change."""
    lines = ["FROM base"]
    for number in range(28):
        lines.append((f"RUN echo {number} > /r{number}",
                      f"COPY f{number % 9}.txt /c{number}", f"ENV N{number}={number}",
                      f"WORKDIR /w{number}")[number % 4])
    return "\n".join([*lines, "COPY last.txt /last", ""])


def many():
    """A Dockerfile of 129 instructions."""
    lines = [f"COPY f{n % 9}.txt /c{n}" if n % 2 else f"ENV N{n}={n}"
             for n in range(127)]
    return "\n".join(["FROM base", *lines, "COPY last.txt /last", ""])


def contenders(launcher):
    """{name: function of a store that returns its command line so far}; with runc, as
    crun takes no hybrid control groups."""
    found = {"minicontainer": lambda store: [launcher, "build"]}
    for name, words in (("buildah", ["bud", "--runtime", "runc"]),
                        ("podman", ["--runtime", "runc", "build"])):
        if program := shutil.which(name):
            found[name] = lambda store, program=program, words=words: [
                program, "--root", f"{store}/{words[-1]}", "--runroot",
                f"{store}/run-{words[-1]}", *words, "--layers", "--format", "docker"]
    return found


def timed(argv, store):
    """(seconds, MB of the largest process) of a command that must succeed."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen([*argv], stdout=said, stderr=said, env={
            **os.environ, "MINICONTAINER_ROOT": f"{store}/mini"})
        _, status, usage = os.wait4(process.pid, 0)
        took = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(map(str, argv))}: {said.read().decode()}")
    return took, usage.ru_maxrss / 1024


def measure(able, text, context, rounds, scratch):
    """{(contender, job): [(seconds, MB), …]}."""
    found = {}
    (context / "Dockerfile").write_text(text)
    for number in range(rounds):
        stores = {who: tempfile.mkdtemp(dir=scratch, prefix="s-") for who in able}
        for who in able:
            timed([*able[who](stores[who]), "-t", "base", "-f", context / "Base",
                   context], stores[who])
        for job in JOBS:
            (context / "last.txt").write_text(f"{number}\n" * (1 + (job == "changed")))
            for who in able:
                found.setdefault((who, job), []).append(timed(
                    [*able[who](stores[who]), "-t", "x", context], stores[who]))
    return found


def print_table(title, found):
    """Medians, and ratios to buildah."""
    print(f"\n{title}\n{'':16}" + "".join(
        f"{job + ', ms':>14}{'× buildah':>11}{'MB':>6}" for job in JOBS))
    for who in dict.fromkeys(who for who, _ in found):
        cells = ""
        for job in JOBS:
            mine, base = found[who, job], found.get(("buildah", job))
            ratio = statistics.median(a / b for (a, _), (b, _) in zip(
                mine, base, strict=True)) if base else 0
            cells += (f"{1000 * statistics.median(s for s, _ in mine):14.0f}"
                      f"{ratio:11.2f}{max(mb for _, mb in mine):6.0f}")
        print(f"{who:16}{cells}", flush=True)


def big(able, megabytes, context, scratch):
    """What a large context costs."""
    (context / "big").mkdir()
    for number in range(megabytes // 64):
        with open(context / f"big/{number}", "wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 20))
    (context / "Dockerfile").write_text("FROM scratch\nCOPY big /big\n")
    print(f"\na context of {megabytes} MB")
    for who in able:
        store = tempfile.mkdtemp(dir=scratch, prefix="s-")
        rows = [timed([*able[who](store), "-t", "x", context], store) for _ in range(2)]
        print(f"{who:16}" + "".join(
            f"  {job} {seconds:6.1f} s {mb:5.0f} MB"
            for job, (seconds, mb) in zip(JOBS, rows, strict=False)), flush=True)
        shutil.rmtree(store, ignore_errors=True)


def main():
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--rounds", type=int, default=5)
    parser.add_argument("--big", type=int, default=0, help="MB of one more context")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("build.py: needs root")
    if not os.environ.get("IN_ITS_OWN_NETWORK"):  # podman leaves rules behind
        os.environ["IN_ITS_OWN_NETWORK"] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    busybox = shutil.which("busybox") or sys.exit("build.py: needs a static busybox")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        scratch = Path(scratch)
        able = contenders(startup.make_launcher(scratch)[0])
        context, rootfs = scratch / "context", scratch / "rootfs"
        (rootfs / "bin").mkdir(parents=True)
        shutil.copy(busybox, rootfs / "bin/busybox")
        (rootfs / "bin/sh").symlink_to("busybox")
        context.mkdir()
        subprocess.run(["tar", "-C", rootfs, "-cf", context / "base.tar", "."],
                       check=True)
        (context / "Base").write_text(BASE)
        for number in range(9):
            (context / f"f{number}.txt").write_text(f"{number}\n" * 100)
        print(", ".join(f"{k} {v}" for k, v in startup.describe_machine().items()))
        for title, text in (("30 steps", thirty()), ("129 instructions", many())):
            print_table(title, measure(able, text, context, options.rounds, scratch))
        if options.big:
            big(able, options.big, context, scratch)
        for mount in scratch.glob("s-*/*/overlay"):  # podman leaves that
            subprocess.run(["umount", "-q", mount], check=False)


if __name__ == "__main__":
    main()
