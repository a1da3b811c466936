"""
`datacache mount`: start the daemon, and return when its mount answers.

The daemon is another program (`python -m fuse`): the settings go to its standard input, one line
comes back on a descriptor of its own, and then the mount is looked at from outside, as any other
process will. Whatever goes wrong before that, nothing is left: no process, no mount.

The directory is locked (flock on what lies under the mount) while this goes on, so that two mounts
that start at once do not end up on top of each other.
"""

import argparse
import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from datacache.cli import flags, permission
from datacache.errors import ControlError, DatacacheError, Denied, MountError, NotFound, SettingError

if TYPE_CHECKING:
    from datacache.config.settings import Settings

START_TIMEOUT = 90.0
"""Seconds until the daemon must have mounted. A manifest is read before that, and a store that is
away takes its 30 s to be given up; this is well above."""
ANSWER_TIMEOUT = 10.0
"""Seconds in which a fresh mount must answer a stat."""
STORE_TIMEOUT = 5.0
"""Seconds that the store is given to say that something is wrong with the name or the credentials."""
STOP_TIMEOUT = 3.0
"""Seconds that a daemon which has not mounted yet is given to end before it is killed. It may be deaf
inside a request to a store; there is nothing that it could lose."""
QUIET = 2.0
"""Seconds after which the user is told what is being waited for."""

EXAMPLES = """\
examples:
  datacache mount s3://bucket/train /mnt/train
  datacache mount s3://bucket/train /mnt/train --cache mem:/dev/shm/x=4GiB --cache ssd:/var/cache/x=200GiB
  datacache mount s3://a/x=/train oss://b/y=/val /mnt/data
  datacache mount https://host/data/ /mnt/data --foreground
  datacache mount --config /etc/datacache/imagenet.yaml /mnt/imagenet
  datacache mount --rw s3://bucket/results /mnt/results --landing /mnt/nvme/landing

Returns 0 only when the mount answers. Mounting what is mounted there already is no error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "datacache mount URI [URI=PATH ...] DIR [FLAGS]"
    parser.description = "Show a bucket, or several, as a local directory, through the cache."
    parser.epilog = EXAMPLES
    parser.add_argument(
        "words", nargs="*", metavar="URI... DIR",
        help="what to show (s3, gs, az, oss, http, https, file, ...); with =PATH: where in the data set; "
        "last the directory to mount at",
    )  # fmt: skip
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="stay until it is unmounted; log to standard error"
    )
    flags.add_dataset_flags(parser)
    flags.add_mount_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Mount. 0 when it answers (in the foreground: when it has ended cleanly)."""
    uris, directory = split(args.words)
    settings = flags.read(args, uris, directory=real(directory))
    if not settings.mount.directory:
        raise SettingError("DIR", "", "the directory to mount at, as the last argument")
    return mount(settings, foreground=args.foreground)


def mount(settings: "Settings", *, foreground: bool) -> int:
    """Mount `settings` in a daemon of its own."""
    from datacache.sources.opening import check_mount
    from fuse import mountpoint

    directory = settings.mount.directory
    for point in settings.dataset.mounts:
        check_mount(point, settings.environment)
    if settings.api.listen:
        from datacache.cluster.credentials import admission

        admission(settings.api)
    mountpoint.clean_stale(directory)
    if (already := _already(settings)) is not None:
        return already
    mountpoint.check_target(directory, mountpoint.places(settings))
    if settings.writing.enabled:
        _check_landing(settings)
    _check_runtime(settings.runtime)
    if not foreground and not settings.log_file:
        settings = replace(settings, log_file=_log_in(settings.state))
    with _interrupted_once():
        return _mounted(settings, foreground=foreground)


