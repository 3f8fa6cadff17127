"""The cluster that the tests share: the one of this checkout when it runs, else one brought up by the same code as
`make up` and taken down at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e import model, product, up
from e2e.cluster import rig
from e2e.cluster.place import Place, this_place
from e2e.kube import HANG_S, Kube
from e2e.steps import Progress, StepError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test here may wait for several things, each for as long as `HANG_S`."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(4 * HANG_S))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Place]:
    """The rig with operator and gateway on it and the model in the claim `models`."""
    os.umask(0o022)
    place = this_place()
    try:
        made = up.everything(place, Progress())
        up.write_environment(place, up.rig_target(place))
    except StepError as error:
        pytest.exit(error.report(), returncode=1)
    yield place
    if made:
        rig.down(place)


@pytest.fixture(scope="session")
def kube(cluster: Place) -> Kube:
    """kubectl as admin."""
    return Kube(str(cluster.programs / "kubectl"), cluster.kubeconfig)


@pytest.fixture(scope="session")
def gateway_url(cluster: Place) -> str:
    """The gateway from the host."""
    return cluster.gateway_url


@pytest.fixture(scope="session")
def model_path(cluster: Place) -> str:
    """The example model on the host."""
    return str(model.path_of(cluster))


@pytest.fixture(scope="session")
def system_namespace() -> str:
    """Where operator and gateway run."""
    return product.NAMESPACE
