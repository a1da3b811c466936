"""Which pods cannot write to what they mount to be written, and what they are told."""

from typing import Any

import pytest

from datacache.config.settings import MountSettings
from datacache.kube.writers import cannot_write

OWNER = MountSettings(uid=1000, gid=2000, file_mode=0o640, dir_mode=0o750)


def pod(
    *, of: Any = None, own: Any = None, volume: Any = None, mount: Any = None, **more: Any
) -> dict[str, Any]:
    container = {"name": "train", "volumeMounts": [{"name": "v", "mountPath": "/data"} | (mount or {})]}
    claim = {"claimName": "data"} | (volume or {})
    return {"spec": {
        "containers": [container | ({"securityContext": own} if own else {})],
        "volumes": [{"name": "v", "persistentVolumeClaim": claim}, {"name": "other", "emptyDir": {}}],
        **({"securityContext": of} if of else {}), **more,
    }}  # fmt: skip


def told(found: dict[str, Any], owner: MountSettings = OWNER) -> str:
    return cannot_write(found, claim="data", dataset="data", owner=owner)


def test_one_that_cannot_is_told_what_would_be_right() -> None:
    assert told(pod(of={"runAsUser": 1234, "runAsGroup": 1234, "fsGroup": 5})) == (
        "container train runs as user 1234 (groups 5, 1234) and cannot write to Dataset data: its files "
        "belong to user 1000 and group 2000, with modes 0640 and 0750; the Dataset needs spec.owner: {uid: "
        "1234}, or the pod runAsUser: 1000"
    )


GROUPS = MountSettings(uid=1000, gid=2000, file_mode=0o660, dir_mode=0o770)
ALL = MountSettings(uid=1000, gid=2000, file_mode=0o666, dir_mode=0o777)
NOBODY = MountSettings(uid=1000, gid=2000, file_mode=0o444, dir_mode=0o555)


@pytest.mark.parametrize(
    ("found", "owner", "can"),
    [
        (pod(of={"runAsUser": 1000}), OWNER, True),
        (pod(of={"runAsUser": 1234, "runAsGroup": 2000}), OWNER, False),
        (pod(of={"runAsUser": 1234, "runAsGroup": 2000}), GROUPS, True),
        (pod(of={"runAsUser": 1234, "runAsGroup": 1, "fsGroup": 2000}), GROUPS, True),
        (pod(of={"runAsUser": 1234, "runAsGroup": 1, "supplementalGroups": [2000]}), GROUPS, True),
        (pod(of={"runAsUser": 1234, "runAsGroup": 1}), GROUPS, False),
        (pod(of={"runAsUser": 1234, "runAsGroup": 1}), ALL, True),
        (pod(of={"runAsUser": 1000}), NOBODY, False),
        (pod(of={"runAsUser": 1000}, own={"runAsUser": 1234, "runAsGroup": 1}), OWNER, False),
        (pod(of={"runAsUser": 1234, "runAsGroup": 1}, own={"runAsUser": 1000}), OWNER, True),
        (pod(of={"runAsUser": 0}), OWNER, True),
        (pod(of={"runAsUser": 0}, own={"capabilities": {"drop": ["ALL"]}}), OWNER, False),
        (pod(of={"runAsUser": 0}, own={"capabilities": {"drop": ["ALL"], "add": ["DAC_OVERRIDE"]}}), OWNER,
         True),
        (pod(of={"runAsUser": 0}, own={"privileged": True}), OWNER, True),
    ],
)  # fmt: skip
def test_who_can_write_is_who_the_kernel_lets(found: Any, owner: MountSettings, can: bool) -> None:
    assert bool(told(found, owner)) is not can


@pytest.mark.parametrize(
    "found",
    [
        pod(),  # as the image says
        pod(of={"runAsNonRoot": True}),
        pod(of={"runAsUser": 1234}, hostUsers=False),
        pod(of={"runAsUser": 1234}, volume={"readOnly": True}),
        pod(of={"runAsUser": 1234}, mount={"readOnly": True}),
        pod(of={"runAsUser": 1234}, mount={"name": "other"}),
        pod(of={"runAsUser": 1234}, volume={"claimName": "another"}),
        {},
        {"spec": None},
    ],
)
def test_who_only_reads_or_does_not_tell_who_he_is_hears_nothing(found: Any) -> None:
    assert told(found) == ""


def test_a_first_group_that_the_image_says_is_not_guessed() -> None:
    assert told(pod(of={"runAsUser": 1234}), GROUPS) == ""
    assert told(pod(of={"runAsUser": 1234}), OWNER) != "", "no group helps here"


def test_modes_that_let_nobody_write_are_what_is_wrong() -> None:
    assert told(pod(of={"runAsUser": 1000}), NOBODY).endswith("the Dataset needs other modes in spec.owner")


def test_a_container_that_begins_the_pod_counts() -> None:
    found = pod(of={"runAsUser": 1000})
    first = {"name": "init", "securityContext": {"runAsUser": 7, "runAsGroup": 7},
             "volumeMounts": [{"name": "v", "mountPath": "/d"}]}  # fmt: skip
    found["spec"]["initContainers"] = [first]
    assert told(found).startswith("container init runs as user 7 (groups 7)")
