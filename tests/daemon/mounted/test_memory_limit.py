"""
A reader with a limit of memory, as a pod has one, of a data set of four times that: what the kernel keeps of
it is charged to the reader, and given up when the limit is reached. It is neither killed nor stalled.
"""

import json
import os
import random
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.clock import SystemClock
from datacache.config.settings import IO, IndexSettings
from datacache.index.snapshot import create_snapshot
from datacache.model import MiB
from datacache.reading.job import LoadRequest
from datacache.worker import opened_sources
from tests.daemon.mounted.conftest import Start
from tests.support.memory_group import memory_group
from tests.support.reading import until

LIMIT = 48 * MiB
FILE = 3 * MiB
FILES = 4 * LIMIT // FILE
STALL = 10.0
"""Seconds that one read may take: on this machine others are at work, too."""

READER = """
import json, mmap, os, sys, time, zlib
directory, way = sys.argv[1:]
longest = 0.0
sums = {}
for epoch in range(3):
    for name in sorted(os.listdir(directory), key=lambda name: zlib.crc32(f"{epoch}{name}".encode())):
        begun, total = time.monotonic(), 0
        with open(f"{directory}/{name}", "rb", buffering=0) as file:
            if way == "mmap":
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                    total = zlib.crc32(mapped)
            else:
                while piece := file.read(1 << 18):
                    total = zlib.crc32(piece, total)
        longest = max(longest, time.monotonic() - begun)
        assert sums.setdefault(name, total) == total
print(json.dumps({"longest": longest, "sums": sums}))
"""


@pytest.mark.parametrize("driver", ["native"], indirect=True)
@pytest.mark.parametrize("way", ["read", "mmap"])
@pytest.mark.parametrize("io", [IO.PASSTHROUGH, IO.PAGECACHE])
def test_four_times_the_limit_neither_kills_nor_stalls(
    daemon: Start, bucket: Path, tmp_path: Path, io: IO, way: str
) -> None:
    """Three epochs, each in an order of its own, of files that are cached whole; with passthrough, and with
    what the kernel keeps by itself (no requests for opens)."""
    rng = random.Random(7)
    sums = {}
    for i in range(FILES):
        data = rng.randbytes(FILE)
        (bucket / f"f{i:02}").write_bytes(data)
        sums[f"f{i:02}"] = zlib.crc32(data)
    one = daemon(io=io, start=False)
    if io is IO.PAGECACHE:
        with opened_sources(one.settings, clock=SystemClock()) as (dataset, sources, _):
            create_snapshot(dataset, sources, state=one.settings.state, name="one", clock=SystemClock())
        one.settings = replace(one.settings, index=IndexSettings(snapshot="one"))
    one.start()
    assert one.answer.get("ok"), one.log.read_text()
    control = one.control()
    job = control.load(LoadRequest())
    until(lambda: control.load_status(job).state != "running", 60)
    assert control.load_status(job).files_done == FILES
    # What was written into the cache is in memory still, charged to nobody here: the reader is to bring it.
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    with memory_group(f"{io}-{way}", LIMIT) as group:
        done = subprocess.run(
            ["sh", "-c", 'echo $$ > "$1" && shift && exec "$@"', "sh", str(group.procs), sys.executable, "-c",
             READER, str(one.directory), way],
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
        assert group.kills() == 0
        assert group.bounced() > 0, "the limit was never reached: nothing was shown"
    said = json.loads(done.stdout)
    assert said["sums"] == sums
    assert said["longest"] < STALL
