"""
A mount outlives its daemon: killed, upgraded, given up; and what is left when it ends.

All on the native driver, which has a broker.
"""

import contextlib
import errno
import json
import os
import random
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from datacache.cluster import registry
from datacache.config.parsing import dump_settings
from datacache.config.settings import (
    IO,
    CacheSettings,
    Consistency,
    Fill,
    IndexSettings,
    MountSettings,
    ReadingSettings,
    Settings,
    TierSettings,
)
from datacache.errors import MountError
from datacache.model import Dataset, Medium, MiB, MountPoint
from fuse import broker, mountpoint
from fuse.broker import TRIES, YOUNG
from tests.daemon.mounted import reading_on
from tests.daemon.mounted.conftest import STOP, UNCOVERED, Daemon, Start
from tests.support.faulty_s3 import Before, FaultyS3, Stall

PATIENCE = 60.0
"""Seconds for whatever must come, on a machine that is busy with other things."""

IMMUTABLE = IndexSettings(consistency=Consistency.IMMUTABLE)
EAGER = IndexSettings(ttl=0)
SHORT = IndexSettings(ttl=0.5)
RANGES = ReadingSettings(fill=Fill.RANGE, readahead=0)
"""What is read at random of a large file is not whole for long."""


@pytest.fixture
def driver() -> str:
    """Only the native one has a broker."""
    if not mountpoint.is_native("auto"):
        pytest.skip("this kernel is older than Linux 6.9, where the native driver begins")
    return "native"


@pytest.fixture
def filled(bucket: Path) -> Path:
    """A bucket of small files, a large one, one too large to become whole, and a directory of many."""
    fill(bucket)
    return bucket


def fill(bucket: Path) -> None:
    rng = random.Random(5)
    for number in range(8):
        (bucket / f"small{number}").write_bytes(rng.randbytes(200_000 + number))
    (bucket / "large").write_bytes(rng.randbytes(9 * MiB + 17))
    piece = rng.randbytes(1 * MiB)
    with open(bucket / "huge", "wb") as file:
        for number in range(96):
            file.write(piece[number * 999 :] + piece[: number * 999])
    (bucket / "many").mkdir()
    for number in range(3000):
        (bucket / "many" / f"{number:05}").write_bytes(b"%d" % number)


def put(path: Path, data: bytes) -> None:
    """Replace an object as stores do: whole, and never changed in place."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.rename(new, path)


def daemons(one: Daemon) -> list[int]:
    """The processes behind the broker of `one`."""
    assert one.process is not None
    pid = one.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def ends(pid: int) -> Iterator[None]:
    """The process has ended when this block has."""
    descriptor = os.pidfd_open(pid)
    try:
        yield
        assert select.select([descriptor], [], [], PATIENCE)[0], f"process {pid} does not end"
    finally:
        os.close(descriptor)


def served_by(one: Daemon) -> int:
    """The daemon that serves, once one does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(Exception):  # none yet, or one that is dying
            return int(one.status()["pid"])
        assert time.monotonic() < deadline, f"no daemon serves:\n{one.log.read_text()}"
        time.sleep(0.01)


def kill(one: Daemon) -> int:
    """kill -9 of the daemon; the pid of its successor, which serves."""
    (old,) = daemons(one)
    with ends(old):
        os.kill(old, signal.SIGKILL)
    while (new := served_by(one)) == old:
        pass
    return new


def nothing_left(one: Daemon) -> bool:
    """Neither mounted, nor registered, nor a socket of it."""
    runtime = Path(one.settings.runtime)
    return mountpoint.is_mounted(str(one.directory)) is None and not (
        runtime.exists() and list(runtime.iterdir())
    )


# ---- readers ------------------------------------------------------------------------------------


