"""
The broker: keeps a mount alive while the daemons behind it come and go.

A small process that does little, so that it does not die: it mounts, greets the kernel (INIT), keeps
the descriptor, and starts the daemon with it. A daemon that dies is followed by another, which has
the kernel send again what was unanswered: whoever reads waits a moment and sees no error. `datacache
upgrade` lets it end one daemon and start the next with new code or other settings. A daemon that keeps
dying is given up after TRIES; from then on every request is answered EIO, so that nothing hangs, until
somebody upgrades or unmounts it.

There is nothing else to hand down: node and handle numbers say what they name (`nodes`).

It never opens or stats its own mount: it would wait for the daemon that it should start. It imports
nothing of the data set, and is protected from the OOM killer, which the daemon is not.
"""

import contextlib
import functools
import json
import logging
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

from datacache.cluster import registry
from datacache.config.parsing import dump_settings, load_settings
from datacache.config.settings import Consistency, Settings
from datacache.errors import DatacacheError, MountError, SettingError
from fuse import connection, mountpoint
from fuse.connection import Agreement, Refusal

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds for which files that are open go on being served after a signal. The mount point is free at
once; then what is still open gets ENOTCONN."""
START = 90.0
"""Seconds in which a daemon that follows another must serve, or it is killed: as long as `datacache mount`
waits for the first one."""
STOP = 10.0
"""Seconds that a daemon which was told to end is given before it is killed. Its cache survives that, and
what it left unanswered is sent to the next one."""
TRIES = 6
"""Daemons that die young, one after the other, before no more are started."""
YOUNG = 20.0
"""Seconds of life up to which a death counts as young."""
_BACKOFF, _BACKOFF_MAX = 0.25, 5.0
"""Seconds between a death and the next daemon: doubled with each young one."""
_ASK_TIMEOUT = 2.0
"""Seconds for a request to arrive whole: nothing else is done meanwhile."""
_ASK_MAX = 4 << 20

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

FIXED = ("directory", "driver", "io", "allow_other")
"""What of the mount's settings the kernel was told, or who mounted: no upgrade changes it."""


@dataclass(frozen=True)
class Handover:
    """What a daemon is started with, beside its settings."""

    descriptor: int
    agreement: Agreement
    life: int
    """Daemons that served this mount before."""
    broker: int
    """Our pid: what others know the mount by."""
    oom_score_adj: str
    """What it was before we protected ourselves."""
    index: str = ""
    """The identity of the index that the first daemon had: a node number means nothing to another."""

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> "Handover":
        fields = json.loads(text)
        return Handover(**{**fields, "agreement": Agreement(**fields["agreement"])})


def serve(
    settings: Settings, *, source: str, stateless: bool, passthrough: bool, control: str,
    mounted: Callable[[], None], inherited: int | None = None,
) -> None:  # fmt: skip
    """Mount, call `mounted` when it answers, keep it served until it is gone, take everything down.

    `control`: the control socket that its daemons will have. `inherited`: the descriptor of a fresh
    connection that somebody else has opened and mounts; it is served, and neither mounted nor unmounted.
    Raises what the first daemon could not start for.
    """
    directory = settings.mount.directory
    with contextlib.ExitStack() as built:
        before = _protect()
        take_off = None
        if inherited is None:
            descriptor, take_off = _mounted(settings, source=source)
            built.callback(os.close, descriptor)
            built.callback(take_off)
        else:
            descriptor = inherited
            built.callback(os.close, descriptor)
        agreement = connection.greet(
            descriptor, stateless=stateless, passthrough=passthrough, writable=settings.writing.enabled
        )
        if passthrough and not agreement.passthrough:
            log.warning("this kernel offers no passthrough (CONFIG_FUSE_PASSTHROUGH): reads are served")
        if mountpoint.is_mounted(directory) is not None:  # else it is in another name space
            # After INIT: answering it resets the read-ahead.
            mountpoint.set_read_ahead(directory, settings.mount.read_ahead)
        first = Handover(descriptor, agreement, 0, os.getpid(), before)
        with Broker(settings, first, control=control, take_off=take_off, mounted=mounted) as broker:
            broker.run()


