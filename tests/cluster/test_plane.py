"""The control plane that the other tests trust: it is whole, it ends, and it says why it does not start."""

import os
import socket
from pathlib import Path

import pytest

from tests.cluster import plane as module
from tests.cluster.plane import ControlPlane, PlaneFailed, control_plane, wait_until


def _running_below(directory: Path) -> list[int]:
    """Processes whose working directory lies there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                cwd = Path(os.readlink(entry / "cwd"))
            except OSError:
                continue
            if cwd.is_relative_to(directory):
                found.append(int(entry.name))
    return found


def test_a_pod_is_made_by_its_controller_and_waits_for_a_node(plane: ControlPlane) -> None:
    plane.kubectl("create", "deployment", "plane-probe", "--image=local.test/none:1")
    try:

        def unschedulable() -> bool:
            pods = plane.get("pods", "-l", "app=plane-probe")["items"]
            said = [each for pod in pods for each in pod["status"].get("conditions", ())]
            return any(each.get("reason") == "Unschedulable" for each in said)

        wait_until(unschedulable, "the scheduler to say that there is no node")
    finally:
        plane.kubectl("delete", "deployment", "plane-probe", "--wait=false")


def test_who_has_no_rights_is_refused(plane: ControlPlane) -> None:
    assert plane.ask("/api/v1/secrets", token="nobody's")[0] == 401
    assert plane.ask("/api/v1/secrets", token="scheduler-token")[0] == 403


def test_a_plane_ends_with_all_its_processes(tmp_path: Path) -> None:
    with control_plane(tmp_path) as second:
        assert len(_running_below(tmp_path)) == 4
        assert second.ask("/readyz") == (200, "ok")
    assert _running_below(tmp_path) == []
    assert second.ask("/readyz")[0] == 0


def test_a_part_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_identity", lambda pki, user: ["--no-such-flag"])
    why = r"(?s)kube-.* has ended \(exit 1\); .*unknown flag: --no-such-flag"
    with pytest.raises(PlaneFailed, match=why), control_plane(tmp_path):
        pass
    assert _running_below(tmp_path) == []


def test_a_port_that_was_taken_meanwhile_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, taken = module._free_ports, []

    def unlucky(count: int) -> list[int]:
        ports = free(count)
        if not taken:
            probe = socket.socket()
            probe.bind(("127.0.0.1", ports[1]))
            probe.listen()
            taken.append(probe)
        return ports

    monkeypatch.setattr(module, "_free_ports", unlucky)
    try:
        with control_plane(tmp_path) as second:
            assert second.directory.name == "try-2"
    finally:
        taken[0].close()
    assert _running_below(tmp_path) == []