class Load:
    """Reader processes, each verifying what it reads."""

    def __init__(self, one: Daemon, *, readers: int = 3) -> None:
        self._readers = [
            subprocess.Popen(
                [
                    *one.via, one.python, "-m", reading_on.__name__,
                    str(one.directory), str(one.bucket), str(seed),
                ],
                cwd=Path(__file__).parents[3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for seed in range(readers)
        ]  # fmt: skip

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in self._readers:
            if any(exc):
                reader.kill()
            reader.communicate(timeout=PATIENCE)

    def tell(self, command: str, readers: Sequence[int] = ()) -> list[dict[str, Any]]:
        """What readers answer to a command: all of them, where none are named."""
        chosen = [self._readers[which] for which in readers] or self._readers
        for reader in chosen:
            assert reader.stdin is not None
            reader.stdin.write(f"{command}\n")
            reader.stdin.flush()
        answers = []
        for reader in chosen:
            assert reader.stdout is not None
            assert select.select([reader.stdout], [], [], PATIENCE)[0], "a reader hangs"
            answers.append(json.loads(reader.stdout.readline()))
        return answers

    def worst(self) -> float:
        """Seconds of the longest operation since this was asked last. Nothing may have been wrong."""
        answers = self.tell("worst")
        assert [answer["errors"] for answer in answers] == [[]] * len(answers)
        return max(answer["worst"] for answer in answers)

    def go_on(self, operations: int) -> None:
        """Return when each reader has done so many more."""
        deadline = time.monotonic() + PATIENCE
        before = [answer["operations"] for answer in self.tell("report")]
        while any(
            answer["operations"] < done + operations
            for answer, done in zip(self.tell("report"), before, strict=True)
        ):
            assert time.monotonic() < deadline, "readers do not get on"


@dataclass
class Ranged:
    """Makes mounts on which a large file does not become whole by being read here and there."""

    start: Start

    def __call__(self, **options: Any) -> Daemon:
        one = self.start(start=False, **options)
        one.settings = replace(one.settings, reading=RANGES)
        one.start()
        assert one.answer.get("ok"), one.log.read_text()
        return one


@pytest.fixture
def ranged(daemon: Start) -> Ranged:
    return Ranged(daemon)


WAYS = [
    pytest.param(io, index, id=f"{io}-{index.consistency}")
    for io in (IO.PASSTHROUGH, IO.PAGECACHE, IO.SERVED)
    for index in (IMMUTABLE, SHORT)
]


@pytest.mark.parametrize(("io", "index"), WAYS)
def test_readers_do_not_notice_that_the_daemon_is_killed(
    ranged: Ranged, filled: Path, io: IO, index: IndexSettings
) -> None:
    """After `kill -9` of the daemon, whoever reads waits a moment and gets the right bytes. Files that are
    open, passed through, mapped or served, go on, and can be opened again.

    No ENOTCONN, no EIO, no wrong byte: not for what is held open in passthrough, mapped or served, not
    for what is opened again, not for a directory that is being read."""
    one = ranged(io=io, index=index)
    with Load(one) as load:
        load.tell("hold")
        for held_anew in ((0,), (1,)):
            load.go_on(30)
            kill(one)
            assert load.worst() < STOP
            load.tell("hold", held_anew)  # what the others hold is opened by another process
            load.go_on(30)
        load.worst()
    assert one.log.read_text().count("has taken over") == 2


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.PAGECACHE])
def test_a_hundred_kills(ranged: Ranged, filled: Path, io: IO, capfd: pytest.CaptureFixture[str]) -> None:
    """The same at random moments, with what one reader has held open since before the first of them. Not
    more than five in a row that young, or the mount would be given up."""
    one = ranged(io=io, index=SHORT)
    rng, stalls, old = random.Random(6), [], 0.0
    with Load(one) as load:
        load.tell("hold")
        for number in range(100):
            until = old + YOUNG if number % (TRIES - 1) == 0 else time.monotonic() + rng.uniform(0, 1)
            while time.monotonic() < until:
                load.go_on(1)
            load.worst()
            kill(one)
            load.go_on(5)
            stalls.append(load.worst())
            load.tell("hold", (number % 2,))
            old = time.monotonic()
        load.go_on(50)
        load.worst()
    stalls.sort()
    with capfd.disabled():
        sys.stdout.write(
            f"\n{io}: readers wait {stalls[50]:.2f} s after a kill in the median, {stalls[95]:.2f} s after "
            f"95 of 100, {stalls[-1]:.2f} s at most\n"
        )


SOAK = 300.0
"""Seconds of a soak, of which there are two."""


