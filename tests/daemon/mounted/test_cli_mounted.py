"""The command line as a user has it: `datacache mount` and what follows, as processes, on file:// stores."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fuse import mountpoint
from tests.support.faulty_s3 import FaultyS3, Status

pytestmark = pytest.mark.mounted

CONTENTS = {"a.txt": b"hello\n", "img/1.jpg": os.urandom(300_000), "img/2.jpg": os.urandom(10)}
PATIENCE = 60.0


@dataclass(frozen=True)
class Shell:
    """Runs commands with directories of their own for sockets, state and caches."""

    root: Path

    @property
    def data(self) -> str:
        return f"file://{self.root}/data"

    @property
    def mnt(self) -> Path:
        return self.root / "mnt"

    @property
    def tier(self) -> tuple[str, str]:
        return ("--cache", f"ssd:{self.root}/tier=100MiB")

    @property
    def environment(self) -> dict[str, str]:
        mine = {k: v for k, v in os.environ.items() if not k.startswith("DATACACHE_")}
        return mine | {
            "DATACACHE_RUNTIME": f"{self.root}/run",
            "XDG_STATE_HOME": f"{self.root}/state",
            "XDG_CACHE_HOME": f"{self.root}/cache",
        }

    def start(self, *words: str, module: str = "datacache.cli.main", **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            env=self.environment | more, cwd=self.root, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def say(self, *words: str, module: str = "datacache.cli.main") -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        child = self.start(*words, module=module)
        out, err = child.communicate(timeout=PATIENCE)
        return child.returncode, out, err

    def do(self, *words: str) -> str:
        """Standard output of a command that must succeed."""
        code, out, err = self.say(*words)
        assert code == 0, f"{out}{err}"
        return out

    def mounts(self) -> list[str]:
        """What `status` shows here; elsewhere others may have stale mounts."""
        shown = json.loads(self.say("status", "--json")[1])["mounts"]
        return [one["mount"] for one in shown if one["mount"].startswith(f"{self.root}/")]

    def kill(self) -> int:
        """kill -9 of all that is behind the mount, its broker first; what was the daemon's pid."""
        status = json.loads(self.do("status", str(self.mnt), "--json"))
        for pid in filter(None, (status["broker"], status["pid"])):
            _kill(pid)
        return int(status["pid"])

    def pid(self) -> int:
        """The daemon of the mount."""
        return int(json.loads(self.do("status", str(self.mnt), "--json"))["pid"])


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A directory of files as the store; what a test leaves mounted is taken down, daemon and all."""
    for name, data in CONTENTS.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(data)
    (tmp_path / "mnt").mkdir()
    shell = Shell(tmp_path)
    yield shell
    if mountpoint.is_mounted(str(shell.mnt)) is not None:
        shell.say("umount", str(shell.mnt), "--force")


def _ended(pid: int, *, patience: float = PATIENCE) -> bool:
    """Whether the process is gone, or is so in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], patience)[0])
    finally:
        os.close(descriptor)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert _ended(pid)


def test_from_mount_to_umount(shell: Shell) -> None:
    """What a newcomer types: mount, read, load, look, unmount; each works, and twice where it may."""
    assert f"mounted at {shell.mnt}" in shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    assert {n: (shell.mnt / n).read_bytes() for n in CONTENTS} == CONTENTS
    assert "ssd" in shell.do("status", str(shell.mnt))
    loaded = json.loads(shell.do("load", str(shell.mnt), "--json"))
    assert (loaded["state"], loaded["files_done"], loaded["files_skipped"]) == ("done", 3, 3)
    assert "100 %" in shell.do("ls", str(shell.mnt / "img"))
    assert "1 file," in shell.do("evict", str(shell.mnt / "img" / "1.jpg"))
    assert "cached:" in shell.do("stat", str(shell.mnt / "img" / "1.jpg"))
    assert "all as they should be" in shell.do("verify", str(shell.mnt))

    code, _, err = shell.say("mount", shell.data, str(shell.mnt), *shell.tier)
    assert (code, "is mounted there already" in err) == (0, True)
    code, _, err = shell.say("mount", f"{shell.data}/img", str(shell.mnt), *shell.tier)
    assert (code, "umount" in err) == (1, True)

    code, _, err = shell.say("mount", shell.data, str(shell.mnt), *shell.tier, "--ttl", "5s", "--xattr")
    assert (code, err.count("\n")) == (1, 1)
    assert "is mounted there already" in err
    assert "with other settings: ttl 60s (not 5s), xattr false (not true); `datacache u" in err
    code, _, err = shell.say("mount", shell.data, str(shell.mnt), *shell.tier, "--allow-other")
    assert code == 1
    assert f"`datacache umount {shell.mnt}` first, since allow-other cannot change while it is mounted" in err

    pid = shell.pid()
    assert shell.do("umount", str(shell.mnt)) == f"{shell.mnt}: unmounted\n"
    assert _ended(pid, patience=0), "umount waits for the daemon"
    assert os.listdir(shell.mnt) == []
    assert "nothing of datacache is mounted" in shell.do("umount", str(shell.mnt))
    assert shell.mounts() == []