def _mounted(settings: Settings, *, source: str) -> tuple[int, Callable[[], None]]:
    """Mount; the descriptor of the connection, and what takes the mount off again."""
    directory = settings.mount.directory
    mountpoint.clean_stale(directory)
    mountpoint.check_target(directory, mountpoint.places(settings))
    descriptor = mountpoint.mount(
        directory, source=source, allow_other=settings.mount.allow_other, writable=settings.writing.enabled
    )
    shown = mountpoint.is_mounted(directory)
    if shown is None:
        os.close(descriptor)
        raise MountError(f"{directory}: mounted, and gone again before it was served")
    return descriptor, functools.partial(mountpoint.take_off, directory, shown.device)


@dataclass(frozen=True)
class _Upgrade:
    """An upgrade under way: who asked for it, to what, and the life that ends for it."""

    peer: socket.socket
    settings: str
    python: str
    """The interpreter: of the installation whose code shall run."""
    replaces: int


class _Daemon:
    """One daemon process: its pid descriptor, and the one line that it says when it serves."""

    def __init__(self, python: str, settings: str, handover: Handover) -> None:
        self.started = time.monotonic()
        self.python, self.settings, self.life = python, settings, handover.life
        ready, theirs = os.pipe()
        self.ready = ready
        self.said = b""
        self.answer: dict[str, Any] | None = None
        try:
            self.process = subprocess.Popen(
                [
                    python, "-P", "-m", "fuse",
                    "--ready-fd", str(theirs), "--handover", handover.dump(),
                ],
                stdin=subprocess.PIPE, pass_fds=(theirs, handover.descriptor), cwd="/",
            )  # fmt: skip
        except BaseException:
            os.close(ready)
            raise
        finally:
            os.close(theirs)
        self.ended = os.pidfd_open(self.process.pid)
        self.serves = False
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(settings.encode())

    def listen(self) -> bool:
        """Take what it says; whether it has said its line, or will not any more."""
        piece = os.read(self.ready, 65536)
        self.said += piece
        if b"\n" in self.said:
            self.answer = json.loads(self.said)
        return not piece or self.answer is not None

    def close(self) -> None:
        os.close(self.ended)
        os.close(self.ready)


