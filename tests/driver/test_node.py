"""The node service over a node that is a table: what each call leaves, made once, twice, at once, or half."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from csi.mounter import fake
from csi.mounter.fake import FakeDatasetMounter, FakeMounter
from csi.node import HOSTNAME, Node
from csi.records import Record, Records
from csi.v1 import csi_pb2 as v1
from datacache.errors import (
    DatacacheError,
    MountError,
    NoSuchVolume,
    NotStaged,
    SettingError,
    TookTooLong,
    VolumeBusy,
    VolumeDiffers,
    VolumeInUse,
)
from tests.conftest import AnnouncedLogs
from tests.driver.requests import MODE, URI, VOLUME, Kubelet

RW = {**URI, "rw": "true"}


class Driver:
    """A driver over the node `node`; another can be made over the same."""

    def __init__(
        self, root: Path, node: fake.Node | None = None, step: Callable[[], None] | None = None,
        volume: str = VOLUME,
    ) -> None:  # fmt: skip
        self.kubelet = Kubelet(root / "kubelet", volume).make()
        self.node = node or fake.Node()
        self.step = step or (lambda: None)
        self.mounter = FakeMounter(self.node, step=self.step)
        self.datasets = FakeDatasetMounter(self.node, step=self.step)
        self.records = _Stepping(str(root / "records"), self.step)
        self.records.open()
        self.service = Node(
            self.mounter, self.datasets, self.records, node_id="node1", kubelet=str(self.kubelet.root),
            environment={"HOME": "/root"},
        )  # fmt: skip

    def call(self, request: object) -> object:
        """Have the request answered."""
        name = type(request).__name__.removesuffix("Request")
        methods = {
            "NodeStageVolume": self.service.node_stage_volume,
            "NodeUnstageVolume": self.service.node_unstage_volume,
            "NodePublishVolume": self.service.node_publish_volume,
            "NodeUnpublishVolume": self.service.node_unpublish_volume,
            "NodeGetVolumeStats": self.service.node_get_volume_stats,
        }
        return methods[name](request, within=10.0)  # type: ignore[operator]

    @property
    def staged(self) -> fake.DataSet:
        shown = self.node.mounts[str(self.kubelet.staging)].shown
        assert shown is not None
        return shown


class _Stepping(Records):
    """Records with a step before and after each change."""

    def __init__(self, directory: str, step: Callable[[], None]) -> None:
        super().__init__(directory)
        self._step = step

    def put(self, record: Record) -> None:
        self._step()
        super().put(record)
        self._step()

    def drop(self, volume: str) -> None:
        self._step()
        super().drop(volume)
        self._step()


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


def test_a_data_set_is_mounted_once_and_bound_to_each_pod(driver: Driver) -> None:
    """... and nothing is left of it at the end."""
    kubelet = driver.kubelet
    driver.call(kubelet.stage(RW, secrets={"AWS_SECRET_ACCESS_KEY": "s"}))
    for pod in ("a", "b"):
        driver.call(kubelet.publish(pod))
    assert driver.staged.tree["uri"] == ["s3://bucket/train"]
    assert driver.staged.secrets == {"AWS_SECRET_ACCESS_KEY": "s"}
    assert {place.shown for place in driver.node.mounts.values()} == {driver.staged}
    assert len(driver.node.mounts) == 3
    for pod in ("a", "b"):
        driver.call(kubelet.unpublish(pod))
    driver.call(kubelet.unstage())
    assert not driver.node.mounts
    assert not driver.node.directories
    assert driver.records.get(kubelet.volume) is None


def test_every_call_may_be_made_again(driver: Driver) -> None:
    """The kubelet does, after an answer that was lost."""
    kubelet = driver.kubelet
    for request in (kubelet.stage(), kubelet.publish("a"), kubelet.unpublish("a"), kubelet.unstage()):
        driver.call(request)
        before = dict(driver.node.mounts)
        driver.call(request)
        assert driver.node.mounts == before


class _Killed(BaseException):
    """kill -9: nothing is caught."""


@pytest.mark.parametrize("context", [URI, RW], ids=["ro", "rw"])
def test_the_driver_may_be_killed_between_any_two_steps(tmp_path: Path, context: dict[str, str]) -> None:
    """The next one does what is missing, mounts nothing twice, and leaves nothing."""
    for nth in itertools.count(1):
        root = tmp_path / str(nth)
        node, count, deaths = fake.Node(), itertools.count(1), 0

        def step(count: "itertools.count[int]" = count, nth: int = nth) -> None:
            if next(count) == nth:
                raise _Killed

        driver = Driver(root, node, step)
        kubelet = driver.kubelet
        for request in (
            kubelet.stage(context), kubelet.publish("a", readonly=True), kubelet.publish("b"),
            kubelet.unpublish("a"), kubelet.unpublish("b"), kubelet.unstage(),
        ):  # fmt: skip
            try:
                driver.call(request)
            except _Killed:
                deaths += 1
                driver = Driver(root, node)
                driver.call(request)
            if isinstance(request, v1.NodePublishVolumeRequest):
                assert node.mounts[request.target_path].shown is driver.staged
                assert node.mounts[request.target_path].read_only is (request.readonly or context is URI)
        assert next(node.devices) == 41, f"mounted more than once (killed at step {nth})"
        assert not node.mounts, nth
        assert not node.directories, nth
        assert not list((root / "records").iterdir()), nth
        if not deaths:
            break
    assert nth > 20


def test_calls_for_one_volume_come_one_by_one(driver: Driver, tmp_path: Path) -> None:
    """The second is told to come again; another volume is not held up."""
    inside, go = threading.Event(), threading.Event()

    def step() -> None:
        inside.set()
        assert go.wait(10)

    slow = FakeMounter(driver.node, step=step)
    service = Node(
        slow, driver.datasets, driver.records, node_id="n", kubelet=str(driver.kubelet.root), environment={}
    )
    staging = threading.Thread(target=lambda: service.node_stage_volume(driver.kubelet.stage(), within=1))
    staging.start()
    assert inside.wait(10)
    with pytest.raises(VolumeBusy, match="pv-train"):
        service.node_unstage_volume(driver.kubelet.unstage(), within=1)
    other = Kubelet(driver.kubelet.root, "pv-other").make()
    with pytest.raises(NotStaged):
        service.node_publish_volume(other.publish("a"), within=1)
    go.set()
    staging.join(10)
    service.node_unstage_volume(driver.kubelet.unstage(), within=1)


@pytest.mark.parametrize(
    ("staged", "published", "read_only"),
    [
        ({}, {}, False),
        ({}, {"readonly": True}, True),
        ({}, {"flags": ("ro",)}, True),
        ({}, {"mode": MODE.MULTI_NODE_READER_ONLY}, True),
        ({"mode": MODE.MULTI_NODE_READER_ONLY}, {}, True),
        ({"flags": ("ro",)}, {}, True),
    ],
)
def test_a_pod_cannot_write_when_anything_says_so(
    driver: Driver, staged: dict[str, object], published: dict[str, object], read_only: bool
) -> None:
    """Measured on a kubelet: the PV's `readOnly` does not arrive as the request's flag."""
    driver.call(driver.kubelet.stage(RW, **staged))  # type: ignore[arg-type]
    driver.call(driver.kubelet.publish("a", **published))  # type: ignore[arg-type]
    assert driver.node.mounts[str(driver.kubelet.target("a"))].read_only is read_only


def test_what_is_there_otherwise_than_asked_is_no_success(driver: Driver) -> None:
    """Other attributes, another place, another mode: ALREADY_EXISTS, and what is there stays."""
    kubelet = driver.kubelet
    driver.call(kubelet.stage(RW))
    driver.call(kubelet.publish("a"))
    before = dict(driver.node.mounts)
    with pytest.raises(VolumeDiffers, match="other attributes"):
        driver.call(kubelet.stage({**RW, "ttl": "5s"}))
    with pytest.raises(VolumeDiffers, match="published writable"):
        driver.call(kubelet.publish("a", readonly=True))
    elsewhere = kubelet.stage(RW)
    elsewhere.staging_target_path = str(kubelet.root / "elsewhere")
    with pytest.raises(VolumeDiffers, match="is staged at"):
        driver.call(elsewhere)
    assert driver.node.mounts == before


def test_secrets_that_have_changed_are_no_other_attributes(driver: Driver) -> None:
    """Keys are rotated; what is mounted goes on, and nothing of them is written down."""
    driver.call(driver.kubelet.stage(secrets={"AWS_SECRET_ACCESS_KEY": "the first"}))
    driver.call(driver.kubelet.stage(secrets={"AWS_SECRET_ACCESS_KEY": "the second"}))
    kept = b"".join(path.read_bytes() for path in driver.kubelet.root.parent.rglob("*.json"))
    assert kept
    assert b"the first" not in kept
    assert b"the second" not in kept


def test_a_mount_of_somebody_else_is_left_alone(driver: Driver) -> None:
    """Wherever it is."""
    kubelet = driver.kubelet
    foreign = fake.Place(None, read_only=False)
    driver.node.mounts[str(kubelet.staging)] = foreign
    for request in (kubelet.stage(), kubelet.unstage()):
        with pytest.raises(VolumeDiffers, match="something else"):
            driver.call(request)
    del driver.node.mounts[str(kubelet.staging)]
    driver.call(kubelet.stage())
    driver.node.mounts[str(kubelet.target("a"))] = foreign
    for call in (kubelet.publish("a"), kubelet.unpublish("a")):
        with pytest.raises(VolumeDiffers, match="something else"):
            driver.call(call)
    assert driver.node.mounts[str(kubelet.target("a"))] is foreign


@pytest.mark.parametrize("error", [MountError("x"), SettingError("a", "b", "c"), TookTooLong("x")])
def test_a_stage_that_fails_leaves_nothing(driver: Driver, error: Exception) -> None:
    """And the next one, with other attributes, is no different volume."""
    driver.mounter.refuses = error
    with pytest.raises(type(error)):
        driver.call(driver.kubelet.stage())
    assert driver.records.get(driver.kubelet.volume) is None
    driver.call(driver.kubelet.stage({**URI, "ttl": "5s"}))


def test_nothing_is_published_that_is_not_staged(driver: Driver) -> None:
    """Not before, not elsewhere, and not from a mount that is dead: a pod would start on it."""
    kubelet = driver.kubelet
    with pytest.raises(NotStaged, match="is not staged at"):
        driver.call(kubelet.publish("a"))
    nowhere = kubelet.publish("a")
    nowhere.staging_target_path = ""
    with pytest.raises(NotStaged, match="no staging_target_path"):
        driver.call(nowhere)
    driver.call(kubelet.stage())
    driver.staged.alive = False
    with pytest.raises(MountError, match="does not answer"):
        driver.call(kubelet.publish("a"))
    assert not driver.node.directories


def test_a_dead_mount_can_be_staged_and_published_anew(driver: Driver, logs: AnnouncedLogs) -> None:
    """The bind mount of the dead one gives way to the new."""
    logs.expect("shows a mount that is gone")
    kubelet = driver.kubelet
    driver.call(kubelet.stage())
    driver.call(kubelet.publish("a"))
    driver.staged.alive = False
    driver.call(kubelet.stage())
    driver.call(kubelet.publish("a"))
    assert driver.node.mounts[str(kubelet.target("a"))].shown is driver.staged
    assert driver.staged.alive


def test_a_mount_stays_while_pods_use_it(driver: Driver) -> None:
    """Unstage would take it from under them."""
    kubelet = driver.kubelet
    driver.call(kubelet.stage())
    driver.call(kubelet.publish("a"))
    with pytest.raises(VolumeInUse, match=r"still published .*/pods/a/"):
        driver.call(kubelet.unstage())
    driver.call(kubelet.unpublish("a"))
    driver.call(kubelet.unstage())


def test_a_copy_of_the_mount_elsewhere_is_no_pod(driver: Driver) -> None:
    """Where the kubelet's directory is shown twice, the kernel makes one of each mount, and takes it off."""
    kubelet = driver.kubelet
    driver.call(kubelet.stage())
    elsewhere = "/data/kubelet/plugins/pv-train/globalmount"
    driver.node.mounts[elsewhere] = fake.Place(driver.staged, read_only=True)
    driver.call(kubelet.unstage())
    assert str(kubelet.staging) not in driver.node.mounts


