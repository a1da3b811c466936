"""
What a node's plugin asks of a real API server: its CacheNode, whether Datasets are still there, and with
which rights: those of the chart, held against the API server's audit log, and what a stolen token could do
with them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from csi.accountant import Holding
from csi.cachenode import AT_MOST
from csi.housekeeping import Housekeeping
from csi.residents import Register, Roots
from csi.sweeping import APART
from csi.tmpfs import FakeMemory
from datacache.clock import VirtualClock
from datacache.cluster import premises
from datacache.config.parsing import read_settings
from datacache.errors import ClusterError
from datacache.kube.api import OURS, Api, configuration
from datacache.kube.release import Name
from datacache.model import GiB, MiB
from tests.cluster.binaries import NotBuilt
from tests.cluster.datasets import RELEASE, Team
from tests.cluster.plane import ControlPlane, control_plane, wait_until
from tests.cluster.test_chart import CHART, IMAGE, _granted

SPACE = RELEASE.namespace
ACCOUNT = f"system:serviceaccount:{SPACE}:datacache-csi"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of its own, with the chart installed."""
    try:
        with control_plane(tmp_path_factory.mktemp("accounts"), audited=[ACCOUNT]) as running:
            running.helm("install", "datacache", str(CHART), "-n", SPACE, "--create-namespace", *IMAGE)
            kinds = [f"/apis/datacache.io/v1alpha1/{kind}" for kind in ("datasets", "cachenodes")]
            wait_until(lambda: all(running.ask(kind)[0] == 200 for kind in kinds), "the kinds to be served")
            _have_account(running)
            yield running
    except NotBuilt as error:
        pytest.skip(str(error))


def _have_account(plane: ControlPlane) -> None:
    """That of the driver, where the chart does not run one."""
    plane.kubectl("create", "serviceaccount", "datacache-csi", "-n", SPACE, check=False)


@pytest.fixture
def team(plane: ControlPlane) -> Iterator[Team]:
    found = Team(plane)
    yield found
    found.close()


def token_of(plane: ControlPlane, team: Team, node: str) -> str:
    """What a plugin on `node` finds in its pod."""
    pod = f"csi-{node}"
    if team.api.get(Name("v1", "Pod", SPACE, pod)) is None:
        team.api.create(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": SPACE, "name": pod},
             "spec": {"nodeName": node, "serviceAccountName": "datacache-csi",
                      "containers": [{"name": "c", "image": "local.test/none:1"}]}}
        )  # fmt: skip
    uid = team.api.get(Name("v1", "Pod", SPACE, pod))["metadata"]["uid"]
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod}", f"--bound-object-uid={uid}"]
    return plane.kubectl("create", "token", "datacache-csi", "-n", SPACE, *bound).out.strip()


def api_of(plane: ControlPlane, token: str, name: str) -> Api:
    config = json.loads(plane.kubeconfig.read_text())
    config["users"] = [{"name": "u", "user": {"token": token}}]
    path = plane.directory / f"{name}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))
    return Api(configuration(str(path)), manager="datacache-csi")


class Accounts:
    """What the node is said to hold."""

    def __init__(self) -> None:
        self.found: Sequence[Holding] = ()

    def holdings(self) -> Sequence[Holding]:
        return self.found


