"""What a worker leaves behind for its node's plugin, and how much of it the plugin believes."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from csi.residents import Register, Resident, Roots
from datacache.cluster import premises
from datacache.cluster.premises import Place, Premises
from datacache.config.parsing import read_settings
from datacache.errors import SettingError
from datacache.kube.manifests import landing_path, settings_text
from datacache.kube.release import Key, Release
from datacache.kube.spec import read_dataset
from datacache.model import GiB, MiB
from tests.conftest import AnnouncedLogs

UID = "0b9f4a4e-7c1e-4d39-9a55-0a2f4b1c9d10"
OTHER = "0b9f4a4e-7c1e-4d39-9a55-0a2f4b1c9d11"


def settings_of(tmp_path: Path, **more: object) -> object:
    given = {
        "uri": ["file:///nowhere"],
        "object": "team/imagenet",
        "state": str(tmp_path / "state" / UID),
        "cache": [
            {"medium": "mem", "path": f"{tmp_path}/mem/{UID}/cache", "quota": "1MiB", "mounted": "true"},
            {"medium": "ssd", "path": f"{tmp_path}/ssd/{UID}/cache", "quota": "2GiB"},
        ],
        "priority": "7",
        **more,
    }
    return read_settings(given, config_file=None, environment={"HOME": "/home/me"})


def roots(tmp_path: Path) -> Roots:
    return Roots(
        str(tmp_path / "state"), str(tmp_path / "run"), (str(tmp_path / "mem"), str(tmp_path / "ssd"))
    )


def residents(tmp_path: Path) -> list[Resident]:
    return Register(roots(tmp_path)).residents()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Tiers, landing zone, priority and name, whole, again at each start."""
    for rw in ("false", "true"):
        settings = settings_of(tmp_path, rw=rw)
        premises.write(settings)  # type: ignore[arg-type]
        found = premises.read(str(tmp_path / "state" / UID))
        assert found == premises.of(settings)  # type: ignore[arg-type]
        assert found is not None and found.object == "team/imagenet" and found.priority == 7
        assert [place.mounted for place in found.places] == [True, False]
        assert found.landing == (str(tmp_path / "state" / UID / "landing") if rw == "true" else "")
    assert os.listdir(tmp_path / "state" / UID) == [premises.NAME]
    assert (tmp_path / "state" / UID / premises.NAME).stat().st_mode & 0o777 == 0o600


def test_a_worker_of_no_object_leaves_nothing(tmp_path: Path) -> None:
    """A mount on a laptop has no plugin."""
    given = {"uri": ["file:///nowhere"], "state": str(tmp_path / "state")}
    premises.write(read_settings(given, config_file=None, environment={"HOME": "/"}))
    assert not (tmp_path / "state").exists()


def test_a_state_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """It is named."""
    (tmp_path / "state").write_text("")
    with pytest.raises(SettingError, match="state"):
        premises.write(settings_of(tmp_path))  # type: ignore[arg-type]


def test_a_resident(tmp_path: Path) -> None:
    """All that is where it must be, is believed."""
    premises.write(settings_of(tmp_path, rw="true"))  # type: ignore[arg-type]
    (found,) = residents(tmp_path)
    assert (found.uid, found.key, found.priority) == (UID, Key("team", "imagenet"), 7)
    assert [place.quota for place in found.places] == [1 * MiB, 2 * GiB]
    assert found.homes == (f"{tmp_path}/mem/{UID}", f"{tmp_path}/ssd/{UID}")
    assert (found.state, found.run) == (f"{tmp_path}/state/{UID}", f"{tmp_path}/run/{UID}")
    assert found.landing == f"{tmp_path}/state/{UID}/landing"


def leave(tmp_path: Path, said: Premises | str, uid: str = UID) -> None:
    state = tmp_path / "state" / uid
    state.mkdir(parents=True, exist_ok=True)
    (state / premises.NAME).write_text(said if isinstance(said, str) else json.dumps(asdict(said)))


