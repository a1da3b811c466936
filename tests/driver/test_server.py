"""The services over a real socket: codes, deadlines, what is logged, who may connect, how it ends."""

import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi.controller import Controller
from csi.identity import Identity
from csi.mounter import fake
from csi.mounter.fake import FakeDatasetMounter, FakeMounter
from csi.node import Node
from csi.records import Records
from csi.server import LIMIT, Server, status
from csi.v1 import csi_pb2 as v1
from datacache import errors
from datacache.errors import MountError, SettingError
from datacache.kube.release import DRIVER
from tests.conftest import AnnouncedLogs
from tests.driver.client import Client, connected
from tests.driver.requests import MODE, URI, Kubelet, capability

SECRET = "wJalrXUtnFEMI-the-value"
SERVICES = v1.DESCRIPTOR.services_by_name


class Served:
    """A driver over a fake node, and a client of it."""

    def __init__(self, root: Path) -> None:
        self.kubelet = Kubelet(root / "kubelet").make()
        self.node = fake.Node()
        self.mounter = FakeMounter(self.node)
        records = Records(str(root / "records"))
        records.open()
        environment = {"HOME": "/root"}
        node = Node(
            self.mounter, FakeDatasetMounter(self.node), records, node_id="n", kubelet=str(self.kubelet.root),
            environment=environment,
        )  # fmt: skip
        self.path = root / "csi.sock"
        self.server = Server(
            str(self.path),
            [
                (SERVICES["Identity"], Identity("1.2")),
                (SERVICES["Controller"], Controller(environment)),
                (SERVICES["Node"], node),
            ],
        )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    made.server.start()
    yield made
    made.server.stop(5)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with connected(served.path) as made:
        yield made


def test_who_we_are(client: Client) -> None:
    """What the kubelet asks first."""
    info = client.call(v1.GetPluginInfoRequest())
    assert (info.name, info.vendor_version) == (DRIVER, "1.2")
    assert client.call(v1.ProbeRequest()).ready.value
    (service,) = client.call(v1.GetPluginCapabilitiesRequest()).capabilities
    assert service.service.type == v1.PluginCapability.Service.CONTROLLER_SERVICE
    rpc = v1.NodeServiceCapability.RPC
    said = client.call(v1.NodeGetCapabilitiesRequest()).capabilities
    assert [one.rpc.type for one in said] == [rpc.STAGE_UNSTAGE_VOLUME, rpc.GET_VOLUME_STATS]
    (one,) = client.call(v1.ControllerGetCapabilitiesRequest()).capabilities
    assert one.rpc.type == v1.ControllerServiceCapability.RPC.CREATE_DELETE_VOLUME


def test_a_volume_from_beginning_to_end(served: Served, client: Client) -> None:
    """A StorageClass's, through all of its calls."""
    wanted = v1.CreateVolumeRequest(name="pvc-1", parameters=URI, volume_capabilities=[capability()])
    made = client.call(wanted).volume
    assert made == client.call(wanted).volume
    assert dict(made.volume_context) == URI
    kubelet = Kubelet(served.kubelet.root, made.volume_id).make()
    client.call(kubelet.stage(made.volume_context))
    client.call(kubelet.publish("a"))
    assert client.call(kubelet.stats(kubelet.target("a"))).usage[0].total == 1000
    client.call(kubelet.unpublish("a"))
    client.call(kubelet.unstage())
    client.call(v1.DeleteVolumeRequest(volume_id=made.volume_id))
    assert not served.node.mounts


