"""
A real node: kubelet, containerd and runc as plain processes, in a mount name space of their own.

Pods are on a bridge of their own and reach this machine, by the node's address and, for the API server, by
that of its Service; nothing is forwarded, so nobody else. All that the node keeps lies below one directory;
what its programs would leave elsewhere is a tmpfs of that name space. A machine has room for one node at a
time: cgroups, addresses on lo, the bridge. At the end its processes are those of the name space, and its
mounts go with it.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.binaries import binary, cache
from tests.cluster.debian import root
from tests.cluster.plane import ControlPlane, wait_until
from tests.cluster.relay import relay

IMAGE = "local.test/busybox:1"
"""The image of pods; imagePullPolicy: Never."""

ADDRESS = "10.99.0.1"
"""Of the node: what this machine serves there, pods reach."""

_PAUSE = "local.test/pause:1"
_API = "10.0.0.1"
"""Of the Service of the API server."""
_BRIDGE, _GATEWAY, _PODS = "k8stest0", "10.244.9.1/24", "10.244.9.0/24"
_SOCKET = "/run/containerd/containerd.sock"
_STOPPING = 20.0
_SYSCTLS = [
    Path("/proc/sys") / name
    for name in (
        "vm/overcommit_memory",
        "kernel/panic",
        "kernel/panic_on_oops",
        "kernel/keys/root_maxkeys",
        "kernel/keys/root_maxbytes",
    )
]
"""What a kubelet sets for the whole machine."""


@dataclass(frozen=True)
class Node:
    """One that runs."""

    name: str
    shell: int
    """A process in its mount name space."""
    kubelet: Path
    """The kubelet's directory."""

    def inside(self, *words: str) -> list[str]:
        """The command line that runs `words` in its mount name space."""
        return ["nsenter", "-t", str(self.shell), "-m", *words]

    def ctr(self, *words: str) -> str:
        """What containerd says, of the images and containers of the kubelet."""
        words = (str(root() / "usr/bin/ctr"), "-a", _SOCKET, "-n", "k8s.io", *words)
        return subprocess.run(self.inside(*words), capture_output=True, text=True, check=True).stdout

    def mounts(self) -> str:
        """Its mount table."""
        return Path(f"/proc/{self.shell}/mountinfo").read_text()


