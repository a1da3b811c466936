"""Uploads of a mount while its store is in trouble: what was written gets there, whole and once."""

import mmap
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from datacache.model import MiB, MountPoint
from tests.daemon.mounted.conftest import (
    WAYS,
    check_way,
    flushed,
    kill_daemon,
    start_writable,
    writable,
)
from tests.support.faulty_s3 import FaultyS3, Lost, Reset, Stall, Status
from tests.support.reading import until
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, find_tool, versitygw_server
from tests.support.stores import Bucket, difference, tree_of

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


@pytest.fixture
def store() -> Iterator[FaultyS3]:
    with FaultyS3() as store:
        yield store


def point(store: FaultyS3) -> MountPoint:
    return MountPoint(f"s3://{store.bucket}", options={"endpoint": store.endpoint, "style": "path"})


def held(store: FaultyS3) -> dict[str, bytes]:
    with store.lock:
        return {key: one.data for key, one in store.objects.items()}


def test_all_that_can_go_wrong_with_a_request(store: FaultyS3, tmp_path: Path) -> None:
    """Refusals, resets, lost answers: each file arrives, whole, and is nobody's conflict."""
    rng = random.Random(1)
    with writable(tmp_path, "passthrough", point(store), environment=ENVIRONMENT) as one:
        store.add("put", None, Status(500, "InternalError"), None, Lost(), Reset(), None, None, Lost())
        store.add("delete", Lost(), None, Status(503, "SlowDown"))
        store.add("head", None, Reset(), None, None, Status(500, "InternalError"))
        store.add("create", Lost())
        store.add("part", Reset(), None, Lost(), Status(500, "InternalError"))
        store.add("complete", Lost())
        for i in range(12):
            (one.directory / f"file{i}").write_bytes(b"%d" % i * 1000)
            if i % 3 == 0:
                (one.directory / f"file{i}").write_bytes(b"again %d" % i)
            if i % 4 == 0:
                (one.directory / f"file{i}").rename(one.directory / f"moved{i}")
            if i % 5 == 4:
                (one.directory / f"file{i}").unlink(missing_ok=True)
        (one.directory / "big").write_bytes(rng.randbytes(1024) * 40 * 1024)
        flushed(one, seconds=100)
        shown = tree_of(one.directory)
        assert not difference(shown, dict(held(store)))
        assert one.status()["writing"]["dirty_conflicts"] == 0
    assert not any(upload.parts for upload in store.uploads.values())


def resume(store: FaultyS3, base: Path, size: int, parts_first: int, way: str) -> None:
    """A daemon is killed when `parts_first` parts of a file were sent; the next one goes on."""
    data = random.Random(2).randbytes(MiB) * (size // MiB)
    # The parts after the first few wait until the daemon is dead: what it had sent by then is known.
    store.add("part", *[None] * parts_first, *[Stall()] * 4)
    with writable(base, way, point(store), environment=ENVIRONMENT) as one:
        (one.directory / "big").write_bytes(data)
        until(lambda: store.count("part") >= parts_first + 1, seconds=60)
        until(lambda: sum(len(upload.parts) for upload in list(store.uploads.values())) >= parts_first)
        before = {number for upload in store.uploads.values() for number in upload.parts}
        if way == "pyfuse3":
            one.kill()
            one.stop()
            store._faults.clear()
            start_writable(one, way)
        else:
            store._faults.clear()
            kill_daemon(one)
        flushed(one, seconds=100)
        assert held(store)["big"] == data
        assert (one.directory / "big").read_bytes() == data
    with store.lock:
        asked = [request for request in store.requests if request.kind == "part"]
    sent = Counter(int(request.query["partNumber"]) for request in asked)
    assert {number for number in before if sent[number] > 1} == set(), "sent again though the store had it"
    assert len({request.query["uploadId"] for request in asked}) == 1, "one upload that goes on"
    assert len(sent) == -(-size // (16 * MiB))
    assert not store.uploads


def test_an_upload_in_parts_goes_on_where_it_was(store: FaultyS3, tmp_path: Path) -> None:
    """kill -9 in the middle of it: no part that the store has is sent again."""
    resume(store, tmp_path, 96 * MiB, 3, "passthrough")


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_large_upload_goes_on_where_it_was(store: FaultyS3, tmp_path: Path, way: str) -> None:
    """200 MiB, in all ways."""
    check_way(way)
    resume(store, tmp_path, 200 * MiB, 7, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_mapping_that_goes_on_after_close_is_not_torn(store: FaultyS3, tmp_path: Path, way: str) -> None:
    """Its file is uploaded when the last mapping is gone, as it is then. What the bucket had stays whole."""
    check_way(way)
    size = MiB
    with writable(tmp_path, way, point(store), environment=ENVIRONMENT) as one:
        path = one.directory / "mapped"
        path.write_bytes(bytes(size))
        flushed(one)
        assert held(store)["mapped"] == bytes(size)
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), size)
        for value in range(1, 60):
            (one.directory / "other").write_bytes(bytes([value]))
            mapped[:] = bytes([value]) * size
            assert held(store)["mapped"] == bytes(size)
        one.control().flush("/", timeout=1)
        assert held(store)["mapped"] == bytes(size), "not while somebody can write to it"
        mapped.close()
        flushed(one)
        assert held(store)["mapped"] == bytes([59]) * size
        assert path.read_bytes() == bytes([59]) * size


@pytest.mark.server
def test_the_store_is_away_for_a_while(tmp_path: Path) -> None:
    """The server is killed while files are written, and started again: status says so meanwhile, and then all
    of it gets there."""
    if find_tool("versitygw") is None:
        pytest.skip("versitygw is not installed")
    kept = tmp_path / "kept"
    with versitygw_server(kept) as server:
        server.make_bucket("away")
        bucket = Bucket(server, "away")
        port = int(server.endpoint.rpartition(":")[2])
        mount = writable(tmp_path, "passthrough", bucket.mount_point(), environment=bucket.environment)
        one = mount.__enter__()
        for i in range(20):
            (one.directory / f"before{i}").write_bytes(b"%d" % i * 5000)
    try:
        for i in range(40):
            (one.directory / f"meanwhile{i}").write_bytes(b"%d" % i * 5000)
        (one.directory / "big").write_bytes(random.Random(3).randbytes(20 * MiB))
        (one.directory / "before3").unlink()
        (one.directory / "before4").rename(one.directory / "renamed")
        until(lambda: one.status()["writing"]["uploads"]["away"], seconds=30)
        shown = tree_of(one.directory)
        with versitygw_server(kept, port=port) as server:
            bucket = Bucket(server, "away")
            flushed(one, seconds=100)
            assert not difference(shown, bucket.tree())
            assert not bucket.unfinished()
            assert one.status()["writing"]["dirty_conflicts"] == 0
            assert one.status()["writing"]["uploads"]["away"] in ([], ())
    finally:
        mount.__exit__(None, None, None)
