"""
The chart on an API server of its own: what helm renders, installs, upgrades and leaves, and what the
controller may do by it.

The rights are held against what a controller really asks for: it runs with the chart's ServiceAccount, and
the API server's audit log says each request. No right is missing, and none is idle.
"""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from datacache.cli.controller import read_release
from datacache.cli.main import command_parser
from datacache.clock import SystemClock
from datacache.cluster.metrics import METRICS
from datacache.kube.api import Api, configuration
from datacache.kube.controller import Controller
from datacache.kube.leaving import held
from datacache.kube.manifests import WORKER_LABELS, Name, objects, settings_text
from datacache.kube.release import Release
from datacache.kube.spec import read_dataset
from tests.cluster.binaries import NotBuilt
from tests.cluster.datasets import RELEASE, Team, job_says, worker_says
from tests.cluster.plane import ControlPlane, control_plane, wait_until

CHART = Path(__file__).parents[2] / "charts/datacache"
IMAGE = ("--set=image.repository=local.test/datacache", "--set-string=image.tag=1")
SPACE = RELEASE.namespace
ACCOUNT, CHECK = (
    f"system:serviceaccount:{SPACE}:datacache-{name}" for name in ("controller", "uninstall-check")
)
INSTALLED = (
    "serviceaccounts,deployments,daemonsets,roles,rolebindings,clusterroles,clusterrolebindings,priorityclasses,"
    "csidrivers,networkpolicies,validatingadmissionpolicies,validatingadmissionpolicybindings,jobs"
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane on which nothing is yet."""
    try:
        with control_plane(tmp_path_factory.mktemp("chart"), audited=[ACCOUNT, CHECK]) as running:
            yield running
    except NotBuilt as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def installed(own: ControlPlane) -> ControlPlane:
    own.helm("install", "datacache", str(CHART), "-n", SPACE, "--create-namespace", *IMAGE)
    kinds = [f"/apis/datacache.io/v1alpha1/{kind}" for kind in ("datasets", "dataloads")]
    wait_until(lambda: all(own.ask(kind)[0] == 200 for kind in kinds), "the kinds to be served")
    return own


# ---- what helm says of it ------------------------------------------------------------------------


def test_helm_finds_nothing_to_say(own: ControlPlane) -> None:
    said = own.helm("lint", "--strict", str(CHART), *IMAGE).out
    assert "1 chart(s) linted, 0 chart(s) failed" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--set=image.repsitory=x"], "at '/image': additional properties 'repsitory' not allowed"),
        (["--set=tiers.roots={relative}"], "at '/tiers/roots/0': 'relative' does not match pattern"),
        (["--set=image.pullPolicy=Sometimes"], "at '/image/pullPolicy': value must be one of 'Always'"),
        (["--set=csi.takeoverTimeout=soon"], "at '/csi/takeoverTimeout': 'soon' does not match pattern"),
        (["--set=controller.replicas=two"], "at '/controller/replicas': got string, want integer"),
        (
            ["--set=webIdentity.audiences={a b}"],
            "at '/webIdentity/audiences/0': 'a b' does not match pattern",
        ),
        (["--set=kubeletDir=kubelet"], "at '/kubeletDir': 'kubelet' does not match pattern"),
        (["--set=worker.metricsPort=80"], "at '/worker/metricsPort': 'anyOf' failed"),
        ([*IMAGE, "--set=podMonitor.enabled=true"], "expected worker.metricsPort to be set, such as 9300"),
        (["--set=tiers.defaultQuota=lots"], "at '/tiers/defaultQuota': 'lots' does not match pattern"),
        (
            ["--set=worker.priorityClass.name=system-node-critical"],
            "at '/worker/priorityClass/name': 'not' fai",
        ),
        ([], "image.repository: '' will not do; expected the image of controller and workers, such as"),
    ],
)
def test_values_that_will_not_do_are_refused(own: ControlPlane, given: list[str], said: str) -> None:
    done = own.helm("template", "datacache", str(CHART), *given, check=False)
    assert done.code != 0 and said in done.err


def test_each_value_is_explained_where_it_stands() -> None:
    """A comment above it, or above the group that it is in."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip() and not line.lstrip().startswith("#") and not line.startswith("    "):
            above = next(each for each in reversed(lines[:number]) if each.strip() or number == 0)
            group = line.endswith(":")
            plain = line.strip().partition(":")[0] in (
                "resources", "nodeSelector", "tolerations", "- {operator", "affinity", "interval",
            )  # fmt: skip
            assert group or plain or above.lstrip().startswith("#"), f"nothing explains {line.strip()!r}"


def test_all_that_it_renders_is_taken_by_a_strict_api(installed: ControlPlane) -> None:
    more = ["--set=image.pullSecrets={regcred}", "--set=controller.nodeSelector.pool=system",
            "--set=controller.tolerations[0].operator=Exists", "--set=controller.replicas=2",
            "--set=worker.metricsPort=9300", "--set=dashboard.enabled=true",
            "--set=networkPolicy.metricsFrom[0].podSelector.matchLabels.app=prometheus"]  # fmt: skip
    rendered = installed.helm("template", "datacache", str(CHART), "-n", SPACE, *IMAGE, *more).out
    said = installed.kubectl(
        "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-",
        given=rendered,
    )  # fmt: skip
    assert said.out.count("serverside-applied (server dry run)") == rendered.count("\nkind: ") == 30
    assert "Warning" not in said.err


def test_its_flags_are_those_of_the_controller(installed: ControlPlane) -> None:
    assert _release(installed) == Release(
        namespace=SPACE, image="local.test/datacache:1", priority_class="datacache-worker",
        plugin="datacache-csi",
    )  # fmt: skip


def _release(plane: ControlPlane) -> Release:
    """What the controller of the Deployment would read."""
    pod = plane.get("deployment", "datacache-controller", "-n", SPACE)["spec"]["template"]["spec"]
    program, command, *flags = pod["containers"][0]["command"]
    assert program == "datacache"
    return read_release(command_parser(command).parse_args(flags))


# ---- rights --------------------------------------------------------------------------------------


def test_the_controller_may_do_what_it_does_and_nothing_else(installed: ControlPlane) -> None:
    team = Team(installed)
    config = configuration(str(_kubeconfig_of(installed, "datacache-controller")))
    stop = threading.Event()
    controller = Controller(config, _release(installed), me="chart", connect=team.connect)
    thread = threading.Thread(target=controller.run, args=(stop,))
    thread.start()
    try:
        _whole_life(team)
    finally:
        stop.set()
        thread.join()
        team.close()
    asked = _asked(installed, ACCOUNT)
    refused = {each for each, code in asked.items() if code == 403}
    assert not refused, f"the chart gives no right to {refused}"
    rules = installed.get("clusterrole", "datacache-controller")["rules"]
    everywhere = _granted(rules)
    here = _granted(installed.get("role", "datacache-controller", "-n", SPACE)["rules"])
    used = {(where == SPACE, right) for where, right in asked}
    assert everywhere - {right for ours, right in used if not ours} == set(), "idle rights in the cluster"
    assert here - {right for ours, right in used if ours} == set(), "idle rights in the namespace"


def _whole_life(team: Team) -> None:
    """All that a controller does: a Dataset with keys, a pod, a worker, loads with an end, and the end."""
    obj = team.dataset()
    wait_until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
    pod = team.pod()
    team.ready(obj, worker_says(cached=1))
    team.load(nodes=[team.node], ttlSecondsAfterFinished=0)
    wait_until(lambda: team.jobs, "the load to begin")
    team.jobs["job0"] = job_says("done", done=4)
    wait_until(lambda: team.loading() is None, "the load to go")
    team.config_map("epochs", **{"1": "a"})
    order = {"configMapKeyRef": {"name": "epochs", "key": "1"}}
    team.load("order", nodes=[team.node], order=order, ttlSecondsAfterFinished=0)
    wait_until(lambda: "job1" in team.jobs, "the order to be announced")
    team.jobs["job1"] = job_says("done", done=1, of=1)
    wait_until(lambda: team.loading("order") is None, "the load to go")
    team.end(pod)
    _upgrade_the_driver(team)
    team.delete()

    def ended() -> bool:
        for worker in team.workers(obj):
            team.end(Name("v1", "Pod", SPACE, worker["metadata"]["name"]))
        return team.see() is None

    wait_until(ended, "the Dataset to go")


def _upgrade_the_driver(team: Team) -> None:
    """Another revision of it is wanted; and a pod of the old one is there."""

    def drivers() -> set[str]:
        labels = "app.kubernetes.io/component=csi"
        return {
            each["metadata"]["uid"] for each in team.api.list("v1", "Pod", namespace=SPACE, labels=labels)
        }

    label = {"metadata": {"labels": {"kubernetes.io/os": "linux"}}}
    team.api.merge(Name("v1", "Node", "", team.node), label)
    wait_until(drivers, "the driver on the node")
    before, name = drivers(), Name("apps/v1", "DaemonSet", SPACE, "datacache-csi")
    annotations = {"kubectl.kubernetes.io/restartedAt": "now"}
    team.api.merge(name, {"spec": {"template": {"metadata": {"annotations": annotations}}}})

    def exchanged() -> bool:
        for each in team.api.list("v1", "Pod", namespace=SPACE, labels="app.kubernetes.io/component=csi"):
            if "deletionTimestamp" in each["metadata"]:  # as its kubelet would
                team.end(Name("v1", "Pod", SPACE, each["metadata"]["name"]))
        return not drivers() & before

    wait_until(exchanged, "the driver to be exchanged")


def _kubeconfig_of(plane: ControlPlane, account: str) -> Path:
    token = plane.kubectl("create", "token", account, "-n", SPACE).out.strip()
    config = json.loads(plane.kubeconfig.read_text())
    config["users"] = [{"name": "u", "user": {"token": token}}]
    path = plane.directory / f"{account}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))
    return path


Right = tuple[str, str, str]


def _granted(rules: list[dict[str, Any]]) -> set[Right]:
    """Group, resource and verb of each right."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _asked(plane: ControlPlane, who: str) -> dict[tuple[str, Right], int]:
    """What `who` has asked for, by namespace, with the answer's code; a refusal stays."""
    found: dict[tuple[str, Right], int] = {}
    for line in (plane.directory / "audit.log").read_text().splitlines():
        event = json.loads(line)
        if not (of := event.get("objectRef")) or event["user"]["username"] != who:
            continue
        resource = "/".join(filter(None, (of["resource"], of.get("subresource"))))
        code = event["responseStatus"]["code"]
        where, group = of.get("namespace", ""), of.get("apiGroup", "")
        # An apply of what there was not is a patch that also takes the right to create.
        verbs = [event["verb"], "create"] if event["verb"] == "patch" and code == 201 else [event["verb"]]
        for verb in verbs:
            key = (where, (group, resource, verb))
            found[key] = 403 if found.get(key) == 403 else code
    return found


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        ("list", "secrets"), ("watch", "secrets"), ("create", "secrets"), ("update", "datasets"),
        ("create", "datasets"), ("delete", "datasets"), ("create", "pods"), ("create", "pods/exec"),
        ("get", "pods/log"), ("delete", "pods"), ("delete", "nodes"), ("get", "nodes/proxy"),
        ("create", "daemonsets"), ("escalate", "clusterroles"), ("bind", "clusterroles"),
        ("impersonate", "serviceaccounts"), ("create", "serviceaccounts/token"), ("create", "namespaces"),
    ],
)  # fmt: skip
def test_what_a_controller_may_not(installed: ControlPlane, verb: str, what: str) -> None:
    resource, _, part = what.partition("/")
    asked = ["auth", "can-i", verb, resource, f"--subresource={part}", "-n", "default", f"--as={ACCOUNT}"]
    assert installed.kubectl(*asked, check=False).out.strip() == "no"


