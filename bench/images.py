#!/usr/bin/env python3
"""How long do load, save, push and pull of an image take, beside others that do them?

    sudo python3 bench/images.py                # a Debian made by mmdebstrap
    sudo python3 bench/images.py --tar FILE     # the root file system in a tarball

Two images are made of that root file system, one of a single layer and one of 50
(its files dealt out), with layers compressed by gzip.  In each round every contender,
in turns, loads one from an OCI archive and unpacks it, saves it, pushes it to a
registry on this machine (Debian's docker-registry), and pulls it into a new store.
skopeo and umoci are one contender: the former copies into an OCI layout, the latter
unpacks that.  docker has a daemon started for it, with a store that is new each round,
but for `pull`, before which its image is removed.

What is measured is what startup.py says, per command: wall, cpu, and the largest
resident set of a process.  Beside it stands, from one more load that is not timed, what
all its processes held together (the sum of their proportional sets, 50 times a second).

Every store is a new directory, and all are removed only at the end: ext4 can be slow to
find inodes after many have just been removed, and whoever comes next would pay for it.

podman leaves a mount behind.  So all this happens in a mount namespace of its own,
which ends with its last process, however that ends.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import engine  # beside this file
import startup

SUITE = "bookworm"
JOBS = ("load", "save", "push", "pull")


# ══ 1. The images ═══════════════════════════════════════════════════════════════════


def make_tarball(tarball: Path) -> str:
    """A root file system; what it is."""
    make = ["mmdebstrap", "--quiet", "--variant=important", SUITE, str(tarball)]
    if shutil.which(make[0]) and subprocess.run(make, check=False).returncode == 0:
        return f"Debian {SUITE}, by mmdebstrap --variant=important"
    subprocess.run(["tar", "-C", "/", "--one-file-system", "-cf", tarball, "usr/bin",
                    "usr/lib/python3", "usr/share/doc", "usr/share/perl"], check=False)
    return "a stand-in made of this machine's /usr: mmdebstrap made no Debian"


def dealt(tarball: Path, count: int):
    """The tarball's entries dealt out to `count` tarballs, as bytes."""
    with tarfile.open(tarball) as tar:
        entries = tar.getmembers()
        share = -(-len(entries) // count)
        for begin in range(0, len(entries), share):
            out, here = io.BytesIO(), {e.name for e in entries[begin:begin + share]}
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as part:
                for entry in entries[begin:begin + share]:
                    if not entry.islnk() or entry.linkname in here:
                        part.addfile(
                            entry, tar.extractfile(entry) if entry.isreg() else None)
            yield out.getvalue()


def make_archive(layers, path: Path) -> None:
    """An OCI archive of an image with these layers, compressed."""
    kind = "application/vnd.oci.image."
    with tarfile.open(path, "w") as tar:
        def add(name, raw):
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))

        def blob(raw, what):
            digest = hashlib.sha256(raw).hexdigest()
            add(f"blobs/sha256/{digest}", raw)
            return {"mediaType": kind + what, "digest": f"sha256:{digest}",
                    "size": len(raw)}

        described, diff_ids = [], []
        for layer in layers:
            described.append(blob(gzip.compress(layer, 6, mtime=0),
                                  "layer.v1.tar+gzip"))
            diff_ids.append(f"sha256:{hashlib.sha256(layer).hexdigest()}")
        machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
        config = blob(json.dumps({
            "architecture": machine, "os": "linux", "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode(),
            "config.v1+json")
        manifest = blob(json.dumps({
            "schemaVersion": 2, "mediaType": f"{kind}manifest.v1+json",
            "config": config, "layers": described}).encode(), "manifest.v1+json")
        manifest["annotations"] = {"org.opencontainers.image.ref.name": "bench:1"}
        add("index.json", json.dumps({
            "schemaVersion": 2, "manifests": [manifest]}).encode())
        add("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        add("manifest.json", json.dumps([{  # what docker reads before its version 25
            "Config": f"blobs/sha256/{config['digest'][7:]}", "RepoTags": ["bench:1"],
            "Layers": [f"blobs/sha256/{d['digest'][7:]}" for d in described],
        }]).encode())


# ══ 2. The contenders ═══════════════════════════════════════════════════════════════
# Each gives, for a directory of its own and a job, a command line; `name` is where it
# is pushed to and pulled from.  "before" a job is what is not timed.


def ours(launcher: str):
    """minicontainer, installed."""
    def command(at, job, archive, name):
        store = f"MINICONTAINER_ROOT={at}/{'2' * (job == 'pull')}m"
        mini = ["/usr/bin/env", store, launcher]
        return {"load": [*mini, "load", "-q", "-i", archive],
                "save": [*mini, "save", "-o", f"{at}/saved.tar", "bench:1"],
                "before push": [*mini, "tag", "bench:1", name],
                "push": [*mini, "push", "-q", name],
                "pull": [*mini, "pull", "-q", name]}.get(job)
    return command


