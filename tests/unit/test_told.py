"""What people are told of what was written: by `status`, `flush`, `recover` and `umount`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from datacache.cli import flush, umount
from datacache.cli.main import main
from datacache.cli.status import describe
from datacache.cli.worker import _drain
from datacache.clock import VirtualClock
from datacache.cluster.registry import Registration
from datacache.config.parsing import read_settings
from datacache.errors import LandingFull, MountError
from datacache.worker import Worker
from datacache.writing import steps
from tests.conftest import AnnouncedLogs

AWAY = "s3://b/p: s3://b/p cannot be had right now (refused)"
UPLOADS: dict[str, Any] = {
    "pending": 4, "oldest": 200.0, "refused": 1, "away": [AWAY], "unverified": 2,
    "running": [{"mount": 0, "key": "big", "what": "put", "sent": 1 << 20, "size": 3 << 20, "seconds": 3.0}],
    "failing": [
        {"mount": 0, "key": "a", "what": "put", "why": "s3://b/p/a cannot be had right now (refused)"},
        {"mount": 0, "key": "b", "what": "put", "why": "s3://b/p/b is forbidden"},
        {"mount": 0, "key": "c", "what": "put", "why": "s3://b/p/c is forbidden"},
    ],
    "failing_count": 3, "uploads": 1, "bytes": 1 << 30, "copies": 2, "deletes": 1, "failures": 7,
    "conflicts": 1,
}  # fmt: skip
WRITING: dict[str, Any] = {
    "landing": "/nvme/landing", "landing_total_bytes": 100 << 30, "landing_free_bytes": 10 << 30,
    "dirty_files": 3, "dirty_bytes": 5 << 20, "dirty_open": 1, "dirty_due": 4, "dirty_conflicts": 1,
    "dirty_unnoted": 0, "short_of_room": True, "parked": ["'d': somebody else has changed it"],
    "uploads": UPLOADS,
}  # fmt: skip


def told(writing: Mapping[str, Any]) -> list[str]:
    return describe({"dataset": "images", "mount": "/mnt", "pid": 7, "writing": writing})[2:]


def test_status_says_what_is_not_in_the_bucket_and_why() -> None:
    """`status` shows dirty files, bytes, age of the oldest, the last error of each."""
    assert told(WRITING) == [
        "  written: 3 files (5.0 MiB) not in the bucket yet, 1 open for writing, 1 closed, but somebody can "
        "write to them still, 4 operations due, the oldest for 3m20s",
        "    under way: upload of big (1.0 MiB of 3.0 MiB, 3s)",
        f"    does not get through: {AWAY}",
        "    failing: 2 uploads, of 'b' first: s3://b/p is forbidden",
        "    waits for a person: 'd': somebody else has changed it",
        "    landing zone: /nvme/landing, room for 10.0 GiB of 100.0 GiB; short of room, so uploads wait for "
        "no delay",
        "    since it started: 1 upload (1.0 GiB), 2 copies, 1 delete, 7 failed attempts, 1 conflict, "
        "2 of which only the size was compared",
    ]


def mounted(tmp_path: Path, **more: object) -> Worker:
    (tmp_path / "bucket").mkdir()
    given = {
        "uri": [f"file://{tmp_path}/bucket"], "rw": True, "state": f"{tmp_path}/state",
        "cache": [f"ssd:{tmp_path}/cache=1MiB"], **more,
    }  # fmt: skip
    return Worker(read_settings(given, config_file=None, environment={}))


def test_a_landing_zone_in_use_is_a_state_and_no_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, in one line: what it is, who uses it, and what to do."""
    landing = tmp_path / "landing"
    with mounted(tmp_path, landing=str(landing)):
        code = main(["recover", str(landing)])
    used = f"landing zone {landing} is in use by process {os.getpid()}"
    expected = f"datacache: error: {used}; wait until that has ended, or take another one\n"
    assert (code, capsys.readouterr().err) == (1, expected)