@contextlib.contextmanager
def node(
    plane: ControlPlane, directory: Path, name: str = "node1", *, images: Sequence[Path] = ()
) -> Iterator[Node]:
    """A node of `plane`, Ready, below `directory`, that has the archives `images`. Raises NoPackages,
    NotBuilt."""
    tools = root()
    kubelet = directory / "kubelet"
    kubelet.mkdir(parents=True)
    _configure(plane, directory, tools, images)
    with contextlib.ExitStack() as held:
        lock = held.enter_context((cache() / "node.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        for sysctl in _SYSCTLS:
            held.callback(sysctl.write_text, sysctl.read_text())
        for address in (ADDRESS, _API):
            _ip("addr", "add", f"{address}/32", "dev", "lo")
            held.callback(_ip, "addr", "del", f"{address}/32", "dev", "lo")
        _ip("link", "add", _BRIDGE, "type", "bridge")
        held.callback(_ip, "link", "del", _BRIDGE)
        _ip("addr", "add", _GATEWAY, "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        host, port = plane.url.removeprefix("https://").split(":")
        held.enter_context(relay((_API, 443), (host, int(port))))
        held.callback(_remove_cgroups)
        with (directory / "node.log").open("wb") as log:
            shell = subprocess.Popen(
                ["unshare", "--mount", "bash", "-eu", str(directory / "start")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        held.callback(_end, shell, tools)

        def ready() -> bool:
            assert shell.poll() is None, (directory / "node.log").read_text()
            query = '{.status.conditions[?(@.type=="Ready")].status}'
            return plane.kubectl("get", "node", name, "-o", f"jsonpath={query}", check=False).out == "True"

        wait_until(ready, f"{name} (its logs: {directory})")
        yield Node(name, shell.pid, kubelet)


def _configure(plane: ControlPlane, directory: Path, tools: Path, images: Sequence[Path]) -> None:
    pki = plane.kubeconfig.parent
    for name in ("cni", "manifests", "pki", "opt"):
        (directory / name).mkdir()
    _image(directory / "busybox.tar", IMAGE, tools)
    _image(directory / "pause.tar", _PAUSE, tools)
    imported = [directory / "pause.tar", directory / "busybox.tar", *images]
    # The bridge and its address are ours: as a gateway the plugin would have the machine forward packets.
    addresses = {
        "type": "host-local", "dataDir": str(directory / "addresses"), "ranges": [[{"subnet": _PODS}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }  # fmt: skip
    bridge = {"type": "bridge", "bridge": _BRIDGE, "isGateway": False, "ipMasq": False, "ipam": addresses}
    network = {"cniVersion": "0.4.0", "name": "k8stest", "plugins": [bridge, {"type": "loopback"}]}
    (directory / "cni" / "10-bridge.conflist").write_text(json.dumps(network))
    (directory / "containerd.toml").write_text(f"""
version = 3
root = "{directory}/containerd"
state = "/run/containerd/state"
[grpc]
address = "{_SOCKET}"
[plugins.'io.containerd.internal.v1.opt']
path = "{directory}/opt"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{_PAUSE}"
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "runc"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{tools}/usr/sbin/runc"
SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{tools}/usr/lib/cni"]
conf_dir = "{directory}/cni"
""")
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "address": ADDRESS,
        "cgroupDriver": "cgroupfs", "failSwapOn": False, "staticPodPath": str(directory / "manifests"),
        "authentication": {
            "anonymous": {"enabled": False}, "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"}, "evictionHard": {}, "makeIPTablesUtilChains": False,
        "resolvConf": "", "syncFrequency": "5s", "readOnlyPort": 0, "healthzPort": 0, "failCgroupV1": False,
        "volumePluginDir": str(directory / "volume-plugins"), "containerRuntimeEndpoint": f"unix://{_SOCKET}",
    }  # fmt: skip
    (directory / "kubelet.json").write_text(json.dumps(settings))
    program = tools / "usr" / "bin"
    (directory / "start").write_text(f"""
mount --make-rshared /
for each in /run /var/lib /var/log; do mount -t tmpfs node $each; done
export PATH={program}:{tools}/usr/sbin:$PATH
containerd -c {directory}/containerd.toml &
until ctr -a {_SOCKET} version >/dev/null 2>&1; do sleep 0.1; done
for each in {" ".join(map(str, imported))}; do ctr -a {_SOCKET} -n k8s.io images import $each; done
{binary("kubelet")} --config={directory}/kubelet.json --kubeconfig={pki}/node1.kubeconfig \
  --hostname-override=node1 --node-ip={ADDRESS} --cert-dir={directory}/pki --root-dir={directory}/kubelet &
wait
""")


def _image(path: Path, reference: str, tools: Path) -> None:
    """An OCI image with busybox in it, that sleeps."""
    busybox = (tools / "bin" / "busybox").read_bytes()
    names = subprocess.run([tools / "bin" / "busybox", "--list"], capture_output=True, text=True, check=True)
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in ("bin", "data", "dev", "etc", "proc", "sys", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        _add(tar, "bin/busybox", busybox, 0o755)
        _add(tar, "etc/passwd", b"root:x:0:0::/:/bin/sh\n", 0o644)
        for name in names.stdout.split():
            if name != "busybox":
                entry = tarfile.TarInfo(f"bin/{name}")
                entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(entry)
    kind = "application/vnd.oci.image."
    bytes_ = layer.getvalue()
    command = {"Cmd": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]}
    config = json.dumps(
        {
            "architecture": "amd64", "os": "linux", "config": command,
            "rootfs": {"type": "layers", "diff_ids": [_digest(bytes_)]},
        }
    ).encode()  # fmt: skip
    manifest = json.dumps(
        {
            "schemaVersion": 2, "mediaType": f"{kind}manifest.v1+json",
            "config": _described(config, f"{kind}config.v1+json"),
            "layers": [_described(bytes_, f"{kind}layer.v1.tar")],
        }
    ).encode()  # fmt: skip
    notes = {
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
    }
    shown = {
        **_described(manifest, f"{kind}manifest.v1+json"),
        "platform": {"os": "linux", "architecture": "amd64"},
        "annotations": notes,
    }
    with tarfile.open(path, "w") as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o644)
        _add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [shown]}).encode(), 0o644)
        for blob in (manifest, config, bytes_):
            _add(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob, 0o644)


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _described(blob: bytes, kind: str) -> dict[str, object]:
    return {"mediaType": kind, "digest": _digest(blob), "size": len(blob)}


# ---- the end -------------------------------------------------------------------------------------


def _end(shell: "subprocess.Popen[bytes]", tools: Path) -> None:
    """End the kubelet first, so that nothing is started again; then the containers; then the rest."""
    space = os.readlink(f"/proc/{shell.pid}/ns/mnt") if shell.poll() is None else ""
    if not space:
        return
    for pid in _inside(space):
        if _name(pid).startswith("kubelet"):
            _kill(pid, signal.SIGKILL)
    ctr = [str(tools / "usr/bin/ctr"), "-a", _SOCKET, "-n", "k8s.io", "tasks"]
    enter = ["nsenter", "-t", str(shell.pid), "-m"]
    tasks = subprocess.run([*enter, *ctr, "ls", "-q"], capture_output=True, text=True, check=False).stdout
    for task in tasks.split():
        subprocess.run([*enter, *ctr, "kill", "-s", "9", task], capture_output=True, check=False)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not _containers(enter, ctr), "containers", patience=_STOPPING)
    for pid in _inside(space):
        _kill(pid, signal.SIGTERM)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not set(_inside(space)) - {shell.pid}, "the node's processes", patience=5)
    for pid in _inside(space):
        _kill(pid, signal.SIGKILL)
    shell.wait(_STOPPING)


def _containers(enter: list[str], ctr: list[str]) -> bool:
    said = subprocess.run([*enter, *ctr, "ls"], capture_output=True, text=True, check=False).stdout
    return "RUNNING" in said


def _inside(space: str) -> list[int]:
    """Processes in the mount name space."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/mnt") == space:
                found.append(int(pid))
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _remove_cgroups() -> None:
    for directory in Path("/sys/fs/cgroup").glob("**/kubepods"):
        for inner, _, _ in os.walk(directory, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(inner)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=False)