WEB = ["--set=webIdentity.enabled=true"]


@pytest.mark.parametrize(
    ("more", "may", "may_not"),
    [
        ([], [("default", "any"), ("kube-system", "any")], []),
        (["--set=webIdentity.namespaces={default}"], [("default", "any")], [("kube-system", "any")]),
        (["--set=webIdentity.serviceAccounts={reader}"], [("default", "reader")], [("default", "any")]),
    ],
)
def test_tokens_of_users_accounts_are_asked_as_far_as_the_operator_says(
    installed: ControlPlane, more: list[str], may: list[tuple[str, str]], may_not: list[tuple[str, str]]
) -> None:
    """None, unless it is turned on: the table above has that."""
    rendered = installed.helm(
        "template", "datacache", str(CHART), "-n", SPACE, *IMAGE, *WEB, *more, "-s", "templates/rights.yaml"
    ).out
    installed.kubectl("apply", "-f", "-", given=rendered)
    kinds = ["role", "rolebinding", "clusterrole", "clusterrolebinding"]
    try:
        for (space, account), allowed in [(each, "yes") for each in may] + [(each, "no") for each in may_not]:
            asked = [
                "auth",
                "can-i",
                "create",
                f"serviceaccounts/{account}",
                "--subresource=token",
                "-n",
                space,
            ]
            said = installed.kubectl(*asked, f"--as={ACCOUNT}", check=False).out.strip()
            assert said == allowed, f"{account} of {space}"
    finally:
        for kind in kinds:
            spaced = ["-n", "default"] if "cluster" not in kind else []
            installed.kubectl("delete", kind, "datacache-web-identity", *spaced, "--ignore-not-found")


