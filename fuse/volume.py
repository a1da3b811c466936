"""
The volume of a worker: its mount comes from the node plugin, goes, and comes again, while the worker works.

One thread keeps a connection to the node plugin's socket and does what `holding.WorkerSide` says. A mount
that is new is served by the worker that is there; one that earlier workers have served needs a worker that
was built for it, since the kernel uses their numbers. So `begin` is asked before the worker is built, and
returns when it is known whether there is a mount; should one of that kind come later, `anew` says so.

    with Volume(path) as volume:
        begun = volume.begin()
        with Worker(settings, resumed=begun.resumed, index=begun.index, passthrough=begun.passthrough) as
        worker: volume.serve(worker) ... volume.leave()"""

import contextlib
import logging
import os
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datacache.cluster.control import owed
from datacache.config.settings import Settings
from datacache.errors import DatacacheError
from fuse import handing
from fuse.handing import Held, Message, Misspoken
from fuse.holding import Act, Do, Say, Stage, WorkerSide
from fuse.serving import Serving, kernel_writes

if TYPE_CHECKING:
    from datacache.worker import Worker

log = logging.getLogger(__name__)

AGAIN = 0.2
"""Seconds between two looks whether the node plugin is there, half as many more at random, while there is a
mount: it has one holder only."""
IDLE = 0.5
"""... while there is none: one can come, and who waits for it waits for this, too."""
SAY_AGAIN = 60.0
"""Seconds between two log lines of a node plugin that cannot be talked to."""
_JOIN = 5.0
_WHY = 500  # characters of a reason


@dataclass(frozen=True)
class Begun:
    """What a worker is to be built for."""

    held: Held | None
    passthrough: bool
    """Writers are the kernel's own, or there are none."""

    @property
    def resumed(self) -> bool:
        """Whether earlier workers have told the kernel of names."""
        return self.held is not None and self.held.life > 0

    @property
    def index(self) -> str:
        """The identity that the index must have; empty: any."""
        return self.held.index if self.held is not None else ""


