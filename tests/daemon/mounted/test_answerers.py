"""Several processes behind one mount: the same bytes, whoever answers, and whoever dies."""

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.clock import SystemClock
from datacache.config.settings import IO, IndexSettings, MountSettings
from datacache.index.snapshot import create_snapshot
from datacache.model import MiB
from datacache.worker import opened_sources
from fuse import answerer
from tests.daemon.mounted.conftest import STOP, Daemon, Start

PROCESSES = MountSettings(processes=3)


@pytest.fixture
def driver() -> str:
    """Only the native driver has this."""
    return "native"


@pytest.fixture
def contents(bucket: Path) -> dict[str, bytes]:
    """What is in the bucket, and in the snapshot `one`."""
    rng = random.Random(6)
    contents = {f"d{i % 7}/{i:04}": rng.randbytes(rng.randrange(1, 120_000)) for i in range(300)}
    contents["big"] = rng.randbytes(9 * MiB)
    for name, data in contents.items():
        (bucket / name).parent.mkdir(exist_ok=True)
        (bucket / name).write_bytes(data)
    return contents


@pytest.fixture
def mounted(daemon: Start, contents: dict[str, bytes]) -> Iterator[Daemon]:
    """A mount of the snapshot by three processes, which all end when they are told to."""
    one = daemon(mount=PROCESSES, index=IndexSettings(snapshot="one"), io=IO.PAGECACHE, start=False)
    with opened_sources(one.settings, clock=SystemClock()) as (dataset, sources, _):
        create_snapshot(dataset, sources, state=one.settings.state, name="one", clock=SystemClock())
    one.start()
    assert one.answer.get("ok"), one.log.read_text()
    yield one
    one.stop()
    assert "did not end" not in one.log.read_text()


def read_all(one: Daemon, contents: dict[str, bytes], seed: int) -> None:
    """All of it, in an order of its own."""
    names = list(contents)
    random.Random(seed).shuffle(names)
    for name in names:
        assert (one.directory / name).read_bytes() == contents[name]


def drop_pages(one: Daemon, contents: dict[str, bytes]) -> None:
    """Let the kernel ask for bytes again."""
    for name in contents:
        with open(one.directory / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_whoever_answers_the_bytes_are_right(mounted: Daemon, contents: dict[str, bytes]) -> None:
    """Cold, when the owner has to fetch what the others were asked for, and warm."""
    for _ in range(2):
        with ThreadPoolExecutor(4) as readers:
            list(readers.map(lambda seed: read_all(mounted, contents, seed), range(4)))
        drop_pages(mounted, contents)
    status = mounted.status()
    assert len(status["answerers"]["pids"]) == 2
    assert status["reads"]["bytes_fetched"] == sum(map(len, contents.values())), "each was fetched once"


def test_an_answerer_that_is_killed_is_replaced_without_a_word(
    mounted: Daemon, contents: dict[str, bytes]
) -> None:
    """Readers see right bytes and no error, whoever is killed while they read."""
    rng = random.Random(8)
    seen = set(mounted.status()["answerers"]["pids"])
    with ThreadPoolExecutor(3) as readers:
        reading = [readers.submit(read_all, mounted, contents, seed) for seed in range(3)]
        for _ in range(4):
            drop_pages(mounted, contents)
            pids = mounted.status()["answerers"]["pids"]
            victim = rng.choice(pids)
            os.kill(victim, signal.SIGKILL)
            deadline = time.monotonic() + STOP
            while victim in (now := mounted.status()["answerers"]["pids"]):
                assert time.monotonic() < deadline, "it is not replaced"
            seen.update(now)
        for done in reading:
            done.result()
    assert len(seen) > 4
    read_all(mounted, contents, 99)


def test_when_the_owner_is_killed_all_are_new(mounted: Daemon, contents: dict[str, bytes]) -> None:
    """The broker starts another owner, that one its answerers; the old ones end by themselves."""
    read_all(mounted, contents, 1)
    status = mounted.status()
    ends = [os.pidfd_open(pid) for pid in status["answerers"]["pids"]]
    os.kill(status["pid"], signal.SIGKILL)
    drop_pages(mounted, contents)
    read_all(mounted, contents, 2)
    for end in ends:
        assert select.select([end], [], [], STOP)[0], "an answerer outlives its owner"
        os.close(end)
    # All of it may have been answered by those that were ending: the new owner need not be there yet.
    deadline = time.monotonic() + STOP
    while (new := mounted.status_if_any()) is None or new["pid"] == status["pid"]:
        assert time.monotonic() < deadline, "there is no other owner"
        time.sleep(0.01)
    assert set(new["answerers"]["pids"]).isdisjoint(status["answerers"]["pids"])


def test_from_the_second_epoch_on_no_process_is_asked(mounted: Daemon, contents: dict[str, bytes]) -> None:
    """The counts of all processes are one count."""

    def epoch() -> None:
        for directory, _, names in os.walk(mounted.directory):
            for name in names:
                # Not open(): before 3.14 Python asks each file whether it is a terminal.
                file = os.open(Path(directory) / name, os.O_RDONLY)
                while os.read(file, 1 << 20):
                    pass
                os.close(file)

    for _ in range(2):
        epoch()
    before = mounted.requests()
    assert before["read"] >= len(contents)
    epoch()
    assert {k: v for k, v in mounted.requests().items() if "forget" not in k} == {
        k: v for k, v in before.items() if "forget" not in k
    }


def test_more_processes_than_one_need_a_pinned_index(daemon: Start) -> None:
    """What changes has one owner; that is said, and nothing is started."""
    refused = daemon(mount=PROCESSES, io=IO.PAGECACHE, start=False).start()
    assert refused.wait() == 2
    assert "processes" in refused.answer["error"]
    assert "snapshot" in refused.answer["error"]


def test_zero_is_as_many_as_there_are_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the control group's limit and the affinity, the smaller; at least one."""
    affinity = len(os.sched_getaffinity(0))
    monkeypatch.setattr(answerer, "_quotas", lambda: iter([]))
    assert answerer.processors() == affinity
    monkeypatch.setattr(answerer, "_quotas", lambda: iter([0.2, 64.0]))
    assert answerer.processors() == 1
    assert replace(PROCESSES, processes=0).processes == 0
