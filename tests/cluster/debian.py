"""
Programs of Debian's packages, unpacked: nothing is installed, nothing started.

What a node needs beside the kubelet: containerd is of sid, since a kubelet of today wants one of today; runc
is of bookworm, as sid's needs a newer libc. And what builds an image. apt works in a directory of its own,
with the mirror and the keys that the machine's own apt has.
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.binaries import cache

NODE = {"containerd": "sid", "runc": "bookworm", "containernetworking-plugins": "bookworm",
        "busybox-static": "bookworm"}  # fmt: skip
"""Packages, each with its suite."""
BUILDER = dict.fromkeys(
    ("buildah", "golang-github-containers-common", "libgpgme11", "libassuan0", "libdevmapper1.02.1",
     "libseccomp2", "debootstrap", "debian-archive-keyring", "wget", "libpsl5"),
    "bookworm",
)  # fmt: skip
"""buildah and debootstrap with those of their libraries that a small machine may lack."""

_SOURCES = Path("/etc/apt")
_TIMEOUT = 300


class NoPackages(Exception):
    """They cannot be had on this machine."""


def root(name: str = "node-1", packages: Mapping[str, str] = NODE) -> Path:
    """The directory that `packages` are unpacked in, as if it were /. Raises NoPackages."""
    made = cache() / name
    if made.exists():
        return made
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NoPackages("no apt-get here: a real node needs packages of Debian")
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "debian.lock").open("w") as lock, contextlib.ExitStack() as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return made
        into = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}.", dir=cache())))
        _unpack(into, packages)
        (into / "root").rename(made)
    return made


def _unpack(into: Path, packages: Mapping[str, str]) -> None:
    for name in ("state/lists/partial", "cache/archives/partial", "debs", "root"):
        (into / name).mkdir(parents=True)
    (into / "state" / "status").touch()
    suites = sorted(set(packages.values()))
    (into / "sources.list").write_text("".join(f"deb {mirror()} {suite} main\n" for suite in suites))
    (into / "apt.conf").write_text(
        f'Dir::State "{into}/state";\nDir::State::status "{into}/state/status";\n'
        f'Dir::Cache "{into}/cache";\nDir::Etc::sourcelist "{into}/sources.list";\n'
        f'Dir::Etc::sourceparts "/dev/null";\nAPT::Sandbox::User "root";\n'
    )
    _run(into, "apt-get", "update", "-qq")
    for name, suite in packages.items():
        _run(into, "apt-get", "download", "-qq", f"{name}/{suite}")
    for package in sorted((into / "debs").glob("*.deb")):
        _run(into, "dpkg-deb", "-x", str(package), str(into / "root"))


def mirror() -> str:
    """The mirror of Debian that the machine's own apt names. Raises NoPackages."""
    found = [*_SOURCES.glob("sources.list"), *_SOURCES.glob("sources.list.d/*")]
    text = "\n".join(file.read_text(errors="replace") for file in found)
    match = re.search(r"^(?:URIs:|deb)\s+(?:\[[^]]*\]\s+)?(\S+/debian/?)(?:\s|$)", text, re.MULTILINE)
    if match is None:
        raise NoPackages("the machine's apt names no mirror of Debian")
    return match[1]


def _run(into: Path, *words: str) -> None:
    done = subprocess.run(
        words, cwd=into / "debs", env={**os.environ, "APT_CONFIG": str(into / "apt.conf")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise NoPackages(f"{' '.join(words[:3])} exits {done.returncode}: {done.stderr.strip()[-300:]}")
