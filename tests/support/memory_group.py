"""A control group with a limit of memory, as a pod has one; of either version of cgroups, made by hand."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryGroup:
    """One that exists. Whoever writes his pid into `procs` is in it."""

    def __init__(self, path: Path, *, unified: bool) -> None:
        self._path, self._unified = path, unified

    @property
    def procs(self) -> Path:
        return self._path / "cgroup.procs"

    def kills(self) -> int:
        """Processes that were killed because of the limit."""
        return self._count("memory.events" if self._unified else "memory.oom_control", "oom_kill")

    def bounced(self) -> int:
        """How often the limit was reached, and memory had to be given up for more."""
        if self._unified:
            return self._count("memory.events", "max")
        return int((self._path / "memory.failcnt").read_text())

    def _count(self, file: str, name: str) -> int:
        words = (self._path / file).read_text().split()
        return int(words[words.index(name) + 1])


@contextlib.contextmanager
def memory_group(name: str, limit: int) -> Iterator[MemoryGroup]:
    """A group whose processes together, page cache included, may have `limit` bytes. Skips where none can be
    made."""
    unified = not (_V1 / "memory.limit_in_bytes").exists()
    path = (_V2 if unified else _V1) / f"datacache-test-{name}-{os.getpid()}"
    try:
        path.mkdir()
        try:
            if unified:
                (path / "memory.max").write_text(str(limit))
                with contextlib.suppress(OSError):
                    (path / "memory.swap.max").write_text("0")
            else:
                (path / "memory.limit_in_bytes").write_text(str(limit))
        except OSError:
            path.rmdir()
            raise
    except OSError as error:
        pytest.skip(f"no control group with a limit of memory can be made here: {error}")
    try:
        yield MemoryGroup(path, unified=unified)
    finally:
        path.rmdir()