def _mounted(settings: "Settings", *, foreground: bool) -> int:
    directory = settings.mount.directory
    daemon = Daemon(settings)
    try:
        with _locked(directory):
            if (already := _already(settings)) is not None:
                return already
            sinks = permission.sinks_of(settings, patience=STORE_TIMEOUT)
            with permission.Permission(sinks, patience=STORE_TIMEOUT) as asked:
                daemon.start()
                daemon.wait_until_mounted()
                _wait_until_it_answers(directory)
                answers = _ask_the_store(directory, may_be_empty=settings.writing.enabled)
                for doubt in asked.check():
                    if answers:  # else that is said already
                        _say(f"warning: {doubt}")
        if not foreground:
            print(f"{settings.dataset.name}: mounted at {directory}")
            return 0
        _say(f"{settings.dataset.name}: mounted at {directory}; Ctrl-C unmounts")
        tell_systemd("READY=1")
        return daemon.accompany()
    except BaseException:
        daemon.stop()
        raise


class Daemon:
    """The daemon process, from its start until somebody else can be told that it runs."""

    def __init__(self, settings: "Settings") -> None:
        self._settings = settings
        self._directory = settings.mount.directory
        self._log_file = settings.log_file
        self._log_start = 0
        self._ready = -1
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Daemon {self._process and self._process.pid} for {self._directory}>"

    def start(self) -> None:
        """Start the process and hand it its settings. It ends by itself when it does not get them all."""
        from datacache.config.parsing import dump_settings

        log = self._open_log() if self._log_file else None
        self._ready, theirs = os.pipe()
        try:
            # -P and "/": the daemon is our `fuse`, not a fuse.py that happens to lie where the user is,
            # and it keeps no directory busy. A session of its own: a Ctrl-C in this terminal is for us,
            # who tell it once what to do.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fuse", "--ready-fd", str(theirs)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(theirs,),
                cwd="/", start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(theirs)
            if log is not None:
                os.close(log)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died; what it wrote says why
            self._process.stdin.write(dump_settings(self._settings).encode())
            self._process.stdin.close()

    def _open_log(self) -> int:
        try:
            os.makedirs(os.path.dirname(self._log_file), mode=0o700, exist_ok=True)
            log = os.open(self._log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            of_state = self._log_file == _log_in(self._settings.state)
            name, value = ("state", self._settings.state) if of_state else ("log-file", self._log_file)
            raise SettingError(name, value, f"one that can be made and written ({error.strerror})") from error
        self._log_start = os.fstat(log).st_size
        return log

    def wait_until_mounted(self) -> None:
        """Return when the daemon says that its mount is up. Raises what it says otherwise."""
        line = self._line()
        if not line:
            raise MountError(f"{self._directory}: the daemon ended before it had mounted{self._last_words()}")
        answer = json.loads(line)
        if answer.get("ok"):
            return
        if answer.get("exit") == 2:
            raise _Refused(str(answer["error"]))
        raise MountError(str(answer.get("error", line)))

    def _line(self) -> str:
        """The one line that the daemon writes, or "" when it ended without one."""
        start, told, text = time.monotonic(), False, b""
        try:
            with selectors.DefaultSelector() as waiting:
                waiting.register(self._ready, selectors.EVENT_READ)
                while True:
                    passed = time.monotonic() - start
                    if passed > START_TIMEOUT:
                        raise MountError(
                            f"{self._directory}: not mounted after {START_TIMEOUT:.0f} s{self._last_words()}"
                        )
                    if passed > QUIET and not told:
                        _say(f"{self._directory}: still mounting (Ctrl-C gives up)")
                        told = True
                    if waiting.select(0.2 if told else QUIET / 8):
                        piece = os.read(self._ready, 65536)
                        text += piece
                        if not piece or b"\n" in text:
                            return text.decode().strip() if b"\n" in text else ""
        finally:
            os.close(self._ready)
            self._ready = -1

    def stop(self) -> None:
        """End the daemon and whatever it mounted. Ctrl-C is deaf here: this is the way out, and bounded."""
        from fuse import mountpoint

        process = self._process
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
        if process is None:
            return
        with _deaf():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            mountpoint.clean_stale(self._directory)

    def accompany(self) -> int:
        """Stay with the daemon until it ends, hand it what would end us; the exit code."""
        from fuse import mountpoint

        process = self._process
        assert process is not None

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, forward) for number in _ending()}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        mountpoint.clean_stale(self._directory)
        if code < 0:
            name = signal.Signals(-code).name
            raise MountError(f"{self._directory}: the daemon was ended by {name}; the mount is gone")
        if code > 0:
            raise MountError(f"{self._directory}: the daemon failed; the mount is gone{self._last_words()}")
        return 0

    def _last_words(self) -> str:
        """The last line of what the daemon has logged, for the message."""
        if not self._log_file:
            return "; what it said is above"
        with suppress(OSError), open(self._log_file, "rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
            if lines:
                return f": {lines[-1].strip()} ({self._log_file})"
        return f" ({self._log_file})"


class _Refused(SettingError):
    """What the daemon would not start with; its words are the message already."""

    def __init__(self, message: str) -> None:
        DatacacheError.__init__(self, message)


def _log_in(state: str) -> str:
    """Where a mount in the background logs, unless it is told otherwise."""
    return os.path.join(state, "mount.log")


def _check_runtime(directory: str) -> None:
    """Make the directory of the control sockets, before anything is started that would need it."""
    from datacache.cluster.registry import make_private

    try:
        make_private(directory)
    except ControlError as error:
        raise SettingError("DATACACHE_RUNTIME", directory, f"a directory for sockets ({error})") from error


def split(words: list[str]) -> tuple[list[str], str]:
    """The URIs and the directory of `URI... DIR`. The directory may come from a config file."""
    if words and "://" not in words[-1]:
        return words[:-1], words[-1]
    return words, ""


def real(directory: str) -> str:
    """`directory` as the kernel calls it. What is mounted there is not touched: it may hang."""
    from fuse import mountpoint

    if not directory:
        return ""
    return mountpoint.real(directory)


def _check_landing(settings: "Settings") -> None:
    """Warn of a landing zone that no power cut may meet. Raises SettingError for one that cannot be."""
    from datacache.cli import doctor
    from datacache.writing.opening import landing_directory
    from fuse import mountpoint

    directory = landing_directory(settings)
    kind = doctor.file_system_type(directory, mountpoint.mountinfo())
    place = doctor.landing_place(directory, settings.cache.tiers)
    for found in [*place, *doctor.landing_disk(directory, kind)]:
        if found.state == "fail":
            where = found.advice.removeprefix("--landing DIR, ")
            raise SettingError("--landing", directory, f"a directory {where}: {found.text}")
        _say(f"warning: {found.text}; {found.advice}")


def _already(settings: "Settings") -> int | None:
    """0 when this very data set is mounted there so, None when nothing is. Raises when another one is, or in
    another way."""
    from datacache.cli import targets
    from fuse import mountpoint

    directory, dataset = settings.mount.directory, settings.dataset
    if mountpoint.is_mounted(directory) is None:
        return None
    worker = next((known for known in targets.live() if known.mount == directory), None)
    if worker is None:
        return None  # of another user, or on its way up or down: check_target says so
    uris = [dataset.manifest] if dataset.manifest else [point.uri for point in dataset.mounts]
    shown = targets.Place(worker, "/").control(timeout=ANSWER_TIMEOUT).status()
    if (worker.dataset, worker.uris, shown["snapshot"]) == (dataset.name, uris, settings.index.snapshot):
        if ("writing" in shown) != settings.writing.enabled:
            how, wanted = ("read-only", "with") if settings.writing.enabled else ("with --rw", "without")
            raise MountError(
                f"{directory}: {dataset.name} is mounted there {how} (process {worker.pid}); "
                f"`datacache umount {directory}` first, to mount it {wanted} --rw"
            )
        return _as_it_is(settings, shown, worker.pid)
    raise MountError(
        f"{directory}: {worker.dataset} is mounted there (process {worker.pid}); "
        f"`datacache umount {directory}` first"
    )


def _as_it_is(settings: "Settings", shown: Mapping[str, Any], pid: int) -> int:
    """0 when the data set is mounted with these settings, as its status has `shown`; credentials are nobody's
    to compare. Raises MountError when it is with others."""
    from importlib.metadata import PackageNotFoundError, version

    from datacache.config.spelling import KEPT, differing, spelled

    directory, wanted = settings.mount.directory, spelled(settings)
    if settings.log_file in ("", _log_in(settings.state)):
        del wanted["log-file"]  # nobody asked for one
    there = f"{directory}: {settings.dataset.name} is mounted there already (process {pid})"
    others = differing(shown.get("settings", {}), wanted)
    if not others:
        _say(there)
        return 0
    said = ", ".join(f"{name} {was or 'none'} (not {then or 'none'})" for name, (was, then) in others.items())
    kept = sorted(others.keys() & KEPT)
    if not kept and shown["broker"]:
        advice = "`datacache upgrade` with the same arguments changes them"
    else:
        why = (
            f"{', '.join(kept)} cannot change while it is mounted"
            if kept
            else "its driver cannot change them"
        )
        advice = f"`datacache umount {directory}` first, since {why}"
    line = f"{there} with other settings: {said}; {advice}"
    ours = "unknown"
    with suppress(PackageNotFoundError):
        ours = version("dataset-cache")
    if shown["version"] != ours:
        _say(f"warning: {line}")  # it may be what nobody chose, and was another choice of ours then
        return 0
    raise MountError(line)


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MountError(f"{directory}: another `datacache mount` is starting there") from None
        yield
    finally:
        os.close(fd)


def _wait_until_it_answers(directory: str) -> None:
    """Return when a stat of `directory` returns. Raises MountError in bounded time.

    In a thread, because a stat of a mount that does not answer cannot be interrupted. It ends at the
    latest when the daemon does, which our caller sees to.
    """
    from fuse import mountpoint

    failed: list[OSError] = []

    def look() -> None:
        try:
            os.stat(directory)
        except OSError as error:
            failed.append(error)

    looking = threading.Thread(target=look, name=f"stat {directory}", daemon=True)
    looking.start()
    looking.join(ANSWER_TIMEOUT)
    if looking.is_alive():
        raise MountError(f"{directory}: mounted, but it does not answer after {ANSWER_TIMEOUT:.0f} s")
    if failed:
        raise MountError(f"{directory}: mounted, but it answers {failed[0].strerror}") from failed[0]
    if mountpoint.is_mounted(directory) is None:
        raise MountError(f"{directory}: the daemon says that it is mounted, the kernel that it is not")


def _ask_the_store(directory: str, *, may_be_empty: bool) -> bool:
    """Raise when the store says that there is no such bucket, or that it is not for us; whether it answers.

    A store that is away is no reason not to mount: what is cached is served. A listing that takes its
    time goes on while we return; whoever looks into the mount first needs it anyway.
    """
    from datacache.cli import targets

    worker = next((known for known in targets.live() if known.mount == directory), None)
    if worker is None:
        return True  # unmounted in the meantime
    try:
        entries, _ = targets.Place(worker, "/").control(timeout=STORE_TIMEOUT).list("/", limit=1)
    except (NotFound, Denied):
        raise
    except DatacacheError as error:
        why = f"nothing within {STORE_TIMEOUT:.0f} s" if isinstance(error, ControlError) else error
        _say(
            f"warning: mounted, but its store does not answer ({why}); what is cached is served; `datacache "
            "doctor`, with the same URI and flags, says what is wrong"
        )
        return False
    if not entries and not may_be_empty:
        _say(f"warning: mounted, but there is nothing below {', '.join(worker.uris)}; check the prefix")
    return True


def tell_systemd(state: str) -> None:
    """Tell the service manager, where one started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.sendto(state.encode(), address)


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """The first signal that ends us is raised here and makes us deaf for more: a second one, in the middle
    of what the first one makes us do, would leave a daemon that mounts for nobody."""
    from datacache.cli.main import Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for ending in before:
            signal.signal(ending, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = {n: signal.getsignal(n) for n in _ending()}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deaf() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_IGN) for n in _ending()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending() -> tuple[signal.Signals, ...]:
    """The signals that end us: of a terminal that is closed, too, but not under nohup(1)."""
    hung_up = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ()
    return (signal.SIGINT, signal.SIGTERM, *hung_up)


def _say(line: str) -> None:
    print(f"datacache: {line}", file=sys.stderr, flush=True)
