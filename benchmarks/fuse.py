"""
The native FUSE driver beside native files, the pyfuse3 driver and rclone's mount, in one run.

    make bench-fuse                 all of it, medians of 5 (about 20 minutes, 30 GiB of disk)
    make bench-fuse ARGS=--quick    3 rounds on less data: to see whether it works, not how fast

A local directory stands in for the store, which is never asked: every cache is warm. Caches, data and
state lie on one disk, that of `--scratch`. Each figure of a mount is measured right beside the same work
on the native files, and a bar about a ratio holds against the median of the ratios of such pairs: the
machine may be slow, but not slow for one of two neighbours. "cold": the page cache is dropped first;
"warm": the same was read just before.

Prints what was measured, and each bar of the issue with whether it holds. Exits with 1 when one does not.
"""

import argparse
import contextlib
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from systems import (
    Cpu,
    Datacache,
    Rclone,
    System,
    drop_page_cache,
    memory_kept,
    processor_time,
    times_dropped,
)

HERE = Path(__file__).parent
MiB, GiB = 1 << 20, 1 << 30
SNAPSHOT = "bench"


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    rounds: int
    large: int
    """Bytes of each of four files."""
    huge: int
    """Bytes of the file for random reads."""
    small: int
    """Files of 100 KiB."""
    entries: int
    """Files of the tree for `find`."""
    touches: int
    """Random reads from the disk, and touches of a mapping."""
    soak: int
    """Bytes read while memory is watched."""


FULL = Scale(5, 256 * MiB, 4 * GiB, 5000, 200_000, 20_000, 100 * GiB)
QUICK = Scale(3, 32 * MiB, 256 * MiB, 2000, 20_000, 2000, 2 * GiB)


class Ours(Datacache):
    """A mount of ours in one of its modes. All of them take turns on one cache and one snapshot."""

    def __init__(self, root: Path, data: Path, name: str, *flags: str) -> None:
        super().__init__(root, "", str(data))
        self.name = name
        state = ["--state", str(self.scratch / f"state-{data.name}")]
        self.cache = self.scratch / f"cache-{data.name}"
        self.options = [*state, "--snapshot", SNAPSHOT, "--entry-timeout", "inf", *flags]
        self._state = state

    def prepare(self) -> None:
        for directory in (self.mount, self.cache, self.scratch / "run"):
            directory.mkdir(parents=True, exist_ok=True)
        self.command("snapshot", "create", *self.where, SNAPSHOT, "--name", "bench", *self._state)

    def load(self) -> None:
        self.command("load", str(self.mount))


def modes(root: Path, data: Path) -> dict[str, System]:
    rclone = Rclone(root, "", str(data))
    rclone.mount.mkdir(parents=True, exist_ok=True)
    rclone.cache.mkdir(exist_ok=True)
    return {
        "passthrough": Ours(root, data, "passthrough", "--io", "passthrough"),
        "pagecache": Ours(root, data, "pagecache", "--io", "pagecache"),
        "2 processes": Ours(root, data, "2 processes", "--io", "pagecache", "--processes", "2"),
        "served": Ours(root, data, "served", "--io", "served"),
        "pyfuse3": Ours(root, data, "pyfuse3", "--driver", "pyfuse3"),
        "rclone": rclone,
    }


@contextlib.contextmanager
def up(system: System) -> Iterator[System]:
    """Mounted afresh, with the cache that it had."""
    system.start()
    try:
        yield system
    finally:
        system.stop()


@contextlib.contextmanager
def prepared(system: System) -> Iterator[Ours]:
    """The same for the first time: what all modes share is made."""
    assert isinstance(system, Ours)
    system.prepare()
    with up(system):
        yield system


COLD_PAIRS = 3
"""Pairs of each cold measurement in a round."""
CROWD = 4
"""Readers at once, of the row that has several."""
_CROWDED = f"small files, first epoch of {CROWD} readers"


