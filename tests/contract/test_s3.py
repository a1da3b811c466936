"""S3 as a source: the contract, and what only S3 has, against moto and a real server."""

import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from datacache.clock import SystemClock
from datacache.config.settings import IndexSettings, SourceSettings
from datacache.errors import Denied, NotFound, Unavailable, VersionChanged
from datacache.index.opening import open_index
from datacache.index.snapshot import create_snapshot
from datacache.model import ByteRange, Dataset, MountPoint, ObjectInfo, Version
from datacache.sources.opening import open_raw, open_source
from datacache.sources.source import Source
from tests.contract.source_suite import Made, SourceSuite
from tests.support.s3 import S3Server

_numbers = itertools.count(1)
SETTINGS = SourceSettings(timeout=20, stall_timeout=10)


def opened(server: S3Server, uri: str, **options: str) -> Source:
    mount = MountPoint(uri, options={"endpoint": server.endpoint, **options})
    return open_raw(mount, settings=SETTINGS, environment=server.environment, clock=SystemClock())


def made_of(server: S3Server, *, versioned: bool = False, odd_keys: bool = True) -> Made:
    name = f"bucket-{next(_numbers)}"
    server.make_bucket(name, versioned=versioned)
    root = "a root/"  # keys of a source are relative to its root
    return Made(
        opened(server, f"s3://{name}/{root}"),
        lambda key, data: server.put_fast(name, root + key, data),
        lambda key: server.delete(name, root + key),
        odd_keys=odd_keys,
        byte_keys=False,
    )


class TestMoto(SourceSuite):
    """The contract against moto."""

    @pytest.fixture
    def made(self, moto: S3Server) -> Iterator[Made]:
        made = made_of(moto)
        with closing(made.source):
            yield made


class TestMotoWithVersions(SourceSuite):
    """The contract against a versioned bucket of moto's."""

    @pytest.fixture
    def made(self, moto: S3Server) -> Iterator[Made]:
        made = made_of(moto, versioned=True)
        with closing(made.source):
            yield made


@pytest.mark.server
class TestVersitygw(SourceSuite):
    """The contract against a real server, which keeps objects as files."""

    @pytest.fixture
    def made(self, versitygw: S3Server) -> Iterator[Made]:
        made = made_of(versitygw, odd_keys=False)
        with closing(made.source):
            yield made

    @pytest.mark.parametrize("missing", [".", "..", "../x", "a/../../x", "/x", "\0", "x" * 3000])
    def test_names_that_lead_elsewhere(self, made: Made, missing: str) -> None:
        """All but `a/./b`, which this server itself takes for `a/b`."""
        SourceSuite().test_names_that_lead_elsewhere(made, missing)


@pytest.fixture
def bucket(moto: S3Server) -> str:
    name = f"bucket-{next(_numbers)}"
    moto.make_bucket(name)
    return name


def listed(source: Source, *, versions: bool = False) -> dict[str, ObjectInfo]:
    pages = source.list("", recursive=True, versions=versions)
    return {info.key: info for page in pages for info in page.objects}


def whole(source: Source, info: ObjectInfo) -> bytes:
    return bytes(source.read(info, ByteRange(0, info.size)))


ODD = ["a//b", "/a", "a/", "./a", "a/../b", "..", "t\tb", "x\x01y", "a/."]


@pytest.mark.parametrize("key", ODD)
def test_keys_that_obstore_cannot_name_are_read_all_the_same(moto: S3Server, bucket: str, key: str) -> None:
    """Whole and in part, by version, and refused when the version has gone."""
    moto.put(bucket, key, b"0123456789")
    with closing(opened(moto, f"s3://{bucket}")) as source:
        info = listed(source)[key]
        assert whole(source, info) == b"0123456789"
        assert bytes(source.read(info, ByteRange(3, 7))) == b"3456"
        assert source.stat(key) == info
        moto.put(bucket, key, b"9876543210")
        with pytest.raises(VersionChanged):
            whole(source, info)
        moto.delete(bucket, key)
        with pytest.raises(NotFound):
            whole(source, info)