def test_status_of_a_mount_that_has_nothing_to_say(tmp_path: Path) -> None:
    """The worker's own figures are those that are shown."""
    with mounted(tmp_path) as worker:
        lines = [line for line in describe(worker.status()) if "written" in line or "since it" in line]
    assert lines == [
        "  written: all of it is in the bucket",
        "    since it started: 0 uploads (0 B), 0 copies, 0 deletes, 0 failed attempts, 0 conflicts",
    ]


def test_a_flush_counts_closes_that_could_not_be_noted(tmp_path: Path, logs: AnnouncedLogs) -> None:
    """It is not clean before they are, and says why."""
    logs.expect("a close cannot be noted")
    with mounted(tmp_path) as worker:
        assert worker.writing is not None
        overlay = worker.writing.overlay
        ino = overlay.create(worker.index.resolve("/").ino, b"a", mode=0o644, uid=0, gid=0).ino
        file = overlay.open(ino, writing=True)

        def full(name: str) -> None:
            if name == "journal.before.close":
                raise LandingFull("no room")

        steps.arm(full)
        try:
            overlay.closed(ino, file)
            answer = worker.flush("/", timeout=0)
            assert not answer["clean"]
            assert answer["errors"] == [
                "1 file was closed, which cannot be noted: the landing zone has no room for its journal"
            ]
            assert "1 closed, which cannot be noted" in "\n".join(describe(worker.status()))
        finally:
            steps.arm(None)
        assert worker.flush("/", timeout=30)["clean"]
    assert (tmp_path / "bucket/a").exists()


class Slow:
    """A worker whose answers to `flush` are `answers`, a second each."""

    def __init__(self, clock: VirtualClock, *answers: dict[str, Any]) -> None:
        self.clock, self.answers = clock, list(answers)

    def status(self) -> dict[str, Any]:
        return {"writing": WRITING}

    def flush(self, path: str, *, timeout: float) -> dict[str, Any]:
        self.clock.advance(1)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


BUSY = {
    "clean": False,
    "pending": 12,
    "open": 0,
    "bytes": 1 << 20,
    "errors": ["upload of 'a': under way", AWAY],
    "stuck": False,
}
CLEAN = {"clean": True, "pending": 0, "open": 0, "bytes": 0, "errors": [], "stuck": False}
PARKED = BUSY | {"pending": 1, "stuck": True, "errors": ["'d': somebody else has changed it"]}


def test_who_waits_is_told_for_what(capfd: pytest.CaptureFixture[str], clock: VirtualClock) -> None:
    """After two seconds, and then when there is something new, or after a minute; of a mere wait there is no
    reason to be said."""
    control: Any = Slow(clock, *[BUSY] * 64, *[BUSY | {"pending": 11}] * 8, CLEAN)
    assert flush.wait(control, "/", timeout=float("inf"), clock=clock)["clean"]
    line = f"12 operations (1.0 MiB) to go: {AWAY}"
    assert capfd.readouterr().err.splitlines() == [line, line, line.replace("12", "11")]


def test_who_waits_for_a_person_waits_no_longer(clock: VirtualClock) -> None:
    control: Any = Slow(clock, BUSY, PARKED)
    assert flush.wait(control, "/", timeout=float("inf"), clock=clock) == PARKED


def test_who_interrupts_it_is_told_what_is_left(
    capfd: pytest.CaptureFixture[str], clock: VirtualClock
) -> None:
    class Interrupted(Slow):
        def flush(self, path: str, *, timeout: float) -> dict[str, Any]:
            if len(self.answers) == 1:
                raise KeyboardInterrupt
            return super().flush(path, timeout=timeout)

    control: Any = Interrupted(clock, BUSY, BUSY)
    with pytest.raises(KeyboardInterrupt):
        flush.wait(control, "/", timeout=float("inf"), clock=clock)
    assert capfd.readouterr().err == f"interrupted: 12 operations are not done yet: {AWAY}\n"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (CLEAN, "all that was closed is in the bucket"),
        (CLEAN | {"open": 1}, "all that was closed is in the bucket; 1 file is open for writing"),
        (CLEAN | {"open": 2}, "all that was closed is in the bucket; 2 files are open for writing"),
        (BUSY, f"12 operations are not done yet: {AWAY}"),
        (BUSY | {"pending": 1, "errors": []}, "1 operation is not done yet"),
        (
            PARKED,
            "1 operation waits for a person: 'd': somebody else has changed it; `mv` the file to another "
            "name, remove it, or mount with another --conflict (docs/writing.md)",
        ),
    ],
)
def test_what_came_of_a_flush(answer: dict[str, Any], line: str) -> None:
    assert flush.said(answer) == line


