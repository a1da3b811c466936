"""gs:// as a source. Google's XML API lists and reads as S3 does, so moto can play it."""

import itertools
import json
from collections.abc import Iterator
from contextlib import closing

import pytest

from datacache.clock import SystemClock
from datacache.config.settings import SourceSettings
from datacache.errors import Denied, NotFound
from datacache.model import MountPoint
from datacache.sources.opening import open_raw
from datacache.sources.source import Source
from tests.contract.source_suite import Made, SourceSuite, keys, prefixes
from tests.support.s3 import S3Server

_numbers = itertools.count(1)


def opened(server: S3Server, uri: str, **options: str) -> Source:
    mount = MountPoint(uri, options={"endpoint": server.endpoint, "anonymous": "true", **options})
    return open_raw(mount, settings=SourceSettings(), environment={}, clock=SystemClock())


def made_of(server: S3Server) -> Made:
    name = f"google{next(_numbers)}"  # no hyphen: obstore encodes it, and moto does not decode it
    server.make_bucket(name)
    server.client.put_bucket_acl(Bucket=name, ACL="public-read")
    everybody = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": f"arn:aws:s3:::{name}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everybody]})
    server.client.put_bucket_policy(Bucket=name, Policy=policy)
    return Made(
        opened(server, f"gs://{name}/root"),
        lambda key, data: server.put_fast(name, f"root/{key}", data),
        lambda key: server.delete(name, f"root/{key}"),
        odd_keys=False,
        byte_keys=False,
    )


@pytest.fixture
def made(moto: S3Server) -> Iterator[Made]:
    made = made_of(moto)
    with closing(made.source):
        yield made


class TestGoogle(SourceSuite):
    """The contract through obstore alone."""

    @pytest.fixture
    def made(self, moto: S3Server) -> Iterator[Made]:
        made = made_of(moto)
        with closing(made.source):
            yield made


def test_markers_of_directories_with_objects_are_dropped(made: Made) -> None:
    """A marker `dir/` comes as an empty object `dir`, which is not shown beside the directory; an
    empty object that is none is."""
    for key in ("dir/", "dir/x", "empty", "other/", "z"):
        made.put(key, b"" if key in ("dir/", "empty", "other/") else b"x")
    assert keys(made) == ["dir/x", "empty", "other", "z"]
    assert keys(made, recursive=False) == ["empty", "z"]
    assert prefixes(made) == ["dir/", "other/"]


def test_refusals_are_our_errors(moto: S3Server) -> None:
    """A bucket that is not there, and one that is not public."""
    with closing(opened(moto, "gs://no-such-bucket")) as source, pytest.raises(NotFound):
        list(source.list("", recursive=True))
    moto.make_bucket("private")
    moto.put("private", "a", b"x")
    with closing(opened(moto, "gs://private")) as source, pytest.raises(Denied):
        source.stat("a")