def test_a_mount_that_fails_leaves_nothing(shell: Shell) -> None:
    """A port that is taken is found out last of all: by then the mount was there, and must go again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = shell.say(
            "mount", shell.data, str(shell.mnt), *shell.tier, "--metrics", f"127.0.0.1:{port}"
        )
    assert (code, out) == (2, "")
    assert str(port) in err
    assert len([line for line in err.splitlines() if "still mounting" not in line]) == 1
    assert mountpoint.is_mounted(str(shell.mnt)) is None
    assert shell.mounts() == []
    assert "all as they should be" in shell.do("verify", f"{shell.root}/tier"), "nobody holds its lock"


def test_a_daemon_that_finds_a_setting_wrong_ends_with_code_2(shell: Shell) -> None:
    """A MEM tier on a disk is seen by the daemon only; it is a wrong setting all the same."""
    code, _, err = shell.say("mount", shell.data, str(shell.mnt), "--snapshot", "none-such", *shell.tier)
    assert code == 1
    assert "none-such" in err
    code, _, err = shell.say("mount", shell.data, str(shell.mnt), "--cache", f"ssd:{shell.mnt}/c=1MiB")
    assert code == 2
    assert "neither under nor over" in err
    assert mountpoint.is_mounted(str(shell.mnt)) is None


def test_a_bucket_that_is_not_there_is_not_mounted(shell: Shell) -> None:
    """A typo in the name of a bucket is found out at once, not by the first read."""
    code, _, err = shell.say("mount", f"{shell.data}-typo", str(shell.mnt), *shell.tier)
    assert (code, "data-typo" in err) == (1, True)
    assert mountpoint.is_mounted(str(shell.mnt)) is None


def test_a_store_that_is_away_is_mounted_with_a_warning(shell: Shell) -> None:
    """What is cached can be served without it; status does not ask it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, _, err = shell.say(
        "mount", f"http://127.0.0.1:{port}/data/", str(shell.mnt), *shell.tier, "--timeout", "500ms"
    )
    assert code == 0
    assert "its store does not answer" in err
    assert "`datacache doctor`, with the same URI and flags, says what is wrong" in err
    assert "breaker open" in shell.do("status", str(shell.mnt))


def test_a_store_that_is_for_reading_only_is_not_mounted_to_be_written(shell: Shell) -> None:
    """It is found out at once, not by the first upload, and said with what to do; without --rw it mounts."""
    keys = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "S", "AWS_EC2_METADATA_DISABLED": "true"}
    with FaultyS3({"a.txt": b"hello"}) as store:
        words = ("mount", "s3://bucket", str(shell.mnt), *shell.tier, "--endpoint", store.endpoint)
        landing = ("--rw", "--landing", f"{shell.root}/landing")
        store.add("put", Status(403, "AccessDenied"))
        child = shell.start(*words, *landing, **keys)
        _, err = child.communicate(timeout=PATIENCE)
        assert child.returncode == 1, err
        assert "nothing can be written to s3://bucket" in err
        assert "or mount without --rw" in err
        assert mountpoint.is_mounted(str(shell.mnt)) is None
        for more in ((), landing):
            child = shell.start(*words, *more, **keys)
            _, err = child.communicate(timeout=PATIENCE)
            assert child.returncode == 0, err
            assert (shell.mnt / "a.txt").read_bytes() == b"hello"
            shell.do("umount", str(shell.mnt))
        assert list(store.objects) == ["a.txt"]