def test_audiences_are_those_of_the_values(own: ControlPlane) -> None:
    rendered = own.helm(
        "template", "datacache", str(CHART), "-n", SPACE, *IMAGE, *WEB, "-s", "templates/controller.yaml"
    ).out
    assert "- --web-identity-audience=sts.amazonaws.com" in rendered
    plain = own.helm("template", "datacache", str(CHART), *IMAGE, "-s", "templates/controller.yaml").out
    assert "web-identity" not in plain


def test_workers_may_nothing(installed: ControlPlane) -> None:
    worker = f"--as=system:serviceaccount:{SPACE}:datacache-worker"
    for verb, what in (("get", "secrets"), ("list", "pods"), ("get", "datasets"), ("get", "configmaps")):
        said = installed.kubectl("auth", "can-i", verb, what, "-n", SPACE, worker, check=False).out.strip()
        assert said == "no", f"{verb} {what}"
    account = installed.get("serviceaccount", "datacache-worker", "-n", SPACE)
    assert account["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"metadata": {"labels": {"datacache.io/dataset-x": "true"}}}, ""),
        ({"metadata": {"labels": {"datacache.io/dataset-x": None}}}, ""),
        ({"metadata": {"annotations": {"cluster-autoscaler.kubernetes.io/scale-down-disabled": "true"}}}, ""),
        ({"metadata": {"annotations": {"cluster-autoscaler.kubernetes.io/scale-down-disabled": None}}}, ""),
        ({"metadata": {"labels": {"pool": "mine"}}}, "labels datacache.io/... of nodes, and no others"),
        (
            {"metadata": {"labels": {"kubernetes.io/os": None}}},
            "labels datacache.io/... of nodes, and no oth",
        ),
        ({"metadata": {"annotations": {"x": "y"}}}, "annotations of its own on nodes, and no others"),
        ({"spec": {"unschedulable": True}}, "and nothing else of them"),
        ({"spec": {"taints": [{"key": "a", "effect": "NoExecute"}]}}, "and nothing else of them"),
        ({"metadata": {"finalizers": ["example.com/x"]}}, "and nothing else of them"),
    ],
)
def test_of_a_node_the_controller_changes_what_is_its_own(
    installed: ControlPlane, patch: dict[str, Any], said: str
) -> None:
    """The right to patch a node reaches all of its fields; a policy of the API server leaves ours."""
    installed.kubectl("apply", "-f", "-", given=json.dumps(
        {"apiVersion": "v1", "kind": "Node",
         "metadata": {"name": "patched", "labels": {"kubernetes.io/os": "linux"}, "annotations": {"a": "b"}},
         "spec": {"unschedulable": False}}
    ))  # fmt: skip
    words = ["patch", "node", "patched", "--type=merge", "-p", json.dumps(patch), f"--as={ACCOUNT}"]

    def refused() -> bool:  # the policy takes part a moment after it was made
        return "changes" in installed.kubectl(*words, check=False).err

    if said:
        wait_until(refused, "the policy to act")
        assert said in installed.kubectl(*words, check=False).err
    else:
        installed.kubectl(*words)
    installed.kubectl("delete", "node", "patched")