def test_what_a_class_cannot_have_is_refused_when_a_volume_is_made(client: Client) -> None:
    """The claim says why it stays pending, no pod has to find out."""
    for request, says in (
        (v1.CreateVolumeRequest(name="p", parameters=URI), "volume_capabilities"),
        (
            v1.CreateVolumeRequest(
                name="p", parameters={"uri": "s3://b", "ttl": "x"}, volume_capabilities=[capability()]
            ),
            "volumeAttributes.ttl",
        ),
        (
            v1.CreateVolumeRequest(
                name="p", parameters=URI, volume_capabilities=[capability()],
                volume_content_source=v1.VolumeContentSource(),
            ),
            "nothing is copied",
        ),
    ):  # fmt: skip
        code, text = client.code(request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert says in text


def test_capabilities_are_confirmed_or_it_is_said_why_not(client: Client) -> None:
    """Of a volume that there is."""
    asked = v1.ValidateVolumeCapabilitiesRequest(
        volume_id="static", volume_context=URI, volume_capabilities=[capability(MODE.SINGLE_NODE_WRITER)]
    )
    assert client.call(asked).confirmed.volume_capabilities == asked.volume_capabilities
    asked.volume_capabilities[0].block.SetInParent()
    said = client.call(asked)
    assert not said.HasField("confirmed")
    assert "a data set is a directory" in said.message
    asked.volume_context.clear()
    assert client.code(asked)[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingError("ttl", "x", "a duration"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.NoSuchVolume("x"), grpc.StatusCode.NOT_FOUND),
        (errors.VolumeDiffers("x"), grpc.StatusCode.ALREADY_EXISTS),
        (errors.VolumeBusy("x"), grpc.StatusCode.ABORTED),
        (errors.VolumeInUse("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.NotStaged("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.TookTooLong("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.NotFound("x"), grpc.StatusCode.NOT_FOUND),
        (errors.Denied("x"), grpc.StatusCode.PERMISSION_DENIED),
        (errors.Unavailable("x"), grpc.StatusCode.UNAVAILABLE),
        (errors.ControlError("x"), grpc.StatusCode.UNAVAILABLE),
        (MountError("x"), grpc.StatusCode.INTERNAL),
        (errors.LandingFull("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_each_error_has_a_code(error: Exception, code: grpc.StatusCode) -> None:
    """And its one line."""
    assert status(error, ()) == (code, str(error))


def test_errors_reach_the_caller(served: Served, client: Client) -> None:
    """Over the wire."""
    served.mounter.refuses = MountError("the kernel says no")
    assert client.code(served.kubelet.stage()) == (grpc.StatusCode.INTERNAL, "the kernel says no")
    code, text = client.code(served.kubelet.stage({**URI, "ttl": "soon"}))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "volumeAttributes.ttl: 'soon'" in text


def test_a_defect_of_ours_is_one_answer_and_the_log_has_the_rest(
    served: Served, client: Client, logs: AnnouncedLogs
) -> None:
    """Without a secret in either; and the next call is answered."""
    logs.expect("internal error")
    served.mounter.refuses = RuntimeError(f"bug with {SECRET}")
    asked = served.kubelet.stage(secrets={"AWS_SECRET_ACCESS_KEY": SECRET})
    assert client.code(asked) == (
        grpc.StatusCode.INTERNAL,
        "internal error, see the driver's log: RuntimeError",
    )
    assert "bug with ***" in logs.messages()[0]
    assert SECRET not in logs.messages()[0]
    client.call(asked)


def test_no_value_of_a_secret_is_said_or_logged(
    served: Served, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever brought it into a message."""
    caplog.set_level(logging.DEBUG)
    asked = served.kubelet.stage(secrets={"AWS_SECRET_ACCESS_KEY": SECRET})
    served.mounter.refuses = MountError(f"the store does not like {SECRET}")
    assert client.code(asked)[1] == "the store does not like ***"
    client.call(asked)
    assert "NodeStageVolume pv-train: done" in caplog.text
    assert SECRET not in caplog.text


class _Slow:
    """Answers when it is let go."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self.within: list[float] = []

    def probe(self, request: Any, *, within: float) -> v1.ProbeResponse:
        self.within.append(within)
        self.began.set()
        assert self.go.wait(10)
        return v1.ProbeResponse()

    def get_plugin_info(self, request: Any, *, within: float) -> v1.GetPluginInfoResponse:
        raise NotImplementedError

    get_plugin_capabilities = get_plugin_info


def test_every_call_has_a_deadline(tmp_path: Path) -> None:
    """The caller's, or our own where it has none or a longer one."""
    slow = _Slow()
    slow.go.set()
    server = Server(str(tmp_path / "s"), [(SERVICES["Identity"], slow)])
    server.start()
    with connected(tmp_path / "s") as client:
        for timeout in (20.0, None, 10 * LIMIT):
            client.call(v1.ProbeRequest(), timeout=timeout)
    server.stop(1)
    short, none, long = slow.within
    assert 10 < short < 25  # gRPC rounds
    assert none == long == LIMIT


def test_calls_under_way_are_answered_before_the_end(tmp_path: Path) -> None:
    """Drain: who calls later is not taken, who is being served is. The socket goes."""
    slow = _Slow()
    server = Server(str(tmp_path / "s"), [(SERVICES["Identity"], slow)])
    server.start()
    answers: list[v1.ProbeResponse] = []
    with connected(tmp_path / "s") as client:
        asking = threading.Thread(target=lambda: answers.append(client.call(v1.ProbeRequest())))
        asking.start()
        assert slow.began.wait(10)
        stopping = threading.Thread(target=lambda: server.stop(10))
        stopping.start()
        slow.go.set()
        stopping.join(20)
        asking.join(20)
    assert answers == [v1.ProbeResponse()]
    assert not (tmp_path / "s").exists()


def test_two_calls_for_one_volume_at_once(served: Served, client: Client) -> None:
    """ABORTED is what the kubelet takes for "come again"."""
    inside, go = threading.Event(), threading.Event()

    def step() -> None:
        inside.set()
        assert go.wait(10)

    served.mounter._step = step
    first = threading.Thread(target=lambda: client.call(served.kubelet.stage()))
    first.start()
    assert inside.wait(10)
    assert client.code(served.kubelet.stage())[0] is grpc.StatusCode.ABORTED
    go.set()
    first.join(10)
    assert client.code(served.kubelet.stage())[0] is grpc.StatusCode.OK


def test_a_request_that_is_too_large_is_not_taken(client: Client, served: Served) -> None:
    """It cannot be one of the kubelet's."""
    code, _ = client.code(served.kubelet.stage({"uri": "x" * (2 << 20)}))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_socket_is_for_its_owner(tmp_path: Path) -> None:
    """0600, whatever the umask, which stays what it was."""
    before = os.umask(0o011)
    try:
        server = Server(str(tmp_path / "s"), [])
        server.start()
        assert os.umask(0o011) == 0o011
    finally:
        os.umask(before)
    found = (tmp_path / "s").lstat().st_mode
    assert stat.S_ISSOCK(found)
    assert stat.S_IMODE(found) == 0o600
    server.stop(1)


def test_a_dead_ones_socket_gives_way_and_nothing_else_does(served: Served, tmp_path: Path) -> None:
    """Not that of a driver that runs, not a file."""
    with pytest.raises(SettingError, match="no other process listens on"):
        Server(str(served.path), []).start()
    assert served.path.exists()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SettingError, match="nothing else"):
        Server(str(tmp_path / "file"), []).start()
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(SettingError, match="107 bytes"):
        Server(str(tmp_path / ("x" * 120)), []).start()
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    server = Server(str(dead), [(SERVICES["Identity"], Identity("1"))])
    server.start()
    with connected(dead) as client:
        assert client.call(v1.ProbeRequest()).ready.value
    server.stop(1)
