"""What benchmarks/write.py has done to a directory, in a process of its own; prints one JSON object.

writer.py sequential DIR FILES BYTES         1 MiB writes, fsync at the end of each file
writer.py small DIR COUNT BYTES WRITERS SYNC create, write, close; SYNC "all": fsync of file and directory
writer.py latency FILE COUNT                 reads of 4 KiB at random places
"""

import json
import os
import random
import sys
import threading
import time

MiB = 1 << 20


def sequential(where: str, files: int, size: int) -> dict[str, float]:
    piece = os.urandom(MiB)
    began = time.monotonic()
    for number in range(files):
        descriptor = os.open(f"{where}/seq-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for _ in range(size // MiB):
            os.write(descriptor, piece)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"bytes": files * size, "seconds": time.monotonic() - began}


def small(where: str, count: int, size: int, writers: int, sync: str) -> dict[str, float]:
    data = os.urandom(size)
    directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY)

    def work(first: int) -> None:
        for number in range(first, count, writers):
            descriptor = os.open(f"{where}/{number:05}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(descriptor, data)
            if sync == "all":
                os.fsync(descriptor)
            os.close(descriptor)
            if sync == "all":
                os.fsync(directory)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(writers)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    os.close(directory)
    return {"operations": count, "seconds": seconds}


def latency(path: str, count: int) -> dict[str, float]:
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    while os.read(descriptor, MiB):
        pass
    rng, taken = random.Random(1), []
    for _ in range(count):
        at = rng.randrange(size // 4096) * 4096
        began = time.perf_counter()
        os.pread(descriptor, 4096, at)
        taken.append(time.perf_counter() - began)
    os.close(descriptor)
    taken.sort()
    return {"p50": taken[count // 2], "p99": taken[count * 99 // 100]}


def main() -> None:
    work, where, *words = sys.argv[1:]
    if work == "sequential":
        found = sequential(where, *map(int, words))
    elif work == "small":
        found = small(where, *map(int, words[:3]), words[3])
    else:
        found = latency(where, int(words[0]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
