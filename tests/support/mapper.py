"""
Another process that reads a cached file without us, as the kernel does after a passthrough open: it
maps the file, closes the descriptor, and keeps the mapping until it is told to end.
"""

import hashlib
import subprocess
import sys

_CHILD = """
import ctypes, hashlib, os, sys
fd, size = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
number, length = ctypes.c_int, ctypes.c_size_t
libc.mmap.argtypes = (ctypes.c_void_p, length, number, number, number, ctypes.c_long)
at = libc.mmap(None, size, 1, 1, fd, 0)  # PROT_READ, MAP_SHARED
assert at != 2**64 - 1, ctypes.get_errno()
os.close(fd)  # Python's own mmap would keep a copy of it
print("mapped", flush=True)
for line in sys.stdin:
    print(hashlib.sha256(ctypes.string_at(at, size)).hexdigest(), flush=True)
"""


class Mapper:
    """A mapping of `size` bytes of the file that `descriptor` has open, in a process of its own."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, str(descriptor), str(size)],
            pass_fds=(descriptor,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "mapped"

    def __repr__(self) -> str:
        return f"<Mapper {self._process.pid}>"

    def __enter__(self) -> "Mapper":
        return self

    def __exit__(self, *exception: object) -> None:
        self.unmap()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def sees(self, content: bytes) -> bool:
        """Whether these are the bytes that the mapping shows."""
        assert self._process.stdin is not None
        self._process.stdin.write("look\n")
        self._process.stdin.flush()
        return self._answer() == hashlib.sha256(content).hexdigest()

    def unmap(self) -> None:
        """End the process, and with it the mapping."""
        self._process.communicate()