class Plugin:
    """The housekeeping of a node, with the rights that the chart gives it."""

    def __init__(self, plane: ControlPlane, team: Team, tmp_path: Path) -> None:
        self.clock, self.accounts, self.team = VirtualClock(), Accounts(), team
        self.api = api_of(plane, token_of(plane, team, team.node), team.node)
        self.roots = Roots(str(tmp_path / "state"), str(tmp_path / "run"), (str(tmp_path / "tiers"),))
        self.keeping = Housekeeping(
            self.api, team.node, Register(self.roots), self.accounts, FakeMemory(), clock=self.clock
        )

    def see(self) -> dict[str, Any] | None:
        return self.team.api.get(Name(OURS, "CacheNode", "", self.team.node))

    def live(self, obj: dict[str, Any], tmp_path: Path) -> str:
        """The Dataset has lived here; its uid."""
        metadata = obj["metadata"]
        uid = metadata["uid"]
        settings = {
            "uri": ["file:///nowhere"], "object": f"{metadata['namespace']}/{metadata['name']}",
            "state": f"{self.roots.state}/{uid}",
            "cache": [f"ssd:{tmp_path}/tiers/{uid}/cache=1MiB"],
        }  # fmt: skip
        premises.write(read_settings(settings, config_file=None, environment={"HOME": "/"}))
        (tmp_path / "tiers" / uid / "cache").mkdir(parents=True)
        return str(uid)


@pytest.fixture
def plugin(plane: ControlPlane, team: Team, tmp_path: Path) -> Iterator[Plugin]:
    found = Plugin(plane, team, tmp_path)
    yield found
    found.api.close()


def holding(uid: str, cached: int, dirty: int = 0) -> Holding:
    return Holding(uid, "team", "data", cached, dirty, 4 * GiB, alive=True)


def test_a_node_says_what_it_holds(plugin: Plugin, team: Team) -> None:
    """The CacheNode is made with the first Dataset, follows a change of a twentieth, is written by nobody
    else and not at all while nothing changes, and goes with its Node."""
    plugin.keeping.tell()
    assert plugin.see() is None
    plugin.accounts.found = [holding("u1", GiB, dirty=5), holding("u2", MiB)]
    plugin.keeping.tell()
    made = plugin.see()
    assert made is not None
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Node", team.node)
    assert made["status"]["count"] == 2 and made["status"]["shown"] == {"cached": "1.0 GiB"}
    assert made["status"]["datasets"][0] == {
        "uid": "u1", "namespace": "team", "name": "data", "cached": GiB, "dirty": 5, "cachedPercentage": 25,
    }  # fmt: skip
    version = made["metadata"]["resourceVersion"]
    for cached in (GiB, GiB + 50 * MiB):
        plugin.clock.advance(AT_MOST)
        plugin.accounts.found = [holding("u1", cached, dirty=5), holding("u2", MiB)]
        plugin.keeping.tell()
        assert plugin.see()["metadata"]["resourceVersion"] == version
    plugin.clock.advance(AT_MOST)
    plugin.accounts.found = [holding("u1", 2 * GiB)]
    plugin.keeping.tell()
    after = plugin.see()
    assert [(each["uid"], each["cached"]) for each in after["status"]["datasets"]] == [("u1", 2 * GiB)]
    node = Name("v1", "Node", "", team.node)
    team.api.delete(node, uid=team.api.get(node)["metadata"]["uid"])
    wait_until(lambda: plugin.see() is None, "the CacheNode to go with its Node")


def test_directories_go_when_the_dataset_has(plugin: Plugin, team: Team, tmp_path: Path) -> None:
    """Not while it is there, and not when one of its name is there in its place, but for the older."""
    obj = team.dataset()
    uid = plugin.live(obj, tmp_path)
    plugin.accounts.found = [Holding(uid, team.namespace, "data", 0, 0, 0, alive=False)]

    def look() -> bool:
        for _ in range(3):
            plugin.keeping.sweep()
            plugin.clock.advance(APART)
        plugin.clock.advance(3600)
        return (tmp_path / "tiers" / uid).exists()

    assert look()
    team.delete()
    wait_until(lambda: team.see() is None, "the Dataset to go")
    again = team.dataset()
    assert again["metadata"]["uid"] != uid
    newer = plugin.live(again, tmp_path)
    plugin.accounts.found = [
        Holding(each, team.namespace, "data", 0, 0, 0, alive=False) for each in (uid, newer)
    ]
    assert not look()
    assert not (tmp_path / "state" / uid).exists()
    assert (tmp_path / "tiers" / newer).exists() and (tmp_path / "state" / newer).exists()
    team.delete()