def test_a_mount_stays_while_the_bucket_is_owed_something(driver: Driver) -> None:
    """It goes on uploading; the kubelet comes again. No pod waits for that: it is unpublished."""
    kubelet = driver.kubelet
    driver.call(kubelet.stage(RW))
    driver.call(kubelet.publish("a"))
    driver.staged.owed = "3 files (12 MiB)"
    driver.call(kubelet.unpublish("a"))
    with pytest.raises(VolumeInUse, match=r"3 files \(12 MiB\) not in the bucket yet"):
        driver.call(kubelet.unstage())
    assert str(kubelet.staging) in driver.node.mounts
    driver.staged.owed = ""
    driver.call(kubelet.unstage())
    assert not driver.node.mounts


def test_a_mount_that_hangs_is_aborted(driver: Driver) -> None:
    """What it was written is durable where it lies; nobody waits for it."""
    kubelet = driver.kubelet
    driver.call(kubelet.stage(RW))
    driver.call(kubelet.publish("a"))
    driver.staged.alive, driver.staged.owed = False, "3 files"
    driver.call(kubelet.unpublish("a"))
    driver.call(kubelet.unstage())
    assert driver.node.aborted == [str(kubelet.staging)]
    assert not driver.node.mounts


def test_a_lost_record_costs_only_the_comparison(driver: Driver) -> None:
    """Damaged or gone: what is mounted is believed."""
    driver.call(driver.kubelet.stage())
    for path in (driver.kubelet.root.parent / "records").iterdir():
        path.write_text("{")
    driver.call(driver.kubelet.stage())
    driver.call(driver.kubelet.publish("a"))
    driver.call(driver.kubelet.unpublish("a"))
    driver.call(driver.kubelet.unstage())


