"""`datacache demo` as `make demo` runs it, on a few files: what it shows, and that nothing of it is left."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.s3 import find_tool

PATIENCE = 120.0
LARGE = 5 * 1024 * 1024
ROWS = ("native directory", "cold epoch", "prewarm (load)", "prewarmed epoch", "second epoch")

needs_versitygw = pytest.mark.skipif(
    find_tool("versitygw") is None, reason="versitygw is not here (`make s3-server` builds it)"
)


@dataclass(frozen=True)
class Demo:
    """Starts demos whose temporary files all lie below `tmp`, but for those in /dev/shm."""

    data: Path
    tmp: Path
    tools: str

    def start(self, *under: str, tools: str | None = None) -> "subprocess.Popen[str]":
        """A demo in a session of its own, as a terminal's foreground job is a process group of its own."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("DATACACHE_", "AWS_", "XDG_"))}
        # Wide enough for paths: no line is broken. HOME and PATH hide a versitygw that lies elsewhere.
        mine |= {"TMPDIR": str(self.tmp), "COLUMNS": "400", "HOME": str(self.tmp.parent)}
        mine |= {"DATACACHE_TOOLS": self.tools if tools is None else tools, "PATH": os.defpath}
        return subprocess.Popen(
            [*under, sys.executable, "-m", "datacache.cli.main", "demo", "--data", str(self.data)],
            env=mine, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, *under: str, tools: str | None = None) -> str:
        """What a demo prints that must succeed."""
        process = self.start(*under, tools=tools)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (0, ""), out
        assert all(row in out for row in ROWS), out
        return out


def _processes_of(directory: Path) -> list[str]:
    """Command lines of what runs with something of `directory`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue  # it ended, or is not ours to look into
        if os.fsencode(directory) in words and int(pid) != os.getpid():
            found.append(words.split(b"\0\0")[0].decode(errors="replace"))
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """Files of a few sizes for the bucket. Afterwards nothing is left of any demo."""
    data, tmp = tmp_path / "data", tmp_path / "tmp"
    for i in range(20):
        (data / f"small/{i % 3}").mkdir(parents=True, exist_ok=True)
        (data / f"small/{i % 3}/{i}").write_bytes(os.urandom(1000 * i))
    (data / "large.tar").write_bytes(os.urandom(LARGE))
    tmp.mkdir()
    shared = set(os.listdir("/dev/shm"))
    program = find_tool("versitygw")
    yield Demo(data, tmp, str(Path(program).parent) if program else "")
    assert _processes_of(tmp) == []
    assert os.listdir(tmp) == []
    assert [n for n in set(os.listdir("/dev/shm")) - shared if n.startswith("datacache-demo-")] == []
    assert str(tmp) not in Path("/proc/self/mountinfo").read_text()


def _cells(out: str, row: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.strip().startswith(row))
    return line.strip().removeprefix(row).split()


@needs_versitygw
def test_the_table_of_the_demo(demo: Demo) -> None:
    """One store request per small object that is not empty, cold or prewarmed; nothing is warm by mistake."""
    out = demo.run()
    assert "20 files of up to 1.0 MiB, 1 larger (large.tar)" in out
    # seconds, files/s, bytes/s and its unit, [daemon requests], store requests per small and large object
    assert _cells(out, "cold epoch")[-2:-1] == ["1.00"]
    assert _cells(out, "prewarm (load)")[-2:-1] == ["1.00"]
    for row in ("prewarmed epoch", "second epoch"):
        assert _cells(out, row)[-2:] == ["0.00", "0.00"]
    asked = {row: float(_cells(out, row)[-3]) for row in ("cold epoch", "prewarmed epoch", "second epoch")}
    assert asked["prewarmed epoch"] >= 3, "read from the cache: open, read, release"
    assert asked["second epoch"] <= 2.2, "the kernel has the pages: open, release"


def test_the_demo_without_a_go_toolchain(demo: Demo) -> None:
    """moto serves it where there is no versitygw, with files that moto can carry."""
    out = demo.run(tools="")
    assert out.startswith("moto at http://127.0.0.1:")
    assert "large.tar" not in out
    assert _cells(out, "cold epoch")[-1] == "1.00"


@needs_versitygw
def test_the_demo_where_nobody_may_mount(demo: Demo) -> None:
    """Many containers: one line says why, and the same rows are shown through the Python reader."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("takes CAP_SYS_ADMIN away with setpriv, as root")
    out = demo.run("setpriv", "--bounding-set=-sys_admin")
    assert sum("no FUSE here" in line for line in out.splitlines()) == 1
    assert "--cap-add SYS_ADMIN" in out
    assert _cells(out, "prewarm (load)")[-2:-1] == ["1.00"]
    assert _cells(out, "prewarmed epoch")[-2:] == ["0.00", "0.00"]


def _interrupt(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C on a terminal: all of its foreground processes get it."""
    os.killpg(process.pid, signal.SIGINT)


def _terminate(process: "subprocess.Popen[str]") -> None:
    process.terminate()


PHASES = ("versitygw at", "$ datacache mount", "$ datacache evict", "$ datacache load", "$ datacache status")
# Each takes a demo to get there: by turns in `make test`, the other half in `make test-long`.
INTERRUPTED = [
    pytest.param(phase, end, marks=[] if (number + turn) % 2 else [pytest.mark.long])
    for number, phase in enumerate(PHASES)
    for turn, end in enumerate((_interrupt, _terminate))
]


@needs_versitygw
@pytest.mark.parametrize(("phase", "end"), INTERRUPTED)
def test_a_demo_that_is_interrupted_leaves_nothing(
    demo: Demo, phase: str, end: Callable[["subprocess.Popen[str]"], None]
) -> None:
    """No mount, no process, no file; also when it happens while a mount is being made, and twice."""
    with demo.start() as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(phase):
                break
        end(process)
        for line in process.stdout:
            if line.startswith("interrupted"):
                end(process)  # whoever is impatient does it again
                break
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if end is _interrupt else 143), err
    assert "Traceback" not in err
