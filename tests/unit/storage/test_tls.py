"""TLS on both ports: who has no certificate, a foreign one, or a node's, gets nowhere or not everywhere."""

import asyncio
import contextlib
import socket
import ssl

import pytest

from csi_vduse.agent.renewal import current, renewed
from csi_vduse.dataplane.backend_spec import NbdBackend, NbdTls
from csi_vduse.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable
from csi_vduse.storage.client import StorageClient
from csi_vduse.storage.config import CONTROLLER_NAME, Address, ServerConfig, Tls
from csi_vduse.storage.server import StorageServer
from csi_vduse.storage.service import listening
from tests.unit.storage.certificates import Authority
from tests.unit.storage.nbd_client import NbdClient, Refused, tls_context

SIZE = 1 << 20


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def directories(authority):
    return {
        "server": authority.issue("server", "storage"),
        "controller": authority.issue("client", CONTROLLER_NAME),
        "node": authority.issue("client", "node-1"),
        "other": authority.issue("client", "guest"),
    }


@pytest.fixture
async def address(tmp_path, directories):
    """A running server's control address."""
    (tmp_path / "pool").mkdir()
    config = ServerConfig(
        directory=tmp_path / "pool",
        run_dir=tmp_path / "run",
        control=Address("127.0.0.1", free_port()),
        nbd=Address("127.0.0.1", free_port()),
        tls=Tls(directories["server"], nodes=("CN=node-*",)),
    )
    server = StorageServer(config)
    async with server.running(), listening(config, server):
        yield config.control


@contextlib.asynccontextmanager
async def client(address, directory):
    client = StorageClient(address, directory, ask_timeout_s=30)
    try:
        yield client
    finally:
        await client.close()


async def published(address, directories):
    async with client(address, directories["controller"]) as controller:
        await controller.create("v1", SIZE)
        return (await controller.publish("v1", "node-1", read_only=False, shared=False)).uri


async def test_a_node_with_its_certificate_reads_and_writes(address, directories):
    uri = await published(address, directories)
    assert uri.startswith("nbds://127.0.0.1:")
    node = await asyncio.to_thread(NbdClient, uri, tls_context(directories["node"]))
    node.write(0, b"over tls" * 64)
    assert node.read(0, 512) == b"over tls" * 64
    node.close()


async def test_who_is_not_named_does_not_get_in(address, directories):
    uri = await published(address, directories)
    with pytest.raises(Refused):
        await asyncio.to_thread(_use, uri, tls_context(directories["other"]))


async def test_without_a_certificate_or_with_a_foreign_one_nobody_gets_in(address, directories, tmp_path):
    uri = await published(address, directories)
    without = ssl.create_default_context(cafile=directories["node"] / "ca-cert.pem")
    foreign = Authority(tmp_path / "foreign", "foreign").issue("client", "node-1")
    stranger = ssl.create_default_context(cafile=directories["node"] / "ca-cert.pem")
    stranger.load_cert_chain(foreign / "client-cert.pem", foreign / "client-key.pem")
    for context in (without, stranger):
        with pytest.raises((Refused, OSError)):
            await asyncio.to_thread(_use, uri, context)
    with pytest.raises(Refused):
        await asyncio.to_thread(_use, uri.replace("nbds:", "nbd:"), None)


def _use(uri, context):
    """With TLS 1.3 a server refuses a client after the client's handshake: at what it asks for first."""
    client = NbdClient(uri, context)
    try:
        client.read(0, 512)
    finally:
        client.close()


async def test_a_node_gives_no_orders(address, directories):
    async with client(address, directories["node"]) as node:
        with pytest.raises(PermissionDenied, match="node-1"):
            await node.unpublish("v1")


async def test_a_node_has_its_own_export_renewed_by_the_name_that_only_it_was_told(address, directories):
    uri, tls = await published(address, directories), NbdTls(certificates=directories["node"])
    told = NbdBackend(uri, tls, control=str(address))
    served = await renewed(told, None)
    assert await current(told) == served
    with pytest.raises(Refused):
        await asyncio.to_thread(NbdClient, uri, tls_context(directories["node"]))
    node = await asyncio.to_thread(NbdClient, served.uri, tls_context(directories["node"]))
    with pytest.raises(NotFound):  # what the NBD server lists to everybody is no right to ask
        await renewed(served, None)
    node.write(0, b"mine" * 128)
    node.close()


async def test_who_cannot_show_a_certificate_has_nothing_renewed(address, directories, tmp_path):
    uri = await published(address, directories)
    foreign = Authority(tmp_path / "foreign", "foreign").issue("client", "node-1")
    for told, refusal in (
        (NbdBackend(uri, NbdTls(certificates=foreign), control=str(address)), Unavailable),
        (NbdBackend(uri, NbdTls(certificates=tmp_path), control=str(address)), FailedPrecondition),
        (NbdBackend(uri.replace("nbds:", "nbd:"), control=str(address)), Unavailable),
    ):
        with pytest.raises(refusal):
            await renewed(told, None)
    (await asyncio.to_thread(NbdClient, uri, tls_context(directories["node"]))).close()


async def test_who_does_not_speak_tls_gives_no_orders(address):
    async with client(address, None) as plain:
        with pytest.raises(Unavailable):
            await plain.pool_id()