def test_df(driver: Driver) -> None:
    """Bytes and files, of the volume where a pod sees it; nothing of what is not there."""
    kubelet = driver.kubelet
    driver.call(kubelet.stage())
    driver.call(kubelet.publish("a"))
    said = driver.call(kubelet.stats(kubelet.target("a")))
    assert isinstance(said, v1.NodeGetVolumeStatsResponse)
    figures = [(usage.unit, usage.total, usage.used, usage.available) for usage in said.usage]
    assert figures == [(v1.VolumeUsage.BYTES, 1000, 600, 300), (v1.VolumeUsage.INODES, 10, 6, 4)]
    for nowhere in (kubelet.target("b"), Path("some/path")):
        with pytest.raises(NoSuchVolume):
            driver.call(kubelet.stats(nowhere))


@pytest.mark.parametrize(
    "field", ["volume_id", "staging_target_path", "target_path", "volume_capability", "volume_path"]
)
def test_what_is_missing_is_named(driver: Driver, field: str) -> None:
    """In every request that has it. Nothing is done."""
    kubelet = driver.kubelet
    for request in (
        kubelet.stage(), kubelet.unstage(), kubelet.publish("a"), kubelet.unpublish("a"),
        kubelet.stats(kubelet.staging),
    ):  # fmt: skip
        optional = isinstance(request, v1.NodeGetVolumeStatsRequest) and field.startswith("staging")
        if field not in request.DESCRIPTOR.fields_by_name or optional:
            continue
        request.ClearField(field)  # type: ignore[arg-type]
        with pytest.raises(DatacacheError, match=field):
            driver.call(request)
    assert not driver.node.mounts
    assert not driver.node.directories


