"""
One file under random operations, against a bytearray.

What is done follows from the seed alone, so a run can be had again:

    python -m tests.support.exerciser PATH --seed 7 --count 10000

Each operation that reads compares; now and then all of the file is compared, by the descriptor that is
open and by one of its own.
"""

import argparse
import contextlib
import ctypes
import errno
import mmap
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence

LARGEST = 256 * 1024
"""Bytes of the file at most."""
PIECE = 64 * 1024
"""Bytes of one operation at most."""
BLOCK = 4096
_KEEP_SIZE, _PUNCH, _ZERO = 1, 2, 16  # of fallocate(2)
_REFUSED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Wrong(AssertionError):
    """The file is not what it should be."""


class Exerciser:
    """See the module. `between` is called now and then while the file is closed."""

    def __init__(
        self, path: str, seed: int, *, between: Callable[[], object] = lambda: None, history: int = 30
    ) -> None:
        self.path, self.seed, self._between = path, seed, between
        self.model = bytearray()
        self.done = 0
        self.refused: set[str] = set()
        """Operations that this file system does not have."""
        self._rng = random.Random(seed)
        self._latest: deque[str] = deque(maxlen=history)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._work: Sequence[tuple[int, Callable[[], str]]] = (
            (18, self._read), (22, self._write), (6, self._append), (8, self._truncate), (4, self._punch),
            (3, self._zero), (4, self._allocate), (8, self._read_mapped), (10, self._write_mapped),
            (6, self._reopen), (2, self._reopen_empty), (3, self._sync), (3, self._look), (2, self._direct),
            (2, self._rename), (2, self._drop), (2, self._copy), (2, self._truncate_by_name),
        )  # fmt: skip

    def run(self, count: int) -> "Exerciser":
        """Do `count` operations, and close the file."""
        weights, calls = zip(*self._work, strict=True)
        try:
            for _ in range(count):
                call = self._rng.choices(calls, weights)[0]
                self._latest.append(call.__name__)
                self._latest[-1] = f"{self.done}: {call.__name__.lstrip('_')} {call()}"
                self.done += 1
            self._look()
        except BaseException as error:
            self._latest.append(f"{self.done}: {error!r}")
            raise Wrong(
                f"seed {self.seed}, operation {self.done}: {error}\n" + "\n".join(self._latest)
            ) from error
        finally:
            os.close(self._fd)
        return self

    # ---- operations ------------------------------------------------------------------------------

    def _span(self, *, beyond: bool) -> tuple[int, int]:
        """Where, and how much; often at the borders of pages."""
        rng = self._rng
        limit = LARGEST - 1 if beyond else max(0, len(self.model) - 1)
        offset, length = rng.randrange(limit + 1), rng.randrange(1, PIECE)
        if rng.random() < 0.3:
            offset -= offset % BLOCK
        if rng.random() < 0.3:
            length = rng.choice((1, BLOCK - 1, BLOCK, BLOCK + 1))
        stop = LARGEST if beyond else len(self.model)
        return offset, max(0, min(length, stop - offset))

    def _bytes(self, length: int) -> bytes:
        return self._rng.randbytes(length)

    def _put(self, offset: int, data: bytes) -> None:
        if data:
            if offset > len(self.model):
                self.model.extend(bytes(offset - len(self.model)))
            self.model[offset : offset + len(data)] = data

    def _same(self, found: bytes, offset: int, length: int, what: str) -> None:
        wanted = bytes(self.model[offset : offset + length])
        if found != wanted:
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
            raise Wrong(
                f"{what} of {length} at {offset}: {len(found)} bytes, {len(wanted)} expected, and the first "
                f"difference at {offset + at if at >= 0 else 'the end'} of {len(self.model)}"
            )

    def _read(self) -> str:
        offset, length = self._span(beyond=False)
        self._same(os.pread(self._fd, length + 10, offset), offset, length + 10, "read")
        return f"{length} at {offset}"

    def _write(self) -> str:
        offset, length = self._span(beyond=True)
        data = self._bytes(length)
        done = os.pwrite(self._fd, data, offset)
        if done != length:
            raise Wrong(f"{done} bytes of {length} were written")
        self._put(offset, data)
        return f"{length} at {offset}"

    def _append(self) -> str:
        data = self._bytes(self._rng.randrange(1, 3000))
        if len(self.model) + len(data) > LARGEST:
            return "no room"
        with open(self.path, "ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise Wrong("not all of it was appended")
        self._put(len(self.model), data)
        return str(len(data))

    def _cut(self, size: int) -> None:
        if size <= len(self.model):
            del self.model[size:]
        else:
            self.model.extend(bytes(size - len(self.model)))

    def _truncate(self) -> str:
        size = self._rng.randrange(LARGEST)
        os.ftruncate(self._fd, size)
        self._cut(size)
        return str(size)

    def _truncate_by_name(self) -> str:
        size = self._rng.randrange(LARGEST)
        os.truncate(self.path, size)
        self._cut(size)
        return str(size)

    def _fallocate(self, name: str, mode: int, offset: int, length: int) -> bool:
        if _libc.fallocate(self._fd, mode, offset, length):
            number = ctypes.get_errno()
            if number not in _REFUSED:
                raise OSError(number, os.strerror(number))
            self.refused.add(name)
            return False
        return True

    def _punch(self) -> str:
        offset, length = self._span(beyond=False)
        if length and self._fallocate("punch", _PUNCH | _KEEP_SIZE, offset, length):
            self.model[offset : offset + length] = bytes(length)
        return f"{length} at {offset}"

    def _zero(self) -> str:
        offset, length = self._span(beyond=True)
        keep = self._rng.random() < 0.5
        if length and self._fallocate("zero", _ZERO | (_KEEP_SIZE if keep else 0), offset, length):
            if keep:
                length = max(0, min(length, len(self.model) - offset))
            self._put(offset, bytes(length))
        return f"{length} at {offset}{', keeping the size' if keep else ''}"

    def _allocate(self) -> str:
        offset, length = self._span(beyond=True)
        keep = self._rng.random() < 0.5
        allocated = length and self._fallocate("allocate", _KEEP_SIZE if keep else 0, offset, length)
        if allocated and not keep and offset + length > len(self.model):
            self._cut(offset + length)
        return f"{length} at {offset}{', keeping the size' if keep else ''}"

    def _read_mapped(self) -> str:
        offset, length = self._span(beyond=False)
        if length:
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            with mmap.mmap(self._fd, offset + length - start, prot=mmap.PROT_READ, offset=start) as mapped:
                self._same(mapped[offset - start :], offset, length, "mapped read")
        return f"{length} at {offset}"

    def _write_mapped(self) -> str:
        offset, length = self._span(beyond=True)
        if not length:
            return "nothing"
        if offset + length > len(self.model):
            os.ftruncate(self._fd, offset + length)
            self._cut(offset + length)
        data, start = self._bytes(length), offset - offset % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(self._fd, offset + length - start, offset=start) as mapped:
            mapped[offset - start :] = data
            if self._rng.random() < 0.5:
                mapped.flush()
        self._put(offset, data)
        return f"{length} at {offset}"

    def _reopen(self) -> str:
        os.close(self._fd)
        if self._rng.random() < 0.5:
            self._between()
        if self._rng.random() < 0.3:
            with open(self.path, "rb", buffering=0) as file:
                self._same(file.read(), 0, LARGEST, "read of the closed file")
        self._fd = os.open(self.path, os.O_RDWR)
        return ""

    def _reopen_empty(self) -> str:
        os.close(self._fd)
        if self._rng.random() < 0.5:
            self._between()
        self._fd = os.open(self.path, os.O_RDWR | os.O_TRUNC | os.O_CREAT)
        self.model.clear()
        return ""

    def _sync(self) -> str:
        (os.fsync if self._rng.random() < 0.5 else os.fdatasync)(self._fd)
        return ""

    def _look(self) -> str:
        """All of it, in each way."""
        for size in (os.fstat(self._fd).st_size, os.stat(self.path).st_size):
            if size != len(self.model):
                raise Wrong(f"it is {size} bytes long, and should be {len(self.model)}")
        self._same(os.pread(self._fd, LARGEST + 1, 0), 0, LARGEST + 1, "read of all")
        with open(self.path, "rb", buffering=0) as file:
            self._same(file.read(), 0, LARGEST + 1, "read of all by another")
        return ""

    def _direct(self) -> str:
        """O_DIRECT, in whole blocks."""
        blocks = self._rng.randrange(1, 5)
        offset = self._rng.randrange(LARGEST // BLOCK - blocks) * BLOCK
        with contextlib.ExitStack() as opened:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self.refused.add("direct")
                return "refused"
            opened.callback(os.close, fd)
            buffer = opened.enter_context(mmap.mmap(-1, blocks * BLOCK))
            buffer[:] = data = self._bytes(blocks * BLOCK)
            if os.pwrite(fd, buffer, offset) != len(data):
                raise Wrong("not all of it was written directly")
            self._put(offset, data)
            if os.preadv(fd, [buffer], offset) != len(data) or buffer[:] != data:
                raise Wrong("what was written directly is not read so")
        return f"{blocks * BLOCK} at {offset}"

    def _rename(self) -> str:
        """To and fro; its writers do not notice."""
        os.rename(self.path, self.path + ".other")
        if self._rng.random() < 0.5:
            self._look_at(self.path + ".other")
        os.rename(self.path + ".other", self.path)
        return ""

    def _look_at(self, path: str) -> None:
        with open(path, "rb", buffering=0) as file:
            self._same(file.read(), 0, LARGEST + 1, "read under another name")

    def _drop(self) -> str:
        """Let the kernel forget the pages."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return ""

    def _copy(self) -> str:
        """Within the file."""
        offset, length = self._span(beyond=False)
        target = self._rng.randrange(LARGEST - PIECE)
        if not length or (offset < target + length and target < offset + length):
            return "nothing"
        try:
            done = os.copy_file_range(self._fd, self._fd, length, offset, target)
        except OSError as error:
            if error.errno not in (*_REFUSED, errno.EXDEV):
                raise
            self.refused.add("copy")
            return "refused"
        self._put(target, bytes(self.model[offset : offset + done]))
        return f"{done} from {offset} to {target}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Random operations on one file, against a bytearray.")
    parser.add_argument("path")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--count", type=int, default=10_000)
    chosen = parser.parse_args(arguments)
    sys.stderr.write(f"seed {chosen.seed}, {chosen.count} operations\n")
    try:
        done = Exerciser(chosen.path, chosen.seed).run(chosen.count)
    except Wrong as wrong:
        sys.exit(str(wrong))
    sys.stderr.write(f"right; refused: {', '.join(sorted(done.refused)) or 'nothing'}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
