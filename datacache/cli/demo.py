"""
`datacache demo`: a bucket, mounted and read for two epochs, on one machine, in three minutes.

Does what a user would do, with the commands a user would type, and prints what each step cost beside
the same files natively. Where FUSE cannot be had it reads through the Python reader instead.
"""

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datacache.cli.s3server import ENDING, S3Server, end, find_versitygw, moto, uninterrupted, versitygw
from datacache.cli.tables import count
from datacache.clock import SystemClock
from datacache.errors import DatacacheError, SettingError
from datacache.model import MiB, format_size

T = TypeVar("T")
R = TypeVar("R")

SMALL = MiB
"""Objects up to this size count as small in the table: they must cost one store request each."""
LARGE_NAMED = 2
"""Large files that are told by name."""
CHILD_TIMEOUT = 60.0
"""Seconds that a command which was interrupted has to take down what it has begun."""
MOTO_FILES, MOTO_LARGEST = 800, 2 * MiB
"""What moto can carry: it answers about 100 requests a second and copies the object for each range."""


@dataclass(frozen=True)
class Sample:
    """The files that the demo puts into its bucket."""

    root: Path
    files: tuple[tuple[str, int], ...]
    """Key and size."""

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def described(self) -> str:
        """Which files these are: how many small ones, the large ones by name."""
        large = sorted(((size, key) for key, size in self.files if size > SMALL), reverse=True)
        small = f"{len(self.files) - len(large):,} files of up to {format_size(SMALL)}"
        if not large:
            return small
        named = ", ".join(key.rpartition("/")[2] for _, key in large[:LARGE_NAMED])
        more = f", and {len(large) - LARGE_NAMED} more" if len(large) > LARGE_NAMED else ""
        return f"{small}, {len(large)} larger ({named}{more})"


@dataclass(frozen=True)
class Measured:
    """One pass over all files."""

    name: str
    seconds: float
    files: int
    bytes: int
    daemon_requests: int | None = None
    """FUSE requests that the daemon answered; None where none could have been made."""
    asked: Counter[str] | None = None
    """How often the store was asked for each object."""

    def per_object(self, sample: "Sample", *, small: bool) -> float | None:
        """Store requests per small (or large) object that has any bytes to ask for."""
        keys = [key for key, size in sample.files if size and (size <= SMALL) == small]
        if self.asked is None or not keys:
            return None
        return sum(self.asked[key] for key in keys) / len(keys)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `datacache demo`."""
    parser.description = (
        "Fill a bucket of its own, mount it, prewarm it, read two shuffled epochs, and say what each cost "
        "beside native files. It leaves nothing behind."
    )
    parser.add_argument("--data", metavar="DIR", help="files to fill the bucket with (default: Python's own)")
    parser.add_argument(
        "--s3",
        metavar="URL",
        help="endpoint of your own S3 server; credentials from the environment; a bucket is made and removed",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when everything worked."""
    console = Console(highlight=False)
    if args.s3 and not re.match(r"https?://[^/]", args.s3):
        raise SettingError("--s3", args.s3, "a URL such as http://127.0.0.1:9000")
    with contextlib.ExitStack() as stack:
        for number in ENDING:  # first, so that they are restored last
            stack.callback(signal.signal, number, signal.getsignal(number))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="datacache-demo-")))
        server = stack.enter_context(_server(args.s3))
        sample = _sample(Path(args.data) if args.data else None, slow=server.kind == "moto")
        console.print(
            f"[bold]{server.kind}[/] at {server.endpoint}; "
            f"{format_size(sample.bytes)} of {sample.root}: {sample.described}",
            soft_wrap=True,
        )
        try:
            bucket = stack.enter_context(_bucket(server, sample, console))
            results = _tour(server, bucket, sample, scratch, stack, console)
            console.print(_table(sample, results))
            return 0 if _honest(sample, results, console) else 1
        except KeyboardInterrupt:
            console.print("interrupted: taking everything down")
            raise
        finally:
            # From here on a Ctrl-C, a second one too, would leave behind what is being taken down.
            for number in ENDING:
                signal.signal(number, signal.SIG_IGN)


# ---- the bucket -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(endpoint: str | None) -> Iterator[S3Server]:
    if endpoint:
        yield S3Server("your server", endpoint, {}, Counter)
    elif binary := find_versitygw():
        with versitygw(binary) as server:
            yield server
    else:
        with moto() as server:
            yield server