REGISTRATION = Registration(pid=1, mount="/mnt", dataset="images", socket="", caches=[], started=0.0)


def test_umount_refuses_while_something_is_not_in_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """`umount` refuses or waits (`--drain`) while dirty, and says so."""
    answers(monkeypatch, CLEAN)
    with pytest.raises(
        MountError, match=r"/mnt: 3 files \(5.0 MiB\) not in the bucket yet, 1 open for writing, 4 operations"
    ):
        umount._settle(REGISTRATION, "/mnt", drain=False)
    umount._settle(REGISTRATION, "/mnt", drain=True)


def test_a_drain_says_that_files_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot wait for who writes: that may take all day."""
    answers(monkeypatch, CLEAN | {"open": 1})
    with pytest.raises(MountError, match="/mnt: 1 file open for writing, so not in the bucket"):
        umount._settle(REGISTRATION, "/mnt", drain=True)


def test_a_drain_ends_where_only_a_person_can_help(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, PARKED)
    with pytest.raises(MountError, match=r"1 operation waits for a person: 'd': .*--leave unmounts"):
        umount._settle(REGISTRATION, "/mnt", drain=True)


def test_who_leaves_it_is_told_what_stays_where(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, CLEAN)
    said = umount._left(REGISTRATION)
    assert "3 files (5.0 MiB) not in the bucket yet" in said
    assert "it stays in /nvme/landing" in said
    assert "`datacache recover /nvme/landing`" in said


def test_a_flush_tells_of_what_waits_for_a_person(tmp_path: Path, logs: AnnouncedLogs) -> None:
    """Also of what waits for that: a rename of it. Somebody else has changed the object."""
    logs.expect("ours is not uploaded (conflict: fail)")
    logs.expect("so it is not deleted")
    with mounted(tmp_path, conflict="fail") as worker:
        assert worker.writing is not None
        bucket, overlay = tmp_path / "bucket", worker.writing.overlay
        root = worker.index.resolve("/").ino
        ino = overlay.create(root, b"a", mode=0o644, uid=0, gid=0).ino
        file = overlay.open(ino, writing=True)
        (bucket / "a").write_bytes(b"theirs")
        overlay.closed(ino, file)
        answer = worker.flush("/", timeout=10)
        while not answer["stuck"]:
            answer = worker.flush("/", timeout=10)
        assert (answer["clean"], answer["pending"]) == (False, 1)
        assert worker.stat("/a").dirty
        overlay.rename(root, b"a", root, b"b", replace=False)
        answer = worker.flush("/", timeout=30)
        assert (answer["clean"], answer["stuck"]) == (True, False)
        assert not worker.stat("/b").dirty
    assert (bucket / "a").read_bytes() == b"theirs"
    assert (bucket / "b").exists()


def answers(monkeypatch: pytest.MonkeyPatch, *those: dict[str, Any]) -> None:
    from datacache.cli import targets

    control = Slow(VirtualClock(), *those)
    monkeypatch.setattr(targets.Place, "control", lambda self, timeout: control)


def test_a_worker_that_is_told_to_end_waits_for_no_person(logs: AnnouncedLogs) -> None:
    logs.expect("not drained: 0 load jobs run, 1 operations (4 bytes) wait for the next worker")

    class Stuck:
        asked = 0

        def drain(self, *, timeout: float) -> dict[str, Any]:
            self.asked += 1
            return {"drained": False, "loads": 0, "pending": 1, "bytes": 4, "open": 0, "stuck": True}

    worker: Any = Stuck()
    _drain(worker, 1e6, lambda seconds: False)
    assert worker.asked == 1