def test_a_version_is_read_by_its_id(moto: S3Server) -> None:
    """In a versioned bucket the bytes of an overwritten or deleted version can still be had."""
    name = f"bucket-{next(_numbers)}"
    moto.make_bucket(name, versioned=True)
    for key in ("plain", "odd//"):
        moto.put(name, key, b"first")
    moto.put(name, "gone", b"x")
    moto.delete(name, "gone")
    with closing(opened(moto, f"s3://{name}")) as source:
        assert source.traits.versioned
        before = listed(source, versions=True)
        assert set(before) == {"plain", "odd//"}
        for key in before:
            moto.put(name, key, b"other")
        moto.delete(name, "plain")
        for info in before.values():
            assert whole(source, info) == b"first"
            assert bytes(source.read(info, ByteRange(1, 3))) == b"ir"


def test_a_snapshot_of_a_versioned_bucket_outlives_its_objects(moto: S3Server, tmp_path: Path) -> None:
    """ "Versioned buckets are read by version id in snapshots": what was pinned is what is read, when the
    bucket has other bytes or none under that key."""
    name, state = f"bucket-{next(_numbers)}", str(tmp_path)
    moto.make_bucket(name, versioned=True)
    for key in ("changed", "removed", "odd//key"):
        moto.put(name, key, b"first")
    mount = MountPoint(f"s3://{name}", options={"endpoint": moto.endpoint})
    dataset, clock = Dataset("pinned", (mount,)), SystemClock()
    source = open_source(mount, settings=SETTINGS, environment=moto.environment, clock=clock)
    with closing(source):
        create_snapshot(dataset, [source], state=state, name="s", clock=clock)
        for key in ("changed", "odd//key"):
            moto.put(name, key, b"other")
        moto.delete(name, "removed")
        settings = IndexSettings(snapshot="s")
        with closing(open_index(dataset, [source], settings, state=state, clock=clock)) as index:
            found = {path: ObjectInfo(e.key, e.size, e.version) for path, e in index.walk()}
        assert {path: whole(source, info) for path, info in found.items()} == {
            "/changed": b"first", "/odd/%empty/key": b"first", "/removed": b"first",
        }  # fmt: skip


def test_a_version_that_was_removed_for_good_is_a_changed_one(moto: S3Server) -> None:
    """The version id is no longer there: the error says version, not object."""
    name = f"bucket-{next(_numbers)}"
    moto.make_bucket(name, versioned=True)
    moto.put(name, "a", b"first")
    with closing(opened(moto, f"s3://{name}")) as source:
        info = listed(source, versions=True)["a"]
        moto.client.delete_object(Bucket=name, Key="a", VersionId=info.version.version_id)
        with pytest.raises((VersionChanged, NotFound)):
            whole(source, info)


def test_a_bucket_without_versions_is_read_by_tag(moto: S3Server, bucket: str) -> None:
    """A bucket that was never versioned is not; asking for it costs one request in all."""
    with closing(opened(moto, f"s3://{bucket}")) as source:
        assert not source.traits.versioned
        assert source.traits.conditional
        assert source.traits.md5_etag


def test_archived_objects_are_known_as_such(moto: S3Server, bucket: str) -> None:
    """Glacier's objects are marked in listing and stat."""
    moto.put(bucket, "cold", b"x", StorageClass="GLACIER")
    moto.put(bucket, "cool", b"x", StorageClass="GLACIER_IR")
    with closing(opened(moto, f"s3://{bucket}")) as source:
        assert {key: info.archived for key, info in listed(source).items()} == {"cold": True, "cool": False}
        assert source.stat("cold").archived
        assert not source.stat("cool").archived


def test_what_is_not_there_is_not_found(moto: S3Server, bucket: str) -> None:
    """A bucket that does not exist is NotFound in listing, stat and read, with a hint."""
    with closing(opened(moto, "s3://no-such-bucket")) as source:
        with pytest.raises(NotFound, match="check the bucket's name"):
            listed(source)
        with pytest.raises(NotFound, match="check the bucket's name"):
            source.read(ObjectInfo("a", 1, Version('"x"')), ByteRange(0, 1))
        with pytest.raises(NotFound):
            source.stat("a")