def _sample(root: Path | None, *, slow: bool) -> Sample:
    if root is not None and not root.is_dir():
        raise SettingError("--data", str(root), "a directory with files")
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in ("__pycache__", "site-packages"))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or path.is_symlink() or not path.is_file():
                continue
            size = path.stat().st_size
            if not slow or size <= MOTO_LARGEST:
                files.append((str(path.relative_to(root)), size))
    if slow:
        files = files[:: max(1, len(files) // MOTO_FILES)]
    if not files:
        raise SettingError("--data", str(root), "a directory with files")
    return Sample(root, tuple(files))


@contextlib.contextmanager
def _bucket(server: S3Server, sample: Sample, console: Console) -> Iterator[str]:
    from datacache.sources.aws import open_client

    bucket = f"datacache-demo-{secrets.token_hex(4)}"
    environment = {**os.environ, **server.environment}
    client = open_client(bucket, endpoint=server.endpoint, environment=environment, clock=SystemClock())
    client.create()

    def put(file: tuple[str, int]) -> None:
        client.put(file[0], (sample.root / file[0]).read_bytes())

    def delete(file: tuple[str, int]) -> None:
        client.delete(file[0])

    try:
        _each("filling the bucket", sample.files, put, console, threads=4)
        yield bucket
    finally:
        if server.kind == "your server":  # ours forgets all by itself
            _each("emptying the bucket", sample.files, delete, console, threads=8)
            client.drop()
        client.close()


# ---- the tour -------------------------------------------------------------------------------------


def _tour(
    server: S3Server,
    bucket: str,
    sample: Sample,
    scratch: Path,
    stack: contextlib.ExitStack,
    console: Console,
) -> list[Measured]:
    """Cold, prewarmed and second epoch through the mount (or the reader), and natively."""
    from fuse import mountpoint

    memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="datacache-demo-", dir="/dev/shm")))
    tiers = [f"mem:{memory}={64 * MiB}", f"ssd:{scratch / 'ssd'}={2 * sample.bytes + 256 * MiB}"]
    (scratch / "ssd").mkdir()
    shell = _Shell(scratch, server, console)
    results = [Measured("native directory", *_read_all("native", sample.root, sample, console))]
    mount = scratch / "mnt"
    mount.mkdir()
    words = ["mount", f"s3://{bucket}", str(mount), "--endpoint", server.endpoint, "--name", "demo"]
    words += [word for tier in tiers for word in ("--cache", tier)]
    if not (obstacle := mountpoint.obstacle()):
        stack.callback(shell.leave, mount)  # first: it may be mounted when we are interrupted here
        try:
            shell.say(*words)
        except DatacacheError as refused:
            # Some containers show /dev/fuse and refuse the mount.
            if "cannot mount on" not in str(refused):
                raise
            obstacle = str(refused)
    if obstacle:
        console.print(
            f"[yellow]no FUSE here ({escape(obstacle)}): reading through the Python reader instead[/]",
            soft_wrap=True,
        )
        return results + _reader_tour(server, bucket, tiers, scratch, sample, console)

    def epoch(name: str) -> None:
        before, asked = shell.mount_requests(mount), server.asked()
        found = _read_all(name, mount, sample, console)
        requests = shell.mount_requests(mount) - before
        results.append(Measured(name, *found, requests, _asked(server, bucket, since=asked)))

    epoch("cold epoch")
    # Mounted anew, or the kernel would still have the pages of the cold epoch, and the cache be idle.
    shell.say("evict", str(mount))
    shell.say("umount", str(mount))
    shell.say(*words)
    asked, begun = server.asked(), time.monotonic()
    shell.say("load", str(mount), live=True)
    seconds = time.monotonic() - begun
    after = _asked(server, bucket, since=asked)
    results.append(Measured("prewarm (load)", seconds, len(sample.files), sample.bytes, None, after))
    epoch("prewarmed epoch")
    epoch("second epoch")
    shell.say("status", str(mount), live=True)
    return results


class _Shell:
    """Runs our own commands as a user would, in directories of the demo's own."""

    def __init__(self, scratch: Path, server: S3Server, console: Console) -> None:
        (scratch / "run").mkdir()
        own = {"XDG_STATE_HOME": str(scratch / "state"), "XDG_RUNTIME_DIR": str(scratch / "run")}
        self._environment = {**os.environ, **server.environment, **own}
        self._console = console

    def say(self, *words: str, live: bool = False) -> str:
        """Print and run a command; its output is shown (`live`) or returned."""
        self._console.print(f"[dim]$ datacache {' '.join(words)}[/]", soft_wrap=True)
        return self._run(*words, live=live)

    def _run(self, *words: str, live: bool = False) -> str:
        command = [sys.executable, "-m", "datacache.cli.main", *words]
        to = None if live else subprocess.PIPE
        child = None
        try:
            with uninterrupted():
                child = subprocess.Popen(command, env=self._environment, stdout=to, stderr=to, text=True)
            out, err = child.communicate()
        except BaseException:
            # It is not killed, as by subprocess.run: a `mount` that is interrupted ends its daemon.
            if child is not None:
                end(child, patience=CHILD_TIMEOUT)
            raise
        if child.returncode:
            reason = (err or "").strip().removeprefix("datacache: error: ")
            raise DatacacheError(f"datacache {words[0]} failed: {reason or 'it said why above'}")
        return out or ""

    def mount_requests(self, mount: Path) -> int:
        """FUSE requests that the daemon has answered so far."""
        status = json.loads(self._run("status", str(mount), "--json"))
        one = status[0] if isinstance(status, list) else status
        return sum(one["mount_requests"].values())

    def leave(self, mount: Path) -> None:
        """Unmount, whatever happened before; by force where somebody else is in there."""
        for how in ((), ("--force",), ("--lazy",)):  # not everybody may use force
            with contextlib.suppress(DatacacheError):
                self._run("umount", str(mount), *how)
                return


