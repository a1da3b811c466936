"""A reader that verifies all it sees: a program for `test_broker`. Arguments: the mount, the bucket, a seed.

It opens, reads, maps, stats and lists at random, and holds the mount against the bucket. Lines on
standard input: `hold` opens every file anew and keeps it, for reads and mapped; `worst` begins a new
measurement of the longest operation. Every line is answered by one of JSON: operations so far, the
longest in seconds, and what was wrong. It ends with its input.
"""

import json
import mmap
import os
import random
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

SPAN = 60_000
"""Bytes of a read at most."""


class Reader:
    """One process of the load."""

    def __init__(self, mount: Path, bucket: Path, seed: int) -> None:
        self.mount, self.bucket = mount, bucket
        self.random = random.Random(seed)
        self.names = sorted(path.name for path in bucket.iterdir() if path.is_file())
        self.truth = {name: os.open(bucket / name, os.O_RDONLY) for name in self.names}
        self.sizes = {name: os.fstat(file).st_size for name, file in self.truth.items()}
        self.held: dict[str, tuple[int, mmap.mmap]] = {}
        self.walk = os.scandir(mount / "many")
        self.walked: list[str] = []
        self.errors: list[str] = []
        self.operations, self.worst = 0, 0.0

    def run(self) -> None:
        actions = (self.reopen, self.read_held, self.touch_mapped, self.stat, self.list, self.step, self.step)
        while True:
            if select.select([0], [], [], 0)[0]:
                line = sys.stdin.readline()
                if not line:
                    return
                self.obey(line.strip())
            self.timed(self.random.choice(actions))

    def obey(self, command: str) -> None:
        if command == "hold":
            self.timed(self.hold)
        said = {"operations": self.operations, "worst": self.worst, "errors": self.errors[:5]}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        if command == "worst":
            self.worst = 0.0

    def timed(self, action: Callable[[], None]) -> None:
        begun = time.monotonic()
        try:
            action()
        except Exception as error:
            self.errors.append(f"{action.__name__}: {type(error).__name__}: {error}")
        self.operations += 1
        self.worst = max(self.worst, time.monotonic() - begun)

    def hold(self) -> None:
        for file, mapping in self.held.values():
            os.close(file)
            mapping.close()
        self.held.clear()
        for name in self.names:
            file = os.open(self.mount / name, os.O_RDONLY)
            self.held[name] = file, mmap.mmap(file, 0, mmap.MAP_SHARED, mmap.PROT_READ)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)

    def place(self, name: str) -> tuple[int, bytes]:
        """Somewhere in a file, and what is there."""
        size = self.sizes[name]
        at = self.random.randrange(max(1, size - SPAN))
        return at, os.pread(self.truth[name], self.random.randint(1, SPAN), at)

    def check(self, what: str, seen: bytes, expected: bytes) -> None:
        if seen != expected:
            self.errors.append(f"{what}: {len(seen)} bytes differ from the {len(expected)} of the store")

    def reopen(self) -> None:
        name = self.random.choice(self.names)
        file = os.open(self.mount / name, os.O_RDONLY)
        try:
            at, expected = self.place(name)
            self.check(f"{name} from {at}, opened anew", os.pread(file, len(expected), at), expected)
        finally:
            os.close(file)

    def read_held(self) -> None:
        if self.held:
            name = self.random.choice(self.names)
            at, expected = self.place(name)
            self.check(f"{name} from {at}, held", os.pread(self.held[name][0], len(expected), at), expected)

    def touch_mapped(self) -> None:
        if self.held:
            name = self.random.choice(self.names)
            at, expected = self.place(name)
            mapping = self.held[name][1]
            self.check(f"{name} from {at}, mapped", mapping[at : at + len(expected)], expected)

    def stat(self) -> None:
        name = self.random.choice(self.names)
        size = os.stat(self.mount / name).st_size
        if size != self.sizes[name]:
            self.errors.append(f"{name} has {size} bytes, not {self.sizes[name]}")
        if self.held and (size := os.fstat(self.held[name][0]).st_size) != self.sizes[name]:
            self.errors.append(f"{name}, held, has {size} bytes, not {self.sizes[name]}")

    def list(self) -> None:
        if sorted(os.listdir(self.mount)) != sorted([*self.names, "many"]):
            self.errors.append("the listing differs")

    def step(self) -> None:
        """A few names further in a directory that is iterated over slowly, across many kills."""
        for _ in range(40):
            entry = next(self.walk, None)
            if entry is None:
                if sorted(self.walked) != sorted(os.listdir(self.bucket / "many")):
                    self.errors.append(f"an iteration found {len(self.walked)} names")
                self.walked, self.walk = [], os.scandir(self.mount / "many")
                return
            self.walked.append(entry.name)


if __name__ == "__main__":
    Reader(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).run()
