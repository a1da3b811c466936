"""Which workers run: found by what people call them, and gone when their process is."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.cluster import registry
from datacache.cluster.registry import Registration
from datacache.errors import ControlError


@pytest.fixture
def runtime(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "datacache")


def registration(runtime: str, *, dataset: str = "train", mount: str = "/mnt/train") -> Registration:
    socket = registry.socket_path(runtime, dataset=dataset, mount=mount)
    return Registration(
        os.getpid(), mount, dataset, socket, ["/var/cache/x"], started=5.0, uris=["s3://bucket/train/"]
    )


@pytest.mark.parametrize(
    "target",
    ["train", "/mnt/train", "/mnt/../mnt/train/", "s3://bucket/train", "s3://bucket/train/", "/var/cache/x"],
)
def test_a_worker_is_found_by_what_people_call_it(runtime: str, target: str) -> None:
    """Mount directory, data set, URI and cache directory all find the worker."""
    mine = registration(runtime)
    registry.register(runtime, mine)
    found = registry.find(runtime, target)
    assert found is not None
    assert replace(found, born="") == mine


def test_of_several_mounts_on_one_directory_the_last_is_found(runtime: str) -> None:
    """The first was detached, and is still read. By its name, or the URI of both, the first is found."""
    for number, dataset in enumerate(("old", "new")):
        registry.register(runtime, replace(registration(runtime, dataset=dataset), started=float(number)))
    found = {target: registry.find(runtime, target) for target in ("/mnt/train", "old", "s3://bucket/train")}
    assert {target: one and one.dataset for target, one in found.items()} == {
        "/mnt/train": "new", "old": "old", "s3://bucket/train": "old",
    }  # fmt: skip


@pytest.mark.parametrize("target", ["", "/", "trai", "/mnt", "/mnt/train/sub", "s3://bucket", "/var/cache"])
def test_what_is_not_its_name_does_not_find_it(runtime: str, target: str) -> None:
    """A part of a name, a directory above or below, and nothing at all find nothing."""
    registry.register(runtime, registration(runtime))
    registry.register(runtime, registration(runtime, dataset="bare", mount=""))
    assert registry.find(runtime, target) is None


def test_a_cache_is_found_through_a_link(runtime: str, tmp_path: Path) -> None:
    """A cache directory is the same however it is spelled."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    registry.register(runtime, replace(registration(runtime), caches=[str(tmp_path / "real")]))
    link = str(tmp_path / "link")
    assert registry.find(runtime, link, real=os.path.realpath) is not None
    assert registry.find(runtime, link) is None, "where nobody asks for it no path is looked at"


def test_workers_come_and_go(runtime: str) -> None:
    """Each worker of a process has a file of its own; taking one back leaves the others."""
    assert registry.live(runtime) == []
    late = replace(registration(runtime, mount="/mnt/late"), started=9.0)
    early = registration(runtime, mount="/mnt/early")
    for one in (late, early):
        registry.register(runtime, one)
    assert [found.mount for found in registry.live(runtime)] == ["/mnt/early", "/mnt/late"]
    assert registry.find(runtime, "train") == registry.live(runtime)[0], "the oldest of several"
    registry.unregister(runtime, early)
    registry.unregister(runtime, early)
    assert [found.mount for found in registry.live(runtime)] == ["/mnt/late"]


def test_a_dead_worker_is_tidied_away(runtime: str) -> None:
    """The file and the socket of a process that was killed are removed by whoever looks."""
    program = (
        "import sys, os\nfrom datacache.cluster import registry\n"
        f"s = registry.socket_path({runtime!r}, dataset='d', mount='/m')\n"
        f"registry.register({runtime!r}, registry.Registration(os.getpid(), '/m', 'd', s))\n"
        "open(s, 'w').close()\nprint(s, flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        socket = process.stdout.readline().strip()
        assert registry.find(runtime, "d") is not None
        process.kill()
    assert registry.live(runtime) == []
    assert not os.path.exists(socket)
    assert os.listdir(runtime) == []


def test_a_dead_worker_that_nobody_has_reaped_is_dead() -> None:
    """A zombie answers to its pid, and serves nobody."""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    born = registry._born(child.pid)
    child.wait()
    assert born == ""


def test_a_pid_that_was_used_again_is_not_the_worker(runtime: str) -> None:
    """A living process with the pid of a dead worker is not taken for it, and keeps its own file."""
    mine = registration(runtime)
    path = registry.register(runtime, mine)
    stale = os.path.join(runtime, f"{os.getpid()}-1-00000000.json")
    known = json.loads(Path(path).read_text())
    Path(stale).write_text(json.dumps({**known, "born": "boot:1", "socket": stale.replace(".json", ".sock")}))
    assert [found.socket for found in registry.live(runtime)] == [mine.socket]
    assert not os.path.exists(stale)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"unheard": "of"}', "\xff"])
def test_what_we_did_not_write_is_passed_over(runtime: str, text: str) -> None:
    """A file that is no registration breaks nothing and stays where it is."""
    registry.register(runtime, registration(runtime))
    other = Path(runtime, "other.json")
    other.write_text(text)
    assert len(registry.live(runtime)) == 1
    assert other.exists()


def test_the_directory_is_private(runtime: str) -> None:
    """Nobody else may enter the directory or read what is in it, even where it was there before."""
    os.makedirs(runtime, mode=0o777)
    os.chmod(runtime, 0o777)
    path = registry.register(runtime, registration(runtime))
    assert stat.S_IMODE(os.stat(runtime).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_directory_that_somebody_else_made_is_refused(tmp_path: Path) -> None:
    """Where others could hand us their sockets, or be handed ours, nothing is registered."""
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(tmp_path)
    file.write_text("")
    for planted in (link, file):
        with pytest.raises(ControlError, match="not a directory of this user; set DATACACHE_RUNTIME"):
            registry.make_private(str(planted))
    with pytest.raises(ControlError, match="cannot be used for control sockets"):
        registry.make_private(str(file / "below"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a directory of somebody else's")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """A directory that another user made first is not ours."""
    (tmp_path / "theirs").mkdir(mode=0o777)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(ControlError, match="not a directory of this user"):
        registry.make_private(str(tmp_path / "theirs"))


def test_no_room_for_a_registration(tmp_path: Path) -> None:
    """A registration that cannot be written is an error that names the file."""
    elsewhere = replace(registration(str(tmp_path)), socket=str(tmp_path / "gone" / "x.sock"))
    with pytest.raises(ControlError, match=r"x\.json cannot be written"):
        registry.register(str(tmp_path), elsewhere)
