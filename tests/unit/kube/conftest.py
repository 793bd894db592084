"""An API server and a client of it."""

import pytest
import structlog

from csi_vduse.kube.api import at
from tests.unit.fakes.kubernetes_api import fake_api


@pytest.fixture(autouse=True)
def _logging():
    """`main` sets up logging for its process, to a standard error that here ends with the test."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
async def server():
    async with fake_api() as running:
        yield running


@pytest.fixture
async def api(server):
    client = at(server.url)
    yield client
    await client.close()
