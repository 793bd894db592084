"""An API server and a client of it."""

import pytest

from csi_vduse.kube.api import at
from tests.unit.fakes.kubernetes_api import fake_api


@pytest.fixture
async def server():
    async with fake_api() as running:
        yield running


@pytest.fixture
async def api(server):
    client = at(server.url)
    yield client
    await client.close()
