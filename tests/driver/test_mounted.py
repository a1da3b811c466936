"""The driver as a process, over real mounts of a real bucket, as a kubelet uses it."""

import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from csi.v1 import csi_pb2 as v1
from datacache.cluster import registry
from fuse import mountpoint
from tests.driver.client import Client, connected
from tests.driver.requests import MODE, Kubelet
from tests.driver.test_program import Program, running
from tests.support.reading import until
from tests.support.s3 import SECRET_KEY, S3Server, versitygw_server

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.server,
    pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make bind mounts"),
]

CONTENT = os.urandom(300_000)
_numbers = itertools.count(1)


class Site:
    """A node, its kubelet, and a bucket with one file."""

    def __init__(self, root: Path, server: S3Server) -> None:
        self.root, self.server = root, server
        self.kubelet = Kubelet(root / "kubelet").make()
        self.environment = {
            "DATACACHE_RUNTIME": str(root / "run"),
            "XDG_STATE_HOME": str(root / "state"),
            "XDG_CACHE_HOME": str(root / "cache"),
        }
        self.bucket = f"csi-{next(_numbers)}"
        self.uri = f"{server.make_bucket(self.bucket)}/train"
        server.put(self.bucket, "train/a/file", CONTENT)

    def context(self, **more: str) -> dict[str, str]:
        """The attributes of the volume."""
        return {"uri": self.uri, "endpoint": self.server.endpoint, **more}

    def stage(self, **more: str) -> v1.NodeStageVolumeRequest:
        return self.kubelet.stage(self.context(**more), secrets=self.server.environment)

    def running(self) -> "Iterator[Program]":
        return running(self.kubelet, environment=self.environment)  # type: ignore[return-value]

    def written(self) -> bytes:
        """All that the driver and its mounts have written down and logged."""
        kept = [path for path in self.root.rglob("*") if path.is_file() and "kubelet/pods" not in str(path)]
        return b"".join(path.read_bytes() for path in kept)


@pytest.fixture
def site(versitygw: S3Server, tmp_path: Path) -> Iterator[Site]:
    # Other users have to get there.
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    site = Site(tmp_path, versitygw)
    yield site
    for info in list(mountpoint.mounts().values()):
        if Path(info.directory).is_relative_to(site.kubelet.root):
            subprocess.run(["umount", "-l", info.directory], check=True)


def calls(program: Program) -> "Iterator[Client]":
    return connected(program.socket)  # type: ignore[return-value]


def insist(client: Client, request: Message, *, seconds: float = 60.0) -> None:
    """Ask until it is done, as a kubelet does."""
    deadline = time.monotonic() + seconds
    while (said := client.code(request))[0] is not grpc.StatusCode.OK:
        assert time.monotonic() < deadline, said
        time.sleep(0.05)  # the kubelet waits, too: nothing tells it when


def test_a_bucket_in_a_pod(site: Site) -> None:
    """Staged once, read by two pods; nothing is left of it, and no secret anywhere on the way."""
    kubelet = site.kubelet
    with site.running() as program, calls(program) as client:
        client.call(site.stage())
        for pod in ("a", "b"):
            client.call(kubelet.publish(pod))
            assert (kubelet.target(pod) / "a" / "file").read_bytes() == CONTENT
        seen = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        assert str(kubelet.staging) in seen or "-m fuse" in seen
        assert SECRET_KEY not in seen
        usage = client.call(kubelet.stats(kubelet.target("a"))).usage
        assert usage[0].total >= len(CONTENT)
        for pod in ("a", "b"):
            client.call(kubelet.unpublish(pod))
            assert not kubelet.target(pod).exists()
        client.call(kubelet.unstage())
        assert not registry.live(site.environment["DATACACHE_RUNTIME"])
    assert SECRET_KEY.encode() not in site.written()
    assert not list((kubelet.root / "plugins" / "csi.datacache.io" / "volumes").iterdir())


def test_only_who_may_write_writes(site: Site) -> None:
    """One volume, a pod that may and one that may not; what is written is in the bucket before the mount
    goes."""
    kubelet = site.kubelet
    with site.running() as program, calls(program) as client:
        client.call(site.stage(rw="true"))
        client.call(kubelet.publish("writer"))
        client.call(kubelet.publish("reader", mode=MODE.MULTI_NODE_READER_ONLY))
        client.call(kubelet.publish("flagged", flags=("ro",)))
        (kubelet.target("writer") / "new").write_bytes(b"by the writer")
        for pod in ("reader", "flagged"):
            assert (kubelet.target(pod) / "new").read_bytes() == b"by the writer"
            with pytest.raises(OSError, match="Read-only file system"):
                (kubelet.target(pod) / "mine").write_bytes(b"x")
        for pod in ("writer", "reader", "flagged"):
            client.call(kubelet.unpublish(pod))
        insist(client, kubelet.unstage())
        body = site.server.client.get_object(Bucket=site.bucket, Key="train/new")["Body"]
        with body:
            assert body.read() == b"by the writer"