class Broker:
    """One mount and the daemons behind it. One thread; everything that happens is an event of `run`."""

    def __init__(
        self, settings: Settings, first: Handover, *, control: str, take_off: Callable[[], None] | None,
        mounted: Callable[[], None],
    ) -> None:  # fmt: skip
        """`take_off` is None for a mount that is not ours to take off."""
        self._settings, self._text = settings, dump_settings(settings)
        self._python = sys.executable
        self._handover, self._descriptor = first, first.descriptor
        self._refusal = Refusal(first.descriptor, first.agreement)
        self._worker, self._control = control, registry.broker_socket(control)
        self._take_off, self._mounted = take_off, mounted
        self._events = selectors.DefaultSelector()
        self._daemon: _Daemon | None = None
        self._deaths = 0  # young ones, one after the other
        self._next_at = 0.0  # when the next daemon is to be started, while there is none
        self._given_up = self._over = self._served = False
        self._kill_at = float("inf")  # when the daemon is killed, unless it has ended, or serves, by then
        self._end_at = float("inf")  # when what is still open is ended, after a signal
        self._signals = 0
        self._asking: _Upgrade | None = None
        self._failure: DatacacheError | None = None

    def __repr__(self) -> str:
        return f"<Broker of {self._settings.mount.directory}, daemon {self._handover.life}>"

    def __enter__(self) -> "Broker":
        self._wake, wake = os.pipe()
        for end in (self._wake, wake):
            os.set_blocking(end, False)
        self._wake_end = wake
        self._old_wake = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _ENDING:
            signal.signal(number, _noted)
        self._events.register(self._wake, selectors.EVENT_READ, self._on_signal)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._control)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            with _address(self._control) as address:
                self._listener.bind(address)
        finally:
            os.umask(mask)
        self._listener.listen(4)
        # Asks the device for nothing but whether it is gone: requests are the daemon's.
        self._gone = select.epoll()
        self._gone.register(self._descriptor, 0)
        self._events.register(self._gone, selectors.EVENT_READ, self._on_gone)
        self._events.register(self._listener, selectors.EVENT_READ, self._on_ask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._daemon is not None:
            self._daemon.process.kill()
            self._daemon.process.wait()
            self._daemon.close()
        if self._asking is not None:
            self._tell(error="the mount ended")
        self._events.close()
        self._gone.close()
        self._listener.close()
        registry.clear(self._worker)  # the last daemon may have had no time to
        signal.set_wakeup_fd(self._old_wake)
        os.close(self._wake)
        os.close(self._wake_end)

    def run(self) -> None:
        """Until the mount is gone. Raises what the first daemon could not start for."""
        self._start(self._text)
        while not self._over:
            for key, _ in self._events.select(self._patience()):
                key.data()
            self._on_time()
        if self._failure is not None:
            raise self._failure

    # ---- time ------------------------------------------------------------------------------------

    def _patience(self) -> float | None:
        due = [self._kill_at, self._end_at]
        if self._daemon is None and not self._given_up:
            due.append(self._next_at)
        first = min(due)
        return None if first == float("inf") else max(0.0, first - time.monotonic())

    def _on_time(self) -> None:
        now = time.monotonic()
        if now >= self._end_at:
            self._end_at = float("inf")
            self._end()
        if now >= self._kill_at and self._daemon is not None:
            what = "end" if self._daemon.serves else "serve"
            log.warning("the daemon (process %d) does not %s; killing it", self._daemon.process.pid, what)
            self._kill_at = float("inf")
            self._daemon.process.kill()
        if self._daemon is None and not self._given_up and not self._over and now >= self._next_at:
            self._start(self._text)

    # ---- daemons ---------------------------------------------------------------------------------

    def _start(self, settings: str, python: str = "") -> None:
        try:
            self._daemon = daemon = _Daemon(python or self._python, settings, self._handover)
        except OSError as error:
            self._failed(-1, f"it cannot be started: {error}", young=True)
            return
        if self._served:
            self._kill_at = daemon.started + START
        self._events.register(daemon.ready, selectors.EVENT_READ, self._on_ready)
        self._events.register(daemon.ended, selectors.EVENT_READ, self._on_end)

    def _on_ready(self) -> None:
        daemon = self._daemon
        assert daemon is not None
        if not daemon.listen():
            return
        self._events.unregister(daemon.ready)
        if daemon.answer is None or not daemon.answer.get("ok"):
            return  # it ends, and then we know why
        daemon.serves = True
        if self._asking is None or self._asking.replaces != daemon.life:
            self._kill_at = float("inf")
        self._handover = replace(self._handover, index=daemon.answer.get("index", ""))
        self._text, self._python = daemon.settings, daemon.python
        if not self._served:
            self._served = True
            self._mounted()
        elif self._asking is not None and self._asking.replaces != daemon.life:
            self._settings, self._deaths = load_settings(self._text, newer=True), 0
            log.info("upgraded: process %d serves", daemon.process.pid)
            self._tell(ok=True, pid=daemon.process.pid)
        else:
            log.warning("process %d has taken over", daemon.process.pid)

    def _on_end(self) -> None:
        daemon = self._daemon
        assert daemon is not None
        code = daemon.process.wait()
        self._daemon, self._kill_at = None, float("inf")
        self._events.unregister(daemon.ended)
        if daemon.ready in self._events.get_map():
            while not daemon.listen():
                pass
            self._events.unregister(daemon.ready)
        daemon.close()
        said = daemon.answer or {}
        if self._signals or self._gone.poll(0):
            self._over = True
        elif not self._served:
            self._failure = _failure(said, code)
            self._over = True
        elif self._asking is not None and self._asking.replaces == daemon.life:
            self._follow(self._asking.settings, self._asking.python)  # the old one has made room
        else:
            how = str(said.get("error") or _how(code))
            self._failed(daemon.process.pid, how, young=time.monotonic() - daemon.started < YOUNG)

    def _failed(self, pid: int, how: str, *, young: bool) -> None:
        """A daemon has ended that nobody told to, or could not be started."""
        if not self._served:
            self._failure, self._over = MountError(how), True
        elif self._asking is not None:
            self._tell(error=f"the new daemon: {how}")
            log.error("the upgrade failed (%s); going on with what there was", how)
            self._follow(self._text)
        else:
            self._died(pid, how, young=young)

    def _follow(self, settings: str, python: str = "") -> None:
        self._handover = replace(self._handover, life=self._handover.life + 1)
        self._start(settings, python)

    def _died(self, pid: int, how: str, *, young: bool) -> None:
        self._deaths = self._deaths + 1 if young else 1
        self._handover = replace(self._handover, life=self._handover.life + 1)
        if self._deaths >= TRIES:
            log.error("the daemon died (%s), %d times in a row: given up, everything is EIO", how, TRIES)
            self._give_up()
            return
        wait = min(_BACKOFF_MAX, _BACKOFF * 2 ** (self._deaths - 1)) if self._deaths > 1 else 0.0
        log.error("the daemon (process %d) died (%s); starting another", pid, how)
        self._next_at = time.monotonic() + wait

    def _on_gone(self) -> None:
        """The mount is gone, in every name space, and nothing of it is open: the daemon ends by itself."""
        self._events.unregister(self._gone)
        if self._daemon is None:
            self._over = True
        else:
            self._kill_at = time.monotonic() + STOP

    # ---- giving up -------------------------------------------------------------------------------

    def _give_up(self) -> None:
        self._given_up = True
        self._refusal.begin()
        self._events.register(self._descriptor, selectors.EVENT_READ, self._on_request)

    def _take_up(self) -> None:
        if self._given_up:
            self._given_up, self._deaths = False, 0
            self._events.unregister(self._descriptor)
            self._refusal.end()

    def _on_request(self) -> None:
        if not self._refusal.answer():
            self._over = True

    # ---- signals and upgrades --------------------------------------------------------------------

    def _on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 64)
        self._signals += 1
        if self._signals > 1:
            self._end()
            return
        if self._take_off is None:
            log.info("told to end")
            self._end()
            return
        log.info("told to end: unmounting")
        self._take_off()
        self._end_at = time.monotonic() + GRACE
        if self._daemon is None:
            self._over = True

    def _end(self) -> None:
        """End what is still open."""
        if self._daemon is None:
            self._over = True
            return
        log.info("ending what is still open")
        self._daemon.process.terminate()
        self._kill_at = time.monotonic() + STOP

    def _on_ask(self) -> None:
        peer, _ = self._listener.accept()
        try:
            asked = _line(peer, _ASK_TIMEOUT)
            if self._asking is not None:
                raise MountError("another upgrade is under way")
            request = json.loads(asked)
            text = request.get("settings") or self._text
            stateless = self._handover.agreement.stateless
            _check_upgrade(self._settings, load_settings(text, newer=True), stateless=stateless)
            python = request.get("python") or sys.executable
            if not os.access(python, os.X_OK):
                raise MountError(f"{python} is no program")
        except Exception as error:  # noqa: BLE001  whatever somebody says, the mount goes on
            known = isinstance(error, DatacacheError | OSError)
            why = str(error) if known else f"it does not understand what is asked ({error!r})"
            with contextlib.suppress(OSError), peer:
                peer.sendall(json.dumps({"error": why}).encode() + b"\n")
            return
        self._asking = _Upgrade(peer, text, python, self._daemon.life if self._daemon is not None else -1)
        self._take_up()
        if self._daemon is None:
            self._follow(text, python)
        else:
            log.info("upgrading: process %d is told to end", self._daemon.process.pid)
            self._daemon.process.terminate()
            self._kill_at = time.monotonic() + STOP

    def _tell(self, **answer: object) -> None:
        assert self._asking is not None
        peer, self._asking = self._asking.peer, None
        with contextlib.suppress(OSError), peer:
            peer.sendall(json.dumps(answer).encode() + b"\n")


