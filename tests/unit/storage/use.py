"""What the tests of the storage server do as its controller and its nodes."""

import asyncio
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from csi_vduse.storage.config import Address, ServerConfig
from csi_vduse.storage.model import Key, Kind
from tests.unit.storage.nbd_client import NbdClient

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = bytes(range(256)) * 16


def config_in(folder: Path, directory: str, **changes: Any) -> ServerConfig:
    """A storage server whose sockets and images, in this directory, are in a folder; the directory is made."""
    (folder / directory).mkdir()
    made = ServerConfig(
        directory=folder / directory,
        run_dir=folder / "run",
        control=Address(path=folder / "control.sock"),
        nbd=Address(path=folder / "nbd.sock"),
    )
    return replace(made, **changes)


clients: list[NbdClient] = []  # closed after each test


def volume(name):
    return Key(Kind.VOLUME, name)


def snapshot(name):
    return Key(Kind.SNAPSHOT, name)


async def connect(uri):
    clients.append(await asyncio.to_thread(NbdClient, uri))
    return clients[-1]


async def publish(server, name="v1", node="a", **manner):
    return await server.publish(name, node, **{"read_only": False, "shared": False, **manner})


async def write(server, data=BLOCK, at=MIB, name="v1", node="a"):
    """Write a block through a node's export and take the volume back from it."""
    client = await connect((await publish(server, name, node)).uri)
    client.write(at, data)
    client.flush()
    client.close()
    await server.unpublish(name, node)


async def content(server, name, at=MIB, length=4096):
    client = await connect((await publish(server, name, "reader")).uri)
    try:
        return client.read(at, length)
    finally:
        client.close()
        await server.unpublish(name, "reader")


def check_images(config):
    """qemu-img finds nothing wrong with any image."""
    for path in config.directory.glob("*/*/image.qcow2"):
        subprocess.run(["qemu-img", "check", "-q", str(path)], check=True, timeout=60)
