#!/usr/bin/env python3
"""What a life costs: containers one after the other and many at once, logs, memory.

    sudo python3 bench/engine.py [-n 200]

Prints, for ever more containers that run at the same time, how long `run -d`, `ps`,
`exec` and `stop` take with so many there, and what a shim keeps in memory of its own;
then how fast the log is written and read.
"""
import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), "minicontainer.py")


def timed(*line, **how):
    """(seconds, standard output) of a command that must succeed."""
    began = time.monotonic()
    done = subprocess.run(line, capture_output=True, **how)
    took = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{' '.join(line)}: {done.stderr.decode()}")
    return took, done.stdout.decode()


def memory(pid):
    """(private, proportional) KiB of a process."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        text = file.read()
    return (sum(map(int, re.findall(r"Private_\w+: +(\d+)", text))),
            int(re.search(r"\nPss: +(\d+)", text)[1]))


def shims(mini):
    """The shims of the containers that run."""
    ids = timed(mini, "ps", "-q", "--no-trunc")[1].split()
    for id in ids:
        pid = timed(mini, "inspect", "-f", "{{.State.Pid}}", id)[1].strip()
        with open(f"/proc/{pid}/stat") as file:
            yield int(file.read().rpartition(") ")[2].split()[1])


def curve(mini, most):
    """One line for each number of containers that run at the same time."""
    print(f"{'running':>8} {'run -d':>8} {'ps':>8} {'exec':>8} {'stop':>8}   ms, "
          "medians; stop -t 0 of the newest")
    made = []
    for wanted in sorted({1, most // 8, most // 4, most // 2, most} - {0}):
        starts = []
        while len(made) < wanted:
            took, id = timed(mini, "run", "-d", "/bin/sleep", "100000")
            made.append(id.strip())
            starts.append(took)
        rows = [starts[-9:]]
        rows.append([timed(mini, "ps")[0] for _ in range(5)])
        rows.append([timed(mini, "exec", made[-1], "/bin/true")[0] for _ in range(5)])
        rows.append([])
        for _ in range(3):
            rows[-1].append(timed(mini, "stop", "-t", "0", made[-1])[0])
            timed(mini, "start", made[-1])
        print(f"{wanted:8}", *(f"{1000 * statistics.median(row):8.1f}" for row in rows),
              flush=True)
    found = [memory(pid) for pid in list(shims(mini))[:9]]
    private, shared = map(statistics.median, zip(*found, strict=True))
    print(f"a shim: {private / 1024:.1f} MiB of its own, {shared / 1024:.1f} MiB with "
          "its part of what it shares")
    took = timed(mini, "rm", "-f", *made)[0]
    print(f"rm -f of {len(made)}: {took:.1f} s, {1000 * took / len(made):.1f} ms each")


def logs(mini, megabytes):
    """How fast a log is written, and read."""
    count = megabytes << 20
    for length in (80, 1000):
        line = "x" * (length - 1)
        script = f"yes {line} | head -c {count}"
        took, id = timed(mini, "run", "-d", "/bin/sh", "-c", script)
        took += timed(mini, "wait", id.strip())[0]
        with tempfile.TemporaryFile() as file:
            began = time.monotonic()
            subprocess.run([mini, "logs", id.strip()], stdout=file, check=True)
            read = time.monotonic() - began
            assert file.seek(0, os.SEEK_END) == count
        timed(mini, "rm", id.strip())
        print(f"lines of {length:4} bytes: written at {megabytes / took:5.1f} MB/s, "
              f"read at {megabytes / read:6.1f} MB/s")


def main():
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200, help="containers at the same time")
    parser.add_argument("--megabytes", type=int, default=100, help="of log")
    options = parser.parse_args()
    store = tempfile.mkdtemp(prefix="minicontainer-bench-")
    os.environ["MINICONTAINER_ROOT"] = store
    try:
        timed(sys.executable, PROGRAM, "install", "--prefix", store)
        mini = f"{store}/bin/minicontainer"
        timed(mini, "run", "--rm", "/bin/true")
        curve(mini, options.n)
        logs(mini, options.megabytes)
        timed(mini, "system", "prune")
    finally:
        shutil.rmtree(store, ignore_errors=True)


if __name__ == "__main__":
    main()