def _check_upgrade(now: Settings, then: Settings, *, stateless: bool = False) -> None:
    """Raise MountError unless a mount of `now` can go on as one of `then`. `stateless`: its handles mean
    nothing, since it is `--io pagecache`."""
    check_processes(then, stateless=stateless)
    changed = [name for name in FIXED if getattr(now.mount, name) != getattr(then.mount, name)]
    changed += [
        name for name, one, other in (
            ("name", now.dataset.name, then.dataset.name),
            ("mounts", _shown(now), _shown(then)),
            ("snapshot", now.index.snapshot, then.index.snapshot),
            ("rw", now.writing.enabled, then.writing.enabled),
            ("landing", now.writing.landing, then.writing.landing),
            ("state", now.state, then.state),
            ("runtime", now.runtime, then.runtime),
            # The kernel asks such a mount nothing any more about what it was told to believe for ever.
            ("consistency", stateless and _is_pinned(now) and not _is_pinned(then), False),
        ) if one != other
    ]  # fmt: skip
    if changed:
        raise MountError(
            f"{now.mount.directory}: an upgrade cannot change {', '.join(changed)}; unmount, and mount anew"
        )


def check_processes(settings: Settings, *, stateless: bool) -> None:
    """Raise SettingError for more processes than may answer a mount."""
    if settings.mount.processes != 1 and not (stateless and settings.index.snapshot):
        expected = "1, or a snapshot with --io pagecache: only then can several answer"
        raise SettingError("processes", settings.mount.processes, expected)


