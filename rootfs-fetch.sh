#!/usr/bin/env bash
#
# rootfs-fetch.sh: get a real root file system for `minicontainer.py run /bin/sh`.
#
# A container needs surprisingly little: a directory that looks like `/`. No kernel, no boot loader,
# no init; only the files that a program expects to find around itself: a shell, a C library, /etc.
# This script gets such a directory in one of four ways, and each shows where they come from:
#
#   alpine    download a tarball and unpack it (4 MB; the usual way of an image)
#   debian    install packages into an empty directory (mmdebstrap or debootstrap)
#   ubuntu    the same, from another archive
#   busybox   build it by hand: one static program, a few hundred links to it, five small files
#
# Where things go (MINICONTAINER_ROOT is /var/lib/minicontainer unless you set it):
#
#   $MINICONTAINER_ROOT/rootfs/alpine/           the files, with their real owners and modes
#   $MINICONTAINER_ROOT/rootfs/default           -> alpine, what `run` uses: the last one fetched
#   $MINICONTAINER_ROOT/rootfs/.new-PID-alpine…  the work in progress of the process PID
#
# Two rules. Nothing half-made is ever visible under its final name: all work is done in the hidden
# directory, which disappears however this script ends, and the result arrives by rename(2). (Only
# SIGKILL leaves it behind: `minicontainer.py system prune` clears it away when PID is no more.) And
# nothing is unpacked before it has been verified: Alpine by a SHA-256 that is written down here,
# Debian and Ubuntu by the signature of their archive, BusyBox by the host's own package manager.
#
# Fetching a NAME again replaces it: stop the containers that run on the old one first.
#
# Exit status: 0 it is there, 1 it could not be done (one line says why), 2 wrong usage; as usual,
# 128 plus the signal's number after Ctrl-C and its like.

set -euo pipefail
umask 022