@pytest.mark.parametrize("store", ["refuses", "hangs"])
def test_a_store_that_is_away_holds_up_no_mount_that_is_written(store: str, shell: Shell) -> None:
    """One warning, not two; what is written is safe, and goes when it is back."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if store == "refuses":
            silent.close()
        begun = time.monotonic()
        child = shell.start(
            "mount", "--rw", "s3://bucket", str(shell.mnt), *shell.tier, "--landing", f"{shell.root}/landing",
            "--endpoint", f"http://127.0.0.1:{port}", "--anonymous",
        )  # fmt: skip
        _, err = child.communicate(timeout=PATIENCE)
        took = time.monotonic() - begun
        shell.do("umount", str(shell.mnt))
    assert child.returncode == 0, err
    assert err.count("warning") == 1
    assert "its store does not answer" in err
    assert took < 20, "the reading side is given 5 s, and the writing side the same ones"


def test_ctrl_c_gives_up_a_mount_that_waits(shell: Shell) -> None:
    """A manifest that never comes: after two seconds we are told, and Ctrl-C leaves nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        child = shell.start(
            "mount", "--manifest", f"http://127.0.0.1:{port}/list.jsonl", str(shell.mnt), *shell.tier
        )
        assert child.stderr is not None
        assert "still mounting" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert mountpoint.is_mounted(str(shell.mnt)) is None
    assert str(shell.root) not in shell.say("status")[1], "of others there may be stale mounts"
    running = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    for file in running:
        with contextlib.suppress(OSError):
            assert str(shell.root).encode() not in file.read_bytes()


def test_a_dead_daemon_is_cleared_away(shell: Shell) -> None:
    """kill -9 leaves a stale mount, which `status` says; the next mount takes it off and keeps the cache, so
    does umount."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    assert (shell.mnt / "img/1.jpg").read_bytes() == CONTENTS["img/1.jpg"]
    shell.kill()
    for which in ((), (str(shell.mnt),)):
        code, out, _ = shell.say("status", *which)
        assert code == 1
        assert f"{shell.data} at {shell.mnt}\n  stale: " in out
        assert f"`datacache umount {shell.mnt}` takes it off" in out
    said = json.loads(shell.say("status", str(shell.mnt), "--json")[1])
    assert said["stale"] is True
    assert said["pid"] is None, "a script may kill what this says, and 0 is itself"
    code, _, err = shell.say("mount", shell.data, str(shell.mnt), *shell.tier)
    assert code == 0, err
    assert "a process that is gone" in err
    assert "100 %" in shell.do("ls", str(shell.mnt / "img/1.jpg"))
    shell.kill()
    code, _, err = shell.say("umount", str(shell.mnt))
    assert (code, "a process that is gone" in err) == (0, True)
    assert mountpoint.is_mounted(str(shell.mnt)) is None


def test_a_busy_mount(shell: Shell) -> None:
    """umount names who uses it; --lazy detaches, the reader goes on, the daemon ends with it."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    pid = shell.pid()
    with open(shell.mnt / "a.txt", "rb") as file:
        code, _, err = shell.say("umount", str(shell.mnt))
        assert code == 1
        assert f"process {os.getpid()}" in err
        assert "detached" in shell.do("umount", str(shell.mnt), "--lazy")
        assert mountpoint.is_mounted(str(shell.mnt)) is None
        assert file.read() == CONTENTS["a.txt"]
    assert _ended(pid)


