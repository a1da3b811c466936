"""Tests on a real control plane: one for all of them, as it takes five seconds to start."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.binaries import NotBuilt
from tests.cluster.debian import NoPackages
from tests.cluster.node import Node, node
from tests.cluster.plane import ControlPlane, control_plane
from tests.support.short import tmp_path as tmp_path

_HERE = Path(__file__).parent
# kopf closes its watches over TLS and does not wait until the API server has agreed, which a busy machine
# makes visible. The connections end with the event loop.
_LATE = [f"ignore:unclosed {what}:ResourceWarning" for what in ("transport", "<socket")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(600))  # the first test starts the control plane
            item.add_marker(pytest.mark.filterwarnings(*_LATE))


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(control_plane(tmp_path_factory.mktemp("plane", numbered=False)))
        except NotBuilt as error:  # `make test-cluster` builds first
            pytest.skip(str(error))
        yield running


@pytest.fixture
def real(plane: ControlPlane, tmp_path: Path) -> Iterator[Node]:
    """A real node of the plane, of one test."""
    with contextlib.ExitStack() as running:
        try:
            made = running.enter_context(node(plane, tmp_path / "node"))
        except NoPackages as error:
            pytest.skip(str(error))
        yield made
        plane.kubectl("delete", "node", made.name)
