"""What a DataLoad may say, which nodes do it, and what its status says."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datacache.errors import SettingError
from datacache.kube.dataload import (
    Job,
    Loading,
    LoadSpec,
    Node,
    Order,
    Target,
    choose,
    fits,
    jobs_of,
    read_load,
    read_order,
    remembered,
    status,
)
from datacache.model import MiB

NOW, LATER = "2026-11-26T21:00:00Z", "2026-11-26T22:00:00Z"


def load(**spec: Any) -> LoadSpec:
    return read_load({"spec": {"dataset": {"name": "imagenet"}} | spec})


def test_all_of_it_is_read() -> None:
    found = load(
        target=[{"path": "/train/", "globs": ["**/*.jpg"]}, {"path": "/val"}], nodes=["n2", "n1"],
        bandwidth="100M", verify=True, policy="Once", ttlSecondsAfterFinished=60,
    )  # fmt: skip
    assert found == LoadSpec(
        "imagenet", (Target("/train", ("**/*.jpg",)), Target("/val")), nodes=("n2", "n1"),
        bandwidth=100_000_000, verify=True, ttl=60,
    )  # fmt: skip


ORDER = {"configMapKeyRef": {"name": "epochs", "key": "1"}}


def test_an_order_is_one_job_whatever_the_api_has_filled_in() -> None:
    found = load(order=ORDER, target=[{"path": "/"}], verify=False, nodes=["a"])
    assert found.order == Order("epochs", "1") and found.jobs == 1
    assert load(target=[{"path": "/a"}, {"path": "/b"}]).jobs == 2


def test_an_order_is_paths_one_a_line() -> None:
    order = Order("epochs", "1")
    assert read_order(b"train/a.jpg\n\n/train/b.jpg\r\n", order) == ("/train/a.jpg", "/train/b.jpg")
    assert read_order(b"a\nb\0c\0", order) == ("/a\nb", "/c"), "any byte, where they end by NUL"
    assert read_order(b"\xff", order) == ("/\udcff",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\n", "spec.order.configMapKeyRef.key: '1' will not do; expected one with paths, one a line"),
        (b"\xff" * 200_000, "expected at most 1000000 bytes of paths, of which it has 1200005"),
    ],
)
def test_an_order_that_will_not_do_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_order(data, Order("epochs", "1"))
    assert said in str(refused.value)


def test_the_least_is_all_of_a_dataset() -> None:
    assert load() == LoadSpec("imagenet", (Target("/"),))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            {"dataset": {}},
            "spec.dataset.name: '' will not do; expected the name of a Dataset of this namespace",
        ),
        (
            {"dataset": {"name": "a", "namespace": "b"}},
            "spec.dataset: 'namespace' will not do; expected a field",
        ),
        (
            {"policy": "Cron"},
            "spec.policy: 'Cron' will not do; expected Once: loads that repeat is not built yet",
        ),
        (
            {"target": [{"path": "train"}]},
            "spec.target[0].path: 'train' will not do; expected an absolute path",
        ),
        (
            {"target": [{"path": "/a/../b"}]},
            "spec.target[0].path: '/a/../b' will not do; expected a path without",
        ),
        (
            {"target": [{"path": "/", "globs": ["/x"]}]},
            "spec.target[0].globs[0]: '/x' will not do; expected a glob",
        ),
        (
            {"nodes": ["a"], "replicas": 1},
            "spec.replicas: 1 will not do; expected nodes, nodeSelector or replicas",
        ),
        (
            {"order": ORDER, "target": [{"path": "/x"}]},
            "spec.target: 'a list' will not do; expected none, with order, which loads nothing by itself",
        ),
        ({"order": ORDER, "bandwidth": "1M"}, "spec.bandwidth: '1M' will not do; expected none, with order"),
        ({"order": ORDER, "verify": True}, "spec.verify: True will not do; expected none, with order"),
        ({"order": {}}, "spec.order.configMapKeyRef.name: '' will not do; expected the name of a ConfigMap"),
        ({"order": {"files": []}}, "spec.order: 'files' will not do; expected a field that there is"),
        ({"bandwidth": "fast"}, "spec.bandwidth: 'fast' will not do; expected a quantity"),
        ({"replicas": 0}, "spec.replicas: 0 will not do; expected a whole number, 1 to 1024"),
        ({"loadMetadata": True}, "spec: 'loadMetadata' will not do; expected a field that there is"),
    ],
)
def test_what_cannot_be_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as refused:
        load(**spec)
    assert said in str(refused.value)


_ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["/x", "a", "1Gi", "Once"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "globs", "name"]), inner)
    ),
    max_leaves=5,
)
_FIELDS = ["dataset", "order", "target", "nodes", "nodeSelector", "replicas", "bandwidth", "verify", "policy",
           "ttlSecondsAfterFinished"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(_FIELDS), _ANY))
def test_whatever_stands_there_is_taken_or_refused_in_one_line(spec: dict[str, Any]) -> None:
    try:
        load(**spec)
    except SettingError as refused:
        assert "\n" not in str(refused)


# ---- nodes ---------------------------------------------------------------------------------------

GPU = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]}
NODES = [
    Node("a", {"gpu": "a100", "size": "8"}),
    Node("b", {"gpu": "h100", "size": "16"}, working=True, cached=5),
    Node("c", {}, working=True, cached=9),
    Node("d", {"gpu": "a100"}, usable=False),
]


@pytest.mark.parametrize(
    ("spec", "affinity", "chosen"),
    [
        ({"nodes": ["d", "a"]}, None, ("a", "d")),
        ({"nodeSelector": {"gpu": "a100"}}, None, ("a", "d")),
        ({"replicas": 1}, None, ("c",)),  # who has most
        ({"replicas": 2}, None, ("b", "c")),
        ({"replicas": 3}, None, ("a", "b", "c")),  # not d, to which no pod may come
        ({}, None, ("b", "c")),  # who has a worker
        ({"replicas": 1}, GPU, ("b",)),  # c may not have one
        ({}, GPU, ("b",)),
    ],
)
def test_nodes_are_those_that_were_asked_for(spec: Any, affinity: Any, chosen: tuple[str, ...]) -> None:
    assert choose(load(**spec), NODES, affinity) == chosen
    assert choose(load(**spec), NODES[::-1], affinity) == chosen


def test_without_any_worker_it_is_one_node() -> None:
    assert choose(load(), [Node("z", {}), Node("y", {}), Node("x", {}, usable=False)], None) == ("y",)


@pytest.mark.parametrize(
    ("spec", "affinity", "said"),
    [
        ({"nodes": ["a", "z"]}, None, "spec.nodes[1]: 'z' will not do; expected a node that there is"),
        (
            {"nodes": ["c"]},
            GPU,
            "spec.nodes[0]: 'c' will not do; expected a node that there is, and that the Dat",
        ),
        (
            {"nodeSelector": {"gpu": "none"}},
            None,
            "spec.nodeSelector: '' will not do; expected labels of at least",
        ),
        (
            {"replicas": 4},
            None,
            "spec.replicas: 4 will not do; expected at most the nodes that can load it, 3",
        ),
    ],
)
def test_nodes_that_there_are_not_are_named(spec: Any, affinity: Any, said: str) -> None:
    with pytest.raises(SettingError) as refused:
        choose(load(**spec), NODES, affinity)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ({"key": "gpu", "operator": "In", "values": ["a100"]}, "ad"),
        ({"key": "gpu", "operator": "NotIn", "values": ["a100"]}, "bc"),
        ({"key": "gpu", "operator": "DoesNotExist"}, "c"),
        ({"key": "size", "operator": "Gt", "values": ["8"]}, "b"),
        ({"key": "size", "operator": "Lt", "values": ["9"]}, "a"),
    ],
)
def test_an_affinity_is_read_as_the_scheduler_reads_it(expression: Any, found: str) -> None:
    affinity = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    assert "".join(node.name for node in NODES if fits(node, affinity)) == found


def test_terms_are_alternatives_and_an_empty_one_fits_nobody() -> None:
    name = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["c"]}]}
    both = {"nodeSelectorTerms": [{}, name, *GPU["nodeSelectorTerms"]]}
    assert [node.name for node in NODES if fits(node, both)] == ["a", "b", "c", "d"]
    assert not fits(NODES[0], {"nodeSelectorTerms": [{}]})


# ---- the status ----------------------------------------------------------------------------------


def job(id: str = "j", state: str = "running", *, done: int = 1, of: int = 4, **more: Any) -> Job:
    there = done * MiB
    return Job(id, state, files=of, files_done=done, bytes=of * MiB, bytes_done=there, bytes_fetched=there,
               seconds=2.0, listed=True, **more)  # fmt: skip


def of(*loading: Loading, before: Any = None, reason: str = "", now: str = NOW) -> dict[str, Any]:
    return status(
        before or {}, generation=2, loading=loading, reason=reason, message="why" if reason else "", now=now
    )


def complete(found: dict[str, Any]) -> tuple[str, str]:
    (condition,) = found["conditions"]
    return condition["status"], condition["reason"]


def test_one_that_waits_says_for_what() -> None:
    found = of(reason="NoDataset")
    assert (found["phase"], *complete(found)) == ("Pending", "False", "NoDataset")
    assert "started" not in found and found["conditions"][0]["message"] == "why"


def test_one_whose_nodes_are_chosen_waits_for_their_workers() -> None:
    found = of(Loading("a", answers=False))
    assert (found["phase"], *complete(found)) == ("Pending", "False", "WaitingForWorkers")
    assert found["nodes"] == [
        {"name": "a", "job": "", "state": "waiting", "bytes": 0, "files": 0, "filesFailed": 0}
    ]


def test_one_at_work_says_how_far_it_is() -> None:
    found = of(Loading("a", (job(done=1),)), Loading("b", (job(done=4, state="done"),)))
    assert (found["phase"], *complete(found), found["started"]) == ("Executing", "False", "Loading", NOW)
    assert found["progress"] == {
        "bytes": 5 * MiB, "bytesTotal": 8 * MiB, "bytesFetched": 5 * MiB, "files": 5, "filesTotal": 8,
        "filesFailed": 0, "listed": True, "nodes": 2, "nodesDone": 1, "throughput": MiB // 2, "etaSeconds": 6,
    }  # fmt: skip
    assert found["shown"] == {"loaded": "5.0 MiB of 8.0 MiB", "throughput": "512.0 KiB/s", "eta": "6s"}
    assert found["nodes"][0] == {
        "name": "a", "job": "j", "state": "running", "bytes": MiB, "files": 1, "filesFailed": 0,
    }  # fmt: skip


def test_totals_are_final_when_the_last_target_is_listed() -> None:
    found = of(Loading("a", (job(state="done", done=4),), targets=2))
    assert found["phase"] == "Executing" and found["progress"]["listed"] is False
    assert found["shown"]["loaded"] == "4.0 MiB of 4.0 MiB or more"


def test_it_is_complete_when_every_node_has_done_every_target() -> None:
    done = Loading("a", (job("j", "done", done=4), job("k", "done", done=4)), targets=2)
    found = of(done, before={"started": NOW}, now=LATER)
    assert (found["phase"], *complete(found)) == ("Complete", "True", "Loaded")
    assert (found["started"], found["finished"]) == (NOW, LATER)
    assert jobs_of(found) == {"a": ("j", "k")}
    assert of(done, before=found, now="2026-11-27T00:00:00Z") == found


def test_an_order_that_is_announced_is_no_load() -> None:
    done = Loading("a", (job(state="done", done=4),))
    found = status({}, generation=1, loading=[done], reason="", message="", now=NOW, order=True)
    assert (found["phase"], *complete(found)) == ("Complete", "True", "Announced")
    assert found["conditions"][0]["message"] == "it is known on 1 node in which order 4 files will be read"
    assert found["shown"]["loaded"] == "order only"
    bad = Loading("a", (job(state="failed", done=3, files_failed=1),))
    found = status({}, generation=1, loading=[bad], reason="", message="", now=NOW, order=True)
    assert found["conditions"][0]["message"] == "1 file named in the order cannot be read"


def test_files_that_failed_are_named_and_counted() -> None:
    bad = job(state="failed", done=3, failures=(("/x", "denied"),), files_failed=1)
    found = of(Loading("a", (bad,)), Loading("b", (job(state="done", done=4),)))
    assert (found["phase"], *complete(found)) == ("Failed", "False", "FilesFailed")
    assert found["conditions"][0]["message"] == "1 file could not be loaded"
    assert found["failures"] == [{"path": "/x", "node": "a", "reason": "denied"}]


def test_one_that_was_cancelled_is_no_success() -> None:
    found = of(Loading("a", (job(state="cancelled"),)))
    assert (found["phase"], *complete(found)) == ("Failed", "False", "Cancelled")


def test_a_store_that_is_away_is_said() -> None:
    assert complete(of(Loading("a", (job(waiting="503"),)))) == ("False", "StoreAway")


def test_a_worker_that_does_not_answer_is_waited_for_and_its_jobs_are_kept() -> None:
    first = of(Loading("a", (job(done=2),)))
    silent = of(remembered(first, "a", targets=1), before=first, now=LATER)
    assert complete(silent) == ("False", "WaitingForWorkers")
    assert jobs_of(silent) == {"a": ("j",)} and silent["progress"]["bytes"] == 2 * MiB
    assert silent["phase"] == "Executing" and silent["started"] == NOW


def test_a_node_that_is_done_is_done_whatever_becomes_of_its_worker() -> None:
    first = of(Loading("a", (job(state="done", done=4),)), Loading("b", (job(),)))
    found = remembered(first, "a", targets=1)
    assert found.ended and not remembered(first, "b", targets=1).ended
    again = of(found, Loading("b", (job(state="done", done=4),)), before=first)
    assert again["phase"] == "Complete" and again["progress"]["bytes"] == 8 * MiB


def test_a_node_that_had_failures_has_them_later_too() -> None:
    bad = job(state="failed", done=3, failures=(("/x", "denied"),), files_failed=1)
    first = of(Loading("a", (bad,)), Loading("b", (job(),)))
    again = of(remembered(first, "a", targets=1), Loading("b", (job(state="done", done=4),)), before=first)
    assert again["phase"] == "Failed" and again["failures"] == first["failures"]
    assert again["progress"]["filesFailed"] == 1


@pytest.mark.parametrize(("seconds", "shown"), [(119, "119s"), (600, "10m"), (9000, "2h30m")])
def test_the_time_that_is_left_is_for_people(seconds: int, shown: str) -> None:
    slow = Job("j", "running", bytes=seconds + 1, bytes_done=1, bytes_fetched=1, seconds=1.0, listed=True)
    assert of(Loading("a", (slow,)))["shown"]["eta"] == shown
