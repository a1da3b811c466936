"""
What every `RemoteControl` does, and every `Control` beyond it. Run on a worker itself, on a client at the
other end of its socket, and (the first) on one that asks over TCP.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from datacache.cluster.control import CachedPath, Control, RemoteControl
from datacache.errors import ControlError, NoSuchPath, NotADirectory, SettingError
from datacache.reading.job import LoadRequest, LoadStatus

FILES = {
    "a.bin": b"a" * 5000,
    "empty": b"",
    "sub/b.bin": b"b" * 70_000,
    "sub/deep/c.bin": b"c" * 10,
    "subway": b"d" * 100,
    "other/sp ace%": b"e" * 200,
}
"""What the bucket of the suite holds."""
SIZE = sum(map(len, FILES.values()))


class RemoteStage(Protocol):
    """A bucket of `FILES`, a cache of one SSD tier, and a control of both."""

    @property
    def control(self) -> RemoteControl: ...

    cached: Callable[[str], dict[str, int]]
    """What is cached of a path."""
    bucket: Path
    tier: str
    """Name of the tier."""
    ended: Callable[[str], LoadStatus]
    """Wait for a load job to end."""


class Stage(RemoteStage, Protocol):
    """... and all of its control."""

    @property
    def control(self) -> Control: ...


class RemoteSuite:
    """Subclasses have a fixture `stage`."""

    def test_a_load_fills_the_cache(self, stage: RemoteStage) -> None:
        """A load is started, looked at while and after it runs, and its files are cached whole."""
        job = stage.control.load(LoadRequest())
        done = stage.ended(job)
        assert stage.control.load_status(job) == done
        assert (done.state, done.files_done, done.bytes_fetched) == ("done", len(FILES), SIZE)
        assert stage.cached("/sub/b.bin") == {stage.tier: 70_000}

    def test_a_load_of_some_files(self, stage: RemoteStage) -> None:
        """All fields of a request arrive: selections, limits, tier."""
        files = ("/a.bin", "/subway")
        request = LoadRequest(files=files, tier="ssd", concurrency=2, bandwidth=10**9, verify=True)
        assert stage.ended(stage.control.load(request)).files_done == 2
        by_glob = LoadRequest(path="/sub", globs=("**/*.bin",))
        assert stage.ended(stage.control.load(by_glob)).files_done == 2
        assert stage.cached("/other/sp ace%") == {}

    def test_failures_of_a_load_have_reasons(self, stage: RemoteStage) -> None:
        """What could not be loaded is named, with its reason."""
        done = stage.ended(stage.control.load(LoadRequest(files=("/a.bin", "/nowhere"))))
        assert (done.state, done.files_failed) == ("failed", 1)
        ((path, reason),) = done.failures
        assert path == "/nowhere"
        assert "nowhere" in reason

    def test_a_load_that_cannot_be(self, stage: RemoteStage) -> None:
        """What is wrong with a request is said at once, with the error's own fields."""
        with pytest.raises(SettingError, match="tape") as caught:
            stage.control.load(LoadRequest(tier="tape"))
        assert caught.value.value == "tape"
        with pytest.raises(ControlError):
            stage.control.load_status("load-77")
        with pytest.raises(ControlError):
            stage.control.load_cancel("load-77")

    def test_a_cancelled_load(self, stage: RemoteStage) -> None:
        """A job that is asked to stop does; asking again, or after the end, is no error."""
        job = stage.control.load(LoadRequest(bandwidth=1))
        stage.control.load_cancel(job)
        assert stage.ended(job).state == "cancelled"
        stage.control.load_cancel(job)

    def test_status(self, stage: RemoteStage) -> None:
        """Status is JSON, and its figures are of what happened."""
        job = stage.control.load(LoadRequest())
        stage.ended(job)
        status = stage.control.status()
        assert json.loads(json.dumps(status)) == status
        assert status["index"]["files"] == len(FILES)
        (tier,) = status["tiers"]
        assert (tier["name"], tier["state"], tier["entries"]) == (stage.tier, "ok", len(FILES) - 1)
        (source,) = status["sources"]
        assert (source["uri"], source["breaker"]) == (f"file://{stage.bucket}", "closed")
        assert status["reads"]["bytes_fetched"] == SIZE
        assert [known["id"] for known in status["loads"]] == [job]
        assert status["rss_bytes"] > 1 << 20

    def test_a_worker_that_drains(self, stage: RemoteStage) -> None:
        """It is ready until it drains; then jobs end, none is started, and it answers all the same."""
        assert stage.control.ready() == ""
        assert stage.control.status()["draining"] is False
        job = stage.control.load(LoadRequest(bandwidth=1))
        done = stage.control.drain(timeout=10)
        nothing = {"loads": 0, "pending": 0, "open": 0, "bytes": 0, "errors": [], "stuck": False}
        assert done == {"drained": True, **nothing}
        assert stage.control.load_status(job).state == "cancelled"
        assert stage.control.ready() == "the worker drains"
        assert stage.control.status()["draining"] is True
        with pytest.raises(ControlError, match="drains"):
            stage.control.load(LoadRequest())
        assert stage.control.drain(timeout=0) == done


