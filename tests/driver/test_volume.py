"""What a request says of a volume: tables."""

import re
from pathlib import Path

import pytest

from csi import volume
from csi.v1 import csi_pb2 as v1
from datacache.errors import NoSuchVolume, SettingError
from tests.driver.requests import MODE, URI, capability

ENVIRONMENT = {"HOME": "/root"}


def settings(context: dict[str, str], *, read_only: bool = False) -> dict[str, str | list[str]]:
    return volume.settings("pv", context, read_only=read_only, environment=ENVIRONMENT)


@pytest.mark.parametrize(
    ("mode", "flags", "asked", "read_only"),
    [
        (MODE.MULTI_NODE_MULTI_WRITER, (), False, False),
        (MODE.SINGLE_NODE_WRITER, ("rw",), False, False),
        (MODE.SINGLE_NODE_READER_ONLY, (), False, True),
        (MODE.MULTI_NODE_READER_ONLY, (), False, True),
        (MODE.MULTI_NODE_MULTI_WRITER, ("ro",), False, True),
        (MODE.MULTI_NODE_MULTI_WRITER, (), True, True),
    ],
)
def test_a_volume_is_read_only_when_any_of_the_three_says_so(
    mode: "MODE.Mode", flags: tuple[str, ...], asked: bool, read_only: bool
) -> None:
    """The access mode, the mount flag `ro`, the request's flag: the last is the pod's, and is often false."""
    assert volume.is_read_only(capability(mode, *flags), asked=asked) is read_only


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (v1.VolumeCapability(), "an access mode"),
        (v1.VolumeCapability(block=v1.VolumeCapability.BlockVolume()), "a data set is a directory"),
        (v1.VolumeCapability(mount=v1.VolumeCapability.MountVolume()), "an access mode"),
        (capability(MODE.SINGLE_NODE_WRITER, "noatime"), "mountOptions: 'noatime'"),
    ],
)
def test_what_a_volume_cannot_be_is_said(wrong: v1.VolumeCapability, says: str) -> None:
    """... in the words of Kubernetes' objects."""
    with pytest.raises(SettingError, match=says):
        volume.check_capability(wrong)


def test_attributes_are_settings() -> None:
    """Lists are divided by `;`, either spelling of a name will do, notes of the kubelet are no attributes."""
    tree = settings(
        {
            "uri": "s3://a/x=/train; oss://b/y=/val",
            "cache": "mem:/dev/shm/x=1GiB;ssd:/var/cache/x=2GiB",
            "block_size": "1MiB",
            "csi.storage.k8s.io/pod.name": "p",
            "storage.kubernetes.io/csiProvisionerIdentity": "i",
        }
    )
    assert tree == {
        "uri": ["s3://a/x=/train", "oss://b/y=/val"],
        "cache": ["mem:/dev/shm/x=1GiB", "ssd:/var/cache/x=2GiB"],
        "block-size": "1MiB",
        "name": "pv",
        "allow-other": "true",
    }


def test_each_volume_has_a_data_set_of_its_own() -> None:
    """Its name becomes that of the cache's directory, which one mount has at a time."""
    one = volume.settings("ns/a", URI, read_only=False, environment=ENVIRONMENT)["name"]
    other = volume.settings("ns/b", URI, read_only=False, environment=ENVIRONMENT)["name"]
    assert one != other
    assert settings({**URI, "name": "mine"})["name"] == "mine"


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({}, "volumeAttributes.uri"),
        ({"uri": "bucket"}, "volumeAttributes.uri: 'bucket' will not do; expected a URI"),
        ({**URI, "ttl": "soon"}, "volumeAttributes.ttl: 'soon' will not do; expected a duration"),
        ({**URI, "tll": "60s"}, "volumeAttributes.tll: '60s' will not do; .* did you mean ttl"),
        ({**URI, "directory": "/etc"}, "volumeAttributes.directory"),
        ({**URI, "allow_other": "false"}, "volumeAttributes.allow_other"),
        ({**URI, "block-size": "1MiB", "block_size": "2MiB"}, "each attribute once"),
        ({**URI, "option": "secret_access_key=x"}, "no secret here"),
        ({**URI, "rw": "true", "snapshot": "s"}, "volumeAttributes.snapshot: .* with rw"),
        ({"namespace": "ns", "dataset": "d", "uid": "u"}, "the controller makes the volume of a Dataset"),
        ({"csi.storage.k8s.io/ephemeral": "true", **URI}, "inline volumes name a Dataset"),
    ],
)
def test_attributes_that_will_not_do_are_named_as_the_user_wrote_them(
    context: dict[str, str], says: str
) -> None:
    """One line: the name, the value, what would be right."""
    with pytest.raises(SettingError, match=says) as caught:
        settings(context)
    assert "--" not in str(caught.value)


def test_a_read_only_volume_is_mounted_without_the_write_path() -> None:
    """Whatever `rw` says; and it is checked all the same."""
    assert settings({**URI, "rw": "true"})["rw"] == "true"
    writable = {**URI, "rw": "true", "landing": "/landing", "upload-delay": "5s"}
    assert settings(writable, read_only=True) == settings(URI)
    with pytest.raises(SettingError, match=r"volumeAttributes.rw: 'yes'"):
        settings({**URI, "rw": "yes"}, read_only=True)