def test_an_inline_volume_is_refused(driver: Driver) -> None:
    """Its attributes are those of whoever may start a pod: they could name any path of the node."""
    inline = {**URI, "csi.storage.k8s.io/ephemeral": "true"}
    for request in (driver.kubelet.stage(inline), driver.kubelet.publish("a", context=inline)):
        with pytest.raises(SettingError, match="inline volumes name a Dataset"):
            driver.call(request)


def test_a_node_says_which_it_is(driver: Driver) -> None:
    """And how many data sets it takes."""
    said = driver.service.node_get_info(v1.NodeGetInfoRequest(), within=1)
    assert said.node_id == "node1"
    assert said.max_volumes_per_node == 64
    assert dict(said.accessible_topology.segments) == {HOSTNAME: "node1"}


# ---- volumes of Datasets ---------------------------------------------------------------------------

UID = "0f2a7c1e-3b54-4c63-9e0e-5d0f6f1d2a3b"
OF = {"namespace": "team", "dataset": "pets", "uid": UID, "csi.storage.k8s.io/pod.name": "x"}


@pytest.fixture
def of_dataset(tmp_path: Path) -> Driver:
    """A driver, and a worker of the Dataset."""
    driver = Driver(tmp_path, volume=f"datacache-{UID}")
    driver.node.workers[UID] = ""
    return driver


def test_a_dataset_is_mounted_once_and_bound_to_each_pod(of_dataset: Driver) -> None:
    """Its worker serves it; another is not started. The connection is aborted before it is unmounted."""
    kubelet, node = of_dataset.kubelet, of_dataset.node
    for request in (kubelet.stage(OF), kubelet.publish("a", context=OF), kubelet.publish("b", readonly=True)):
        of_dataset.call(request)
        of_dataset.call(request)
    assert of_dataset.staged.tree == {"dataset": "team/pets"}
    assert [place.read_only for place in node.mounts.values()] == [False, False, True]
    with pytest.raises(VolumeInUse, match="still published"):
        of_dataset.call(kubelet.unstage())
    for pod in ("a", "b"):
        of_dataset.call(kubelet.unpublish(pod))
    node.workers[UID] = "3 files"
    with pytest.raises(VolumeInUse, match="3 files not in the bucket yet"):
        of_dataset.call(kubelet.unstage())
    node.workers[UID] = ""
    of_dataset.call(kubelet.unstage())
    of_dataset.call(kubelet.unstage())
    assert node.aborted == [str(kubelet.staging)]
    assert not node.mounts
    assert of_dataset.records.get(kubelet.volume) is None