def test_what_a_stolen_token_may_not(plane: ControlPlane, team: Team, tmp_path: Path, plugin: Plugin) -> None:
    """The CacheNode of another node, with a token of this one; any, with one that is bound to no pod; and
    nothing of Secrets, pods and Datasets but to read one by its name."""
    team.add_node(f"{team.node}-b")
    plugin.accounts.found = [holding("u1", GiB)]
    plugin.keeping.tell()
    other = {"apiVersion": OURS, "kind": "CacheNode", "metadata": {"name": f"{team.node}-b"}}
    wait_until(lambda: _refused(plugin.api, other), "the policy to be in force")
    theirs = api_of(plane, token_of(plane, team, f"{team.node}-b"), "theirs")
    theirs.apply(other)
    status = {**other, "status": {"count": 7}}
    with pytest.raises(ClusterError, match="of its own node"):
        plugin.api.apply(status, part="status")
    theirs.apply(status, part="status")
    theirs.close()
    loose = api_of(plane, plane.kubectl("create", "token", "datacache-csi", "-n", SPACE).out.strip(), "loose")
    with pytest.raises(ClusterError, match="of its own node"):
        loose.apply(status, part="status")
    loose.close()
    for verb, what in (
        ("get", "secrets"), ("list", "datasets"), ("watch", "datasets"), ("patch", "datasets"),
        ("list", "nodes"), ("patch", "nodes"), ("get", "pods"), ("list", "cachenodes"),
        ("delete", "cachenodes"), ("create", "events"), ("get", "configmaps"),
        ("create", "serviceaccounts/token"),
    ):  # fmt: skip
        said = plane.kubectl("auth", "can-i", verb, what, "-A", f"--as={ACCOUNT}", check=False).out.strip()
        assert said == "no", f"{verb} {what}"


def _refused(api: Api, obj: dict[str, Any]) -> bool:
    try:
        api.apply(obj, dry_run=True)
    except ClusterError as error:
        return "of its own node" in str(error)
    return False


def test_no_right_is_missing_and_none_is_idle(
    plane: ControlPlane, plugin: Plugin, team: Team, tmp_path: Path
) -> None:
    """All that a plugin does, against the API server's audit log. (What the tests above were refused on
    purpose was not by these rules.)"""
    uid = plugin.live(team.dataset(), tmp_path)
    plugin.accounts.found = [Holding(uid, team.namespace, "data", 1, 0, 0, alive=False)]
    plugin.keeping.tell()
    plugin.keeping.sweep()
    used = set()
    for line in (plane.directory / "audit.log").read_text().splitlines():
        event = json.loads(line)
        of = event.get("objectRef")
        if not of or event["user"]["username"] != ACCOUNT or of["resource"] == "selfsubjectreviews":
            continue
        code = event["responseStatus"]["code"]
        assert code != 403 or "policy" in json.dumps(event), event
        resource = "/".join(filter(None, (of["resource"], of.get("subresource"))))
        verbs = [event["verb"], "create"] if event["verb"] == "patch" and code == 201 else [event["verb"]]
        used |= {(of.get("apiGroup", ""), resource, verb) for verb in verbs}
    granted = _granted(plane.get("clusterrole", "datacache-csi")["rules"])
    assert granted == used
    team.delete()


def test_that_there_is_no_such_kind_is_no_answer(plane: ControlPlane, plugin: Plugin, team: Team) -> None:
    """Somebody took the kinds away: no Dataset is gone by that. Last, since it takes them away."""
    name = Name(OURS, "Dataset", team.namespace, "nothing")
    assert plugin.api.is_gone(name, "x")
    plane.kubectl("delete", "crd", "datasets.datacache.io")

    def unknown() -> bool:
        try:
            plugin.api.is_gone(name, "x")
        except ClusterError as error:
            return error.status == 404
        return False

    wait_until(unknown, "the kind to go")
    for _ in range(20):
        assert unknown()
