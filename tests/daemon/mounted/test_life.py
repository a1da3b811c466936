"""How mounts begin and end: ready, refused, unmounted, told to end, killed, hung."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from datacache.cli import targets
from datacache.cli.main import main as cli
from datacache.cluster import metrics, registry
from datacache.config.settings import MountSettings
from datacache.errors import MountError
from datacache.model import MiB
from fuse import mountpoint
from fuse.__main__ import main
from tests.conftest import AnnouncedLogs
from tests.daemon.mounted import raising
from tests.daemon.mounted.conftest import START, STOP, Daemon, Start


@pytest.fixture
def filled(bucket: Path) -> dict[str, bytes]:
    """What is in the bucket."""
    rng = random.Random(4)
    contents = {f"{i}": rng.randbytes(200_000) for i in range(10)} | {"big": rng.randbytes(8 * MiB)}
    for name, data in contents.items():
        (bucket / name).write_bytes(data)
    return contents


def nothing_left(one: Daemon) -> bool:
    """Neither mounted, nor registered, nor listening."""
    return mountpoint.is_mounted(str(one.directory)) is None and not registry.live(one.settings.runtime)


def test_ready_means_mounted(daemon: Start, filled: dict[str, bytes]) -> None:
    """When the one line is there, the mount is there, answers and can be found."""
    mounted = daemon()
    assert mounted.process is not None
    assert mounted.answer == {"ok": True, "pid": mounted.process.pid}
    info = mountpoint.is_mounted(str(mounted.directory))
    assert info is not None
    assert info.fstype == mountpoint.FSTYPE
    assert not mountpoint.is_stale(str(mounted.directory))
    found = mounted.registered()
    assert found is not None
    assert found.pid == mounted.process.pid
    assert sorted(os.listdir(mounted.directory)) == sorted(filled)
    options = Path("/proc/self/mountinfo").read_text().split(str(mounted.directory))[1].splitlines()[0]
    assert {"ro", "nosuid", "nodev"} <= set(options.split()[0].split(","))


def test_umount_ends_the_daemon(daemon: Start, filled: dict[str, bytes]) -> None:
    """Whoever unmounts needs to end nothing else."""
    mounted = daemon()
    assert (mounted.directory / "0").read_bytes() == filled["0"]
    mountpoint.unmount(str(mounted.directory))
    assert mounted.wait() == 0
    assert nothing_left(mounted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_clean(daemon: Start, filled: dict[str, bytes], number: signal.Signals) -> None:
    """systemd's SIGTERM, Ctrl-C, and a terminal that closes."""
    mounted = daemon()
    assert (mounted.directory / "0").read_bytes() == filled["0"]
    mounted.signal(number)
    assert mounted.wait() == 0
    assert nothing_left(mounted)


def test_a_signal_lets_open_files_be_read_to_their_end(daemon: Start, filled: dict[str, bytes]) -> None:
    """The mount point is free at once; the daemon ends with the last close."""
    mounted = daemon()
    with open(mounted.directory / "big", "rb", buffering=0) as file:
        assert file.read(10) == filled["big"][:10]
        mounted.signal(signal.SIGTERM)
        while mountpoint.is_mounted(str(mounted.directory)):
            time.sleep(0.01)
        assert file.readall() == filled["big"][10:]
    assert mounted.wait() == 0
    assert nothing_left(mounted)


def test_a_second_signal_ends_it_at_once(daemon: Start, filled: dict[str, bytes]) -> None:
    """What is open then gets an error, not a wait."""
    mounted = daemon()
    file = os.open(mounted.directory / "big", os.O_RDONLY)
    try:
        mounted.signal(signal.SIGTERM)
        while mountpoint.is_mounted(str(mounted.directory)):
            time.sleep(0.01)
        mounted.signal(signal.SIGTERM)
        assert mounted.wait() == 0
        with pytest.raises(OSError) as gone:
            os.read(file, 10)
    finally:
        with contextlib.suppress(OSError):  # it says ENOTCONN too, and closes
            os.close(file)
    assert gone.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert nothing_left(mounted)


def test_a_busy_mount_is_not_unmounted_and_says_by_whom(daemon: Start, filled: dict[str, bytes]) -> None:
    """The message names the process and the way out."""
    mounted = daemon()
    with open(mounted.directory / "0", "rb") as file:
        with pytest.raises(MountError, match=rf"in use by .*\(process {os.getpid()}\).*--lazy"):
            mountpoint.unmount(str(mounted.directory))
        assert file.read() == filled["0"]
    assert (mounted.directory / "1").read_bytes() == filled["1"]


def test_unmount_under_load(daemon: Start, filled: dict[str, bytes]) -> None:
    """Lazily: readers read on until they have closed their files, correct bytes or none."""
    mounted = daemon()
    started, wrong = threading.Barrier(5), []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        with open(mounted.directory / "big", "rb", buffering=0) as file:
            started.wait()
            for _ in range(200):
                at = rng.randrange(8 * MiB)
                if os.pread(file.fileno(), 5000, at) != filled["big"][at : at + 5000]:
                    wrong.append(at)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    started.wait()
    mountpoint.unmount(str(mounted.directory), lazy=True)
    assert not os.listdir(mounted.directory), "the mount point is free again"
    for reader in readers:
        reader.join()
    assert not wrong
    assert mounted.wait() == 0
    assert nothing_left(mounted)