class ControlSuite(RemoteSuite):
    """... and what only a `Control` does."""

    def test_listing_a_directory(self, stage: Stage) -> None:
        """A directory is listed in pages, each entry once, with what is cached of it."""
        stage.ended(stage.control.load(LoadRequest(path="/a.bin")))
        pages, after = [], 0
        while True:
            page, after = stage.control.list("/", after=after, limit=2)
            pages.append(page)
            if not after:
                break
        found = {entry.path: entry for page in pages for entry in page}
        assert max(map(len, pages)) == 2
        assert sum(map(len, pages)) == len(found)
        assert set(found) == {"/a.bin", "/empty", "/sub", "/subway", "/other"}
        assert {path for path, entry in found.items() if entry.kind == "directory"} == {"/sub", "/other"}
        assert found["/a.bin"].cached == {stage.tier: 5000}
        assert found["/subway"].cached == {}
        assert stage.control.list("/sub/")[0][0].path.startswith("/sub/")

    def test_listing_a_file(self, stage: Stage) -> None:
        """A file is its own listing."""
        (only,), after = stage.control.list("/a.bin")
        assert (only, after) == (stage.control.stat("/a.bin"), 0)

    def test_one_path(self, stage: Stage) -> None:
        """`stat` says size, version, URI and what is cached."""
        assert stage.control.stat("/") == CachedPath("/", "directory", 0)
        found = stage.control.stat("/sub/deep/c.bin")
        assert (found.path, found.kind, found.size, found.cached) == ("/sub/deep/c.bin", "file", 10, {})
        assert found.uri == f"file://{stage.bucket}/sub/deep/c.bin"
        assert found.version
        assert found.mtime_ns == (stage.bucket / "sub/deep/c.bin").stat().st_mtime_ns
        with pytest.raises(NoSuchPath, match="nowhere"):
            stage.control.stat("/nowhere")
        with pytest.raises(NotADirectory):
            stage.control.stat("/a.bin/x")

    def test_names_that_are_no_text(self, stage: Stage) -> None:
        """Bytes that are not UTF-8 go through as they are."""
        odd = "odd/\udcff\udcfe.bin"
        (stage.bucket / "odd").mkdir()
        (stage.bucket / odd).write_bytes(b"x")
        assert stage.control.stat("/" + odd).size == 1
        assert [entry.path for entry in stage.control.list("/odd")[0]] == ["/" + odd]
        assert stage.ended(stage.control.load(LoadRequest(files=("/" + odd,)))).files_done == 1

    def test_eviction(self, stage: Stage) -> None:
        """Copies below a path are dropped, no others, and a dry run says the same and drops none."""
        stage.ended(stage.control.load(LoadRequest()))
        assert stage.control.evict("/sub", dry_run=True) == (2, 70_010)
        assert stage.control.stat("/sub/b.bin").cached
        assert stage.control.evict("/sub") == (2, 70_010)
        assert stage.control.evict("/sub") == (0, 0)
        assert not stage.control.stat("/sub/b.bin").cached
        assert stage.control.stat("/subway").cached, "/subway is not below /sub"
        assert stage.control.evict("/a.bin") == (1, 5000)
        files, size = stage.control.evict("/")
        assert size == SIZE - 70_010 - 5000
        assert files >= 2
        with pytest.raises(NoSuchPath):
            stage.control.evict("/nowhere")

    def test_eviction_lists_nothing(self, stage: Stage) -> None:
        """What was never listed is not listed in order to be evicted."""
        stage.control.stat("/sub")
        before = stage.control.status()["index"]["listings"]
        stage.control.evict("/sub")
        stage.control.pin("/other", True)
        assert stage.control.status()["index"]["listings"] == before

    def test_what_the_bucket_no_longer_has_can_be_evicted(self, stage: Stage) -> None:
        """Copies of files that are gone from the bucket are found below their directory."""
        stage.ended(stage.control.load(LoadRequest(path="/sub")))
        (stage.bucket / "sub/b.bin").unlink()
        assert stage.control.evict("/sub") == (2, 70_010)

    def test_pins(self, stage: Stage) -> None:
        """Copies are pinned and let go again by path; eviction by hand drops pinned ones too."""
        assert stage.control.pin("/sub", True) == 0, "nothing is cached yet"
        stage.ended(stage.control.load(LoadRequest()))
        assert not stage.control.stat("/sub/b.bin").pinned
        assert stage.control.pin("/sub", True) == 2
        assert stage.control.stat("/sub/b.bin").pinned
        assert not stage.control.stat("/a.bin").pinned
        assert stage.control.pin("/sub/b.bin", False) == 1
        assert not stage.control.stat("/sub/b.bin").pinned
        assert stage.control.stat("/sub/deep/c.bin").pinned
        stage.control.evict("/sub")
        assert not stage.control.stat("/sub/deep/c.bin").pinned

    def test_a_lease(self, stage: Stage) -> None:
        """A tier is let have less than its quota, and says so; never more, and of no tier that there is
        not."""
        quota = stage.control.status()["tiers"][0]["quota"]
        assert stage.control.lease(stage.tier, 1 << 20, entries=7, ttl=60) == (1 << 20, 7)
        (tier,) = stage.control.status()["tiers"]
        assert (tier["quota"], tier["lease"], tier["lease_entries"]) == (quota, 1 << 20, 7)
        assert stage.control.lease(stage.tier, 1 << 50, ttl=60) == (quota, 0)
        with pytest.raises(SettingError, match="tape"):
            stage.control.lease("tape", 0, ttl=60)

    def test_verify(self, stage: Stage) -> None:
        """Every block is held against its checksum."""
        stage.ended(stage.control.load(LoadRequest()))
        found = stage.control.verify()
        assert (found["damaged"], found["orphans"], found["problems"]) == (0, 0, 0)
        assert found["blocks"] >= 4
        assert found["bytes"] == SIZE
