"""
The write path beside native files, the bare store client, rclone's mount and s3fs, in one run.

    make bench-write                 all of it, medians of 3
    make bench-write ARGS=--quick    once each, on less data: to see whether it works, not how fast

One real S3 server on loopback. Landing zone and native files lie on one file system. Ratios are what counts:
server, mount and writers share the machine's cores. Peers are mounted as their manuals have it for writing:
neither is durable at close in our sense (rclone uploads later, from a cache that it does not sync; s3fs
uploads at close).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
from botocore.config import Config
from rich.console import Console
from rich.table import Table
from systems import (
    KEY,
    REGION,
    SECRET,
    Datacache,
    Rclone,
    S3fs,
    Server,
    System,
    clear_away,
    memory_kept,
    mounted,
)

HERE = Path(__file__).parent
MiB = 1 << 20
SMALL = 100 * 1024
BUCKET = "bench"


class Writable(Datacache):
    """Ours, writable, the landing zone beside the cache."""

    durability = "close"
    driver = "auto"
    delay = "10m"
    """What is written is not sent while it is measured: store and mount share two cores and a disk."""

    def start(self) -> None:
        (self.scratch / "landing").mkdir()
        self.options = [
            "--rw", "--landing", str(self.scratch / "landing"), "--durability", self.durability,
            "--driver", self.driver, "--upload-delay", self.delay, "--ttl", "1h",
        ]  # fmt: skip
        super().start()

    def stop(self) -> None:
        self.command("umount", str(self.mount), "--leave")


class WritableFsync(Writable):
    """... durable at fsync only."""

    name = "datacache, fsync"
    durability = "fsync"


class WritableSending(Writable):
    """... sending at once."""

    name = "datacache, sending"
    delay = "0s"


class WritablePortable(Writable):
    """... by the portable driver."""

    name = "datacache, pyfuse3"
    driver = "pyfuse3"


class RcloneWriting(Rclone):
    """rclone mount, VFS cache writes."""

    options = ("--vfs-cache-mode", "writes")


class S3fsWriting(S3fs):
    """s3fs with a disk cache."""

    options = ()


class Run:
    """Measures, repeats, remembers."""

    def __init__(self, root: Path, server: Server, *, quick: bool) -> None:
        self.root, self.server, self.quick = root, server, quick
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.console = Console(stderr=True)
        self.count = 500 if quick else 5000
        self.large = (128 if quick else 1024) * MiB

    def note(self, row: str, system: str, figure: float) -> None:
        self.rows.setdefault(row, {}).setdefault(system, []).append(figure)
        self.console.print(f"  {row:44} {system:20} {figure:12.1f}", highlight=False)

    def write(self, work: str, where: Path, *words: object) -> dict[str, float]:
        """What benchmarks/writer.py measured, in a process of its own."""
        out = subprocess.run(
            [sys.executable, str(HERE / "writer.py"), work, str(where), *map(str, words)],
            stdout=subprocess.PIPE, check=True, timeout=1800,
        ).stdout  # fmt: skip
        found: dict[str, float] = json.loads(out)
        return found

    # What is measured

    def sequential(self, name: str, where: Path) -> None:
        found = self.write("sequential", where, 4, self.large)
        self.note("sequential write + fsync, MiB/s", name, found["bytes"] / MiB / found["seconds"])

    def small(self, name: str, where: Path, writers: int, sync: str) -> float:
        found = self.write("small", where, self.count, SMALL, writers, sync)
        return found["operations"] / found["seconds"]


def native(run: Run) -> None:
    place = run.root / "native"
    place.mkdir()
    run.sequential("native", place)
    clear_away(place)
    for writers in (1, 16):
        place.mkdir()
        rate = run.small("native", place, writers, "all")
        run.note(f"create, close durable, {writers:2} writers, files/s", "native", rate)
        clear_away(place)
        place.mkdir()
        rate = run.small("native", place, writers, "none")
        run.note(f"create, fsync durable, {writers:2} writers, files/s", "native", rate)
        clear_away(place)


def ours(run: Run, system: Callable[..., Writable], *, large: bool = True) -> None:
    with mounted(system(run.root, run.server.endpoint, BUCKET)) as one:
        assert isinstance(one, Writable)
        place = one.mount / f"{one.name}-{time.monotonic_ns()}".replace(", ", "-")
        place.mkdir()
        if large:
            run.sequential(one.name, place)
            one.command("flush", str(one.mount))
        kind = "fsync" if one.durability == "fsync" else "close"
        for writers in (1, 16):
            where = place / str(writers)
            where.mkdir()
            rate = run.small(one.name, where, writers, "none")
            run.note(f"create, {kind} durable, {writers:2} writers, files/s", one.name, rate)
            one.command("flush", str(one.mount))


def uploads(run: Run) -> None:
    """What is written while nothing is sent, and then flushed, against the client alone."""
    with mounted(Writable(run.root, run.server.endpoint, BUCKET)) as one:
        assert isinstance(one, Writable)
        place = one.mount / f"up-{time.monotonic_ns()}"
        place.mkdir()
        run.small(one.name, place, 16, "none")
        began = time.monotonic()
        one.command("flush", str(one.mount))
        run.note("upload of small files, files/s", "datacache", run.count / (time.monotonic() - began))
    client = boto3.client(
        "s3", endpoint_url=run.server.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        region_name=REGION, config=Config(s3={"addressing_style": "path"}, max_pool_connections=16),
    )  # fmt: skip
    place = run.root / "client"
    place.mkdir()
    run.small("client", place, 16, "none")
    names = [path for path in place.rglob("*") if path.is_file()]
    prefix = f"client-{time.monotonic_ns()}"

    def put(path: Path) -> None:
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, names))
    run.note("upload of small files, files/s", "client", len(names) / (time.monotonic() - began))
    clear_away(place)


def latency(run: Run) -> None:
    """p99 of 4 KiB reads of a cached file, alone and beside writes at half of the disk's native rate."""
    native_rate = statistics.median(run.rows["sequential write + fsync, MiB/s"]["native"])
    with mounted(Writable(run.root, run.server.endpoint, BUCKET)) as one:
        assert isinstance(one, Writable)
        file = one.mount / "cached"
        run.write("sequential", one.mount, 1, 256 * MiB)
        (one.mount / "seq-0").rename(file)
        one.command("flush", str(one.mount))
        for name, rate in (("alone", 0.0), ("beside writes", native_rate / 2)):
            stop = threading.Event()
            writer = threading.Thread(target=_keep_writing, args=(one.mount / "stream", rate, stop))
            if rate:
                writer.start()
            found = run.write("latency", file, 20_000 if run.quick else 100_000)
            stop.set()
            if rate:
                writer.join()
            run.note("read of 4 KiB, cached, p99 us", name, found["p99"] * 1e6)