def test_a_mount_that_was_killed_is_stale_and_the_next_one_cleans_it(
    daemon: Start, filled: dict[str, bytes]
) -> None:
    """kill -9 leaves a mount that answers ENOTCONN; mounting again just works, over the same cache."""
    mounted = daemon()
    for name, data in filled.items():
        assert (mounted.directory / name).read_bytes() == data
        mounted.wait_until_cached(name, len(data))
    mounted.kill()
    with pytest.raises(OSError) as gone:
        os.listdir(mounted.directory)
    assert gone.value.errno == errno.ENOTCONN
    assert mountpoint.is_stale(str(mounted.directory))
    again = daemon()
    for name, data in filled.items():
        assert (again.directory / name).read_bytes() == data
    assert again.status()["reads"]["bytes_fetched"] == 0, "what was cached is still there"
    mountpoint.unmount(str(again.directory))
    assert again.wait() == 0
    assert nothing_left(again)


def test_a_stale_mount_can_be_unmounted(daemon: Start, logs: AnnouncedLogs) -> None:
    """By `umount`, or in passing by whoever looks."""
    logs.expect("was still mounted by a process that is gone")
    for clean in (mountpoint.unmount, mountpoint.clean_stale):
        mounted = daemon()
        mounted.kill()
        clean(str(mounted.directory))
        assert nothing_left(mounted)


def test_a_daemon_that_hangs_is_not_stale_and_can_be_taken_off_by_force(daemon: Start) -> None:
    """Asking takes bounded time; by force, what waits for it gets an error."""
    if os.geteuid() != 0:
        pytest.skip("only root can unmount by force")
    mounted = daemon()
    mounted.signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert not mountpoint.is_stale(str(mounted.directory))
    assert time.monotonic() - begun < 10
    assert mountpoint.is_mounted(str(mounted.directory)) is not None
    mountpoint.unmount(str(mounted.directory), force=True, lazy=True)
    mounted.signal(signal.SIGCONT)
    assert mounted.wait() == 0
    assert nothing_left(mounted)


def test_who_looks_for_a_mount_that_hangs_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody answers what is asked of it, not even once: by name, through a link, and in it. Links before it
    are followed all the same."""
    monkeypatch.setenv("DATACACHE_RUNTIME", str(tmp_path / "run"))
    hung = tmp_path / "hung"
    hung.mkdir()
    (tmp_path / "link").symlink_to("hung")
    descriptor = mountpoint.mount(str(hung), source="test", allow_other=False)
    said: list[object] = []

    def look() -> None:
        for path in (hung, hung / "a/b", tmp_path / "link/a", hung / "a/../.."):
            said.append(mountpoint.real(str(path)))
        said.append(mountpoint.is_mounted(f"{tmp_path}/link") is not None)
        said.append(mountpoint.is_mounted(f"{hung}/a") is None)
        said.append([targets.find(str(path)) for path in (hung / "a", tmp_path / "link/a")])
        for command in ("status", "stat", "verify", "umount"):
            said.append(cli([command, f"{tmp_path}/link/a"]))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        looking.join(START)
        assert not looking.is_alive(), f"it hangs after {said}"
    finally:
        mountpoint.unmount(str(hung), lazy=True)
        os.close(descriptor)  # whoever hangs is told an error
        looking.join(STOP)
    assert said == [
        str(hung), f"{hung}/a/b", f"{hung}/a", str(tmp_path), True, True, [None, None], 1, 1, 2, 0,
    ]  # fmt: skip


def test_the_end_of_a_daemon_spares_the_mount_of_its_successor(
    daemon: Start, filled: dict[str, bytes], tmp_path: Path
) -> None:
    """Detached, and told to end after somebody else has mounted there: that mount stays."""
    first = daemon()
    with open(first.directory / "big", "rb") as file:
        mountpoint.unmount(str(first.directory), lazy=True)
        second = daemon(cache=tmp_path / "cache-of-another", start=False)
        second.start()
        assert second.answer.get("ok"), second.answer
        first.signal(signal.SIGTERM)
        first.signal(signal.SIGTERM)
        while first.process is not None and first.process.poll() is None:
            first.signal(signal.SIGTERM)
            time.sleep(0.01)
        assert not file.closed
    assert (second.directory / "0").read_bytes() == filled["0"]


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("the mount point is missing", 2, "mkdir"),
        ("the cache lies under the mount point", 2, "neither under nor over"),
        ("it is mounted already", 1, "already shows"),
        ("the cache is in use", 1, "in use by process"),
    ],
)
def test_a_mount_that_cannot_be_says_why_and_leaves_nothing(
    daemon: Start, tmp_path: Path, what: str, code: int, says: str
) -> None:
    """One line, the exit code that goes with it, and what was there before is untouched."""
    other = None
    if "already" in what or "in use" in what:
        other = daemon()
    elsewhere = tmp_path / "elsewhere"
    refused = {
        "the mount point is missing": lambda: daemon(directory=elsewhere, start=False),
        "the cache lies under the mount point": lambda: daemon(cache=tmp_path / "mnt" / "cache", start=False),
        "it is mounted already": lambda: daemon(start=False),
        "the cache is in use": lambda: daemon(directory=elsewhere, start=False),
    }[what]()
    if "missing" in what:
        elsewhere.rmdir()
    refused.start()
    assert refused.wait() == code
    assert refused.answer["exit"] == code
    assert says in refused.answer["error"]
    assert "\n" not in refused.answer["error"]
    assert len(registry.live(refused.settings.runtime)) == (other is not None)
    assert mountpoint.is_mounted(str(elsewhere)) is None


def test_settings_that_do_not_arrive_whole_start_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Who started it died: there is nobody to tell, and nothing to do."""
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "fuse", "--ready-fd", str(write)],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(write,), cwd="/",
    ) as process:  # fmt: skip
        os.close(write)
        assert process.stdin is not None
        process.stdin.write(b'{"dataset": {"na')
        process.stdin.close()
        with open(read, "rb") as ready:
            assert b'"exit": 1' in ready.read()
        assert process.wait(START) == 1
    with pytest.raises(SystemExit):
        main([])