def podman(program: str):
    """podman, which keeps layers unpacked, not as they came."""
    def command(at, job, archive, name):
        top = f"{at}/{'2' * (job == 'pull')}p"
        pod = [program, "--root", top, "--runroot", f"{top}r"]  # it takes no long name
        return {"load": [*pod, "load", "-q", "-i", archive],
                "save": [*pod, "save", "-q", "--format", "oci-archive", "-o",
                         f"{at}/saved.tar", "bench:1"],
                "push": [*pod, "push", "-q", "--tls-verify=false", "bench:1", name],
                "pull": [*pod, "pull", "-q", "--tls-verify=false", name]}.get(job)
    return command


def skopeo(program: str):
    """skopeo, and umoci to unpack what it brings."""
    def command(at, job, archive, name):
        layout = f"oci:{at}/{'2' * (job == 'pull')}layout:x"
        plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        unpack = f" && umoci unpack --image {layout[4:]} {at}/{job} >/dev/null"
        words = {"load": ["copy", "-q", f"oci-archive:{archive}", layout],
                 "save": ["copy", "-q", layout, f"oci-archive:{at}/saved.tar"],
                 "push": ["copy", "-q", *plain, layout, f"docker://{name}"],
                 "pull": ["copy", "-q", *plain, f"docker://{name}", layout]}
        if job in ("load", "pull"):
            return ["/bin/sh", "-c", f"{program} {' '.join(words[job])}{unpack}"]
        return [program, *words[job]] if job in words else None
    return command


def docker(program: str):
    """docker, whose daemon does the work: its cpu and memory are not in its row."""
    def command(at, job, archive, name):
        words = [program, "--host", f"unix://{at}/sock"]
        return {"load": [*words, "load", "-q", "-i", archive],
                "save": [*words, "save", "-o", f"{at}/saved.tar", "bench:1"],
                "before push": [*words, "tag", "bench:1", name],
                "push": [*words, "push", "-q", name],
                "before pull": [*words, "image", "rm", "-f", "bench:1", name],
                "pull": [*words, "pull", "-q", name]}.get(job)
    return command


