"""Processes of the demo and the signals that may come while they are made."""

import signal
import subprocess
import sys

import pytest

from datacache.cli.s3server import end, uninterrupted

SLEEPS = [sys.executable, "-c", "import signal; signal.pause()"]
DEAF = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); signal.pause()",
]


def test_a_ctrl_c_while_a_process_is_made_comes_when_it_is_known() -> None:
    """Raised in the middle of Popen it would leave a child that nobody ends; this one can be ended."""
    child = None
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        child = subprocess.Popen(SLEEPS)
    assert child is not None
    end(child, patience=30)
    assert child.returncode == -signal.SIGTERM


def test_a_process_that_does_not_end_is_killed() -> None:
    """Bounded, whatever it does with SIGTERM."""
    child = subprocess.Popen(DEAF, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"x\n"
    end(child, patience=0.1)
    assert child.returncode == -signal.SIGKILL