def test_umount_by_force_ends_a_daemon_that_hangs(shell: Shell) -> None:
    """A stopped daemon answers nothing: --force takes the mount off all the same."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    pid = shell.pid()
    os.kill(pid, signal.SIGSTOP)
    shell.do("umount", str(shell.mnt), "--force")
    assert _ended(pid)
    assert mountpoint.is_mounted(str(shell.mnt)) is None


def test_umount_by_force_of_a_mount_in_use(shell: Shell) -> None:
    """Its daemon may be faster than we to take off what was aborted: that is no failure."""
    for _ in range(3):
        shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
        with open(shell.mnt / "a.txt", "rb"):
            shell.do("umount", str(shell.mnt), "--force")
        assert mountpoint.is_mounted(str(shell.mnt)) is None


def test_a_directory_names_what_is_mounted_there_now(shell: Shell) -> None:
    """Not what was detached from it, and is still read."""
    shell.do("mount", shell.data, str(shell.mnt), "--name", "old", *shell.tier)
    with open(shell.mnt / "a.txt", "rb"):
        shell.do("umount", str(shell.mnt), "--lazy")
        tier = ("--cache", f"ssd:{shell.mnt.parent}/other=1GiB")
        shell.do("mount", shell.data, str(shell.mnt), "--name", "new", *tier)
        said = json.loads(shell.do("status", str(shell.mnt), "--json"))
        assert said["dataset"] == "new", said
        shell.do("umount", str(shell.mnt))
        assert mountpoint.is_mounted(str(shell.mnt)) is None


def test_a_mount_that_another_name_space_has(shell: Shell) -> None:
    """A container that has begun meanwhile, say: who it is is said, and that the daemon goes on for it."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    pid = shell.pid()
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; read end"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        child = shell.start("umount", str(shell.mnt))
        assert child.stderr is not None
        line = child.stderr.readline()
        assert "unmounted; waiting for its daemon" in line
        assert f"to end: sh (process {holder.pid}) still has it in another mount name space" in line
        holder.communicate(b"\n")
        out, err = child.communicate(timeout=PATIENCE)
        assert (child.returncode, out) == (0, f"{shell.mnt}: unmounted\n"), err
    assert _ended(pid)


def _notified(listening: socket.socket) -> bytes:
    listening.settimeout(PATIENCE)
    return listening.recv(100)


@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "SIGHUP", "umount", "SIGKILL"])
def test_in_the_foreground(shell: Shell, end: str) -> None:
    """It tells systemd when it is up, hands signals on, and ends as its daemon does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(shell.root / "notify"))
        child = shell.start(
            "mount", "-f", shell.data, str(shell.mnt), *shell.tier, NOTIFY_SOCKET=str(shell.root / "notify")
        )
        assert _notified(systemd) == b"READY=1"
    assert (shell.mnt / "a.txt").read_bytes() == CONTENTS["a.txt"]
    pid = shell.pid()
    if end == "umount":
        shell.do("umount", str(shell.mnt))
    elif end == "SIGKILL":
        shell.kill()
    else:
        child.send_signal(signal.Signals[end])
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == (1 if end == "SIGKILL" else 0), err
    assert ("was ended by SIGKILL" in err) == (end == "SIGKILL")
    assert mountpoint.is_mounted(str(shell.mnt)) is None
    assert _ended(pid)


def test_two_mounts_at_once(shell: Shell) -> None:
    """Of two that start together at one place at most one mounts; they are never stacked."""
    words = ("mount", shell.data, str(shell.mnt), *shell.tier)
    children = [shell.start(*words) for _ in range(2)]
    said = [child.communicate(timeout=PATIENCE)[1] for child in children]
    codes = [child.returncode for child in children]
    assert 0 in codes, said
    with open("/proc/self/mountinfo", "rb") as table:
        here = [m for m in mountpoint.parse_mountinfo(table.read()) if m.directory == str(shell.mnt)]
    assert len(here) == 1
    assert (shell.mnt / "a.txt").read_bytes() == CONTENTS["a.txt"]


def test_load_on_a_cache_that_a_mount_owns(shell: Shell) -> None:
    """The same data set: the mount does it. Another one: refused, with pid and mount."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    loaded = json.loads(shell.do("load", shell.data, *shell.tier, "--json"))
    assert (loaded["state"], loaded["files_done"]) == ("done", 3)
    assert "100 %" in shell.do("ls", str(shell.mnt / "img/1.jpg"))
    code, _, err = shell.say("load", f"{shell.data}/img", *shell.tier)
    assert code == 1
    assert f"in use by process {shell.pid()}, mounted at {shell.mnt}" in err


