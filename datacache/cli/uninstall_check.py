"""
`datacache uninstall-check`: say what would be lost, or hang, if the release were uninstalled now. The chart
runs it before it is.
"""

import argparse
import os

from datacache.errors import DatacacheError

EXAMPLES = """\
examples:
  datacache uninstall-check --namespace datacache
  datacache uninstall-check --namespace datacache --kubeconfig ~/.kube/config

Exit code 0: nothing holds it. 1: a line for each Dataset that a pod uses, or that holds what is not in its
bucket.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say which Datasets keep a release of the chart from being uninstalled, and why."
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--namespace", default="", metavar="NAME", help="where workers run: the release's namespace")
    add(
        "--kubeconfig",
        default="",
        metavar="FILE",
        help="how to reach the API; default: as the pod that this is",
    )


def run(args: argparse.Namespace) -> int:
    """0 when nothing holds the release. Raises ClusterError when that cannot be told."""
    from datacache.cli.controller import read_namespace

    namespace = read_namespace(args.namespace)
    try:
        from datacache.kube.api import Api, configuration
        from datacache.kube.controller import RemoteWorker
        from datacache.kube.leaving import held
    except ModuleNotFoundError as error:
        said = f"uninstall-check needs {error.name}: pip install 'dataset-cache[kubernetes]'"
        raise DatacacheError(said) from error
    from datacache.clock import SystemClock
    from datacache.kube.release import Release

    api = Api(configuration(os.path.expanduser(args.kubeconfig)))
    try:
        found = held(api, Release(namespace=namespace, image=""), connect=RemoteWorker, clock=SystemClock())
    finally:
        api.close()
    if not found:
        print("nothing holds the release")
        return 0
    print("\n".join(found))
    count = "1 Dataset holds" if len(found) == 1 else f"{len(found)} Datasets hold"
    raise DatacacheError(
        f"{count} the release: end the pods, wait for the uploads (or give up what is not uploaded: "
        "annotation datacache.io/accept-loss=true on the Dataset), and try again"
    )