@pytest.mark.long
@pytest.mark.timeout(SOAK + 300)
@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.SERVED])
def test_fio_verifies_while_daemons_are_killed(ranged: Ranged, filled: Path, io: IO) -> None:
    """Another program's idea of correct bytes, by reads and by a mapping, for minutes, beside the readers of
    ours; a kill whenever the last daemon is no longer young."""
    if not shutil.which("fio"):
        pytest.skip("fio is not installed")
    job = ["fio", "--name=f", "--filename=fio", "--size=48m", "--bs=16k", "--verify=crc32c", "--randseed=7"]
    job += ["--minimal", "--thread", "--verify_fatal=1"]
    written = subprocess.run([*job, "--rw=write", "--do_verify=0"], cwd=filled, capture_output=True)
    assert written.returncode == 0, written.stderr
    one = ranged(io=io, index=SHORT)
    over = time.monotonic() + SOAK
    kills = runs = 0

    def verify() -> int:
        count = 0
        while time.monotonic() < over:
            for how in (["--rw=randread"], ["--rw=read"], ["--rw=randread", "--ioengine=mmap"]):
                done = subprocess.run([*job, *how], cwd=one.directory, capture_output=True)
                assert done.returncode == 0, done.stderr
                count += 1
        return count

    with ThreadPoolExecutor(1) as pool, Load(one, readers=2) as load:
        verifying = pool.submit(verify)
        load.tell("hold")
        while time.monotonic() < over:
            next_at = min(over, time.monotonic() + YOUNG + 1)
            while time.monotonic() < next_at and not verifying.done():
                load.go_on(5)
            kill(one)
            kills += 1
            load.worst()
            load.tell("hold", (kills % 2,))
        runs = verifying.result(PATIENCE)
        load.worst()
    assert runs >= 3
    assert one.log.read_text().count("has taken over") == kills


@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.SERVED])
def test_what_was_opened_before_a_kill_keeps_its_version(daemon: Start, bucket: Path, io: IO) -> None:
    """An open file keeps its version, whichever daemon answers for it: also when the object has another one
    meanwhile, and when it is gone from the bucket."""
    old = random.Random(1).randbytes(300_000)
    for name in ("renewed", "deleted"):
        (bucket / name).write_bytes(old)
    one = daemon(io=io, index=EAGER)
    with (
        open(one.directory / "renewed", "rb", 0) as renewed,
        open(one.directory / "deleted", "rb", 0) as gone,
    ):
        assert renewed.read(10) == gone.read(10) == old[:10]
        for name in ("renewed", "deleted"):
            one.wait_until_cached(name, len(old))
        put(bucket / "renewed", b"new")
        (bucket / "deleted").unlink()
        assert (one.directory / "renewed").read_bytes() == b"new"
        assert not (one.directory / "deleted").exists()
        for _ in range(2):
            kill(one)
            for file in (renewed, gone):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(file.fileno(), len(old), 0) == old
                assert os.fstat(file.fileno()).st_size == len(old)
            assert (one.directory / "renewed").read_bytes() == b"new"


