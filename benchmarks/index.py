"""
How fast names are: a snapshot of a million synthetic objects, made, opened and read; a live
directory of 200,000; and the snapshot mounted, with `find` over it.

    python benchmarks/index.py [--objects 1000000] [--directory DIR] [--shape SHAPE] [--mounted]

The objects come from a generator, so the time of the listing itself can be taken alone and
subtracted. Bars (issue 3): made at 50,000 objects/s or more beyond the listing; mounted in less than
a second, with at most 32 MiB more resident memory than a snapshot of 1,000; `find` over the mount at
50,000 entries/s. `of CPU` is what the same work took of this process's processor time: on a machine
that others use as well, the wall clock tells of them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import psutil

from datacache.clock import SystemClock
from datacache.config.settings import IndexSettings
from datacache.index.index import ROOT
from datacache.index.opening import open_index
from datacache.index.snapshot import create_snapshot
from datacache.model import Buffer, ByteRange, Dataset, MiB, MountPoint, ObjectInfo, Version
from datacache.sources.source import Page, Traits

BIRTH = 1_700_000_000_000_000_000
DATASET = Dataset("synthetic", (MountPoint("synthetic://bucket"),))


class SyntheticSource:
    """Objects that are made up while they are listed."""

    uri = "synthetic://bucket"
    traits = Traits(conditional=True)

    def __init__(self, shape: str, count: int) -> None:
        self._key, self._count = SHAPES[shape], count

    def list(self, prefix: str, *, recursive: bool, versions: bool = False) -> Iterator[Page]:
        """A listing in the order of the keys; all keys are files, whatever `recursive` says."""
        for start in range(0, self._count, 1000):
            numbers = range(start, min(start + 1000, self._count))
            yield Page(
                [
                    ObjectInfo(self._key(i), 110_000 + i % 1000, Version(f'"{i:032x}"'), BIRTH + i)
                    for i in numbers
                ],
                [],
            )

    def stat(self, key: str) -> ObjectInfo:
        raise NotImplementedError

    def read(self, info: ObjectInfo, span: ByteRange) -> Buffer:
        raise NotImplementedError

    def close(self) -> None:
        pass


SHAPES = {
    "flat": lambda i: f"sample-{i:07d}.jpg",
    "classes": lambda i: f"train/n{i // 1300:08d}/n{i // 1300:08d}_{i % 1300:05d}.JPEG",
    "deep": lambda i: f"team/run-{i // 100000:04d}/shard-{i // 1000:06d}/part-{i // 10:07d}/item-{i:07d}.bin",
    "alone": lambda i: f"ids/{i:07d}/data.bin",
    "unordered": lambda i: f"d{i * 7919 % 1009:04d}/sample-{i:07d}.jpg",
}


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def opened(state: str, name: str) -> tuple[float, int]:
    """Seconds to open a snapshot in a process of its own, and its resident bytes then."""
    command = [sys.executable, __file__, "--open", name, "--directory", state]
    seconds, size = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), int(size)


def measure(shape: str, count: int, state: str) -> None:
    source = SyntheticSource(shape, count)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in source.list("", recursive=True):
        pass
    listing, listing_cpu = time.perf_counter() - start, time.process_time() - cpu
    before = resident()
    peak = before

    def progress(_: int) -> None:
        nonlocal peak
        peak = max(peak, resident())

    start, cpu = time.perf_counter(), time.process_time()
    create_snapshot(DATASET, [source], state=state, name=shape, clock=SystemClock(), progress=progress)
    taken, taken_cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = max(peak, resident())
    size = os.path.getsize(os.path.join(state, "snapshots", shape + ".db"))
    opening, memory = opened(state, shape)
    _, small = opened(state, "small")
    index = open_index(DATASET, [source], IndexSettings(snapshot=shape), state=state, clock=SystemClock())
    start = time.perf_counter()
    seen, after = 0, 0
    top = ROOT
    if shape == "flat":
        while some := index.children(top, after=after):
            seen, after = seen + len(some), some[-1].ino
    else:
        seen = sum(1 for _ in index.walk())
    reading = time.perf_counter() - start
    index.close()
    print(
        f"{shape:10} listed in {listing:5.2f} s, made in {taken:5.2f} s:"
        f" {count / max(taken - listing, 1e-9):9,.0f} objects/s beyond"
        f" ({count / max(taken_cpu - listing_cpu, 1e-9):9,.0f} of CPU);"
        f" {size / MiB:5.0f} MiB, peak +{(peak - before) / MiB:.0f} MiB;"
        f" opened in {opening * 1000:5.1f} ms, {(memory - small) / MiB:+.1f} MiB;"
        f" {'children' if shape == 'flat' else 'walk'} {seen / reading:9,.0f} entries/s"
    )


def measure_live(state: str) -> None:
    source = SyntheticSource("flat", 200_000)
    index = open_index(DATASET, [source], IndexSettings(), state=state, clock=SystemClock())
    before, start = resident(), time.perf_counter()
    entry = index.lookup(ROOT, b"sample-0100000.jpg")
    first = time.perf_counter() - start
    grown = resident() - before
    start = time.perf_counter()
    for _ in range(100_000):
        index.lookup_nowait(ROOT, entry.name)
    cached = (time.perf_counter() - start) / 100_000
    names = [b"sample-%07d.jpg" % (i * 7919 % 200_000) for i in range(20_000)]
    start = time.perf_counter()
    for name in names:
        index.lookup_nowait(ROOT, name)
    uncached = (time.perf_counter() - start) / len(names)
    index.close()
    print(
        f"live: a directory of 200,000 listed in {first:.2f} s (+{grown / MiB:.0f} MiB);"
        f" lookup {cached * 1e6:.1f} µs cached, {uncached * 1e6:.1f} µs from the database"
    )


def processor(daemon: psutil.Process) -> float:
    """Seconds that the processors have spent on the daemon, and on the programs that were waited for."""
    served, ours = daemon.cpu_times(), psutil.Process().cpu_times()
    return served.user + served.system + ours.children_user + ours.children_system


def measure_mounted(state: str, shape: str, count: int) -> None:
    """Mount a snapshot as anybody would. Its source is an empty directory: names come from disk alone."""
    empty, at = state + "-bucket", state + "-mounted"
    os.mkdir(empty)
    os.mkdir(at)
    dataset = Dataset("mounted", (MountPoint(f"file://{empty}"),))
    resident_at, mounted = {}, {}
    for name, number in (("thousand", 1000), ("all", count)):
        source = SyntheticSource(shape, number)
        source.uri = f"file://{empty}"
        create_snapshot(dataset, [source], state=state, name=name, clock=SystemClock())
        command = [sys.executable, "-m", "datacache.cli.main"]
        flags = ["--snapshot", name, "--state", state, "--cache", f"ssd:{state}/cache=64MiB"]
        start = time.perf_counter()
        subprocess.run([*command, "mount", f"file://{empty}", at, "--name", "mounted", *flags], check=True)
        mounted[name] = time.perf_counter() - start
        try:
            status = [*command, "status", at, "--json"]
            daemon = psutil.Process(json.loads(subprocess.check_output(status))["pid"])
            resident_at[name] = daemon.memory_info().rss
            if name == "all":
                cpu, start = processor(daemon), time.perf_counter()
                found = subprocess.check_output(["find", at]).count(b"\n")
                taken, busy = time.perf_counter() - start, processor(daemon) - cpu
                grown = (resident_at["all"] - resident_at["thousand"]) / MiB
                print(
                    f"mounted    {shape}: `datacache mount` returned in {mounted['all']:.2f} s (of 1,000:"
                    f" {mounted['thousand']:.2f} s), {grown:+.1f} MiB; find {found / taken:9,.0f} entries/s"
                    f" ({found / max(busy, 1e-9):9,.0f} of the CPU of daemon and find together);"
                    f" then {(daemon.memory_info().rss - resident_at['all']) / MiB:+.1f} MiB"
                )
        finally:
            subprocess.run([*command, "umount", at], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast names are; see the top of this file.")
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--directory", default="")
    parser.add_argument("--shape", choices=[*SHAPES], action="append")
    parser.add_argument("--mounted", action="store_true", help="only what needs a mount")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        start = time.perf_counter()
        index = open_index(
            DATASET,
            [SyntheticSource("flat", 0)],
            IndexSettings(snapshot=args.open),
            state=args.directory,
            clock=SystemClock(),
        )
        index.entry(ROOT)
        print(time.perf_counter() - start, resident())
        index.close()
        return
    state = tempfile.mkdtemp(prefix="datacache-index-", dir=args.directory or None)
    try:
        if args.mounted:
            for number, shape in enumerate(args.shape or ["classes"]):
                os.mkdir(below := os.path.join(state, str(number)))
                measure_mounted(below, shape, args.objects)
            return
        create_snapshot(
            DATASET, [SyntheticSource("flat", 1000)], state=state, name="small", clock=SystemClock()
        )
        for shape in args.shape or SHAPES:
            measure(shape, args.objects, state)
        measure_live(state)
    finally:
        shutil.rmtree(state)


if __name__ == "__main__":
    main()
