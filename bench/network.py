#!/usr/bin/env python3
"""What a network costs: a bridged start over one without, and bytes per second.

    sudo python3 bench/network.py [-n 20] [--seconds 3]

Starts a shell that says that it runs, without a network and on a bridge, with ours,
podman and docker (a dockerd is started for it) in turns, and takes the time until it
says so, and until the command that started it has ended: on a bridge that is made for
it, at once after that again, and on one that another container holds.  Then measures
with iperf3 how fast containers send to each other, from outside to a published port,
and from this host to one on 127.0.0.1: by our relay, and by docker-proxy before the
same server.  All in a network namespace of its own: dockerd leaves rules behind.
Needs root, ip, unshare, a static busybox and iperf3; podman, docker and docker-proxy as
available.
"""
import argparse
import contextlib
import json
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import startup

LATER = "1000000"


def done(*argv, **how):
    """Standard output of a command that must succeed."""
    ran = subprocess.run(argv, capture_output=True, text=True, **how)
    if ran.returncode:
        sys.exit(f"{' '.join(argv)}: {ran.stderr}")
    return ran.stdout


def until(condition, what):
    """Wait until condition() is true, and return what it returned."""
    end = time.monotonic() + 20
    while not (found := condition()):
        if time.monotonic() > end:
            sys.exit(f"network.py: waited too long for {what}")
        time.sleep(0.02)
    return found