def _is_pinned(settings: Settings) -> bool:
    index = settings.index
    return bool(index.snapshot) or index.consistency is Consistency.IMMUTABLE or index.ttl == float("inf")


def _shown(settings: Settings) -> object:
    dataset = settings.dataset
    return (dataset.manifest, [(point.uri, point.path) for point in dataset.mounts])


def _failure(said: dict[str, Any], code: int) -> DatacacheError:
    if said.get("exit") == 2:
        refused = SettingError.__new__(SettingError)
        DatacacheError.__init__(refused, str(said["error"]))
        return refused
    return MountError(str(said.get("error") or f"the daemon ended before it served ({_how(code)})"))


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _line(peer: socket.socket, timeout: float) -> bytes:
    text, deadline = b"", time.monotonic() + timeout
    while b"\n" not in text:
        peer.settimeout(max(0.001, deadline - time.monotonic()))
        piece = peer.recv(1 << 16)
        if not piece or len(text) > _ASK_MAX:
            raise MountError("the request did not arrive whole")
        text += piece
    return text


@contextlib.contextmanager
def _address(path: str) -> Iterator[str]:
    """The address of a socket at `path`. Through its directory: there is room for 107 bytes only."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor has the rest."""


def _protect() -> str:
    """Keep the OOM killer away from this process, where we may; what it had been."""
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as knob:
            before = knob.read().strip()
            knob.seek(0)
            knob.write("-1000")
        return before
    except OSError:
        return ""


def ask_for_upgrade(control: str, settings: Settings | None, *, timeout: float) -> int:
    """Ask the broker of a mount for another daemon, of this interpreter's code; its pid. `settings` None: the
    same as now. Raises MountError."""
    request = {"settings": settings and dump_settings(settings), "python": sys.executable}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
        to.settimeout(timeout)
        try:
            with _address(registry.broker_socket(control)) as address:
                to.connect(address)
            to.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(_line(to, timeout))
        except FileNotFoundError as error:
            raise MountError(
                "this mount has no broker, which only the native driver's have: unmount, and mount anew"
            ) from error
        except (OSError, ValueError) as error:
            raise MountError(f"the mount's broker does not answer ({error})") from error
    if "error" in answer:
        raise MountError(str(answer["error"]))
    return int(answer["pid"])


__all__ = ["Broker", "Handover", "ask_for_upgrade", "serve"]