def test_a_snapshot_is_mounted_by_name(shell: Shell) -> None:
    """Made of the mounted data set, mounted by name, and not changed by what comes later."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    assert "snapshot one of 3 files" in shell.do("snapshot", "create", str(shell.mnt), "one")
    shell.do("umount", str(shell.mnt))
    (shell.root / "data" / "new").write_bytes(b"new")
    shell.do("mount", shell.data, str(shell.mnt), "--snapshot", "one", *shell.tier)
    assert sorted(os.listdir(shell.mnt)) == ["a.txt", "img"]
    code, _, err = shell.say("mount", shell.data, str(shell.mnt), *shell.tier)
    assert (code, "umount" in err) == (1, True), "the live bucket is another data set than its snapshot"


def test_mounted_by_mount8s_helper(shell: Shell) -> None:
    """`mount -t fuse.datacache` and fstab: options are flags, the codes are mount(8)'s."""
    helper = "datacache.cli.fstab"
    option = f"rw,_netdev,xattr,cache=ssd:{shell.root}/tier=100MiB"
    assert shell.say(shell.data, str(shell.mnt), "-o", option, module=helper)[0] == 0
    uri = os.getxattr(shell.mnt / "a.txt", "user.datacache.uri")
    assert uri.endswith(b"/data/a.txt")
    other = f"file://{shell.root}/data/img"
    assert shell.say(other, str(shell.mnt), "-o", option, module=helper)[0] == 32
    assert shell.say(other, str(shell.mnt), "-o", "nonsense", module=helper)[0] == 1


def brokered(shell: Shell) -> int:
    """The daemon of a mount that has a broker."""
    status = json.loads(shell.do("status", str(shell.mnt), "--json"))
    if not status["broker"]:
        pytest.skip("the native driver needs Linux 6.9 or newer")
    return int(status["pid"])


def test_a_mount_is_upgraded(shell: Shell) -> None:
    """With the settings that it has, or with others; what cannot be changed is named, and nothing happens."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    first = brokered(shell)
    with open(shell.mnt / "img/1.jpg", "rb", 0) as file:
        assert file.read(10) == CONTENTS["img/1.jpg"][:10]
        said = shell.do("upgrade", str(shell.mnt))
        second = shell.pid()
        assert said == f"{shell.mnt}: upgraded; process {second} serves\n"
        assert first != second
        assert _ended(first, patience=0)
        shell.do("upgrade", shell.data, str(shell.mnt), "--cache", f"ssd:{shell.root}/tier=50MiB", "--xattr")
        assert file.readall() == CONTENTS["img/1.jpg"][10:]
    assert os.getxattr(shell.mnt / "a.txt", "user.datacache.uri").endswith(b"/data/a.txt")
    third = shell.pid()
    code, _, err = shell.say("upgrade", shell.data, str(shell.mnt), *shell.tier, "--io", "served")
    assert (code, "an upgrade cannot change io" in err, err.count("\n")) == (1, True, 1)
    code, _, err = shell.say("upgrade", f"{shell.data}/img", str(shell.mnt), *shell.tier)
    assert (code, "cannot change" in err) == (1, True)
    code, _, err = shell.say("upgrade", str(shell.root))
    assert (code, "nothing of datacache is mounted there" in err) == (1, True)
    assert shell.say("upgrade")[0] == 2
    assert shell.pid() == third
    assert shell.do("umount", str(shell.mnt)) == f"{shell.mnt}: unmounted\n"
    assert os.listdir(shell.root / "run") == []


def test_a_mount_that_lost_both_its_processes_is_cleaned_away(shell: Shell) -> None:
    """Stale; umount takes it off, and what they had registered is forgotten."""
    shell.do("mount", shell.data, str(shell.mnt), *shell.tier)
    brokered(shell)
    shell.kill()
    assert shell.say("umount", str(shell.mnt))[0] == 0
    assert mountpoint.is_mounted(str(shell.mnt)) is None
    assert shell.mounts() == []
    assert os.listdir(shell.root / "run") == []
