"""
The read path beside native files, the bare store client, rclone's mount and s3fs, in one run.

    make bench-read                 all of it, medians of 3
    make bench-read ARGS=--quick    once each, on less data: to see whether it works, not how fast

One real S3 server on loopback holds a bucket of large objects (256 MiB) and small ones (100 KiB).
Server, mount and readers share the machine's cores, so absolute figures say little; the ratios in
one run are what counts. Every figure is the median of its repeats; the order of the systems is
turned round each repeat, so that drift of the machine hits all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import obstore
from botocore.config import Config
from obstore.store import S3Store
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
    drop_page_cache,
    memory_kept,
    mounted,
)

HERE = Path(__file__).parent
MiB = 1 << 20
BUCKET = "bench"


class Bucket:
    """The objects, natively and in the store."""

    def __init__(self, root: Path, server: Server, *, large: int, small: int, size: int) -> None:
        self.native = root / "native"
        self.server = server
        self.large = [f"large/{i:03}.bin" for i in range(large)]
        self.small = [f"small/{i % 10}/{i:05}.jpg" for i in range(small)]
        self.sizes = dict.fromkeys(self.large, size) | dict.fromkeys(self.small, 100 * 1024)
        self.store = S3Store(
            BUCKET,
            endpoint=server.endpoint,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region=REGION,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def make(self) -> None:
        client = boto3.client(
            "s3",
            endpoint_url=self.server.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=REGION,
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=16),
        )
        client.create_bucket(Bucket=BUCKET)
        noise = os.urandom(MiB)
        for key, size in self.sizes.items():
            path = self.native / key
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for i in range(0, size, MiB):
                    turn = hash((key, i)) % MiB
                    file.write((noise[turn:] + noise[:turn])[: size - i])

        def put(key: str) -> None:
            client.put_object(Bucket=BUCKET, Key=key, Body=(self.native / key).read_bytes())

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put, self.sizes))


class Run:
    """Measures, repeats, remembers."""

    def __init__(self, bucket: Bucket, root: Path, repeats: int) -> None:
        self.bucket, self.root, self.repeats = bucket, root, repeats
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.notes: dict[str, object] = {}
        self.console = Console(stderr=True)

    def note(self, row: str, system: str, figure: float) -> None:
        self.rows.setdefault(row, {}).setdefault(system, []).append(figure)
        self.console.print(f"  {row:44} {system:10} {figure:12.1f}", highlight=False)

    def ask(self, work: str, paths: list[str], readers: int, count: int = 0) -> dict[str, float]:
        with tempfile.NamedTemporaryFile("w", dir=self.root) as file:
            file.write("\n".join(paths))
            file.flush()
            out = subprocess.run(
                [sys.executable, str(HERE / "reader.py"), work, str(readers), file.name, str(count)],
                stdout=subprocess.PIPE,
                check=True,
                timeout=900,
            ).stdout
        return json.loads(out)

    def rate(self, found: dict[str, float], *, per: str) -> float:
        amount = found["bytes"] / MiB if per == "MiB" else found["operations"]
        return amount / found["seconds"]


def store_best(bucket: Bucket, keys: list[str], *, write_to: Path | None = None) -> float:
    """MiB/s of the bare client at its best concurrency: 8 MiB ranges of large objects, small ones whole."""
    requests = [
        (key, start, min(start + 8 * MiB, bucket.sizes[key]))
        for key in keys
        for start in range(0, bucket.sizes[key], 8 * MiB)
    ]

    def fetch(request: tuple[str, int, int]) -> int:
        key, start, stop = request
        data = obstore.get_range(bucket.store, key, start=start, end=stop)
        if write_to is not None:
            fd = os.open(write_to / key.replace("/", "_"), os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(fd, data, start)
            os.close(fd)
        return len(data)

    best = 0.0
    for threads in (2, 4, 8, 16):
        if write_to is not None:
            clear_away(write_to)
            write_to.mkdir()
        begun = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(fetch, requests))
        best = max(best, total / MiB / (time.monotonic() - begun))
    return best


def cold(run: Run, systems: list[type[System]], repeat: int) -> None:
    # A fresh mount over an empty cache is cold by itself. The page cache is not dropped: the store's files
    # would go with it, and the bare client, which is measured several times, would find them warm again.
    bucket = run.bucket
    for readers in (1, 4):
        keys = bucket.large[:readers] if readers > 1 else bucket.large[:2]
        run.note(f"cold sequential, {readers} readers, MiB/s", "client", store_best(bucket, keys))
        for kind in systems if repeat % 2 else reversed(systems):
            with mounted(kind(run.root, bucket.server.endpoint, BUCKET)) as system:
                os.sync()
                found = run.ask("read", [system.path(k) for k in keys], readers)
                run.note(
                    f"cold sequential, {readers} readers, MiB/s", system.name, run.rate(found, per="MiB")
                )
    for readers in (1, 8):
        keys = bucket.small[: len(bucket.small) // (2 if readers == 1 else 1)]
        for kind in systems if repeat % 2 else reversed(systems):
            with mounted(kind(run.root, bucket.server.endpoint, BUCKET)) as system:
                os.sync()
                before = bucket.server.requests("GetObject", "HeadObject")
                found = run.ask("read", shuffled([system.path(k) for k in keys]), readers)
                run.note(
                    f"cold small files, {readers} readers, files/s", system.name, run.rate(found, per="files")
                )
                after = bucket.server.requests("GetObject", "HeadObject")
                run.note(
                    f"object requests per small file, {readers} readers",
                    system.name,
                    (after - before) / len(keys),
                )


def prewarm(run: Run, repeat: int) -> None:
    bucket = run.bucket
    for what, keys in (("large", bucket.large[:4]), ("small", bucket.small)):
        amount = sum(bucket.sizes[k] for k in keys) / MiB
        run.note(f"prewarm {what}, MiB/s", "client", store_best(bucket, keys, write_to=run.root / "written"))
        clear_away(run.root / "written")
        with mounted(Datacache(run.root, bucket.server.endpoint, BUCKET)) as system:
            assert isinstance(system, Datacache)
            (run.root / "keys").write_text("\n".join("/" + k for k in keys))
            os.sync()
            begun = time.monotonic()
            system.command("load", str(system.mount), "--files-from", str(run.root / "keys"), "--json")
            run.note(f"prewarm {what}, MiB/s", "datacache", amount / (time.monotonic() - begun))
        rclone = Rclone(run.root, bucket.server.endpoint, BUCKET)
        os.sync()
        target = run.root / "copied"
        begun = time.monotonic()
        subprocess.run(
            [
                "rclone",
                "copy",
                f"b:{BUCKET}",
                str(target),
                "--files-from",
                str(run.root / "keys"),
                "--transfers",
                "16",
            ]
            + ["--config", os.devnull, "--no-traverse"],
            env=rclone.environment(),
            check=True,
            stderr=subprocess.DEVNULL,
        )
        run.note(f"prewarm {what}, MiB/s", "rclone", amount / (time.monotonic() - begun))
        clear_away(target)


def warm(run: Run, systems: list[type[System]], repeat: int) -> None:
    bucket = run.bucket
    large, small = bucket.large[:4], bucket.small

    def measure(name: str, path: Callable[[str], str], dropped: bool) -> None:
        state = "page cache dropped" if dropped else "kept"
        everything = [path(k) for k in small]
        work = [
            ("sequential, 1 reader, MiB/s", "read", [path(k) for k in large], 1, 0, "MiB"),
            ("sequential, 4 readers, MiB/s", "read", [path(k) for k in large], 4, 0, "MiB"),
            ("small files, 1 reader, files/s", "read", shuffled(everything), 1, 0, "files"),
            ("small files, 4 readers, files/s", "read", shuffled(everything), 4, 0, "files"),
            ("random 4 KiB, reads/s", "random", [path(large[0])], 1, 4000, "reads"),
            ("stat, files/s", "stat", everything, 1, 0, "files"),
            ("ls -l, entries/s", "list", sorted({str(Path(p).parent) for p in everything}), 1, 0, "entries"),
        ]
        for row, verb, paths, readers, count, per in work:
            if dropped:
                drop_page_cache()
            run.note(f"warm, {state}: {row}", name, run.rate(run.ask(verb, paths, readers, count), per=per))

    def native(key: str) -> str:
        return str(bucket.native / key)

    run.ask("read", [native(k) for k in large + small], 4)
    for dropped in (True, False):
        measure("native", native, dropped)
    for kind in systems if repeat % 2 else reversed(systems):
        with mounted(kind(run.root, bucket.server.endpoint, BUCKET)) as system:
            run.ask("read", [system.path(k) for k in large + small], 4)
            for dropped in (True, False):
                measure(system.name, system.path, dropped)
            run.note("memory of the daemon after all of it, MiB", system.name, system.memory() / MiB)


def amplification(run: Run) -> None:
    bucket = run.bucket
    for fill in ("range", "block"):
        system = Datacache(run.root, bucket.server.endpoint, BUCKET)
        system.options = ["--fill", fill]
        for work, size in (("random64", 65536), ("mmap", 4096)):
            with mounted(system):
                found = run.ask(work, [system.path(bucket.large[0])], 1, 400)
                reads = system.status()["reads"]
                assert isinstance(reads, dict)
                run.note(
                    f"bytes fetched per byte read, {work}, --fill {fill}",
                    "datacache",
                    reads["bytes_fetched"] / found["bytes"],
                )
                assert size * 400 == found["bytes"]


def sixty_four(run: Run) -> None:
    bucket = run.bucket
    with mounted(Datacache(run.root, bucket.server.endpoint, BUCKET)) as system:
        drop_page_cache()
        paths = [system.path(k) for k in bucket.large for _ in range(64 // len(bucket.large))]
        run.ask("read", paths, len(paths))
        run.note("memory of the daemon, 64 readers, MiB", "datacache", system.memory() / MiB)


def shuffled(paths: list[str]) -> list[str]:
    import random

    return random.Random(7).sample(paths, len(paths))


def report(run: Run) -> None:
    names = ["native", "client", "datacache", "rclone", "s3fs"]
    table = Table("work", *names, title=f"medians of {run.repeats}")
    for row, found in run.rows.items():
        cells = [f"{statistics.median(found[n]):,.1f}" if n in found else "" for n in names]
        table.add_row(row, *cells)
    Console(width=140).print(table)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    target = results / time.strftime("read-%Y%m%d-%H%M%S.json")
    target.write_text(json.dumps({"repeats": run.repeats, "rows": run.rows}, indent=1))
    print(f"written to {target.relative_to(HERE.parent)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="once each, on less data")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (default 3)")
    parser.add_argument(
        "--only", default="", help="comma-separated of cold, prewarm, warm, amplification, memory"
    )
    parser.add_argument("--systems", default="datacache,rclone,s3fs", help="which mounts to compare")
    parser.add_argument("--scratch", default="", help="a directory on a real disk with 10 GiB to spare")
    args = parser.parse_args()
    kinds = {"datacache": Datacache, "rclone": Rclone, "s3fs": S3fs}
    systems = [kinds[name] for name in args.systems.split(",")]
    only = set(filter(None, args.only.split(","))) or {"cold", "prewarm", "warm", "amplification", "memory"}
    repeats = 1 if args.quick else args.repeats
    scratch_at = tempfile.TemporaryDirectory(prefix="datacache-bench-", dir=args.scratch or None)
    with memory_kept(), scratch_at as scratch:
        root = Path(scratch)
        server = Server(root)
        try:
            size, small = (32 * MiB, 500) if args.quick else (256 * MiB, 5000)
            bucket = Bucket(root, server, large=4, small=small, size=size)
            run = Run(bucket, root, repeats)
            run.console.print(f"making {len(bucket.sizes)} objects")
            bucket.make()
            for repeat in range(repeats):
                if "cold" in only:
                    cold(run, systems, repeat)
                if "prewarm" in only:
                    prewarm(run, repeat)
                if "warm" in only:
                    warm(run, systems, repeat)
            if "amplification" in only:
                amplification(run)
            if "memory" in only:
                sixty_four(run)
            report(run)
        finally:
            server.close()


if __name__ == "__main__":
    main()
