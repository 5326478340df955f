#!/usr/bin/env python3
"""What a life costs: containers one after the other and many at once, logs, memory.

    sudo python3 bench/engine.py [-n 200]
    sudo python3 bench/engine.py --beside       # podman and docker, if installed

Prints, for ever more containers that run at the same time, how long `run -d`, `ps`,
`exec` and `stop` take with so many there, and what a shim keeps in memory of its own;
then how fast the log is written and read.  With --beside it measures one container, in
turns, of minicontainer, of podman with conmon, and of docker with containerd-shim (a
dockerd is started for it): the commands, the memory of who stays with a container, and
how fast output goes to the log, out of it, and to who is attached.
"""
import argparse
import contextlib
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


@contextlib.contextmanager
def docker(top):
    """The words that every command of docker begins with, for a dockerd of its own that
    keeps all below a directory; or None, and it is said why."""
    if not shutil.which("docker") or not shutil.which("dockerd"):
        yield None
        return
    with open(f"{top}/daemon.json", "w") as file:
        file.write("{}")
    with open(f"{top}/dockerd.log", "w") as log:
        daemon = subprocess.Popen([
            "dockerd", "--data-root", f"{top}/docker", "--exec-root",
            f"{top}/docker.run", "--host", f"unix://{top}/sock", "--pidfile",
            f"{top}/dockerd.pid", "--iptables=false", "--ip6tables=false",
            "--bridge=none", "--config-file", f"{top}/daemon.json"],
            stdout=log, stderr=log, start_new_session=True)
    words, end = ["docker", "--host", f"unix://{top}/sock"], time.monotonic() + 30
    try:
        while words and subprocess.run([*words, "version"],
                                       capture_output=True).returncode:
            if daemon.poll() is not None or time.monotonic() > end:
                with open(f"{top}/dockerd.log") as log:
                    print("docker left out:", log.read().strip().splitlines()[-1][:200])
                words = None
            time.sleep(0.1)
        yield words
    finally:
        daemon.terminate()
        daemon.wait()


@contextlib.contextmanager
def engines(mini, top):
    """{name: the words that every command of it begins with}, those that are there."""
    found = {"minicontainer": [mini]}
    if shutil.which("podman"):
        # As in startup.py: it raises two limits, which takes CAP_SYS_RESOURCE.
        found["podman"] = ["podman", "--root", f"{top}/podman", "--runroot",
                           f"{top}/podman.run", "--storage-driver", "overlay",
                           "--cgroup-manager", "cgroupfs"]
        if shutil.which("runc"):  # its other one refuses hybrid control groups
            found["podman"] += ["--runtime", "runc"]
    with docker(top) as words:
        yield {**found, "docker": words} if words else found


FLAGS = {"podman": ["--log-driver", "k8s-file", "--ulimit", "nofile=1024:1024",
                    "--ulimit", "nproc=1024:1024"]}
LINE = "x" * 79


def one_round(name, words, image, megabytes, row):
    """Measure each thing once with one of the engines."""
    count = megabytes << 20

    def took(what, *line, divide=0, **how):
        seconds, out = timed(*words, *line, **how)
        row.setdefault(what, []).append(divide / seconds if divide else 1000 * seconds)
        return out.strip()
    common = ["--network", "none", *FLAGS.get(name, ())]
    took("run --rm true, ms", "run", "--rm", *common, image, "/bin/true")
    id = took("run -d, ms", "run", "-d", *common, image, "/bin/sleep", "1000")
    took("exec true, ms", "exec", id, "/bin/true")
    pid = timed(*words, "inspect", "-f", "{{.State.Pid}}", id)[1].strip()
    with open(f"/proc/{pid}/stat") as file:
        shim = int(file.read().rpartition(") ")[2].split()[1])
    own, shared = memory(shim)
    row.setdefault("its shim, MiB of its own", []).append(own / 1024)
    row.setdefault("its shim, PSS in MiB", []).append(shared / 1024)
    took("stop -t 0, ms", "stop", "-t", "0", id)
    timed(*words, "rm", id)
    began = time.monotonic()
    id = timed(*words, "run", "-d", *common, image, "/bin/sh", "-c",
               f"yes {LINE} | head -c {count}")[1].strip()
    timed(*words, "wait", id)
    row.setdefault("log written, MB/s", []).append(
        megabytes / (time.monotonic() - began))
    began = time.monotonic()
    with tempfile.TemporaryFile() as file:
        subprocess.run([*words, "logs", id], stdout=file, check=True)
        row.setdefault("log read, MB/s", []).append(
            megabytes / (time.monotonic() - began))
        assert file.seek(0, os.SEEK_END) == count, name
    timed(*words, "rm", id)
    id = timed(*words, "run", "-d", "-i", *common, image, "/bin/sh", "-c",
               f"read x; yes {LINE} | head -c {count}")[1].strip()
    took("attach, MB/s", "attach", id, divide=megabytes, input=b"go\n")
    timed(*words, "rm", "-f", id)


def beside(mini, top, rounds, megabytes):
    """One container of each engine, in turns; medians."""
    id = timed(mini, "create", "/bin/true")[1].strip()
    timed(mini, "export", "-o", f"{top}/rootfs.tar", id)
    timed(mini, "rm", id)
    with engines(mini, top) as found:
        rows = {name: {} for name in found}
        for words in found.values():
            timed(*words, "import", f"{top}/rootfs.tar", "bench:1")
        for number in range(rounds + 1):
            for name, words in found.items():  # the first round warms up
                row = rows[name] if number else {}
                one_round(name, words, "bench:1", megabytes, row)
            print(".", end="", file=sys.stderr, flush=True)
        print(f"\nmedians of {rounds} rounds, {megabytes} MB of lines of 80 bytes\n"
              f"{'':26}", *(f"{name:>14}" for name in found))
        for what in rows["minicontainer"]:
            print(f"{what:26}", *(f"{statistics.median(rows[name][what]):14.1f}"
                                  for name in found))
        for words in found.values():
            subprocess.run([*words, "rmi", "-f", "bench:1"], capture_output=True)
        subprocess.run(["umount", f"{top}/podman/overlay"], capture_output=True)


def main():
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200, help="containers at the same time")
    parser.add_argument("--megabytes", type=int, default=100, help="of log")
    parser.add_argument("--beside", action="store_true", help="podman and docker, too")
    parser.add_argument("--rounds", type=int, default=9, help="of --beside")
    options = parser.parse_args()
    store = tempfile.mkdtemp(prefix="minicontainer-bench-")
    os.environ["MINICONTAINER_ROOT"] = store
    try:
        timed(sys.executable, PROGRAM, "install", "--prefix", store)
        mini = f"{store}/bin/minicontainer"
        timed(mini, "run", "--rm", "/bin/true")
        if options.beside:
            beside(mini, store, options.rounds, options.megabytes)
        else:
            curve(mini, options.n)
            logs(mini, options.megabytes)
        timed(mini, "system", "prune", "-f")
    finally:
        shutil.rmtree(store, ignore_errors=True)


if __name__ == "__main__":
    main()