def test_what_the_bucket_has_not_yet_keeps_the_mount(site: Site) -> None:
    """The store is away: unstage says what is owed, and the pod is gone all the same. Then it is back."""
    kubelet = site.kubelet
    with site.running() as program, calls(program) as client:
        with versitygw_elsewhere(site) as elsewhere:
            client.call(site.stage(rw="true", endpoint=elsewhere.endpoint))
            client.call(kubelet.publish("a"))
            port = int(elsewhere.endpoint.rpartition(":")[2])
        (kubelet.target("a") / "new").write_bytes(b"nobody is there")
        client.call(kubelet.unpublish("a"))
        code, text = client.code(kubelet.unstage())
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "1 files (15 B)" in text
        assert "not in the bucket yet" in text
        assert mountpoint.is_mounted(str(kubelet.staging))
        with versitygw_server(site.root / "elsewhere", port=port) as back:
            insist(client, kubelet.unstage())
            body = back.client.get_object(Bucket=site.bucket, Key="train/new")["Body"]
            with body:
                assert body.read() == b"nobody is there"


@contextmanager
def versitygw_elsewhere(site: Site) -> Iterator[S3Server]:
    """A second store, which can be away."""
    with versitygw_server(site.root / "elsewhere") as server:
        server.make_bucket(site.bucket)
        yield server


def test_the_driver_is_killed_between_all_calls_and_mounts_go_on(site: Site) -> None:
    """The next one finds what is there. A pod that reads meanwhile notices nothing."""
    kubelet = site.kubelet
    with site.running() as program, calls(program) as client:
        client.call(site.stage())
        program.end(signal.SIGKILL)
    with site.running() as program, calls(program) as client:
        client.call(site.stage())
        client.call(kubelet.publish("a"))
        reading = open(kubelet.target("a") / "a" / "file", "rb")  # noqa: SIM115  it stays open
        assert reading.read(1000) == CONTENT[:1000]
        program.end(signal.SIGKILL)
    with reading:
        assert reading.read() == CONTENT[1000:]
    assert (kubelet.target("a") / "a" / "file").read_bytes() == CONTENT
    with site.running() as program, calls(program) as client:
        client.call(kubelet.publish("a"))
        client.call(kubelet.publish("b", readonly=True))
        program.end(signal.SIGKILL)
    with site.running() as program, calls(program) as client:
        assert (kubelet.target("b") / "a" / "file").read_bytes() == CONTENT
        for pod in ("a", "b"):
            client.call(kubelet.unpublish(pod))
        program.end(signal.SIGKILL)
    with site.running() as program, calls(program) as client:
        client.call(kubelet.unstage())
    assert not registry.live(site.environment["DATACACHE_RUNTIME"])


def test_many_at_once(site: Site) -> None:
    """Several volumes, and several calls for each: whoever is told to come again does, and all is as if they
    had come one by one."""
    names = ("pv-1", "pv-2", "pv-3")
    volumes = [Kubelet(site.kubelet.root, name).make() for name in names]
    environment = site.server.environment

    def all_at_once(client: Client, requests: list[Message]) -> None:
        asking = [threading.Thread(target=insist, args=(client, one)) for one in requests * 2]
        for one in asking:
            one.start()
        for one in asking:
            one.join(90)

    with site.running() as program, calls(program) as client:
        all_at_once(client, [one.stage(site.context(), secrets=environment) for one in volumes])
        all_at_once(client, [one.publish(pod) for one in volumes for pod in "ab"])
        for one in volumes:
            for pod in "ab":
                assert (one.target(pod) / "a" / "file").read_bytes() == CONTENT
        shown = [info for info in mountpoint.mounts().values() if info.source == site.uri]
        here = [info for info in shown if info.directory.startswith(str(site.root))]
        assert len(here) == 9
        assert len({info.device for info in here}) == 3
        all_at_once(client, [one.unpublish(pod) for one in volumes for pod in "ab"])
        all_at_once(client, [one.unstage() for one in volumes])
    assert not registry.live(site.environment["DATACACHE_RUNTIME"])