me=${0##*/}
root=${MINICONTAINER_ROOT:-/var/lib/minicontainer}
case $root in /*) ;; *) root=$PWD/$root ;; esac
store=$root/rootfs

# Alpine's mini root file system: this release and no other, because only this one's sums are known.
# To update: change the version, and copy the two sums from the .sha256 files next to the tarballs at
# https://dl-cdn.alpinelinux.org/alpine/vX.Y/releases/ARCH/ (better still, check the .asc signature).
alpine_version=3.24.2
alpine_sha256_x86_64=c5ca053cfe1d85c5b96dff8b9bc57045f7f184a30ffb6b65776409ca90388677
alpine_sha256_aarch64=9bf70a7f18ea44094cbb5f70c58f9af129c8214745743db0e68e5502cc2ce773

usage() {
    cat <<END
usage: $me [-h] [--mirror URL] [alpine|debian|ubuntu|busybox] [SUITE]

Get a root file system for 'minicontainer.py run' and make it the default one.

  alpine    Alpine Linux $alpine_version, the mini root file system (this is what you get if you name none)
  debian    minimal Debian, through mmdebstrap or debootstrap; SUITE is trixie, bookworm, sid ...
  ubuntu    minimal Ubuntu, likewise; SUITE is noble, jammy ...
  busybox   one static program and its links, from this system's own packages

  --mirror URL   where to get it from; or set ALPINE_MIRROR, DEBIAN_MIRROR or UBUNTU_MIRROR

It is stored in $store/NAME (MINICONTAINER_ROOT sets another place).
Needs root, because it keeps the owners of the files.
END
}

say()   { printf '%s: %s\n' "$me" "$*" >&2; }
fail()  {  # whatever could not be done: if the disk is full, that is why
    if [ -n "$work" ] && ! head -c 65536 /dev/zero 2>/dev/null >"$work/room"; then
        set -- "no room left in $store: free some, or set MINICONTAINER_ROOT to a place that has"
    fi
    say "$@"
    exit 1
}
wrong() { say "$*; see '$me --help'"; exit 2; }
have()  { command -v "$1" >/dev/null; }


# ── Leaving ──────────────────────────────────────────────────────────────────────────────────────
# A shell that is sent SIGTERM waits for its foreground command before it runs a trap: minutes, for a
# bootstrap. So everything slow runs in the background under `wait`, which a signal does interrupt.

work=''     # the hidden directory, once there is one
child=''    # the slow command that is running, if one is

run() {    # run a slow command; its exit status is ours
    local status=0
    set -m    # job control: the command becomes the leader of a process group, which `leave` can kill
    "$@" </dev/null & child=$!
    set +m
    wait "$child" || status=$?
    child=
    return "$status"
}

leave() {  # the last thing that happens, whatever happened before
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -KILL -- "-$child" 2>/dev/null || :
        wait "$child" 2>/dev/null || :
    fi
    [ -n "$work" ] || return 0
    # What the command had started may need a moment longer to die and can still create a file, hence
    # the other tries. --one-file-system: should anything be mounted in there, it must not be emptied.
    local try
    for try in 1 2 3 4 5; do
        rm -rf --one-file-system "$work" 2>/dev/null && return 0
        sleep "0.$try"
    done
    say "could not remove $work"
}

trap leave EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM


# ── Alpine: download, verify, unpack ─────────────────────────────────────────────────────────────

fetch_alpine() {
    local arch want got tarball=$work/alpine.tar.gz url
    arch=$(uname -m)
    case $arch in
        x86_64)        want=$alpine_sha256_x86_64 ;;
        aarch64|arm64) want=$alpine_sha256_aarch64 arch=aarch64 ;;
        *) fail "alpine: no SHA-256 is known here for the architecture $arch; try '$me busybox'" ;;
    esac
    mirror=${mirror:-${ALPINE_MIRROR:-https://dl-cdn.alpinelinux.org/alpine}} mirror=${mirror%/}
    url=$mirror/v${alpine_version%.*}/releases/$arch/alpine-minirootfs-$alpine_version-$arch.tar.gz
    have sha256sum || fail "alpine: sha256sum is missing: install the package coreutils"

    say "downloading $url"
    download "$url" "$tarball"
    got=$(sha256sum <"$tarball") got=${got%% *}
    [ "$got" = "$want" ] || fail "alpine: the download is not the file that was expected, and was not" \
        "unpacked: its SHA-256 is $got, it should be $want ($url)"

    run tar -xpzf "$tarball" -C "$new" --numeric-owner || fail "alpine: cannot unpack $tarball into $new"
    # Inside, `apk add` should use the mirror that has just proved to be reachable.
    printf '%s\n' "$mirror/v${alpine_version%.*}/main" "$mirror/v${alpine_version%.*}/community" \
        >"$new/etc/apk/repositories"
    what="Alpine Linux $alpine_version"
}

download() {  # download URL FILE: with a progress bar for a person, silently for a log file
    local url=$1 file=$2 tool bar=() quiet=() status=0
    if have curl; then
        tool=curl bar=(--progress-bar) quiet=(--silent --show-error)
        set -- curl --fail --location --connect-timeout 20 --retry 2 --output "$file"
    elif have wget; then
        tool=wget bar=(--quiet --show-progress) quiet=(--no-verbose)
        set -- wget --timeout=20 --tries=3 --output-document="$file"
    else
        fail "neither curl nor wget is installed: install one of them, or try '$me busybox'"
    fi
    if [ -t 2 ]; then
        # The bar and the tool's own error message share stderr: on a terminal it speaks for itself.
        run "$@" "${bar[@]}" "$url" || status=$?
    else
        run "$@" "${quiet[@]}" "$url" 2>"$work/log" || status=$?
    fi
    [ "$status" = 0 ] || fail "cannot reach $url ($(reason "$work/log" "$tool: exit status $status")):" \
        "set --mirror to one that you can reach, or try '$me busybox' (needs no such mirror)"
}

reason() {  # reason LOG OTHERWISE: the one line of a log that says what went wrong
    local line=
    [ ! -s "$1" ] || line=$(grep -aE -m1 '^(E|ERROR|curl|wget|unshare): |failed: ' "$1" || tail -n1 "$1")
    printf '%s' "${line:-$2}"
}


# ── Debian and Ubuntu: install packages into an empty directory ──────────────────────────────────

bootstrap() {  # bootstrap debian|ubuntu
    local distribution=$1 keyring package suite_default mirror_default why
    case $distribution in
        debian) package=debian-archive-keyring suite_default=trixie
                mirror=${mirror:-${DEBIAN_MIRROR:-}} mirror_default=http://deb.debian.org/debian ;;
        ubuntu) package=ubuntu-keyring suite_default=noble
                mirror=${mirror:-${UBUNTU_MIRROR:-}} mirror_default=http://archive.ubuntu.com/ubuntu
                # Ubuntu keeps everything but x86 on another server.
                [ "$(uname -m)" = x86_64 ] || mirror_default=http://ports.ubuntu.com/ubuntu-ports ;;
    esac

    # A machine that runs this distribution knows a mirror that it can reach, and its own release.
    if [ "$(os_release ID)" = "$distribution" ]; then
        suite=${suite:-$(os_release VERSION_CODENAME)}
        mirror=${mirror:-$(apt_mirror)}
    fi
    suite=${suite:-$suite_default} mirror=${mirror:-$mirror_default} mirror=${mirror%/}

    local tool
    if   have mmdebstrap;  then tool=mmdebstrap
    elif have debootstrap; then tool=debootstrap
    else fail "$distribution: needs mmdebstrap or debootstrap: apt-get install mmdebstrap" \
             "(elsewhere: the package debootstrap), or try '$me alpine'"
    fi
    have unshare || fail "$distribution: unshare is missing: install the package util-linux"

    # Without the archive's public keys the packages could be anybody's.
    for keyring in "/usr/share/keyrings/$distribution-archive-keyring".{gpg,pgp} ''; do
        [ ! -s "$keyring" ] || break
    done
    [ -n "$keyring" ] || fail "$distribution: the keys of its archive are missing: apt-get install $package"

    # Both tools mount /proc and more inside the new directory and chroot into it. In a mount and a
    # PID namespace of their own nothing of that can be left behind: when the namespace's first
    # process is killed, the kernel kills the rest and drops the mounts.
    set -- unshare --mount --mount-proc --pid --fork --kill-child
    if [ "$tool" = mmdebstrap ]; then
        set -- "$@" mmdebstrap --mode=root --variant=minbase --format=directory \
            --keyring="$keyring" "$suite" "$new" "$mirror"
    else
        set -- "$@" debootstrap --variant=minbase --keyring="$keyring" "$suite" "$new" "$mirror"
        # A release younger than this debootstrap has no script yet, but all of them are the same.
        if [ ! -e "/usr/share/debootstrap/scripts/$suite" ]; then
            case $distribution in debian) set -- "$@" sid ;; ubuntu) set -- "$@" gutsy ;; esac
        fi
    fi

    say "installing $distribution $suite from $mirror with $tool: a minute or two"
    if ! run "$@" >"$work/log" 2>&1; then
        why=$(reason "$work/log" "$tool failed")
        fail "$distribution: cannot install $suite from $mirror ($why): check the name of the suite," \
            "set --mirror to one that you can reach, or try '$me busybox' (needs no such mirror)"
    fi
    rm -f "$new"/var/cache/apt/archives/*.deb    # debootstrap keeps what it has downloaded
    what="$distribution $suite"
}

os_release() {  # os_release KEY: a line of /etc/os-release, which is shell by definition
    # shellcheck source=/dev/null
    (. /etc/os-release 2>/dev/null && eval "printf '%s' \"\${$1:-}\"") || :
}

# The address from which this machine's apt gets its own release. Both formats that apt reads:
#     deb [signed-by=FILE] http://deb.debian.org/debian trixie main            *.list
#     Types: deb / URIs: http://… / Suites: trixie trixie-updates / …          *.sources
apt_mirror() {
    local codename
    codename=$(os_release VERSION_CODENAME)
    contents /etc/apt/sources.list /etc/apt/sources.list.d/*.list | awk -v suite="$codename" '
        $1 == "deb" { sub(/\[[^]]*\]/, ""); if ($3 == suite && $2 ~ /^https?:/ && !found++) print $2 }' |
        grep . ||
    contents /etc/apt/sources.list.d/*.sources | awk -v suite="$codename" '
        NF == 0        { if (deb && ours && uri && !off && !found++) print uri
                         deb = ours = off = 0; uri = "" }
        /^Types:/      { for (i = 2; i <= NF; i++) if ($i == "deb") deb = 1 }
        /^URIs:/       { if ($2 ~ /^https?:/) uri = $2 }
        /^Suites:/     { for (i = 2; i <= NF; i++) if ($i == suite) ours = 1 }
        /^Enabled: no/ { off = 1 }' |
        grep . || :
}

contents() {  # contents FILE...: those that exist, an empty line after each
    local file
    for file; do
        [ ! -r "$file" ] || { cat "$file"; echo; }
    done
}


# ── BusyBox: a root file system by hand ──────────────────────────────────────────────────────────

make_busybox() {
    local applet
    # One directory of programs under the four names by which scripts look for them.
    mkdir -p "$new"/{bin,dev,etc,home,mnt,proc,run,sys,usr,var}
    ln -s bin    "$new/sbin"
    ln -s ../bin "$new/usr/bin"
    ln -s ../bin "$new/usr/sbin"
    ln -s ../run "$new/var/run"
    mkdir -m 0700 "$new/root"
    mkdir -m 1777 "$new/tmp" "$new/var/tmp"
    printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'nobody:x:65534:65534:nobody:/:/bin/false' \
        >"$new/etc/passwd"
    printf '%s\n' 'root:x:0:' 'nogroup:x:65534:' >"$new/etc/group"
    printf '%s\n' '127.0.0.1 localhost' '::1 localhost' >"$new/etc/hosts"

    busybox_here || busybox_packaged || fail "busybox: there is no static busybox here, and the package" \
        "manager has none ($(reason "$work/log" 'no apt-get, apk or dnf')):" \
        "apt-get update && apt-get install busybox-static, then try again"

    # It looks at the name by which it was called: a link for each thing that it can do.
    chroot "$new" /bin/busybox --list | while IFS= read -r applet; do
        [ "$applet" = busybox ] || ln -s busybox "$new/bin/$applet"
    done
    what=$(chroot "$new" /bin/busybox --help 2>&1 | sed -n 1p) what=${what%% (*}
}

# A static program is one that runs where there is nothing else: so try it there.
is_static() { chroot "$new" /bin/busybox true 2>/dev/null; }

busybox_here() {
    local found
    found=$(command -v busybox) && install -m 0755 "$found" "$new/bin/busybox" && is_static
}

busybox_packaged() {
    local found
    mkdir "$work/packages"
    say "getting a static busybox from this system's packages"
    run package_download "$work/packages" >"$work/log" 2>&1 || return 1
    found=$(find "$work/packages" -type f -perm -u+x \( -name busybox -o -name busybox.static \))
    [ -n "$found" ] && install -m 0755 "${found%%$'\n'*}" "$new/bin/busybox" && is_static
}

package_download() {  # package_download DIR: unpack the package there; nothing is installed
    cd "$1" || return
    if   have apt-get; then apt-get -q -o APT::Sandbox::User=root download busybox-static &&
                            dpkg-deb -x busybox-static_*.deb .
    elif have apk;     then apk fetch --quiet --stdout busybox-static | tar -xz
    elif have dnf;     then dnf -q download busybox && rpm2cpio busybox-*.rpm | cpio -idm --quiet
    else return 1
    fi
}


# ── What was asked, and doing it ─────────────────────────────────────────────────────────────────

name='' suite='' mirror='' what=''
while [ $# -gt 0 ]; do
    case $1 in
        -h|--help)  usage; exit 0 ;;
        --mirror)   [ -n "${2:-}" ] || wrong "--mirror needs a URL"
                    mirror=$2; shift ;;
        --mirror=*) mirror=${1#*=} ;;
        -*)         wrong "unknown option $1" ;;
        *)          if   [ -z "$name" ];  then name=$1
                    elif [ -z "$suite" ]; then suite=$1
                    else wrong "one argument too many: $1"
                    fi ;;
    esac
    case $mirror in ''|*://?*) ;; *) wrong "--mirror $mirror: not a URL" ;; esac
    shift
done
name=${name:-alpine}
case $name:$suite in
    alpine:|"alpine:$alpine_version"|busybox:|debian:*|ubuntu:*) ;;
    alpine:*)  wrong "alpine $suite: only $alpine_version can be verified (its SHA-256 is in this script)" ;;
    busybox:*) wrong "busybox has no versions to choose from" ;;
    *)         wrong "$name: not one of alpine, debian, ubuntu, busybox" ;;
esac
case $suite in *[!A-Za-z0-9.-]*|-*) wrong "$suite: not the name of a suite" ;; esac
[ "$name" != busybox ] || [ -z "$mirror" ] || wrong "busybox comes from this system's packages, no mirror"

[ "$(id -u)" = 0 ] || fail "must run as root, to keep the owners of the files: sudo $0 $name"

# The store is closed to others, or a set-user-ID program in an old, unpatched root file system
# would be at the service of every user of this host.
{ mkdir -p "$store" && chmod 0700 "$store"; } || fail "cannot create $store"
work=$(mktemp -d "$store/.new-$$-$name-XXXX") || fail "cannot write in $store"
new=$work/new
mkdir "$new"
export TMPDIR=$work    # what the tools drop goes with the rest

case $name in
    alpine)        fetch_alpine ;;
    debian|ubuntu) bootstrap "$name" ;;
    busybox)       make_busybox ;;
esac
[ -e "$new/bin/sh" ] || [ -L "$new/bin/sh" ] || fail "$name: something is wrong with it: it has no /bin/sh"
size=$(du -sm "$new") size=${size%%[!0-9]*}

# The exchange: three renames that no signal interrupts. rename(2) cannot replace a directory that is
# not empty, so the old one steps aside first; `leave` removes it with the rest of the work.
trap '' INT TERM HUP
[ ! -e "$store/$name" ] || mv -T "$store/$name" "$work/old"
if ! mv -T "$new" "$store/$name"; then
    [ ! -e "$work/old" ] || mv -T "$work/old" "$store/$name"
    fail "cannot move the result to $store/$name"
fi
ln -s "$name" "$work/default"
mv -T "$work/default" "$store/default" 2>/dev/null ||
    fail "$store/$name is there, but not the default: $store/default is no symbolic link"

place="MINICONTAINER_ROOT=$root "
[ "$root" != /var/lib/minicontainer ] || place=''
echo "$store/$name: $what, $size MB, now the default;" \
    "try: sudo ${place}python3 minicontainer.py run /bin/sh"