# ---- what keeps it from going --------------------------------------------------------------------


def test_what_is_used_or_dirty_holds_the_release_and_is_named(installed: ControlPlane) -> None:
    """A pre-delete hook refuses, naming Datasets that are mounted or dirty."""
    path = _kubeconfig_of(installed, "datacache-controller")
    rendered = installed.helm("template", "datacache", str(CHART), "-n", SPACE, *IMAGE).out
    hook = [each for each in rendered.split("\n---\n") if "helm.sh/hook: pre-delete" in each]
    installed.kubectl(
        "apply", "-f", "-", given="\n---\n".join(each for each in hook if "kind: Job" not in each)
    )
    team, stop = Team(installed), threading.Event()
    controller = Controller(configuration(str(path)), _release(installed), me="held", connect=team.connect)
    thread = threading.Thread(target=controller.run, args=(stop,))
    thread.start()
    checking = Api(configuration(str(_kubeconfig_of(installed, "datacache-uninstall-check"))))
    try:

        def said() -> list[str]:
            return held(checking, _release(installed), connect=team.connect, clock=SystemClock())

        where = f"Dataset {team.namespace}/data"
        assert said() == []
        obj = team.dataset(accessModes=["ReadWriteMany"])
        wait_until(lambda: team.status().get("phase") == "Bound", "the claim to be bound")
        assert said() == []
        pod = team.pod()
        wait_until(lambda: team.workers(obj), "a worker")
        assert said() == [
            f"{where}: used by pod {team.namespace}/reader; no worker answers on node {team.node}, which may "
            "hold what is not in the bucket"
        ]
        team.ready(obj, worker_says(dirty=1 << 30, due=1))
        team.end(pod)
        found = f"{where}: 1.0 GiB and 1 operation are not in the bucket yet, on node {team.node}"
        wait_until(lambda: said() == [found], found)
        team.ready(obj, worker_says())
        wait_until(lambda: said() == [], "nothing to hold it")
        team.delete()

        def gone() -> bool:
            for worker in team.workers(obj):
                if "deletionTimestamp" in worker["metadata"]:  # it was asked before it was ended
                    team.end(Name("v1", "Pod", SPACE, worker["metadata"]["name"]))
            return team.see() is None

        wait_until(gone, "the Dataset to go")
    finally:
        stop.set()
        thread.join()
        checking.close()
        team.close()
    asked = _asked(installed, CHECK)
    assert not {each for each, code in asked.items() if code == 403}
    granted = _granted(installed.get("clusterrole", "datacache-uninstall-check")["rules"])
    granted |= _granted(installed.get("role", "datacache-uninstall-check", "-n", SPACE)["rules"])
    assert granted == {right for _, right in asked}
    installed.kubectl("delete", "-f", "-", given="\n---\n".join(e for e in hook if "kind: Job" not in e))