@pytest.mark.parametrize("after", [0.0, 0.2, 0.6])
def test_the_driver_is_killed_in_the_middle_of_a_stage(site: Site, after: float) -> None:
    """What it had begun goes on or comes to nothing: the next one gets there, with one mount."""
    kubelet = site.kubelet
    records = kubelet.root / "plugins" / "csi.datacache.io" / "volumes"
    with site.running() as program, calls(program) as client:
        asking = threading.Thread(target=client.code, args=(site.stage(),))
        asking.start()
        until(lambda: list(records.glob("*.json")))
        time.sleep(after)  # that many seconds into the mount: each place is as good as another
        program.end(signal.SIGKILL)
        asking.join(60)
    with site.running() as program, calls(program) as client:
        insist(client, site.stage())
        insist(client, kubelet.publish("a"))
        assert (kubelet.target("a") / "a" / "file").read_bytes() == CONTENT
        on = [m for m in mountpoint.mounts().values() if m.directory == str(kubelet.staging)]
        assert len(on) == 1
        client.call(kubelet.unpublish("a"))
        client.call(kubelet.unstage())
        assert not registry.live(site.environment["DATACACHE_RUNTIME"])


def as_1000(*words: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a program as another user."""
    return subprocess.run(
        words, user=1000, group=1000, extra_groups=[], capture_output=True, timeout=60, cwd="/"
    )


@pytest.mark.parametrize("owner", [{}, {"uid": "1000", "gid": "1000"}], ids=["root", "1000"])
def test_a_pod_of_another_user_with_a_subpath(site: Site, owner: dict[str, str]) -> None:
    """subPath is a bind mount of a part of the volume: user 1000 reads there, and writes if it is his."""
    kubelet, sub = site.kubelet, site.root / "subpath"
    sub.mkdir()
    with site.running() as program, calls(program) as client:
        client.call(site.stage(rw="true", **owner))
        client.call(kubelet.publish("a"))
        subprocess.run(["mount", "--bind", str(kubelet.target("a") / "a"), str(sub)], check=True)
        try:
            read = as_1000("cat", str(sub / "file"))
            assert read.stdout == CONTENT, read.stderr
            wrote = as_1000("sh", "-c", 'printf "by 1000" > "$0"', str(sub / "mine"))
            if owner:
                assert wrote.returncode == 0, wrote.stderr
                assert (sub / "mine").read_bytes() == b"by 1000"
                assert (sub / "mine").stat().st_uid == 1000
            else:
                assert b"Permission denied" in wrote.stderr
        finally:
            subprocess.run(["umount", str(sub)], check=True)
        client.call(kubelet.unpublish("a"))
        insist(client, kubelet.unstage())


def test_a_store_that_refuses_is_said_to_whoever_looks_at_the_pod(site: Site) -> None:
    """Wrong keys, no such bucket: the reason comes back, without the key, and nothing is left."""
    with site.running() as program, calls(program) as client:
        wrong = site.stage()
        wrong.secrets["AWS_SECRET_ACCESS_KEY"] = "a-wrong-key-0123456789"
        code, text = client.code(wrong)
        assert code is grpc.StatusCode.INTERNAL
        assert "a-wrong-key" not in text
        assert site.bucket in text
        missing = site.stage(uri="s3://no-such-bucket")
        code, text = client.code(missing)
        assert "no-such-bucket" in text
        assert not mountpoint.is_mounted(str(site.kubelet.staging))
        assert not registry.live(site.environment["DATACACHE_RUNTIME"])
    assert b"a-wrong-key" not in site.written()


def test_the_kubelets_directory_may_be_shown_twice(site: Site, tmp_path: Path) -> None:
    """As where it is bound to /var/lib/kubelet: the kernel makes a mount at both places, and takes both."""
    kubelet = site.kubelet
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "--bind", str(kubelet.root), str(kubelet.root)], check=True)
    subprocess.run(["mount", "--make-shared", str(kubelet.root)], check=True)
    subprocess.run(["mount", "--bind", str(kubelet.root), str(other)], check=True)
    try:
        with site.running() as program, calls(program) as client:
            client.call(site.stage())
            client.call(kubelet.publish("a"))
            copies = [m for m in mountpoint.mounts() if m.startswith(str(other) + "/")]
            assert len(copies) == 2
            client.call(kubelet.unpublish("a"))
            client.call(kubelet.unstage())
        assert not [m for m in mountpoint.mounts() if m.startswith(str(other) + "/")]
    finally:
        for directory in (other, kubelet.root):
            subprocess.run(["umount", "-l", str(directory)], check=True)