def test_a_read_that_waits_for_the_store_is_answered_by_the_next_daemon(
    daemon: Start, tmp_path: Path
) -> None:
    """kill -9 in the middle of a read: the kernel sends it again, the reader gets its bytes."""
    data = random.Random(2).randbytes(6 * MiB)
    with FaultyS3({"slow": data}) as store:
        one = daemon(start=False)
        point = MountPoint("s3://bucket", options={"endpoint": store.endpoint, "style": "path"})
        keys = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example"}
        one.settings = replace(
            one.settings,
            dataset=Dataset("test", (point,)),
            environment=keys | {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"},
        )
        one.start()
        assert one.answer.get("ok"), one.answer
        asked = threading.Event()
        store.add("get", Before(asked.set), *[Stall()] * 3)
        with ThreadPoolExecutor(1) as pool, open(one.directory / "slow", "rb", 0) as file:
            store.add("get", *[Stall()] * 5)
            reading = pool.submit(os.pread, file.fileno(), 1000, 5 * MiB)
            assert asked.wait(PATIENCE)
            with store.lock:
                store._faults.clear()  # the store has recovered, the daemon that waits for it will not see
            kill(one)
            assert reading.result(PATIENCE) == data[5 * MiB : 5 * MiB + 1000]
        one.stop()


# ---- upgrades -----------------------------------------------------------------------------------


def upgrade(one: Daemon, settings: Settings | None = None) -> int:
    """Have another daemon, with `settings` or the same; its pid."""
    found = one.registered()
    assert found is not None
    return broker.ask_for_upgrade(found.socket, settings, timeout=PATIENCE)


def test_readers_do_not_notice_an_upgrade(ranged: Ranged, filled: Path) -> None:
    """With the same settings, and with others: memory, concurrency, a tier more, another TTL."""
    one = ranged(index=SHORT)
    before = one.settings
    other = replace(
        before,
        reading=replace(before.reading, memory=64 * MiB, concurrency=4),
        index=IndexSettings(ttl=5),
        cache=replace(
            before.cache,
            tiers=(*before.cache.tiers, TierSettings(Medium.SSD, f"{one.directory}-second", 64 * MiB)),
        ),
    )
    with Load(one) as load:
        load.tell("hold")
        load.go_on(20)
        for settings in (None, other):
            (old,) = daemons(one)
            new = upgrade(one, settings)
            assert [new] == daemons(one) != [old]
            assert load.worst() < STOP
            load.go_on(20)
        assert len(one.status()["tiers"]) == 2
        kill(one)
        assert len(one.status()["tiers"]) == 2, "what follows a dead daemon has the settings of the upgrade"
        load.go_on(20)
        load.worst()
    assert "upgraded" in one.log.read_text()


@pytest.mark.parametrize("asked", [{"settings": 5}, {"python": 5}, {"settings": "{}"}, 5, None], ids=str)
def test_whatever_is_asked_of_a_broker_the_mount_goes_on(daemon: Start, filled: Path, asked: Any) -> None:
    """What means nothing; and settings (None) of which only a newer release knows one: they are looked at."""
    one = daemon()
    served, found = daemons(one), one.registered()
    assert found is not None
    why = "it does not understand what is asked"
    if asked is None:
        other = replace(one.settings, dataset=replace(one.settings.dataset, name="other"))
        asked = {"settings": json.dumps({**json.loads(dump_settings(other)), "brand_new": 1})}
        why = "an upgrade cannot change name"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
        to.settimeout(PATIENCE)
        with broker._address(registry.broker_socket(found.socket)) as address:
            to.connect(address)
        to.sendall(json.dumps(asked).encode() + b"\n")
        with to.makefile() as answer:
            assert why in json.loads(answer.readline())["error"]
    assert daemons(one) == served
    assert (one.directory / "small0").read_bytes() == (filled / "small0").read_bytes()


@pytest.mark.parametrize(
    "name", ["io", "allow_other", "driver", "name", "mounts", "snapshot", "state", "runtime"]
)
def test_an_upgrade_that_cannot_be_is_refused_and_changes_nothing(
    daemon: Start, filled: Path, tmp_path: Path, name: str
) -> None:
    """What the kernel was told, and what is shown: one line names it, and the daemon stays."""
    one = daemon()
    now, dataset = one.settings, one.settings.dataset
    then = {
        "io": replace(now, mount=replace(now.mount, io=IO.SERVED)),
        "allow_other": replace(now, mount=replace(now.mount, allow_other=True)),
        "driver": replace(now, mount=replace(now.mount, driver="pyfuse3")),
        "name": replace(now, dataset=replace(dataset, name="other")),
        "mounts": replace(now, dataset=replace(dataset, mounts=(MountPoint(tmp_path.as_uri()),))),
        "snapshot": replace(now, index=replace(now.index, snapshot="one")),
        "state": replace(now, state=str(tmp_path / "state2")),
        "runtime": replace(now, runtime=str(tmp_path / "runtime2")),
    }[name]
    served = daemons(one)
    with pytest.raises(MountError, match=f"an upgrade cannot change {name}"):
        upgrade(one, then)
    assert daemons(one) == served
    assert (one.directory / "small0").read_bytes() == (filled / "small0").read_bytes()


@pytest.mark.parametrize("why", ["cache in use", "no such program"])
def test_when_the_new_daemon_cannot_start_the_settings_from_before_go_on(
    daemon: Start, filled: Path, tmp_path: Path, why: str
) -> None:
    """The asker is told why; a reader sees nothing, not even of a file that is open."""
    one = daemon()
    now = one.settings
    with contextlib.ExitStack() as meanwhile:
        if why == "cache in use":
            other = daemon(directory=tmp_path / "elsewhere", cache=tmp_path / "theirs", start=False)
            other.settings = replace(other.settings, state=str(tmp_path / "state2"))
            other.start()
            assert other.answer.get("ok"), other.answer
            tier = replace(now.cache.tiers[0], path=str(tmp_path / "theirs"))
            then, says = replace(now, cache=replace(now.cache, tiers=(tier,))), "in use by process"
        else:
            then, says = now, "is no program"
            meanwhile.enter_context(pytest.MonkeyPatch.context()).setattr(sys, "executable", "/no/python")
        with open(one.directory / "large", "rb", 0) as file:
            expected = (filled / "large").read_bytes()
            assert file.read(100) == expected[:100]
            with pytest.raises(MountError, match=says):
                upgrade(one, then)
            assert file.readall() == expected[100:]
    served_by(one)
    found = one.registered()
    assert found is not None
    assert found.caches == [tier.path for tier in now.cache.tiers]
    assert (one.directory / "small0").read_bytes() == (filled / "small0").read_bytes()


def test_of_two_upgrades_at_once_one_is_refused_or_both_come_in_turn(daemon: Start, filled: Path) -> None:
    """And one daemon serves at the end."""
    one = daemon()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(upgrade, one) for _ in range(2)]
        failures = [failure for failure in (each.exception(PATIENCE) for each in asked) if failure]
    assert len(failures) < 2
    assert all("another upgrade is under way" in str(failure) for failure in failures)
    assert len(daemons(one)) == 1
    assert (one.directory / "small0").read_bytes() == (filled / "small0").read_bytes()


