"""
`datacache-csi`: the driver of one node, until it is told to end.

SIGTERM and SIGINT drain it: no new calls, those under way are given time. Mounts stay; the next driver finds
them.
"""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING

from datacache.cli.main import Parser, UsageError
from datacache.config.keys import PATH
from datacache.errors import DatacacheError, SettingError
from datacache.kube.release import DRIVER, TIER_ROOTS, Release
from datacache.model import parse_duration
from datacache.telemetry import redact, set_up_logging

if TYPE_CHECKING:
    from csi.records import Records
    from csi.residents import Roots

log = logging.getLogger(__name__)

PROGRAM = "datacache-csi"
PATIENCE = 10.0
"""Seconds that a driver may take to say that it answers."""
GRACE = 15.0
"""Seconds that calls under way are given at the end."""
LINGER = 10.0
"""... and workers that have just ended, for the next one to come. Kubernetes kills after 30."""

_POD = "/var/run/secrets/kubernetes.io/serviceaccount/token"
"""By which a pod that may ask the API of its cluster is told from all else."""

EXAMPLES = """\
examples:
  datacache-csi --node-id "$NODE_NAME"
  datacache-csi --node-id node1 --kubelet-dir /data/kubelet
  datacache-csi --probe

It mounts, so it needs root, and the kubelet's directory with mount propagation both ways (docs/csi.md).
"""


def parser() -> Parser:
    """The command line."""
    made = Parser(PROGRAM)
    made.description = f"The CSI driver {DRIVER} of one node: data sets as volumes of pods."
    made.epilog = EXAMPLES
    made.add_argument("--node-id", metavar="NAME", default="", help="the name of this node ($NODE_NAME)")
    made.add_argument(
        "--kubelet-dir", metavar="DIR", default="/var/lib/kubelet",
        help="the kubelet's directory, at the path at which the kubelet has it (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--endpoint", metavar="unix:///PATH", default="",
        help=f"where calls are answered (default: plugins/{DRIVER}/csi.sock in the kubelet's directory)",
    )  # fmt: skip
    made.add_argument(
        "--state-dir", metavar="DIR", default=Release.state_dir,
        help="on the node: state of each Dataset, below (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--run-dir", metavar="DIR", default=Release.run_dir,
        help="on the node: sockets of workers, below (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--tier-root", metavar="DIR", action="append", default=[],
        help="below which Datasets may have tiers, as the controller is told; repeatable "
        f"(default: {', '.join(TIER_ROOTS)})",
    )  # fmt: skip
    made.add_argument(
        "--kubeconfig", metavar="FILE", default="",
        help="how to reach the API of the cluster, for CacheNodes and Datasets that are gone; default: as "
        "the pod that this is, or not at all",
    )  # fmt: skip
    made.add_argument(
        "--takeover-timeout", metavar="DURATION", default="2m",
        help="how long a volume waits for a worker before what is asked of it fails (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--probe", action="store_true",
        help="ask the driver that runs whether it answers, and end: exit code 0 when it does",
    )  # fmt: skip
    made.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    made.add_argument("--log-format", default="text", choices=("text", "json"))
    return made


def serve(
    *, node_id: str, kubelet: str, endpoint: str, roots: "Roots", kubeconfig: str, takeover: float
) -> None:
    """Answer calls, and keep the node's accounts, until a signal. `takeover`: seconds without a worker after
    which a Dataset's volume answers EIO. Raises SettingError for what was named wrongly."""
    # Here, since help and mistakes need none of it.
    from csi.controller import Controller
    from csi.identity import Identity
    from csi.mounter.datasets import LinuxDatasetMounter
    from csi.mounter.holders import Holders
    from csi.mounter.linux import LinuxMounter
    from csi.node import Node
    from csi.records import Records
    from csi.registration import Registration
    from csi.server import Server
    from csi.v1 import csi_pb2, registration_pb2

    home = os.path.join(kubelet, "plugins", DRIVER)
    registry = os.path.join(kubelet, "plugins_registry")
    if not os.path.isdir(registry):
        raise SettingError("--kubelet-dir", kubelet, "the kubelet's directory, with plugins_registry in it")
    path = _socket(endpoint, kubelet)
    records = Records(os.path.join(home, "volumes"))
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        records.open()
    except OSError as error:
        raise SettingError("--kubelet-dir", kubelet, f"one that can be written ({error.strerror})") from error
    environment = dict(os.environ)
    holders = Holders(roots.run, patience=takeover)
    node = Node(
        LinuxMounter(), LinuxDatasetMounter(holders), records, node_id=node_id, kubelet=kubelet,
        environment=environment,
    )  # fmt: skip
    services = csi_pb2.DESCRIPTOR.services_by_name
    calls = Server(
        path,
        [
            (services["Identity"], Identity(version("dataset-cache"))),
            (services["Controller"], Controller(environment)),
            (services["Node"], node),
        ],
    )
    registering = registration_pb2.DESCRIPTOR.services_by_name["Registration"]
    announced = Server(
        os.path.join(registry, f"{DRIVER}-reg.sock"), [(registering, Registration(path))]
    )  # fmt: skip
    with ExitStack() as late, ExitStack() as running, _Told() as told:
        running.enter_context(holders)
        running.callback(holders.linger, LINGER)  # what only we hold ends with us
        node.go_on()
        calls.start()
        running.callback(calls.stop, GRACE)
        stop = _accounts(late, node_id, roots, records, kubeconfig)
        running.callback(stop.set)
        announced.start()  # last, since the kubelet calls at once; and it goes first
        running.callback(announced.stop, 1.0)
        log.info("%s answers at %s for node %s", DRIVER, path, node_id)
        told.wait()
        log.info("told to end; the mounts stay")


