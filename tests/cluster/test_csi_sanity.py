"""csi-sanity, the tests that CSI has for drivers, against ours as a process over a real bucket."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fuse import mountpoint
from tests.cluster.binaries import NotBuilt, binary
from tests.driver.requests import Kubelet
from tests.driver.test_program import running
from tests.support.s3 import S3Server

PAGE = Path(__file__).parents[2] / "docs" / "csi.md"

pytestmark = [
    pytest.mark.skipif(bool(mountpoint.obstacle()), reason=mountpoint.obstacle() or "-"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make bind mounts"),
]


def test_csi_sanity(tmp_path: Path, versitygw: S3Server) -> None:
    """No failure; and the page says of each test that is skipped why."""
    try:
        program = binary("csi-sanity")
    except NotBuilt as error:
        pytest.skip(str(error))
    kubelet, report = Kubelet(tmp_path / "kubelet").make(), tmp_path / "report.json"
    uri = versitygw.make_bucket("csi-sanity")
    versitygw.put("csi-sanity", "train/file", b"content")
    parameters = {"uri": f"{uri}/train", "endpoint": versitygw.endpoint, "rw": "true"}
    secrets = {"NodeStageVolumeSecret": dict(versitygw.environment)}
    # JSON is YAML.
    (tmp_path / "parameters").write_text(json.dumps(parameters))
    (tmp_path / "secrets").write_text(json.dumps(secrets))
    environment = {
        "DATACACHE_RUNTIME": str(tmp_path / "run"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    with running(kubelet, environment=environment) as driver:
        done = subprocess.run(
            [
                program,
                f"-csi.endpoint={driver.socket}",
                f"-csi.stagingdir={kubelet.root / 'staging'}",
                f"-csi.mountdir={kubelet.root / 'mount'}",
                f"-csi.testvolumeparameters={tmp_path / 'parameters'}",
                f"-csi.secrets={tmp_path / 'secrets'}",
                f"-ginkgo.json-report={report}",
                "-ginkgo.no-color",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        log = driver.log.read_text()
    assert done.returncode == 0, done.stdout
    specs = json.loads(report.read_text())[0]["SpecReports"]
    found = Counter(spec["State"] for spec in specs if spec["LeafNodeType"] == "It")
    assert found["passed"] >= 36, found
    assert set(found) <= {"passed", "skipped", "pending"}
    page = PAGE.read_text()
    for spec in specs:
        if spec["State"] == "skipped":
            why = spec["Failure"]["Message"]
            assert f"| {why} |" in page, f"{spec['LeafNodeText']}: {why}"
    assert versitygw.environment["AWS_SECRET_ACCESS_KEY"] not in log
    left = [m for m in mountpoint.mounts() if m.startswith(str(kubelet.root))]
    assert not left