class Run:
    """Measures, and remembers."""

    def __init__(self, root: Path, scale: Scale) -> None:
        self.root, self.scale = root, scale
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.chance = random.Random(7)
        self.console = Console(stderr=True)

    def note(self, row: str, system: str, figure: float) -> None:
        self.rows.setdefault(row, {}).setdefault(system, []).append(figure)
        self.console.print(f"  {row:52} {system:12} {figure:12,.3f}", highlight=False)

    def median(self, row: str, system: str) -> float:
        return statistics.median(self.rows[row][system])

    def ask(self, work: str, paths: Sequence[str], readers: int = 1, count: int = 0) -> dict[str, float]:
        with tempfile.NamedTemporaryFile("w", dir=self.root) as file:
            file.write("\n".join(paths))
            file.flush()
            out = subprocess.run(
                [sys.executable, str(HERE / "reader.py"), work, str(readers), file.name, str(count)],
                stdout=subprocess.PIPE, check=True, timeout=1800,
            ).stdout  # fmt: skip
        found: dict[str, float] = json.loads(out)
        return found


@dataclass(frozen=True)
class Work:
    """One kind of reading of the large files."""

    row: str
    verb: str
    paths: tuple[str, ...]
    readers: int = 1
    count: int = 0
    cold: bool = False


def large_work(scale: Scale) -> list[Work]:
    files = tuple(f"large/{i}.bin" for i in range(4))
    huge = ("huge.bin",)
    return [
        *(
            Work(f"sequential, {readers} reader{'s' * (readers > 1)}, {state}", "read", files, readers,
                 cold=state == "cold")
            for readers in (1, 4) for state in ("cold", "warm")
        ),
        Work("random 4 KiB, cold", "random", huge, count=scale.touches, cold=True),
        Work("random 4 KiB, warm", "random", huge, count=scale.touches * 10),
        Work("mmap touches, cold", "mmap", huge, count=scale.touches, cold=True),
        Work("mmap touches, warm", "mmap", huge, count=scale.touches * 10),
    ]  # fmt: skip


def make_data(root: Path, scale: Scale, only: set[str]) -> tuple[Path, Path]:
    """The files to read, and the tree to list, as far as they are needed."""
    data, tree = root / "data", root / "tree"
    noise = os.urandom(MiB)
    sizes = {f"large/{i}.bin": scale.large for i in range(4)} if only & {"large", "soak"} else {}
    sizes |= {"huge.bin": scale.huge} if "large" in only else {}
    sizes |= dict.fromkeys(small_files(scale), 100 * 1024) if "small" in only else {}
    data.mkdir()
    tree.mkdir()

    def make(key: str) -> None:
        with (data / key).open("wb") as file:
            for at in range(0, sizes[key], MiB):
                turn = hash((key, at)) % MiB
                file.write((noise[turn:] + noise[:turn])[: sizes[key] - at])

    for folder in {(data / key).parent for key in sizes}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, sizes))
    for number in range(scale.entries if "list" in only else 0):
        if number % 1000 == 0:
            folder = tree / f"class-{number // 1000:04}"
            folder.mkdir(parents=True)
        (folder / f"sample-{number:07}.jpg").touch()
    return data, tree


def small_files(scale: Scale) -> list[str]:
    return [f"small/{i % 10}/{i:05}.jpg" for i in range(scale.small)]