def test_a_signal_before_it_is_mounted_is_an_answer_too() -> None:
    """Ctrl-C while a mount starts: whoever waits is told, and nothing is left."""
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "fuse", "--ready-fd", str(write)],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(write,), cwd="/",
    ) as process:  # fmt: skip
        os.close(write)
        assert process.stdin is not None
        process.stdin.write(b" " * 200_000)  # more than a pipe holds: now it is reading
        process.terminate()
        with open(read, "rb") as ready:
            assert b"ended by SIGTERM before it was mounted" in ready.read()
        assert process.wait(START) == 1


def test_without_root_fusermount_unmounts(
    daemon: Start, filled: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same refusals and successes by the way that users have."""
    directory = str(daemon().directory)
    with open(f"{directory}/0", "rb") as file:
        assert "busy" in mountpoint._fusermount(directory, lazy=False)
        assert file.read() == filled["0"]
        assert not mountpoint._fusermount(directory, lazy=True)
    assert mountpoint.is_mounted(directory) is None
    assert "fusermount3" in mountpoint._fusermount(directory, lazy=False)
    monkeypatch.setenv("PATH", "")
    assert "apt install fuse3" in mountpoint._fusermount(directory, lazy=False)


@pytest.mark.parametrize("how", ["handlers", "start"])
def test_a_handler_that_raises_answers_eio_and_the_next_request_works(tmp_path: Path, how: str) -> None:
    """Anything unexpected: EIO. Every exception becomes an errno: a bug in one request does not end the
    mount, or go unseen.

    What fails while the mount starts does end it, and leaves nothing mounted.
    """
    directory = tmp_path / "mnt"
    directory.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", raising.__name__, str(directory), how],
        cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        if how == "handlers":
            for _ in range(3):
                with pytest.raises(OSError) as bug:
                    os.stat(directory / "ill")
                assert bug.value.errno == errno.EIO
                assert os.stat(directory / "well").st_size == 5
                with pytest.raises(OSError) as bug, open(directory / "well", "rb"):
                    pass
                assert bug.value.errno == errno.EIO
            mountpoint.unmount(str(directory))
        said = process.communicate(timeout=START)[1]
    assert process.returncode == (how == "start"), said
    assert "KeyError" in said
    assert mountpoint.is_mounted(str(directory)) is None


def test_a_mount_for_others_is_what_the_settings_say(daemon: Start) -> None:
    """allow_other is a choice, and not made by default."""

    def options(one: Daemon) -> str:
        table = Path("/proc/self/mountinfo").read_text()
        return next(line for line in table.splitlines() if str(one.directory) in line)

    mounted = daemon()
    assert "allow_other" not in options(mounted)
    assert "default_permissions" in options(mounted)
    mounted.stop()
    assert "allow_other" in options(daemon(mount=MountSettings(allow_other=True)))


def test_secrets_appear_nowhere(daemon: Start, bucket: Path, tmp_path: Path) -> None:
    """Secrets never appear in arguments, logs, status, metrics or files of ours."""
    secret = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
    (bucket / "f").write_bytes(b"12345")
    one = daemon(start=False)
    environment = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": secret}
    one.settings = replace(one.settings, environment=environment, log_level="debug")
    one.start()
    assert (one.directory / "f").read_bytes() == b"12345"
    assert one.process is not None
    said = [
        Path(f"/proc/{one.process.pid}/cmdline").read_bytes(),
        json.dumps(one.status()).encode(),
        metrics.render(one.status()),
        json.dumps(one.answer).encode(),
    ]
    one.stop()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4, "index, catalogue, layout, log"
    for text in [*said, *(path.read_bytes() for path in written)]:
        assert secret.encode() not in text