# ---- install, upgrade, uninstall -----------------------------------------------------------------


def test_an_upgrade_reaches_the_kinds_and_an_uninstall_leaves_datasets(
    installed: ControlPlane, tmp_path: Path
) -> None:
    plane = installed
    # No node runs the hook's job here; tests/cluster/test_story.py has one.
    leave = ["uninstall", "datacache", "-n", SPACE, "--wait", "--no-hooks"]
    plane.helm(*leave)
    shutil.copytree(CHART, tmp_path / "before")
    crd = tmp_path / "before/files/crds/datasets.yaml"
    crd.write_text(crd.read_text().replace("Whom files and directories belong to", "The owner"))
    (tmp_path / "before/Chart.yaml").write_text(
        (CHART / "Chart.yaml").read_text().replace("version: 0.1.0\n", "version: 0.0.9\n")
    )
    release = ["datacache", "-n", SPACE, *IMAGE]
    plane.helm("install", *release, str(tmp_path / "before"))  # the kinds of before are there still
    explained = ["explain", "dataset.spec.owner"]
    wait_until(lambda: "The owner" in plane.kubectl(*explained).out, "the older kinds")
    team = Team(plane)
    try:
        team.dataset()
        plane.helm("upgrade", *release, str(CHART))
        wait_until(lambda: "Whom files and" in plane.kubectl(*explained).out, "the kinds of now")
        plane.helm(*leave)
        ours = ["-l", "app.kubernetes.io/instance=datacache", "-A", "-o", "name"]
        assert plane.kubectl("get", INSTALLED, *ours).out == ""
        assert team.see() is not None, "Datasets stay, as does their kind"
    finally:
        team.close()