# ---- given up -----------------------------------------------------------------------------------


def give_up(one: Daemon) -> None:
    """Kill one daemon after the other until no more are started."""
    deadline = time.monotonic() + PATIENCE
    while "given up" not in one.log.read_text():
        assert time.monotonic() < deadline
        for pid in daemons(one):
            with contextlib.suppress(ProcessLookupError), ends(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_daemon_that_keeps_dying_is_given_up_and_an_upgrade_revives_it(daemon: Start, filled: Path) -> None:
    """A daemon that keeps dying is given up, and then requests fail with EIO instead of hanging: what waits,
    and what is asked later; until an upgrade."""
    one = daemon(io=IO.SERVED)
    with ThreadPoolExecutor(1) as pool, open(one.directory / "large", "rb", 0) as file:
        (pid,) = daemons(one)
        os.kill(pid, signal.SIGSTOP)  # what is asked from now on waits
        waiting = pool.submit(os.pread, file.fileno(), 1000, 5 * MiB)
        give_up(one)
        assert isinstance(failed := waiting.exception(PATIENCE), OSError)
        assert failed.errno == errno.EIO
        with pytest.raises(OSError) as refused:
            os.listdir(one.directory)
        assert refused.value.errno == errno.EIO
        assert one.log.read_text().count("starting another") == TRIES - 1
        found = registry.live(one.settings.runtime)
        assert found, "an upgrade must find it"
        upgrade(one)
        assert os.pread(file.fileno(), 1000, 5 * MiB) == (filled / "large").read_bytes()[5 * MiB :][:1000]
    assert len(os.listdir(one.directory)) == 11
    kill(one)
    assert (one.directory / "small0").read_bytes() == (filled / "small0").read_bytes()


def test_a_mount_that_was_given_up_can_be_unmounted(daemon: Start, filled: Path) -> None:
    """And leaves nothing."""
    one = daemon()
    give_up(one)
    mountpoint.unmount(str(one.directory))
    assert one.wait() == 0
    assert nothing_left(one)


def test_an_index_that_was_taken_away_is_not_replaced_underneath_the_mount(
    daemon: Start, filled: Path
) -> None:
    """A successor with another index would answer for numbers that mean something else there: it refuses,
    and says what there is to do."""
    one = daemon()
    (one.directory / "small0").read_bytes()
    index = Path(one.settings.state) / "index.db"
    index.rename(f"{index}.away")
    (pid,) = daemons(one)
    with ends(pid):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while "given up" not in one.log.read_text():
        assert time.monotonic() < deadline
    with pytest.raises(OSError) as refused:
        os.listdir(one.directory)
    assert refused.value.errno == errno.EIO
    assert "is not what this mount was made with: there is none yet" in one.log.read_text()
    assert not index.exists()
    Path(f"{index}.away").rename(index)
    upgrade(one)
    assert (one.directory / "small0").read_bytes() == (filled / "small0").read_bytes()


def test_a_daemon_that_dies_before_it_served_leaves_nothing(daemon: Start) -> None:
    """One line, exit code 1, no mount."""
    one = daemon(start=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        manifest = f"http://127.0.0.1:{silent.getsockname()[1]}/list.jsonl"
        root = MountPoint(manifest.rpartition("/")[0])
        one.settings = replace(one.settings, dataset=Dataset("test", (root,), manifest=manifest))
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(one.start)
            connection, _ = silent.accept()  # the daemon is there, and waits for the manifest
            with connection:
                for pid in daemons(one):
                    os.kill(pid, signal.SIGKILL)
                starting.result(PATIENCE)
    assert one.wait() == 1
    assert "SIGKILL" in one.answer["error"]
    assert nothing_left(one)


# ---- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_a_daemon_whose_broker_was_killed_goes_on_and_is_found(daemon: Start, filled: Path, how: str) -> None:
    """The mount then ends with it: unmounted, or told to end; and nothing is left."""
    one = daemon()
    (pid,) = daemons(one)
    one.signal(signal.SIGKILL)
    one.wait()
    deadline = time.monotonic() + PATIENCE
    while (found := one.registered()) is None or found.pid != pid:
        assert time.monotonic() < deadline
    assert (one.directory / "large").read_bytes() == (filled / "large").read_bytes()
    with ends(pid):
        if how == "umount":
            mountpoint.unmount(str(one.directory))
        else:
            os.kill(pid, signal.SIGTERM)
    assert nothing_left(one)


def test_a_daemon_that_hangs_is_ended_with_its_mount(daemon: Start, filled: Path) -> None:
    """Stopped in the middle: by force what waits fails, and the broker kills it."""
    if os.geteuid() != 0:
        pytest.skip("only root can unmount by force")
    one = daemon(io=IO.SERVED)
    (pid,) = daemons(one)
    file = os.open(one.directory / "large", os.O_RDONLY)
    with ThreadPoolExecutor(1) as pool:
        os.kill(pid, signal.SIGSTOP)
        waiting = pool.submit(os.pread, file, 1000, 5 * MiB)
        with ends(pid):
            mountpoint.unmount(str(one.directory), force=True, lazy=True)
        assert isinstance(waiting.exception(PATIENCE), OSError)
    with contextlib.suppress(OSError):  # it says ENOTCONN too, and closes
        os.close(file)
    assert one.wait() == 0
    assert nothing_left(one)


def test_the_space_of_what_is_evicted_comes_back_after_a_kill(
    daemon: Start, filled: Path, tmp_path: Path
) -> None:
    """The kernel's hold on cached files that a dead daemon registered is taken back by the next one."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs, and pass through")
    tier = tmp_path / "tmpfs"
    tier.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tier), "-o", "size=200m"], check=True)

    def used() -> int:
        found = os.statvfs(tier)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    try:
        one = daemon(cache=tier / "cache")
        (one.directory / "large").read_bytes()
        one.wait_until_cached("large", 9 * MiB + 17)
        with open(one.directory / "large", "rb", 0) as file:
            assert one.status()["mount_files"]["open_passthrough"] == 1
            kill(one)
            assert file.read(10) == (filled / "large").read_bytes()[:10]
            assert used() > 9 * MiB
            one.control().evict("/large")
        one.requests()  # the close has arrived
        deadline = time.monotonic() + PATIENCE
        while used() > 2 * MiB:
            assert time.monotonic() < deadline, f"{used()} bytes are still used"
        assert sum(each["used"] for each in one.status()["tiers"]) < 2 * MiB
        one.stop()
    finally:
        subprocess.run(["umount", "-l", str(tier)], check=True)


def test_a_connection_that_somebody_else_mounted_is_served(daemon: Start, filled: Path) -> None:
    """As a CSI driver does it: the broker neither mounts nor unmounts, whatever happens to it."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount by itself")
    one = daemon(start=False)
    theirs = mountpoint.mount(str(one.directory), source="theirs", allow_other=False)
    try:
        one.start(descriptor=theirs)
        assert one.answer.get("ok"), one.log.read_text()
        assert (one.directory / "large").read_bytes() == (filled / "large").read_bytes()
        kill(one)
        assert (one.directory / "small0").read_bytes() == (filled / "small0").read_bytes()
        one.signal(signal.SIGTERM)
        assert one.wait() == 0
        assert mountpoint.is_mounted(str(one.directory)) is not None
    finally:
        os.close(theirs)
        mountpoint.unmount(str(one.directory), lazy=True)
    assert nothing_left(one)


NOBODY = 65534


def python_for(via: Sequence[str]) -> str:
    """An interpreter like ours that a user may start who is reached `via` these words."""
    # One that starts itself: setpriv may start what its user may not.
    program = "import subprocess, sys, xxhash; subprocess.run([sys.executable, '-c', ''], check=True)"
    ours = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in filter(None, (sys.executable, shutil.which(ours, path="/usr/local/bin:/usr/bin"))):
        if subprocess.run([*via, python, "-c", program], cwd="/", capture_output=True).returncode == 0:
            return python
    pytest.skip(f"no {ours} that another user may start")


@pytest.fixture
def users(tmp_path: Path) -> Iterator[Daemon]:
    """A mount that an ordinary user makes, on directories of its own."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becomes another user by setpriv, as root")
    paths = os.pathsep.join([str(Path(__file__).parents[3]), sysconfig.get_path("purelib")])
    via = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    via += [*UNCOVERED, f"PYTHONPATH={paths}"]
    python = python_for(via)
    with tempfile.TemporaryDirectory(prefix="datacache-user-") as made, contextlib.ExitStack() as undone:
        home = Path(made)
        if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
            # Distributions open it to all. Where it is not, the user gets one in a name space of its own,
            # of which we see what is mounted in `home`.
            device = home / "fuse"
            os.mknod(device, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
            device.chmod(0o666)
            home = home / "home"
            home.mkdir()
            for words in (["--bind", home, home], ["--make-shared", home]):
                subprocess.run(["mount", *map(str, words)], check=True)
            undone.callback(subprocess.run, ["umount", "-l", str(home)], check=True)
            shown = f'mount --make-private /dev; mount --bind {device} /dev/fuse; exec "$@"'
            via = ["unshare", "--mount", "--propagation=unchanged", "sh", "-ec", shown, "sh", *via]
        for name in ("bucket", "mnt"):
            (home / name).mkdir()
        fill(home / "bucket")
        for path in (Path(made), home, home / "mnt"):
            os.chown(path, NOBODY, NOBODY)
        settings = Settings(
            dataset=Dataset("test", (MountPoint((home / "bucket").as_uri()),)),
            state=str(home / "state"),
            runtime=str(home / "runtime"),
            cache=CacheSettings(tiers=(TierSettings(Medium.SSD, str(home / "cache"), 256 * MiB),)),
            reading=RANGES,
            index=SHORT,
            mount=MountSettings(directory=str(home / "mnt"), driver="native", io=IO.PASSTHROUGH),
        )
        one = Daemon(home / "bucket", settings, log=tmp_path / "daemon.log", via=via, python=python)
        yield one
        one.stop()
        log = one.log.read_text()
    assert "Traceback" not in log, log


def test_an_ordinary_user_mounts_by_fusermount3_and_kills_are_not_noticed(users: Daemon, driver: str) -> None:
    """Reads are served; one line of the log says why they are not passed through."""
    users.start()
    assert users.answer.get("ok"), f"{users.answer}\n{users.log.read_text()}"
    with Load(users) as load:
        load.tell("hold")
        for _ in range(2):
            load.go_on(30)
            kill(users)
            load.tell("hold", (0,))
            load.go_on(30)
        load.worst()
    assert users.log.read_text().count("it needs CAP_SYS_ADMIN") == 3, "one line of each daemon"
    users.signal(signal.SIGTERM)
    assert users.wait() == 0
    assert nothing_left(users)


def test_both_are_told_to_end_at_once(daemon: Start, filled: Path) -> None:
    """As systemd stops a unit: SIGTERM to every process of it, in any order."""
    for first in ("daemon", "broker"):
        one = daemon()
        assert one.process is not None
        pids = [*daemons(one), one.process.pid]
        for pid in pids if first == "daemon" else reversed(pids):
            os.kill(pid, signal.SIGTERM)
        assert one.wait() == 0
        assert nothing_left(one)


def test_a_daemon_that_is_told_to_end_is_followed(daemon: Start, filled: Path) -> None:
    """It is the broker that ends a mount; whoever signals its daemon gets another."""
    one = daemon()
    with open(one.directory / "large", "rb", 0) as file:
        (old,) = daemons(one)
        with ends(old):
            os.kill(old, signal.SIGTERM)
        assert file.readall() == (filled / "large").read_bytes()
        while served_by(one) == old:
            pass
