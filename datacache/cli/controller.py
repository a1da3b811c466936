"""
`datacache controller`: have a cluster's Datasets be what they should be. The chart runs it.
"""

import argparse
import logging
import os
import re
import socket
import threading
from typing import Any

from datacache.config.keys import AUDIENCE, PATH, QUOTA, Kind, spell_size
from datacache.config.parsing import read_one
from datacache.errors import DatacacheError
from datacache.kube.release import API_PORT, TIER_ROOTS, Release

EXAMPLES = """\
examples:
  datacache controller --namespace datacache --image registry.example/datacache:1.0
  datacache controller --namespace datacache --image datacache:dev --kubeconfig ~/.kube/config

It acts while it holds the Lease datacache-controller of that namespace, and waits while another does.
SIGTERM ends it; exit code 1 when it loses the Lease.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plain = Release(namespace="", image="")
    parser.description = "Have the Datasets of a cluster be what they should be: workers, volumes, status."
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--namespace", default="", metavar="NAME", help="where workers run: the release's namespace")
    add("--image", default="", metavar="IMAGE", help="of the workers")
    add("--pull-policy", default=plain.pull_policy, choices=("Always", "IfNotPresent", "Never"),
        help=f"of that image; default {plain.pull_policy}")  # fmt: skip
    add(
        "--pull-secret",
        action="append",
        default=[],
        metavar="NAME",
        help="a Secret to pull it with; may be repeated",
    )
    add("--service-account", default=plain.service_account, metavar="NAME",
        help=f"of the workers; default {plain.service_account}")  # fmt: skip
    add(
        "--priority-class",
        default="",
        metavar="NAME",
        help="of workers whose Dataset names none; default: none",
    )
    add("--plugin", default="", metavar="NAME",
        help="the DaemonSet of the CSI driver, whose pods are exchanged; default: none")  # fmt: skip
    add("--metrics-port", default="0", metavar="PORT",
        help="on which workers serve metrics to anybody; default: none does")  # fmt: skip
    for name, what in _DIRECTORIES.items():
        default = getattr(plain, name)
        add(f"--{name.replace('_', '-')}", default=default, metavar="DIR", help=f"{what}; default {default}")
    add("--tier-root", action="append", default=[], metavar="DIR",
        help="below which a Dataset may have tiers, on the nodes; may be repeated; default "
        + ", ".join(TIER_ROOTS))  # fmt: skip
    add("--tier-quota", default=spell_size(plain.tier_quota), metavar="SIZE",
        help=f"of the tier of a Dataset that names none; default {spell_size(plain.tier_quota)}")  # fmt: skip
    add("--web-identity-audience", action="append", default=[], metavar="AUDIENCE",
        help="for whom a Dataset may have tokens of its ServiceAccount, such as sts.amazonaws.com; may be "
        "repeated; default: none may")  # fmt: skip
    add(
        "--kubeconfig",
        default="",
        metavar="FILE",
        help="how to reach the API; default: as the pod that this is",
    )
    add("--log-format", default="json", choices=("json", "text"), help="default json")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="default info")


_DIRECTORIES = {
    "state_dir": "on the nodes: index, journal and landing zone of each Dataset",
    "run_dir": "on the nodes: the sockets of workers",
    "memory_dir": "on the nodes: of MEM tiers that name no path",
    "disk_dir": "on the nodes: of SSD tiers that name no path",
}


def run(args: argparse.Namespace) -> int:
    """Act until a signal comes. Raises ClusterError when the Lease is lost."""
    release = read_release(args)
    try:
        from datacache.kube.api import configuration
        from datacache.kube.controller import Controller
    except ModuleNotFoundError as error:
        said = f"the controller needs {error.name}: pip install 'dataset-cache[kubernetes]'"
        raise DatacacheError(said) from error
    from datacache.telemetry import set_up_logging

    configured = configuration(os.path.expanduser(args.kubeconfig))
    set_up_logging(level=args.log_level, style=args.log_format, file="")
    if args.log_level == "info":
        # Of each event of each pod it says that it was handled, and all of its settings.
        logging.getLogger("kopf").setLevel(logging.WARNING)
    Controller(configured, release, me=f"{socket.gethostname()}-{os.getpid()}").run(threading.Event())
    return 0


def read_release(args: argparse.Namespace) -> Release:
    """What the flags say. Raises SettingError."""
    image = Kind("the name of an image", _image)
    port = Kind(f"0, or a port from 1024 on that is not {API_PORT}", _port)
    return Release(
        namespace=read_namespace(args.namespace),
        image=_one("image", args.image, image),
        pull_policy=args.pull_policy,
        pull_secrets=tuple(_one("pull-secret", name, _NAMES) for name in args.pull_secret),
        plugin=_one("plugin", args.plugin, _NAMES) if args.plugin else "",
        metrics_port=_one("metrics-port", args.metrics_port, port),
        service_account=_one("service-account", args.service_account, _NAMES),
        priority_class=_one("priority-class", args.priority_class, _NAMES) if args.priority_class else "",
        **{name: _one(name.replace("_", "-"), getattr(args, name), PATH) for name in _DIRECTORIES},
        tier_roots=tuple(_one("tier-root", each, PATH) for each in args.tier_root or TIER_ROOTS),
        tier_quota=_one("tier-quota", args.tier_quota, QUOTA),
        audiences=tuple(
            _one("web-identity-audience", each, AUDIENCE) for each in args.web_identity_audience
        ),
    )  # fmt: skip


def read_namespace(text: str) -> str:
    """What --namespace says. Raises SettingError."""
    return str(_one("namespace", text, _NAMES))


def _one(flag: str, text: str, kind: Kind) -> Any:
    return read_one(kind, f"--{flag}", text)


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", text, re.ASCII):
        raise ValueError
    return text


_NAMES = Kind("a name of Kubernetes: small letters, digits and dashes", _name)


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number != 0 and (not 1024 <= number <= 65535 or number == API_PORT):
        raise ValueError
    return number


def _image(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,510}", text, re.ASCII):
        raise ValueError
    return text