def _accounts(
    late: ExitStack, node: str, roots: "Roots", records: "Records", kubeconfig: str
) -> threading.Event:
    """Keep the node's accounts until the event is set; with a cluster, tell it of them, too. What is then to
    be waited for, some seconds, is in `late`."""
    from csi.accountant import Accountant
    from csi.housekeeping import Housekeeping
    from csi.residents import Register
    from csi.tmpfs import LinuxMemory
    from datacache.clock import SystemClock
    from datacache.kube.release import volume_name

    clock, memory, stop = SystemClock(), LinuxMemory(), threading.Event()
    accountant = Accountant(
        Register(roots), memory, clock=clock, staged=lambda uid: records.get(volume_name(uid)) is not None
    )  # fmt: skip
    parts = [("accountant", accountant.run)]
    if kubeconfig or ("KUBERNETES_SERVICE_HOST" in os.environ and os.path.exists(_POD)):
        from datacache.kube.api import Api, configuration

        api = late.enter_context(
            closing(Api(configuration(kubeconfig), timeout=(2.0, 8.0), manager=PROGRAM))
        )  # fmt: skip
        housekeeping = Housekeeping(api, node, Register(roots), accountant, memory, clock=clock)
        parts.append(("housekeeping", housekeeping.run))
    else:
        log.info("there is no API of a cluster to ask: no CacheNode is written, and no directory removed")
    for name, act in parts:
        thread = threading.Thread(target=act, args=(stop,), name=name)
        thread.start()
        late.callback(thread.join)
        late.callback(stop.set)  # before it is waited for, whatever else goes wrong
    return stop


class _Told:
    """Waits for a signal that ends us."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __enter__(self) -> "_Told":
        self._before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        self._event.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._event.set()


def probe(*, kubelet: str, endpoint: str) -> None:
    """Ask the driver that runs whether it answers. Raises ControlError when it does not."""
    from csi import server
    from csi.v1 import csi_pb2

    identity = csi_pb2.DESCRIPTOR.services_by_name["Identity"]
    server.probe(_socket(endpoint, kubelet), identity, within=PATIENCE)


def _socket(endpoint: str, kubelet: str) -> str:
    if not endpoint:
        return os.path.join(kubelet, "plugins", DRIVER, "csi.sock")
    path = re.fullmatch(r"unix:(?://)?(/[^\0]+)", endpoint)
    if path is None:
        raise SettingError("--endpoint", endpoint, "unix:// and an absolute path")
    return path[1]


def _node(given: str) -> str:
    name = given or os.environ.get("NODE_NAME", "")
    # It becomes the value of a label.
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name, re.ASCII):
        raise SettingError("--node-id", name, "the name of this node, up to 63 letters, digits, dots, dashes")
    return name


def _kubelet(given: str) -> str:
    if not given.startswith("/") or "\0" in given:
        raise SettingError("--kubelet-dir", given, "an absolute path")
    return os.path.normpath(given)


def _roots(state: str, run: str, tiers: Sequence[str]) -> "Roots":
    from csi.residents import Roots

    def path(text: str, name: str) -> str:
        try:
            found = str(PATH.read(text))
        except ValueError as error:
            raise SettingError(name, text, PATH.expected) from error
        if found == "/":
            raise SettingError(name, text, "a directory of its own")
        return found

    return Roots(
        path(state, "--state-dir"), path(run, "--run-dir"),
        tuple(path(each, "--tier-root") for each in tiers or TIER_ROOTS),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (this process's by default); the exit code."""
    try:
        try:
            args = parser().parse(sys.argv[1:] if argv is None else argv)
        except SystemExit as done:  # argparse has printed the help
            return int(done.code or 0)
        kubelet = _kubelet(args.kubelet_dir)
        if args.probe:
            probe(kubelet=kubelet, endpoint=args.endpoint)
            return 0
        node_id = _node(args.node_id)
        roots = _roots(args.state_dir, args.run_dir, args.tier_root)
        takeover = parse_duration(args.takeover_timeout, name="--takeover-timeout")
        if not 1 <= takeover < float("inf"):
            raise SettingError("--takeover-timeout", args.takeover_timeout, "a duration of 1s or more")
        set_up_logging(level=args.log_level, style=args.log_format)
        serve(
            node_id=node_id, kubelet=kubelet, endpoint=args.endpoint, roots=roots, kubeconfig=args.kubeconfig,
            takeover=takeover,
        )  # fmt: skip
    except (UsageError, SettingError) as error:
        return _fail(2, str(error))
    except DatacacheError as error:
        return _fail(1, str(error))
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in ("grpc", "google", "kubernetes"):
            raise
        return _fail(1, f"{error.name} is missing: pip install 'dataset-cache[kubernetes]'")
    return 0


def _fail(code: int, message: str) -> int:
    sys.stderr.write(f"{PROGRAM}: error: {redact(message)}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