def _keep_writing(path: Path, rate: float, stop: threading.Event) -> None:
    piece, written = os.urandom(MiB), 0
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        while not stop.is_set():
            file.write(piece)
            written += 1
            if written % 1024 == 0:
                file.seek(0)
            ahead = written / rate - (time.monotonic() - began)
            if ahead > 0:
                stop.wait(ahead)


def peer(run: Run, system: System) -> None:
    with mounted(system) as one:
        place = one.mount / f"{one.name}-{time.monotonic_ns()}"
        place.mkdir()
        run.sequential(one.name, place)
        for writers in (1, 16):
            where = place / str(writers)
            where.mkdir()
            rate = run.small(one.name, where, writers, "none")
            run.note(f"create, fsync durable, {writers:2} writers, files/s", one.name, rate)


BARS: Sequence[tuple[str, str, str, float, bool]] = (
    ("sequential write + fsync, MiB/s", "datacache", "native", 0.9, False),
    ("create, close durable,  1 writers, files/s", "datacache", "native", 0.5, False),
    ("create, close durable, 16 writers, files/s", "datacache", "native", 0.5, False),
    ("create, fsync durable,  1 writers, files/s", "datacache, fsync", "rclone|s3fs", 5.0, False),
    ("create, fsync durable, 16 writers, files/s", "datacache, fsync", "rclone|s3fs", 5.0, False),
    ("upload of small files, files/s", "datacache", "client", 0.9, False),
    ("read of 4 KiB, cached, p99 us", "beside writes", "alone", 1.5, True),
)
"""Row, ours, beside whom (the best of them), the ratio to reach, whether less is better."""


def report(run: Run) -> None:
    table = Table("work", "system", "median", "all")
    for row, systems in run.rows.items():
        for system, figures in systems.items():
            table.add_row(
                row, system, f"{statistics.median(figures):.0f}", " ".join(f"{f:.0f}" for f in figures)
            )
    bars = Table("bar", "ratio", "wanted", "met")
    for row, mine, others, wanted, less in BARS:
        found = run.rows.get(row, {})
        beside = [statistics.median(found[name]) for name in others.split("|") if name in found]
        if mine in found and beside:
            ratio = statistics.median(found[mine]) / max(beside)
            met = ratio <= wanted if less else ratio >= wanted
            bars.add_row(f"{row}: {mine} / {others}", f"{ratio:.2f}", f"{wanted:g}", "yes" if met else "no")
    out = Console(width=120)
    out.print(table, bars)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="parts, by comma: native, ours, uploads, latency, peers")
    args = parser.parse_args()
    parts = set(filter(None, args.only.split(","))) or {"native", "ours", "uploads", "latency", "peers"}
    with tempfile.TemporaryDirectory(prefix="dcb-", ignore_cleanup_errors=True) as name, memory_kept():
        root = Path(name)
        server = Server(root)
        try:
            boto3.client(
                "s3", endpoint_url=server.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
                region_name=REGION, config=Config(s3={"addressing_style": "path"}),
            ).create_bucket(Bucket=BUCKET)  # fmt: skip
            run = Run(root, server, quick=args.quick)
            for _ in range(1 if args.quick else args.repeats):
                if "native" in parts:
                    native(run)
                if "ours" in parts:
                    ours(run, Writable)
                    ours(run, WritableFsync, large=False)
                    ours(run, WritableSending)
                    ours(run, WritablePortable)
                if "uploads" in parts:
                    uploads(run)
                if "latency" in parts and "native" in parts:
                    latency(run)
                if "peers" in parts:
                    peer(run, RcloneWriting(root, server.endpoint, BUCKET))
                    peer(run, S3fsWriting(root, server.endpoint, BUCKET))
            report(run)
        finally:
            server.close()


if __name__ == "__main__":
    main()