def test_the_driver_of_a_dataset_may_be_killed_between_any_two_steps(tmp_path: Path) -> None:
    """The next one lets the worker come, does what is missing, and leaves nothing."""
    for nth in itertools.count(1):
        root, deaths = tmp_path / str(nth), 0
        node, count = fake.Node(workers={UID: ""}), itertools.count(1)

        def step(count: "itertools.count[int]" = count, nth: int = nth) -> None:
            if next(count) == nth:
                raise _Killed

        driver = Driver(root, node, step, volume=f"datacache-{UID}")
        kubelet = driver.kubelet
        for request in (
            kubelet.stage(OF), kubelet.publish("a", context=OF), kubelet.unpublish("a"), kubelet.unstage()
        ):  # fmt: skip
            try:
                driver.call(request)
            except _Killed:
                deaths += 1
                driver = Driver(root, node, volume=f"datacache-{UID}")
                driver.service.go_on()
                known = driver.records.get(kubelet.volume)
                assert driver.datasets.expected == ([UID] if known is not None else [])
                driver.call(request)
        assert not node.mounts, nth
        assert not node.directories, nth
        assert not list((root / "records").iterdir()), nth
        if not deaths:
            break
    assert nth > 10


def test_one_volume_that_cannot_be_taken_up_holds_up_no_other(
    of_dataset: Driver, logs: AnnouncedLogs
) -> None:
    """A driver starts on a node on which something stands in the way of one of its volumes."""
    logs.expect("datacache-one: no room")
    for name in ("one", "two"):
        of_dataset.records.put(Record(f"datacache-{name}", f"/staging/{name}", "digest", name))
    of_dataset.datasets.refuses = "one"
    of_dataset.service.go_on()
    assert of_dataset.datasets.expected == ["two"]


def test_a_dataset_without_a_worker_is_not_mounted(of_dataset: Driver) -> None:
    """Nothing is left of the try; what was there before stays."""
    kubelet, node = of_dataset.kubelet, of_dataset.node
    del node.workers[UID]
    with pytest.raises(TookTooLong, match="no worker of Dataset team/pets"):
        of_dataset.call(kubelet.stage(OF))
    assert not node.mounts
    assert of_dataset.records.get(kubelet.volume) is None
    node.workers[UID] = ""
    of_dataset.call(kubelet.stage(OF))
    del node.workers[UID]
    with pytest.raises(TookTooLong):
        of_dataset.call(kubelet.stage(OF))
    assert list(node.mounts) == [str(kubelet.staging)]
    assert of_dataset.records.get(kubelet.volume) is not None


def test_a_dataset_whose_mount_is_dead(of_dataset: Driver) -> None:
    """No pod is put on it, with the reason; it is mounted anew when no pod uses it."""
    kubelet, node = of_dataset.kubelet, of_dataset.node
    of_dataset.call(kubelet.stage(OF))
    of_dataset.call(kubelet.publish("a", context=OF))
    of_dataset.staged.alive = False
    for request in (kubelet.publish("b", context=OF), kubelet.stage(OF)):
        with pytest.raises(MountError, match="have ended at the same time"):
            of_dataset.call(request)
    of_dataset.call(kubelet.unpublish("a"))
    of_dataset.call(kubelet.stage(OF))
    assert of_dataset.staged.alive
    assert len(node.mounts) == 1


@pytest.mark.parametrize(
    ("staged", "read_only"),
    [({}, False), ({"mode": MODE.MULTI_NODE_READER_ONLY}, True), ({"flags": ("ro",)}, True)],
)
def test_a_dataset_that_may_only_be_read(
    of_dataset: Driver, staged: dict[str, object], read_only: bool
) -> None:
    """Nobody can remount it otherwise, and it is another volume then."""
    of_dataset.call(of_dataset.kubelet.stage(OF, **staged))  # type: ignore[arg-type]
    assert of_dataset.node.mounts[str(of_dataset.kubelet.staging)].read_only is read_only
    if read_only:
        with pytest.raises(VolumeDiffers, match="other attributes"):
            of_dataset.call(of_dataset.kubelet.stage(OF))