def shuffled(paths: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(paths, len(paths))


# ---- what is measured ----------------------------------------------------------------------------


def large(run: Run, data: Path, system: System, *, beside: bool) -> None:
    """`beside`: a system that has no bar to meet, so of each kind of work one is enough."""
    pids = system.pids()
    kinds = [work for work in large_work(run.scale) if not beside or work.readers == 1]
    # The disk of a shared machine reads at one of two speeds, by chance: more pairs, in either order.
    for work in [kind for kind in kinds for _ in range(COLD_PAIRS if kind.cold else 1)]:
        rates, cpu = {}, Cpu()
        pair = [("native", str(data)), (system.name, str(system.mount))]
        for name, base in run.chance.sample(pair, 2):
            paths = [f"{base}/{path}" for path in work.paths]
            # Before a warm reading, too: it takes longer from the single pages that random reads have left
            # than from the large folios of a sequential one.
            drop_page_cache()
            if not work.cold:
                run.ask("read", paths)
            before = processor_time(pids)
            found = run.ask(work.verb, paths, work.readers, work.count)
            if name != "native":
                cpu = processor_time(pids).since(before)
            rates[name] = found["operations" if work.count else "bytes"] / found["seconds"]
        mine, native = rates[system.name], rates["native"]
        unit = 1 if work.count else MiB
        run.note(f"{work.row}, {'calls' if work.count else 'MiB'}/s", "native", native / unit)
        run.note(f"{work.row}, {'calls' if work.count else 'MiB'}/s", system.name, mine / unit)
        run.note(f"{work.row}, of native", system.name, mine / native)
        if work.count:
            run.note(f"{work.row}, µs added per call", system.name, 1e6 / mine - 1e6 / native)
        elif work.cold:
            gib = sum(os.path.getsize(data / path) for path in work.paths) / GiB
            row = f"daemon CPU s per GiB, {work.readers} reader{'s' * (work.readers > 1)}"
            run.note(row, system.name, (cpu.user + cpu.system) / gib)


def epochs(run: Run, data: Path, system: System, seed: int) -> None:
    """A first epoch after a fresh mount and a listing, and a second."""
    keys = shuffled(small_files(run.scale), seed)
    native, mine = ([f"{base}/{key}" for key in keys] for base in (data, system.mount))
    run.ask("read", native)
    run.ask("list", sorted({os.path.dirname(path) for path in mine}))
    pids = system.pids()  # once: to ask for them takes processor time of the daemon
    for epoch in ("first", "second"):
        row = f"small files, {epoch} epoch"
        asked = system.requests() if isinstance(system, Datacache) else 0
        before = processor_time(pids)
        found = run.ask("read", mine)
        cpu = processor_time(pids).since(before)
        beside = run.ask("read", native)
        rate = found["operations"] / found["seconds"]
        run.note(f"{row}, files/s", "native", beside["operations"] / beside["seconds"])
        run.note(f"{row}, files/s", system.name, rate)
        run.note(f"{row}, of native", system.name, rate * beside["seconds"] / beside["operations"])
        run.note(f"{row}, daemon user CPU, µs/file", system.name, cpu.user * 1e6 / len(keys))
        run.note(f"{row}, daemon system CPU, µs/file", system.name, cpu.system * 1e6 / len(keys))
        if isinstance(system, Datacache):
            run.note(f"{row}, requests/file", system.name, (system.requests() - asked) / len(keys))


def crowded_epoch(run: Run, data: Path, system: System, seed: int) -> None:
    """A first epoch of CROWD readers at once, after a fresh mount and a listing: what several processes are
    for. With one reader they only take turns at being woken."""
    keys = shuffled(small_files(run.scale), seed)
    mine = [f"{system.mount}/{key}" for key in keys]
    run.ask("list", sorted({os.path.dirname(path) for path in mine}))
    pids = system.pids()
    before = processor_time(pids)
    found = run.ask("read", mine, CROWD)
    cpu = processor_time(pids).since(before)
    run.note(f"{_CROWDED}, files/s", system.name, found["operations"] / found["seconds"])
    for kind, seconds in (("user", cpu.user), ("system", cpu.system)):
        run.note(f"{_CROWDED}, daemon {kind} CPU, µs/file", system.name, seconds * 1e6 / len(keys))


def undisturbed_epochs(run: Run, data: Path, system: System, seed: int) -> None:
    """Both epochs in a fresh mount; again when somebody emptied the machine's caches meanwhile, which are
    what a second epoch is read from."""
    for left in reversed(range(5)):
        before, dropped = copy.deepcopy(run.rows), times_dropped()
        with up(system):
            epochs(run, data, system, seed)
        if system.name in ("pagecache", "2 processes"):
            with up(system):
                crowded_epoch(run, data, system, seed)
        if times_dropped() == dropped or not left:
            return
        run.console.print("  another program emptied the page cache: once more")
        run.rows = before


def listing(run: Run, tree: Path, system: System) -> None:
    """`find` and `ls -lR`, each in a fresh mount, twice."""
    for tool in (["find"], ["ls", "-lR"]):
        drop_page_cache()
        listed = " ".join(tool)
        with up(system):
            pids = system.pids()
            for time_ in ("first", "second"):
                seconds = {}
                asked = system.requests() if isinstance(system, Datacache) else 0
                before = processor_time(pids)
                for name, where in ((system.name, system.mount), ("native", tree)):
                    begun = time.monotonic()
                    subprocess.run([*tool, str(where)], check=True, stdout=subprocess.DEVNULL)
                    seconds[name] = time.monotonic() - begun
                    run.note(f"{listed}, {time_}, entries/s", name, run.scale.entries / seconds[name])
                cpu = processor_time(pids).since(before)
                run.note(f"{listed}, {time_}, of native's time", system.name,
                         seconds[system.name] / seconds["native"])  # fmt: skip
                run.note(f"{listed}, {time_}, daemon user CPU, µs/entry", system.name,
                         cpu.user * 1e6 / run.scale.entries)  # fmt: skip
                if isinstance(system, Datacache):
                    run.note(f"{listed}, {time_}, requests", system.name, system.requests() - asked)


def soak(run: Run, system: Ours) -> None:
    """Read the same files over and over, past the page cache, and watch the memory of the daemon."""
    paths = [f"{system.mount}/large/{i}.bin" for i in range(4)]
    tenth = max(1, run.scale.soak // 10 // (4 * run.scale.large))
    daemon = system.pids()[-1]
    for part in range(10):
        run.ask("stream", paths, 4, tenth)
        if part in (0, 9):
            kilobytes = Path(f"/proc/{daemon}/status").read_text().split("VmRSS:")[1].split()[0]
            which = "a tenth" if part == 0 else "all"
            run.note(f"RSS of the daemon after {which} of the soak, MiB", system.name, int(kilobytes) / 1024)


# ---- the bars ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A figure, and what it must be."""

    row: str
    system: str
    limit: float
    at_least: bool
    figure: Callable[[Run], float] | None = None

    def measured(self, run: Run) -> float | None:
        try:
            return self.figure(run) if self.figure else run.median(self.row, self.system)
        except KeyError:
            return None  # left out by --only or --systems

    def holds(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


def _times_pyfuse3(system: str) -> Bar:
    row = "small files, first epoch, files/s"
    return Bar(
        "small files, first epoch, times the pyfuse3 driver", system, 3.0, True,
        lambda run: run.median(row, system) / run.median(row, "pyfuse3"),
    )  # fmt: skip


def _processes(run: Run) -> float:
    row = _CROWDED + ", daemon {} CPU, µs/file"
    one, two = (
        sum(run.median(row.format(kind), system) for kind in ("user", "system"))
        for system in ("pagecache", "2 processes")
    )
    return two / one


def _grown(run: Run) -> float:
    row = "RSS of the daemon after {} of the soak, MiB"
    return run.median(row.format("all"), "served") - run.median(row.format("a tenth"), "served")


BARS = [
    *(
        Bar(f"sequential, {readers}, {state}, of native", "passthrough", 0.95, True)
        for readers in ("1 reader", "4 readers") for state in ("cold", "warm")
    ),
    Bar("random 4 KiB, cold, of native", "passthrough", 0.95, True),
    Bar("random 4 KiB, warm, µs added per call", "passthrough", 0.5, False),
    Bar("mmap touches, cold, of native", "passthrough", 0.95, True),
    Bar("mmap touches, warm, of native", "passthrough", 0.95, True),
    Bar("small files, second epoch, of native", "pagecache", 0.85, True),
    Bar("small files, second epoch, requests/file", "pagecache", 0.0, False),
    _times_pyfuse3("pagecache"),
    _times_pyfuse3("passthrough"),
    Bar("small files, first epoch, requests/file", "pagecache", 1.1, False),
    Bar("small files, first epoch, requests/file", "passthrough", 2.0, False),
    Bar("small files, first epoch, daemon user CPU, µs/file", "pagecache", 60.0, False),
    Bar("small files, first epoch, daemon user CPU, µs/file", "passthrough", 60.0, False),
    Bar(f"{_CROWDED}, CPU, times one process's", "2 processes", 1.15, False, _processes),
    Bar("find, first, entries/s", "pagecache", 50_000, True),
    *(
        bar
        for tool in ("find", "ls -lR")
        for bar in (
            Bar(f"{tool}, second, of native's time", "pagecache", 1.2, False),
            Bar(f"{tool}, second, requests", "pagecache", 0.0, False),
        )
    ),
    Bar("daemon CPU s per GiB, 1 reader", "passthrough", 0.02, False),
    Bar("RSS of the daemon after all of the soak, MiB", "served", 150.0, False),
    Bar("RSS of the daemon, MiB more than after a tenth of it", "served", 8.0, False, _grown),
]  # fmt: skip


def report(run: Run) -> bool:
    """Print all of it; whether no bar was missed."""
    names = ["native", "passthrough", "pagecache", "2 processes", "served", "pyfuse3", "rclone"]
    table = Table("work", *names, title=f"medians of {run.scale.rounds}")
    for row, found in run.rows.items():
        table.add_row(row, *(f"{statistics.median(found[n]):,.2f}" if n in found else "" for n in names))
    bars = Table("bar", "of", "must be", "is", "holds", title="what the issue asks for")
    missed = False
    for bar in BARS:
        figure = bar.measured(run)
        if figure is None:
            continue
        good = bar.holds(figure)
        missed = missed or not good
        must = f"{'≥' if bar.at_least else '≤'} {bar.limit:,g}"
        bars.add_row(bar.row, bar.system, must, f"{figure:,.2f}", "yes" if good else "[bold]NO[/bold]")
    out = Console(width=160)
    out.print(table)
    out.print(bars)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    target = results / time.strftime("fuse-%Y%m%d-%H%M%S.json")
    target.write_text(json.dumps({"rounds": run.scale.rounds, "rows": run.rows}, indent=1))
    print(f"written to {target.relative_to(HERE.parent)}")
    return not missed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds on less data")
    parser.add_argument("--only", default="large,small,list,soak", help="of large, small, list, soak")
    parser.add_argument("--systems", default="passthrough,pagecache,2 processes,served,pyfuse3,rclone")
    parser.add_argument("--scratch", default="", help="a directory on a real disk with 30 GiB to spare")
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    only, names = set(args.only.split(",")), args.systems.split(",")
    scratch_at = tempfile.TemporaryDirectory(prefix="datacache-bench-", dir=args.scratch or None)
    with memory_kept(), scratch_at as scratch:
        root = Path(scratch)
        run = Run(root, scale)
        run.console.print("making the data")
        data, tree = make_data(root, scale, only)
        reading, listed = modes(root, data), modes(root, tree)
        if only - {"list"}:
            with prepared(reading["served"]) as system:
                system.load()
        if "list" in only:
            with prepared(listed["served"]):
                pass
        if "rclone" in names and only & {"large", "small"}:
            with up(reading["rclone"]) as rclone:
                run.ask("read", [rclone.path(str(p.relative_to(data))) for p in data.rglob("*.*")], 2)
        for number in range(scale.rounds):
            run.console.print(f"round {number + 1}")
            for name in names if number % 2 else reversed(names):
                if "small" in only:
                    undisturbed_epochs(run, data, reading[name], number)
                if "large" in only and name not in ("pagecache", "2 processes"):
                    with up(reading[name]) as system:
                        large(run, data, system, beside=name != "passthrough")
                if "list" in only and name in ("pagecache", "pyfuse3", "rclone"):
                    listing(run, tree, listed[name])
        if "soak" in only and "served" in names:
            with up(reading["served"]) as system:
                assert isinstance(system, Ours)
                soak(run, system)
        good = report(run)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