class Volume:
    """See the module. `path` is where the node plugin listens."""

    def __init__(
        self, path: str, settings: Settings, *, is_mount: Callable[[int], bool] = handing.is_mount,
        serving: Callable[..., Serving] = Serving,
    ) -> None:  # fmt: skip
        """`is_mount` tells whether a descriptor that came is one of a mount; `serving` makes what serves
        it."""
        self._path, self._settings = path, settings
        self._is_mount, self._make_serving = is_mount, serving
        # Changed by the thread alone, or, before it is started and after it is joined, by who does that.
        self._side = WorkerSide()
        self._peer: socket.socket | None = None
        self._descriptor = -1
        self._serving: Serving | None = None
        self._begun: Begun | None = None  # what the worker that there is was built for
        self._worker: Worker | None = None
        self._left = False
        self._connect_at = 0.0
        self._complained = -SAY_AGAIN
        # What others have the thread do.
        self._asked: deque[Callable[[], None]] = deque()
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._learned = threading.Event()
        self._anew, self._anew_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="volume", daemon=True)

    def __repr__(self) -> str:
        return f"<Volume {self._path}, {self._side!r}>"

    def __enter__(self) -> "Volume":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Where a mount was left, its descriptor and the connection go with the process: not before, since
        the node plugin takes the end of the connection for ours."""
        self._ask(self._end)
        self._thread.join(_JOIN)
        if self._left:
            if self._peer is not None:
                self._peer.detach()
            return
        if self._peer is not None:
            self._peer.close()
        self._let_go()
        if not self._thread.is_alive():
            for end in (self._wake, self._woken, self._anew, self._anew_end):
                os.close(end)

    @property
    def left(self) -> bool:
        """Whether a mount was left to the next worker: this process has to end."""
        return self._left

    def fileno(self) -> int:
        """Can be read from when the worker cannot go on: end it, and `begin` again."""
        return self._anew

    # ---- what the worker's main thread calls ---------------------------------------------------------

    def begin(self) -> Begun:
        """What a worker is to be built for; returns when that is known, which is at once but where a node
        plugin listens and does not say a word, or an earlier worker has not ended yet."""
        while not self._learned.wait(SAY_AGAIN):
            log.warning("the node plugin at %s does not say whether there is a mount; waiting", self._path)
        answer: list[Begun] = []

        def look() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(self._anew, 64)
            held = self._side.held
            self._begun = Begun(held, held is None or self._kernel_writes(held))
            answer.append(self._begun)

        self._ask_and_wait(look)
        return answer[0]

    def refuse(self, why: DatacacheError) -> None:
        """No worker can be built for the mount that there is."""
        self._ask_and_wait(lambda: self._cannot(str(why)))

    def serve(self, worker: "Worker") -> None:
        """Serve the mount that there is, and those that come, by `worker`, until `leave`."""

        def begin() -> None:
            self._worker = worker
            if self._side.stage is Stage.TAKEN:
                self._prepare()

        self._ask_and_wait(begin)

    def leave(self) -> None:
        """Let the next worker serve the mount: nothing is answered any more. This process has to end then,
        unless there was none."""
        self._ask_and_wait(self._leave)

    # ---- the thread ----------------------------------------------------------------------------------

    def _ask(self, what: Callable[[], None]) -> None:
        self._asked.append(what)
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._woken, b"x")

    def _ask_and_wait(self, what: Callable[[], None]) -> None:
        done = threading.Event()

        def act() -> None:
            try:
                what()
            finally:
                done.set()

        self._ask(act)
        done.wait()

    def _run(self) -> None:
        while not self._ends:
            try:
                self._wait()
                while self._asked:
                    self._asked.popleft()()
                if self._peer is None and time.monotonic() >= self._connect_at:
                    self._connect()
            except Exception:
                log.exception("the volume failed: the worker begins anew")
                self._lost()
                self._begin_anew()

    def _wait(self) -> None:
        """Until there is something to do, which the node plugin may say."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        patience = None
        if self._peer is not None:
            poll.register(self._peer, select.POLLIN)
        else:
            patience = 1000 * max(0.0, self._connect_at - time.monotonic())
        held = self._side.held
        if held is not None and self._side.stage is not Stage.SERVES:
            # Only whether it is gone; each request would wake us up, too, but it is the session who takes
            # them.
            poll.register(self._descriptor, 0)
        for ready, _ in poll.poll(patience):
            if held is not None and ready == self._descriptor:
                self._gone(held.connection)
            elif ready != self._wake:
                self._hear()
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def _connect(self) -> None:
        patience = IDLE if self._side.held is None else AGAIN
        self._connect_at = time.monotonic() + patience * (1 + random.random() / 2)
        try:
            self._peer = handing.connect(self._path)
        except (FileNotFoundError, ConnectionRefusedError):
            self._do(self._side.nobody())
        except OSError as error:
            self._complain(f"the node plugin at {self._path} cannot be reached ({error.strerror or error})")
        else:
            self._do(self._side.connects())

    def _hear(self) -> None:
        assert self._peer is not None
        try:
            heard = handing.receive(self._peer)
            if heard is None:
                raise ConnectionResetError
        except BlockingIOError:
            return
        except (OSError, Misspoken) as error:
            if isinstance(error, Misspoken):
                self._complain(f"the node plugin at {self._path}: {error}")
            self._lost()
            return
        message, descriptor = heard
        if descriptor >= 0 and not self._is_mount(descriptor):
            os.close(descriptor)
            self._complain(f"the node plugin at {self._path} gives what is no mount")
            self._lost()
            return
        actions = self._side.heard(message)
        if Act.ADOPT in actions:
            self._descriptor = descriptor
        elif descriptor >= 0:
            os.close(descriptor)
        if message.say == "owing":
            self._say(Message("owes", owed=self._owed()))
        self._do(actions)

    def _lost(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
            self._do(self._side.lost())

    def _do(self, actions: list[Do]) -> None:
        for action in actions:
            if isinstance(action, Say):
                self._say(action.message, self._descriptor if action.with_mount else None)
            elif action is Act.LEARN:
                self._learned.set()
            elif action is Act.PREPARE:
                self._prepare()
            elif action is Act.START:
                self._start()
            elif action is Act.DROP:
                self._drop()
            elif action is Act.ANEW:
                log.error("the node plugin has another mount than this worker, which ends for it")
                self._begin_anew()
            elif action is Act.HANG_UP:
                self._complain(f"the node plugin at {self._path} says what it cannot")
                self._lost()

    def _say(self, message: Message, descriptor: int | None = None) -> None:
        if self._peer is None:
            return
        try:
            handing.send(self._peer, message, descriptor)
        except OSError:
            self._lost()

    # ---- the mount -----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        worker, held, begun = self._worker, self._side.held, self._begun
        if worker is None or begun is None or held is None:
            return  # `serve` comes back to it
        fits = begun.held is not None and begun.held.connection == held.connection
        if held.life and not fits:
            # Its numbers are in the kernel's hands: a worker is needed that went on from them.
            log.warning("a mount came that earlier workers have served: this one begins anew for it")
            self._begin_anew()
            return
        if held.index and held.index != worker.index.identity:
            self._cannot("the index is another one than this mount was made with")
            return
        try:
            # What the worker was built for has to stay so.
            writes = begun.passthrough if fits else self._kernel_writes(held)
            self._serving = self._make_serving(
                worker, self._descriptor, held.agreement, life=held.life, kernel_writes=writes,
                gone=lambda: self._ask(lambda: self._gone(held.connection)),
            )  # fmt: skip
        except (DatacacheError, OSError) as error:
            self._cannot(str(error))
            return
        self._do(self._side.prepared(worker.index.identity))

    def _kernel_writes(self, held: Held) -> bool:
        return held.agreement.passthrough and kernel_writes(self._settings, self._descriptor)

    def _cannot(self, why: str) -> None:
        if self._side.held is None:
            return
        log.error("the volume cannot be served: %s", why)
        self._do(self._side.unable(why[:_WHY]))

    def _start(self) -> None:
        if self._worker is None or self._serving is None:
            return  # it has been told to end
        self._serving.start()
        log.info("the volume is served")

    def _gone(self, connection: str) -> None:
        held = self._side.held
        if held is None or held.connection != connection or self._left:
            return
        log.info("the volume is not mounted any more")
        self._do(self._side.gone())

    def _drop(self) -> None:
        serving, self._serving = self._serving, None
        if serving is None or serving.close():
            self._let_go()
        else:
            self._descriptor = -1  # a thread still has it: another file must not get its number

    def _let_go(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _leave(self) -> None:
        self._worker = None
        if self._serving is not None:
            self._left = self._side.stage is Stage.SERVES
            self._serving.leave()

    def _owed(self) -> str:
        """What the bucket does not have. Who asks knows that nobody uses the mount any more: what earlier
        workers have counted as open is not."""
        worker = self._worker
        if worker is None or worker.writing is None:
            return ""
        worker.writing.overlay.forsaken()
        return owed(worker.writing.status())

    def _begin_anew(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._anew_end, b"x")

    def _end(self) -> None:
        self._ends = True

    def _complain(self, what: str) -> None:
        now = time.monotonic()
        if now - self._complained >= SAY_AGAIN:
            self._complained = now
            log.warning("%s", what)