def all_contenders(launcher: str):
    """({name: its command}, {name: why it is not there})."""
    able, missing = {"minicontainer": ours(launcher)}, {}
    for name, make, ask in (
            ("podman", podman, ["podman", "--version"]),
            ("skopeo+umoci", skopeo, ["sh", "-c", "skopeo -v && umoci -v"]),
            ("docker", docker, ["sh", "-c", "docker -v && dockerd -v"])):
        try:
            done = subprocess.run(ask, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(startup.last_error(done.stderr))
            able[name] = make(shutil.which(name.partition("+")[0]))
        except OSError as error:
            missing[name] = str(error)
    return able, missing


@contextlib.contextmanager
def registry(top: Path):
    """Debian's docker-registry on this machine: HOST:PORT, or "" without it."""
    if not shutil.which("docker-registry"):
        yield ""
        return
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    (top / "registry.yml").write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {top}/registry}}}}\n"
        f"http: {{addr: '{host}'}}\n")
    server = subprocess.Popen(["docker-registry", "serve", top / "registry.yml"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while socket.socket().connect_ex(("127.0.0.1", int(host.rpartition(":")[2]))):
            time.sleep(0.05)
        yield host
    finally:
        server.kill()
        server.wait()


# ══ 3. Measuring ════════════════════════════════════════════════════════════════════


def held_together(argv, pid_file: Path) -> float:
    """The most, in MB, that a command and all its processes held at once; with those
    of its daemon, if it has one."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
    groups, most = {process.pid}, 0
    if pid_file.exists():
        groups.add(os.getsid(int(pid_file.read_text())))
    while process.poll() is None:
        total = 0
        for directory in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError, ValueError, IndexError):
                if os.getsid(int(directory)) in groups:
                    text = Path(f"/proc/{directory}/smaps_rollup").read_text()
                    total += int(text.partition("\nPss:")[2].split()[0])
        most = max(most, total)
        time.sleep(0.02)
    return most / 1024


def daemon_of(who: str, at: Path):
    """A context in which a contender's daemon runs, if it has one."""
    return engine.docker(at) if who == "docker" else contextlib.nullcontext()


def measure(able: dict, archive: str, rounds: int, scratch: Path) -> dict:
    """{(contender, job): its starts}, in turns.

    Each has a registry of its own: podman and skopeo remember what a registry has
    been sent, and would send nothing a second time."""
    starts, starter = {}, startup.Starter([])
    for number in range(rounds):
        names = list(able)
        for who in names[number % len(names):] + names[:number % len(names)]:
            at = Path(tempfile.mkdtemp(dir=scratch, prefix="s-"))
            with registry(at) as host, daemon_of(who, at):
                for job in JOBS if host else JOBS[:2]:
                    name = f"{host}/bench:1"
                    if before := able[who](at, f"before {job}", archive, name):
                        starter.measure(before)
                    os.sync()  # what the last one wrote is not this one's to wait for
                    start = starter.measure(able[who](at, job, archive, name))
                    starts.setdefault((who, job), []).append(start)
                    if start["exit"]:
                        print(f"{who}: {job}: exit {start['exit']}", file=sys.stderr)
            (at / "saved.tar").unlink(missing_ok=True)
    starter.close()
    return starts


def print_table(starts: dict, together: dict) -> dict:
    """One line for each job and contender; the same as a dict."""
    print(f"{'':6}{'':15}{'wall s':>8}{'middle half':>14}{'× podman':>10}{'cpu s':>7}"
          f"{'peak MB':>9}{'together':>10}")
    table = {}
    for job in dict.fromkeys(job for _, job in starts):
        for who in dict.fromkeys(who for who, _ in starts):
            good = [s for s in starts[who, job] if s["exit"] == 0]
            if not good:
                print(f"{job:6}{who:15} failed")
                continue
            walls = [s["wall"] / 1e3 for s in good]
            pairs = [mine["wall"] / theirs["wall"] for mine, theirs in zip(
                starts[who, job], starts.get(("podman", job), ()), strict=False)]
            row = table[f"{job} {who}"] = {
                "wall": statistics.median(walls), "quartiles": startup.quartiles(walls),
                "ratio": statistics.median(pairs) if pairs else None,
                "cpu": statistics.median(s["cpu"] for s in good) / 1e3,
                "peak": max(s["peak"] for s in good),
                "together": together.get((who, job))}
            first, third = row["quartiles"]
            print(f"{job:6}{who:15}{row['wall']:8.2f}{first:8.2f} –{third:5.2f}"
                  f"{row['ratio'] or 0:10.2f}{row['cpu']:7.2f}{row['peak']:9.0f}"
                  + (f"{row['together']:10.0f}" if row["together"] else ""))
    return table


def second_container(launcher: str, archive: str, at: Path) -> None:
    """What one more container of an image takes on the disk."""
    environment = {**os.environ, "MINICONTAINER_ROOT": f"{at}/m"}

    def used():
        done = subprocess.run(["du", "-sk", f"{at}/m"], capture_output=True, text=True,
                              check=True)
        return int(done.stdout.split()[0])

    subprocess.run([launcher, "load", "-q", "-i", archive], env=environment, check=True,
                   stdout=subprocess.DEVNULL)
    sizes, running = [used()], []
    for _ in range(2):
        process = subprocess.Popen(
            [launcher, "run", "--rm", "-i", "bench:1", "/bin/sh", "-c",
             "echo up; read line"], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)
        process.stdout.readline()
        running.append(process)
        sizes.append(used())
    for process in running:
        process.communicate(b"\n")
    print(f"disk: image {sizes[0]} kB (layers as they came and unpacked), the first "
          f"container {sizes[1] - sizes[0]} kB, the second {sizes[2] - sizes[1]} kB")


# ══ 4. The command line ═════════════════════════════════════════════════════════════


@contextlib.contextmanager
def scratch_directory():
    """A directory for all of it, removed at the end with what is mounted in it."""
    top = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        yield top
    finally:
        while top.exists():  # whoever was interrupted may still be at work in it
            mounts = [line.split()[1] for line in Path("/proc/self/mounts").open()]
            for mount in reversed(mounts):
                if mount.startswith(f"{top}/"):
                    subprocess.run(["umount", "-q", "-l", mount], check=False)
            shutil.rmtree(top, ignore_errors=True)


def main() -> int:
    """Make the images, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tar", type=Path, help="a root file system; else one is made")
    parser.add_argument("-n", "--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 50],
                        help="images of how many layers")
    parser.add_argument("--json", type=Path, help="keep every number there")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("images.py: needs root")
    if not os.environ.get("BENCH_IS_APART"):
        os.environ["BENCH_IS_APART"] = "yes"
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private",
                              sys.executable, *sys.argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    kept = {}
    with scratch_directory() as scratch:
        tarball, what = options.tar or scratch / "rootfs.tar", str(options.tar)
        if not options.tar:
            what = make_tarball(tarball)
        launcher = startup.make_launcher(scratch)[0]
        able, missing = all_contenders(launcher)
        with tarfile.open(tarball) as tar:
            print(f"{what}: {sum(1 for _ in tar)} entries, "
                  f"{tarball.stat().st_size / 1e6:.0f} MB")
        print(", ".join(f"{k} {v}" for k, v in startup.describe_machine().items()))
        for count in options.layers:
            archive = scratch / f"{count}.tar"
            make_archive(dealt(tarball, count) if count > 1 else [tarball.read_bytes()],
                         archive)
            print(f"\n{count} layer{'s' * (count > 1)}, "
                  f"{archive.stat().st_size / 1e6:.0f} MB as an archive", flush=True)
            starts = measure(able, str(archive), options.rounds, scratch)
            together = {}
            for who, command in able.items():
                at = Path(tempfile.mkdtemp(dir=scratch, prefix="s-"))
                with daemon_of(who, at):
                    together[who, "load"] = held_together(
                        command(at, "load", str(archive), ""), at / "dockerd.pid")
            kept[count] = print_table(starts, together)
            second_container(launcher, str(archive),
                             Path(tempfile.mkdtemp(dir=scratch, prefix="s-")))
        for name, why in missing.items():
            print(f"{name}: not measured: {why}")
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