def test_secrets_are_variables_of_stores_clients() -> None:
    """Nothing else is set that way: not what is loaded, nor where settings come from. No value is shown."""
    assert volume.check_secrets({"AWS_SECRET_ACCESS_KEY": "v"}) == {"AWS_SECRET_ACCESS_KEY": "v"}
    for name in (
        "LD_PRELOAD",
        "PYTHONPATH",
        "PATH",
        "DATACACHE_LANDING",
        "HTTPS_PROXY",
        "aws_secret",
        "X\nY",
    ):
        with pytest.raises(SettingError) as caught:
            volume.check_secrets({name: "value-of-it"})
        assert "value-of-it" not in str(caught.value)
    with pytest.raises(SettingError, match="without NUL"):
        volume.check_secrets({"AWS_SECRET_ACCESS_KEY": "a\0b"})


@pytest.mark.parametrize("text", ["", "relative", "/etc/passwd", "/kubelet/../etc", "{root}", "{root}/a\0b"])
def test_a_place_lies_below_the_kubelets_directory(tmp_path: Path, text: str) -> None:
    """Nothing is mounted or removed elsewhere, whoever asks."""
    root = tmp_path / "kubelet"
    root.mkdir()
    with pytest.raises(SettingError, match="target_path"):
        volume.place(text.format(root=root), "target_path", below=str(root))


def test_a_place_is_spelled_as_the_mount_table_spells_it(tmp_path: Path) -> None:
    """The kubelet's directory may be a link; what lies at the end is not followed, since it may hang. A link
    below it that leads out leads nowhere."""
    (tmp_path / "real" / "pods").mkdir(parents=True)
    link = tmp_path / "kubelet"
    link.symlink_to("real")
    assert volume.place(f"{link}/pods/mount/", "p", below=str(link)) == f"{tmp_path}/real/pods/mount"
    (tmp_path / "real" / "out").symlink_to("/etc")
    with pytest.raises(SettingError, match="below"):
        volume.place(f"{link}/out/mount", "p", below=str(link))


@pytest.mark.parametrize("text", ["", "x" * 129, "a\nb"])
def test_the_id_of_a_volume_is_one_line(text: str) -> None:
    """It goes into logs and names of files."""
    with pytest.raises(SettingError, match="volume_id"):
        volume.identity(text)


def test_a_created_volume_is_known_by_its_id() -> None:
    """Whoever is asked, and as often as it is asked: nobody keeps a list."""
    assert volume.created("pvc-1") == volume.created("pvc-1") != volume.created("pvc-2")
    assert len(volume.created("x" * 10_000)) <= volume.MAX_TEXT
    volume.check_exists(volume.created("pvc-1"), {})
    volume.check_exists("static", URI)
    with pytest.raises(NoSuchVolume, match="other"):
        volume.check_exists("other", {})


# ---- volumes of Datasets ---------------------------------------------------------------------------

UID = "0f2a7c1e-3b54-4c63-9e0e-5d0f6f1d2a3b"
OF = {"namespace": "team", "dataset": "pets", "uid": UID}


def test_the_volume_of_a_dataset_says_which() -> None:
    """And is told from one that says what it shows; what the kubelet adds is no attribute."""
    assert volume.dataset("pv", URI) is None
    found = volume.dataset(f"datacache-{UID}", {**OF, "csi.storage.k8s.io/pod.name": "a"})
    assert found == volume.Dataset("team", "pets", UID)
    assert str(found) == "team/pets"
    volume.check_exists(f"datacache-{UID}", OF)


@pytest.mark.parametrize(
    ("changes", "handle", "says"),
    [
        ({"uid": ""}, "datacache-", "volumeAttributes.uid"),
        ({"uid": ".."}, "datacache-..", "the uid of a Dataset"),
        ({"uid": "a/b"}, "datacache-a/b", "the uid of a Dataset"),
        ({"uid": "x" * 65}, "datacache-" + "x" * 65, "the uid of a Dataset"),
        ({"namespace": "../x"}, f"datacache-{UID}", "volumeAttributes.namespace"),
        ({"namespace": ""}, f"datacache-{UID}", "volumeAttributes.namespace"),
        ({"dataset": "A"}, f"datacache-{UID}", "volumeAttributes.dataset"),
        ({"uri": "s3://b"}, f"datacache-{UID}", "volumeAttributes.uri"),
        ({}, "another", f"expected datacache-{UID}"),
        ({"csi.storage.k8s.io/ephemeral": "true"}, f"datacache-{UID}", "inline volumes"),
    ],
)
def test_what_is_no_dataset_is_refused(changes: dict[str, str], handle: str, says: str) -> None:
    """Its uid becomes a path; and only the controller makes such volumes."""
    with pytest.raises(SettingError, match=re.escape(says)):
        volume.dataset(handle, OF | changes)
