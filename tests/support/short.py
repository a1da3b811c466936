"""Directories for tests that bind Unix sockets deep below them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a short name: the address of a Unix socket has room for 107 bytes, and pytest's own
    directories take half of that."""
    with tempfile.TemporaryDirectory(prefix="csi-") as directory:
        yield Path(directory)