def test_the_kinds_alone(own: ControlPlane) -> None:
    rendered = own.helm("template", "datacache", str(CHART), "--set=controller.enabled=false").out
    assert rendered.count("\nkind: ") == rendered.count("\nkind: CustomResourceDefinition") == 3
    assert rendered.count("helm.sh/resource-policy: keep") == 3
    nothing = own.helm("template", "x", str(CHART), "--set=controller.enabled=false,crds.install=false").out
    assert nothing.strip() == ""


# ---- what is looked at ---------------------------------------------------------------------------


def test_workers_serve_metrics_where_the_monitor_asks_for_them(own: ControlPlane) -> None:
    """The monitor names a port that workers have, and labels that they have."""
    given = [
        "--set=podMonitor.enabled=true",
        "--set=worker.metricsPort=9300",
        "--set=podMonitor.labels.team=a",
    ]
    rendered = own.helm("template", "datacache", str(CHART), *IMAGE, *given).out
    monitor = next(each for each in yaml.safe_load_all(rendered) if each["kind"] == "PodMonitor")
    assert monitor["metadata"]["labels"]["team"] == "a"
    assert monitor["spec"]["selector"]["matchLabels"] == WORKER_LABELS
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    deployment = next(each for each in yaml.safe_load_all(rendered) if each["kind"] == "Deployment")
    _, _, *flags = deployment["spec"]["template"]["spec"]["containers"][0]["command"]
    release = read_release(command_parser("controller").parse_args(flags))
    spec = read_dataset(
        {"metadata": {"name": "a", "namespace": "b", "uid": "0b6e4c1a-0000", "generation": 1},
         "spec": {"mounts": [{"mountPoint": "https://host/x"}]}}, release,
    )  # fmt: skip
    workers = next(e for e in objects(spec, release, token="") if e["kind"] == "DaemonSet")
    (container,) = workers["spec"]["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports[endpoint["port"]] == 9300
    assert json.loads(settings_text(spec, release))["metrics"] == "0.0.0.0:9300"
    annotations = workers["spec"]["template"]["metadata"]["annotations"]
    source = endpoint["relabelings"][0]["sourceLabels"][0].removeprefix("__meta_kubernetes_pod_annotation_")
    assert source in {re.sub(r"[^a-z0-9]", "_", name) for name in annotations}


def test_the_dashboard_shows_metrics_that_there_are(own: ControlPlane) -> None:
    rendered = own.helm("template", "datacache", str(CHART), *IMAGE, "--set=dashboard.enabled=true").out
    found = next(
        each for each in yaml.safe_load_all(rendered) if each["metadata"]["name"] == "datacache-dashboard"
    )
    dashboard = json.loads(found["data"]["datacache.json"])
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = set(re.findall(r"datacache_\w+", json.dumps([asked, dashboard["templating"]])))
    known = {each.name: each for each in METRICS}
    assert len(names) > 15 and names <= known.keys(), names - known.keys()
    for name in names & {name for name, each in known.items() if each.kind == "counter"}:
        assert any(re.search(rf"rate\({name}", expr) for expr in asked), f"{name} is a counter"
    labels = {label for expr in asked for label in re.findall(r"by \(([\w, ]+)\)", expr)}
    there = {"dataset", *(label for each in METRICS for label in each.labels)}
    assert {each for some in labels for each in some.split(", ")} <= there
