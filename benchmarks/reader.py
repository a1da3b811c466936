"""
What a training job does to files, as a program of its own: read them, map them, stat them, list them.

Started by the benchmarks for each measurement, so that every system is asked by the same fresh process.
Prints one JSON object: seconds, bytes, operations.

    reader.py WORK READERS LIST [COUNT]

WORK is one of: read (each file whole, 1 MiB reads), stream (that, COUNT times, from outside of the page
cache), random (COUNT reads of 4 KiB of each file),
random64 (COUNT reads of 64 KiB), mmap (COUNT touches of pages), stat (each file), list (`ls -l` of
each directory). LIST is a file of paths. READERS processes share it.
"""

import json
import mmap
import os
import random
import sys
import time
from multiprocessing import get_context


def read(paths: list[str], count: int) -> tuple[int, int]:
    buffer = bytearray(1 << 20)
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while got := os.readv(fd, [buffer]):
            total += got
        os.close(fd)
    return total, len(paths)


def stream(paths: list[str], count: int) -> tuple[int, int]:
    """Each file `count` times, with the page cache told to forget it each time: all of it is asked for."""
    buffer = bytearray(1 << 20)
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        for _ in range(count):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(fd, 0, os.SEEK_SET)
            while got := os.readv(fd, [buffer]):
                total += got
        os.close(fd)
    return total, len(paths) * count


def random_reads(paths: list[str], count: int, size: int) -> tuple[int, int]:
    buffer = bytearray(size)
    rng = random.Random(1)
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        blocks = os.fstat(fd).st_size // size
        for _ in range(count):
            total += os.preadv(fd, [buffer], rng.randrange(blocks) * size)
        os.close(fd)
    return total, count * len(paths)


def touches(paths: list[str], count: int) -> tuple[int, int]:
    rng = random.Random(1)
    seen = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
            pages = len(view) // 4096
            for _ in range(count):
                seen += view[rng.randrange(pages) * 4096] >= 0
        os.close(fd)
    return seen * 4096, count * len(paths)


def stat(paths: list[str], count: int) -> tuple[int, int]:
    for path in paths:
        os.stat(path)
    return 0, len(paths)


def listing(paths: list[str], count: int) -> tuple[int, int]:
    entries = 0
    for path in paths:
        with os.scandir(path) as found:
            for entry in found:
                entry.stat(follow_symlinks=False)
                entries += 1
    return 0, entries


WORK = {
    "read": read,
    "stream": stream,
    "random": lambda paths, count: random_reads(paths, count, 4096),
    "random64": lambda paths, count: random_reads(paths, count, 65536),
    "mmap": touches,
    "stat": stat,
    "list": listing,
}


def share(work: str, paths: list[str], count: int, start: float, results) -> None:  # type: ignore[no-untyped-def]
    while time.monotonic() < start:
        time.sleep(0.0005)
    done = WORK[work](paths, count)
    results.put((*done, time.monotonic()))


def main() -> None:
    work, readers, source = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    with open(source) as lines:
        paths = lines.read().split("\n")
    context = get_context("fork")
    results = context.SimpleQueue()
    start = time.monotonic() + 0.1
    shares = [paths[i::readers] for i in range(readers)]
    children = [context.Process(target=share, args=(work, part, count, start, results)) for part in shares]
    for child in children:
        child.start()
    for child in children:
        child.join()
        if child.exitcode:
            sys.exit(f"a reader failed with {child.exitcode}")
    rows = [results.get() for _ in children]
    print(
        json.dumps(
            {
                "seconds": max(row[2] for row in rows) - start,
                "bytes": sum(row[0] for row in rows),
                "operations": sum(row[1] for row in rows),
            }
        )
    )


if __name__ == "__main__":
    main()