@pytest.mark.parametrize(
    "path",
    [
        "{0}/mem/{1}/other", "{0}/mem/{2}/cache", "{0}/elsewhere/{1}/cache", "{0}/mem/../elsewhere/{1}/cache",
        "{0}/mem/{1}/../{1}/cache", "{0}/link/{1}/cache", "{0}/mem//{1}/cache", "mem/{1}/cache",
        "{0}/mem/{1}", "{0}/memory/{1}/cache",
    ],
)  # fmt: skip
def test_a_path_that_is_not_where_it_must_be_is_left_out(
    path: str, tmp_path: Path, logs: AnnouncedLogs
) -> None:
    """Another Dataset's, one outside of the roots, one behind a link: it is neither mounted nor removed, and
    that is said once."""
    logs.expect("left out")
    (tmp_path / "elsewhere" / UID).mkdir(parents=True)
    (tmp_path / "mem").mkdir()
    (tmp_path / "mem" / "link").symlink_to(tmp_path / "elsewhere")
    given = path.format(tmp_path, UID, OTHER).replace("/link/", "/mem/link/")
    good = Place("ssd:y", "ssd", f"{tmp_path}/ssd/{UID}/cache", GiB)
    leave(tmp_path, Premises("a/b", (Place("mem:x", "mem", given, MiB, True), good)))
    register = Register(roots(tmp_path))
    for _ in range(2):
        (found,) = register.residents()
        assert found.places == (good,)
    assert len(logs.messages()) == 1


def test_a_landing_zone_elsewhere_is_left_out(tmp_path: Path, logs: AnnouncedLogs) -> None:
    """It would be removed with the Dataset."""
    logs.expect("left out")
    leave(tmp_path, Premises("a/b", (), landing=f"{tmp_path}/ssd/{OTHER}/landing"))
    assert residents(tmp_path)[0].landing == ""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"object": 1}', "\xff", '{"object": "x", "places": []}']
)
def test_a_file_that_is_none_of_ours(text: str, tmp_path: Path, logs: AnnouncedLogs) -> None:
    """Whose directory it is, is not known: nothing is done with it."""
    logs.expect("left out")
    leave(tmp_path, text)
    assert residents(tmp_path) == []


def test_other_directories_are_nobodys(tmp_path: Path) -> None:
    """Only what has a uid for its name; not even a link that has."""
    leave(tmp_path, Premises("a/b", ()), uid="volumes")
    leave(tmp_path, Premises("a/b", ()))
    (tmp_path / "state" / OTHER).symlink_to(tmp_path / "state" / UID)
    assert [each.uid for each in residents(tmp_path)] == [UID]
    assert Register(Roots(str(tmp_path / "nowhere"))).residents() == []


@pytest.mark.parametrize("landing_tier", ["SSD", "MEM"])
def test_what_the_controller_makes_is_what_the_plugin_believes(landing_tier: str, tmp_path: Path) -> None:
    """A worker with the settings of a Dataset says of each of its directories where it is, and nothing of
    that is left out: tiers, of them those that wait for a tmpfs, the landing zone, and who gives way to
    whom."""
    release = Release(
        namespace="datacache", image="x:1", state_dir=f"{tmp_path}/state", run_dir=f"{tmp_path}/run",
        memory_dir=f"{tmp_path}/mem", disk_dir=f"{tmp_path}/ssd",
        tier_roots=(f"{tmp_path}/mem", f"{tmp_path}/ssd"),
    )  # fmt: skip
    tiers = [
        {"mediumtype": kind, "path": f"{tmp_path}/{path}", "quota": "1Gi"}
        for kind, path in (("MEM", "mem/a"), ("SSD", "ssd/b"))
        if kind in ("MEM", landing_tier)
    ]
    obj = {
        "metadata": {"name": "imagenet", "namespace": "team", "uid": UID, "generation": 1},
        "spec": {
            "mounts": [{"mountPoint": "s3://bucket", "options": {"anonymous": "true"}}],
            "accessModes": ["ReadWriteMany"],
            "tieredstore": {"levels": tiers, "priority": -3},
        },
    }
    of = read_dataset(obj, release)
    (config := tmp_path / "datacache.yaml").write_text(settings_text(of, release))
    premises.write(read_settings({}, config_file=str(config), environment={"HOME": "/"}))
    (found,) = residents(tmp_path)
    assert (found.uid, found.key, found.priority) == (UID, Key("team", "imagenet"), -3)
    assert [(place.medium, place.mounted) for place in found.places] == [
        (tier["mediumtype"].lower(), tier["mediumtype"] == "MEM") for tier in tiers
    ]
    assert found.landing == f"{landing_path(of, release)}"
    assert found.state == f"{release.state_dir}/{UID}" and found.run == f"{release.run_dir}/{UID}"