def test_a_public_bucket_needs_no_credentials(moto: S3Server, bucket: str) -> None:
    """anonymous=true signs nothing; what is not public is denied then."""
    moto.put(bucket, "public", b"x", ACL="public-read")
    moto.put(bucket, "private", b"x")
    with closing(opened(moto, f"s3://{bucket}", anonymous="true")) as source:
        assert whole(source, ObjectInfo("public", 1, Version())) == b"x"
        with pytest.raises(Denied):
            whole(source, ObjectInfo("private", 1, Version()))


@pytest.mark.server
def test_a_wrong_secret_is_denied(versitygw: S3Server) -> None:
    """A real server checks signatures, of both clients, and the error says what is wrong."""
    name = f"bucket-{next(_numbers)}"
    versitygw.make_bucket(name)
    versitygw.put(name, "a", b"x")
    wrong = S3Server(versitygw.endpoint, {**versitygw.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})
    with closing(opened(wrong, f"s3://{name}")) as source:
        with pytest.raises(Denied, match="SignatureDoesNotMatch"):
            listed(source)
        with pytest.raises(Denied, match="does not fit the access key"):
            whole(source, ObjectInfo("a", 1, Version()))


@pytest.mark.server
def test_a_rotated_key_file_is_noticed_by_the_refusal(versitygw: S3Server, tmp_path: Path) -> None:
    """Keys that the store refuses are looked up again at once, so a rotation fails no read."""
    name = f"bucket-{next(_numbers)}"
    versitygw.make_bucket(name)
    versitygw.put(name, "a", b"x")
    keys = tmp_path / "keys"

    def write(secret: str) -> None:
        access = versitygw.environment["AWS_ACCESS_KEY_ID"]
        keys.write_text(f"[default]\naws_access_key_id={access}\naws_secret_access_key={secret}\n")

    write("wrong")
    with closing(opened(versitygw, f"s3://{name}", credentials=str(keys))) as source:
        with pytest.raises(Denied):
            whole(source, ObjectInfo("a", 1, Version()))
        write(versitygw.environment["AWS_SECRET_ACCESS_KEY"])
        assert whole(source, ObjectInfo("a", 1, Version())) == b"x"
        assert set(listed(source)) == {"a"}


@pytest.mark.server
def test_large_objects_in_ranges(versitygw: S3Server) -> None:
    """Ranges of a large object, by a real server, are its bytes."""
    name = f"bucket-{next(_numbers)}"
    versitygw.make_bucket(name)
    body = bytes(i * 31 % 251 for i in range(3 << 20))
    versitygw.put(name, "large", body)
    with closing(opened(versitygw, f"s3://{name}")) as source:
        info = listed(source)["large"]
        assert whole(source, info) == body
        assert bytes(source.read(info, ByteRange(1 << 20, 2 << 20))) == body[1 << 20 : 2 << 20]
        versitygw.put(name, "large", body[::-1])
        with pytest.raises(VersionChanged):
            source.read(info, ByteRange(5, 10))


def test_what_open_source_makes_reads_through_all_layers(moto: S3Server, bucket: str) -> None:
    """Steady, checked, S3: one stack, with the digest compared."""
    moto.put(bucket, "a", b"data")
    mount = MountPoint(f"s3://{bucket}", options={"endpoint": moto.endpoint})
    source = open_source(mount, settings=SETTINGS, environment=moto.environment, clock=SystemClock())
    with closing(source):
        assert whole(source, listed(source)["a"]) == b"data"


def test_a_store_that_is_away_is_unavailable() -> None:
    """Nobody listens: both clients say so, with the address."""
    with closing(opened(S3Server("http://127.0.0.1:9"), "s3://bucket")) as source:
        for act in (lambda: listed(source), lambda: source.stat("a")):
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
                act()
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
            whole(source, ObjectInfo("a", 1, Version()))