def add_iperf3(rootfs):
    """iperf3 and what it is linked with, in a root file system."""
    program = shutil.which("iperf3") or sys.exit("network.py: no iperf3")
    libraries = re.findall(r"(/\S+)", done("ldd", program))
    for path in {program, *libraries}:
        target = rootfs / os.path.relpath(path, "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(program, rootfs / "bin/iperf3")


class Engine:
    """One that runs containers: its name, and the command line of a `run`."""

    def __init__(self, name, run, prefix=()):
        self.name, self.start, self.prefix = name, run, list(prefix)

    def run(self, network, *words, options=()):
        """The command line that runs something in a container on a network."""
        line = [*self.prefix, *self.start]
        at = line.index("none")
        return [*line[:at], network, *options, *line[at + 1:-1], *words]

    @contextlib.contextmanager
    def behind(self, network, script, options=()):
        """A container that runs a shell's script until the block ends its input."""
        process = subprocess.Popen(self.run(
            network, "/bin/sh", "-c", f"{script}\nread x", options=["-i", *options]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True)
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.stdout.read()
            process.wait()


@contextlib.contextmanager
def engines(scratch, rootfs, names):
    """Ours and, if they run here, podman and docker."""
    launcher = startup.make_launcher(scratch)
    found = [Engine("minicontainer", [*launcher, "run", "--rm", "--network", "none",
                                      "--rootfs", str(rootfs), "/bin/true"])]
    if "podman" in names and (program := shutil.which("podman")):
        podman = startup.Contender("podman", program, startup.podman(program, rootfs))
        podman.choose(scratch / "podman", iter(range(9)))
        if podman.way:
            found.append(Engine("podman", podman.way.argv, podman.way.prefix))
        else:
            print(f"podman: {podman.trouble}")
    with dockerd(scratch) if "docker" in names else contextlib.nullcontext() as words:
        if words:
            tar = subprocess.Popen(["tar", "-C", rootfs, "-c", "."],
                                   stdout=subprocess.PIPE)
            done(*words, "import", "-", "bench:1", stdin=tar.stdout)
            tar.wait()
            found.append(Engine("docker", [*words, "run", "--rm", "--network", "none",
                                           "bench:1", "/bin/true"]))
        yield found


@contextlib.contextmanager
def dockerd(scratch):
    """The words that a command of a docker of our own begins with; none if there is
    none here."""
    top = scratch / "docker"
    top.mkdir()
    words = ["docker", "--host", f"unix://{top}/sock"]
    if not (shutil.which("docker") and shutil.which("dockerd")):
        yield None
        return
    (top / "daemon.json").write_text("{}")
    with open(top / "log", "w") as log:
        daemon = subprocess.Popen([
            "dockerd", "--data-root", top / "data", "--exec-root", top / "run",
            "--host", f"unix://{top}/sock", "--pidfile", top / "pid", "--config-file",
            top / "daemon.json"], stdout=log, stderr=log)
    try:
        until(lambda: daemon.poll() is not None or not subprocess.run(
            [*words, "version"], capture_output=True).returncode, "dockerd")
        if daemon.poll() is not None:
            print("docker:", startup.last_error((top / "log").read_text())[:200])
        yield words if daemon.poll() is None else None
    finally:
        daemon.terminate()
        daemon.wait()
        subprocess.run(["umount", "-R", top / "data"], capture_output=True)


NETWORKS = "none", "bridge", "again", "held"


def milliseconds(argv, fifo):
    """How long a container's program took to run, which it says in a FIFO, and the
    command that has started it, to end."""
    began = time.monotonic()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    select.select([fifo, process.stderr], [], [], 60)
    runs = time.monotonic() - began
    told = process.stderr.read()
    if process.wait() or not os.read(fifo, 9):
        sys.exit(f"{' '.join(argv)}: {told.decode()}")
    return 1000 * runs, 1000 * (time.monotonic() - began)


def measure_starts(known, rounds, fifo):
    """The tables of starts, in turns: until the program runs, and until all is over."""
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    took = {engine.name: [] for engine in known}
    for number in range(rounds + 1):
        for engine in known:
            def start(network, engine=engine):
                return milliseconds(engine.run(
                    network, "/bin/sh", "-c", "echo up >/fifo",
                    options=["-v", f"{fifo}:/fifo"]), reader)

            def on_held(start=start, engine=engine):
                with engine.behind("bridge", "echo up"):
                    return [start("bridge")]
            blocks = [lambda start=start: [start("none")],
                      lambda start=start: [start("bridge"), start("bridge")], on_held]
            rows = {}
            for turn in range(3):  # nobody is always first, or after the same
                which = (number + turn) % 3
                rows[which] = blocks[which]()
            if number:
                took[engine.name].append([*rows[0], *rows[1], *rows[2]])
    for which, what in enumerate(("until it runs", "until the command has ended")):
        print(f"\n{what + ', ms':30}" + "".join(f"{word:>9}" for word in NETWORKS)
              + f"   added, ms, and × podman's: medians of {rounds} rounds")
        added = {}
        for name, rows in took.items():
            columns = zip(*([pair[which] for pair in row] for row in rows), strict=True)
            added[name] = [statistics.median(row[n][which] - row[0][which]
                                             for row in rows) for n in (1, 2, 3)]
            print(f"{name:30}" + "".join(f"{statistics.median(column):9.0f}"
                                         for column in columns)
                  + "   " + "".join(f"{value:7.1f}" for value in added[name]))
        if "podman" in added:
            for name in added.keys() - {"podman"}:
                print(f"{name + ' × podman':30}{'':36}   " + "".join(
                    f"{one / other:7.2f}" for one, other in zip(
                        added[name], added["podman"], strict=True)))
    os.close(reader)


def speed(argv, seconds):
    """Gigabits per second that an iperf3 client reports."""
    ran = subprocess.run([*argv, "-t", str(seconds), "-J"], capture_output=True,
                         text=True)
    with contextlib.suppress(ValueError, KeyError):
        report = json.loads(ran.stdout[ran.stdout.index("{"):])
        return report["end"]["sum_received"]["bits_per_second"] / 1e9
    sys.exit(f"{' '.join(argv)}: {(ran.stdout + ran.stderr).strip()[-200:]}")


def answers(*client):
    """Return when a server is there, as a client of it sees."""
    until(lambda: subprocess.run([*client, "-n", "1K"], capture_output=True
                                 ).returncode == 0, " ".join(client))


@contextlib.contextmanager
def outside():
    """Another host at the end of a cable: the command that runs something there."""
    process = subprocess.Popen(["unshare", "-n", "sleep", LATER])
    try:
        until(lambda: os.readlink(f"/proc/{process.pid}/ns/net")
              != os.readlink("/proc/self/ns/net"), "a namespace")
        inside = ["nsenter", "-t", str(process.pid), "-n"]
        done("ip", "link", "add", "bench", "type", "veth", "peer", "eth0", "netns",
             str(process.pid))
        for prefix, name, number in (([], "bench", 1), (inside, "eth0", 2)):
            done(*prefix, "ip", "address", "add", f"198.51.100.{number}/24", "dev",
                 name)
            done(*prefix, "ip", "link", "set", name, "up")
        yield inside
    finally:
        process.kill()
        process.wait()
        subprocess.run(["ip", "link", "delete", "bench"], capture_output=True)


COLUMNS = "containers", "published", "127.0.0.1"


def measure_speed(known, seconds, rounds):
    """The table of throughput, everybody in turns before servers that all are there."""
    server = "iperf3 -s >/dev/null & ip -4 address show eth0 | grep inet"
    clients = {}  # name: the command line of a client for each column
    with outside() as there, contextlib.ExitStack() as servers:
        for number, engine in enumerate(known, 5301):
            port = str(number)
            line = servers.enter_context(engine.behind("bridge", server, [
                "-p", f"{port}:5201"]))
            address = line.split()[1].partition("/")[0]
            clients[engine.name] = [
                engine.run("bridge", "iperf3", "-c", address),
                [*there, "iperf3", "-c", "198.51.100.1", "-p", port],
                ["iperf3", "-c", "127.0.0.1", "-p", port]]
            answers(*clients[engine.name][1])
            if engine is known[0] and shutil.which("docker-proxy"):
                servers.enter_context(docker_proxy(address))
                clients["docker-proxy"] = [None, None, [
                    "iperf3", "-c", "127.0.0.1", "-p", "5300"]]
                answers(*clients["docker-proxy"][2])
        found = {name: [[], [], []] for name in clients}
        for _ in range(rounds):
            for column in range(3):
                for name, lines in clients.items():
                    if lines[column]:
                        found[name][column].append(speed(lines[column], seconds))
    print(f"\n{'Gbit/s':30}" + "".join(f"{word:>12}" for word in COLUMNS)
          + f"   medians of {rounds} rounds")
    for name, columns in found.items():
        print(f"{name:30}" + "".join(f"{statistics.median(column):12.1f}" if column
                                     else " " * 12 for column in columns))
    for name, columns in found.items():
        if name != known[0].name:
            ratios = [sorted(map(float.__truediv__, found[known[0].name][n], column))
                      for n, column in enumerate(columns)]
            print(f"{'ours × ' + name:30}" + "".join(
                f"{statistics.median(row):12.2f}" if row else " " * 12
                for row in ratios) + "   by pairs; from "
                + ", ".join(f"{row[0]:.2f} to {row[-1]:.2f}" for row in ratios if row))


@contextlib.contextmanager
def docker_proxy(address):
    """docker-proxy on 127.0.0.1:5300, before a server at an address."""
    # It tells its parent on descriptor 3 that it listens, and has to have one.
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'exec docker-proxy "$@" 3>/dev/null', "sh", "-proto", "tcp",
         "-host-ip", "127.0.0.1", "-host-port", "5300", "-container-ip", address,
         "-container-port", "5201"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def main():
    """Measure in a scratch directory that is gone afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-n", dest="rounds", type=int, default=20, metavar="ROUNDS",
                        help="of starts, and a third of it of iperf3 (20)")
    parser.add_argument("--seconds", type=int, default=3, help="of each iperf3 (3)")
    parser.add_argument("--only", default="minicontainer,podman,docker",
                        metavar="NAMES", help="of the engines")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("needs root")
    if not os.environ.get("IN_ITS_OWN_NETWORK"):
        os.environ["IN_ITS_OWN_NETWORK"] = "1"
        os.execvp("unshare", ["unshare", "--net", "--mount", sys.executable, *sys.argv])
    done("ip", "link", "set", "lo", "up")
    with tempfile.TemporaryDirectory(prefix="minicontainer-bench-") as text:
        scratch = Path(text)
        scratch.chmod(0o755)
        os.environ["MINICONTAINER_ROOT"] = f"{scratch}/state"
        rootfs = scratch / "rootfs"
        startup.make_rootfs(rootfs)
        (rootfs / "fifo").touch()
        fifo = scratch / "fifo"
        os.mkfifo(fifo)
        fifo.chmod(0o666)
        for name in ("ip", "sleep", "echo", "grep"):
            (rootfs / "bin" / name).symlink_to("busybox")
        (rootfs / "tmp").chmod(0o1777)  # where iperf3 keeps what it is about to send
        add_iperf3(rootfs)
        print(", ".join(f"{key} {value}" for key, value in
                        startup.describe_machine().items()), flush=True)
        with engines(scratch, rootfs, options.only.split(",")) as known:
            measure_starts(known, options.rounds, fifo)
            measure_speed(known, options.seconds, max(1, options.rounds // 3))


if __name__ == "__main__":
    main()