def _reader_tour(
    server: S3Server, bucket: str, tiers: list[str], scratch: Path, sample: Sample, console: Console
) -> list[Measured]:
    from datacache.config.parsing import read_settings
    from datacache.reading.job import LoadRequest
    from datacache.worker import Worker

    settings = read_settings(
        {"uri": [f"s3://{bucket}"], "endpoint": server.endpoint, "name": "demo", "cache": tiers},
        config_file=None,
        environment={
            **os.environ,
            **server.environment,
            "XDG_STATE_HOME": str(scratch / "state"),
            "XDG_RUNTIME_DIR": str(scratch / "run"),
        },
    )
    results = []
    with Worker(settings) as worker:

        def read(key: str) -> int:
            opened = worker.reader.open(worker.index.resolve("/" + key))
            try:
                return sum(len(opened.read(at, MiB)) for at in range(0, max(1, opened.entry.size), MiB))
            finally:
                opened.close()

        def measured(name: str, work: Callable[[], int]) -> None:
            asked, begun = server.asked(), time.monotonic()
            total = work()
            seconds = time.monotonic() - begun
            after = _asked(server, bucket, since=asked)
            results.append(Measured(name, seconds, len(sample.files), total, None, after))

        def epoch(name: str) -> None:
            files = random.Random(name).sample(sample.files, len(sample.files))
            measured(name, lambda: sum(_each(name, files, lambda file: read(file[0]), console, threads=4)))

        def load() -> int:
            done = worker.loads.wait(worker.load(LoadRequest()))
            if done.state != "done":
                raise DatacacheError(f"load: {done.state}, {count(done.files_failed, 'file')} failed")
            return done.bytes_fetched

        epoch("cold epoch")
        worker.evict("/")
        measured("prewarm (load)", load)
        epoch("prewarmed epoch")
        epoch("second epoch")
    return results


def _asked(server: S3Server, bucket: str, *, since: "Counter[str]") -> "Counter[str] | None":
    """Requests per key since then; None where the server is not ours to ask."""
    if server.kind == "your server":
        return None
    found = server.asked()
    found.subtract(since)
    return Counter({path.removeprefix(f"/{bucket}/"): times for path, times in found.items()})


def _read_all(name: str, root: Path, sample: Sample, console: Console) -> tuple[float, int, int]:
    """Read every file once, in a new order; seconds, files and bytes. Contents are compared by length."""

    def read(file: tuple[str, int]) -> int:
        fd = os.open(root / file[0], os.O_RDONLY)
        try:
            total = 0
            while got := len(os.read(fd, MiB)):
                total += got
            return total
        finally:
            os.close(fd)

    files = random.Random(name).sample(sample.files, len(sample.files))
    begun = time.monotonic()
    sizes = _each(name, files, read, console, threads=4)
    seconds = time.monotonic() - begun
    if sizes != [size for _, size in files]:
        raise DatacacheError(f"{name}: a file has another length than its original")
    return seconds, len(files), sum(sizes)


def _each(
    name: str, items: Sequence[T], work: Callable[[T], R], console: Console, *, threads: int
) -> list[R]:
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True) as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        task = progress.add_task(name, total=len(items))
        results = []
        try:
            for result in pool.map(work, items):
                results.append(result)
                progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return results


# ---- what it says at the end ------------------------------------------------------------------------


def _table(sample: Sample, results: list[Measured]) -> Table:
    title = f"{len(sample.files)} files, {format_size(sample.bytes)}, 4 readers, shuffled"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("seconds", "files/s", "bytes/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("daemon requests per file", "store requests per small object", "per large object"):
        table.add_column(column, justify="right", min_width=8)
    for row in results:
        table.add_row(
            row.name,
            f"{row.seconds:.1f}",
            f"{row.files / row.seconds:,.0f}",
            f"{format_size(row.bytes / row.seconds)}/s",
            "" if row.daemon_requests is None else f"{row.daemon_requests / row.files:.2f}",
            *(
                "" if n is None else f"{n:.2f}"
                for n in (row.per_object(sample, small=s) for s in (True, False))
            ),
        )
    return table


def _honest(sample: Sample, results: list[Measured], console: Console) -> bool:
    """Whether the store was asked once per small object when cold, and never when warm."""
    wanted = {"cold epoch": 1, "prewarm (load)": 1, "prewarmed epoch": 0, "second epoch": 0}
    found = [(row.name, row.per_object(sample, small=True)) for row in results if row.name in wanted]
    wrong = [(name, n) for name, n in found if n is not None and n != wanted[name]]
    for name, n in wrong:
        console.print(f"[red]{name}: {n:.2f} store requests per small object, not {wanted[name]}[/]")
    return not wrong


__all__ = ["add_arguments", "run"]
