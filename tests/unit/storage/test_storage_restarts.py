"""The storage server, or its daemon, ends and comes back."""

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from csi_vduse.errors import DataLoss, FailedPrecondition, Unavailable
from csi_vduse.storage import block, qmp
from tests.unit.processes import is_alive
from tests.unit.storage.conftest import started
from tests.unit.storage.nbd_client import Refused
from tests.unit.storage.use import BLOCK, MIB, SIZE, check_images, connect, publish, volume


async def until_served(server, old_pid):
    """Wait for another daemon than `old_pid` that has its exports."""
    async with asyncio.timeout(120):
        while server.daemon_pid in {0, old_pid}:
            await asyncio.sleep(0.05)


async def test_a_killed_daemon_comes_back_with_the_same_exports(server, config):
    await server.create("v1", SIZE)
    await server.create("v2", SIZE)
    gone = await publish(server, "v2", "b")
    await server.unpublish("v2", "b")
    published = await publish(server)
    client = await connect(published.uri)
    client.write(MIB, BLOCK)
    client.flush()
    pid = server.daemon_pid
    os.kill(pid, signal.SIGKILL)
    await until_served(server, pid)
    assert await publish(server) == published
    back = await connect(published.uri)
    assert back.read(MIB, len(BLOCK)) == BLOCK
    back.write(2 * MIB, BLOCK)
    back.close()
    with pytest.raises(Refused):
        await connect(gone.uri)
    await server.unpublish("v1")
    check_images(config)


async def test_calls_while_the_daemon_is_away_are_unavailable_at_once(server):
    await server.create("v1", SIZE)
    pid = server.daemon_pid
    os.kill(pid, signal.SIGKILL)
    await server._core.block.qmp.gone.wait()
    begun_s = time.monotonic()
    with pytest.raises(Unavailable):
        await publish(server)
    assert time.monotonic() - begun_s < 5
    await until_served(server, pid)
    await publish(server)


async def test_a_storage_server_that_was_killed_finds_its_daemon_serving(config):
    """The first server is let go of as a kill would: without a word to the daemon."""
    first = started(config)
    server = await first.__aenter__()
    await server.create("v1", SIZE)
    await server.create("v2", SIZE)
    published = await publish(server)
    stale = await publish(server, "v2", "b")
    client = await connect(published.uri)
    client.write(MIB, BLOCK)
    pid = server.daemon_pid
    await _abandon(server)
    # Killed between the record and the act: the export is there, its publication has been taken back.
    image = server._core.store.find(volume("v2"))
    server._core.store.save(type(image)(image.key, image.format, image.size_bytes, image.epoch))
    async with started(config) as second:
        assert second.daemon_pid == pid
        assert client.read(MIB, len(BLOCK)) == BLOCK, "the client was cut off"
        with pytest.raises(Refused):
            await connect(stale.uri)
        assert await publish(second) == published
        await second.unpublish("v1")
    await first.__aexit__(None, None, None)


async def _abandon(server):
    """As its death would: nobody supervises the daemon, nobody has the directory."""
    server._daemon._supervision.cancel()
    await server._daemon._qmp.close()
    fcntl.flock(next(_lock_fds(server)), fcntl.LOCK_UN)


def _lock_fds(server):
    path = str(server._core.config.directory / ".lock")
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()) == path:
                yield int(link.name)


async def test_a_daemon_with_other_options_is_replaced(config, tmp_path):
    first = started(config)
    server = await first.__aenter__()
    await server.create("v1", SIZE)
    await publish(server)
    pid = server.daemon_pid
    await _abandon(server)
    moved = type(config)(**{**vars(config), "nbd": type(config.nbd)(path=tmp_path / "other.sock")})
    async with started(moved) as second:
        assert second.daemon_pid != pid
        client = await connect((await publish(second)).uri)
        assert client.size_bytes == SIZE
        client.close()
    await first.__aexit__(None, None, None)


async def test_a_directory_has_one_storage_server(server, config):
    with pytest.raises(FailedPrecondition, match="another storage server"):
        async with started(config):
            pass


async def test_a_missing_directory_is_not_made(config):
    config.directory.rmdir()
    with pytest.raises(FailedPrecondition, match="not a directory"):
        async with started(config):
            pass
    assert not config.directory.exists()


async def test_an_image_that_is_damaged_does_not_keep_others_away(config):
    async with started(config) as server:
        for name in ("v1", "v2"):
            await server.create(name, SIZE)
            await publish(server, name)
    image = next(config.directory.glob("volumes/v1/image.*"))
    image.rename(image.with_name("elsewhere"))
    async with started(config) as server:
        (await connect((await publish(server, "v2")).uri)).close()
        with pytest.raises(DataLoss):
            await publish(server, "v1")
        image.with_name("elsewhere").rename(image)
        (await connect((await publish(server, "v1")).uri)).close()


async def test_what_interrupted_calls_left_is_removed_at_start(config):
    left = config.directory / "volumes/v1.0123.tmp"
    left.mkdir(parents=True)
    (left / "image.raw").touch()
    async with started(config) as server:
        assert not left.exists()
        assert [image.key.id for image in await server.volumes()] == []


async def test_a_daemon_that_does_not_answer_is_killed_before_another_is_started(config, monkeypatch):
    running = started(config)
    server = await running.__aenter__()
    await server.create("v1", SIZE)
    published = await publish(server)
    pid = server.daemon_pid
    await _abandon(server)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(qmp, "_CONNECT_TIMEOUT_S", 0.5)
    async with started(config) as second:
        assert second.daemon_pid != pid
        assert not is_alive(pid)
        assert await publish(second) == published


async def test_a_daemon_is_not_left_behind_by_a_server_that_ends_while_it_comes_up(config):
    async with started(config) as server:
        pid = server.daemon_pid
        given = asyncio.Queue()

        async def never_done(qmp, fresh):
            await given.put(qmp.pid)
            await asyncio.Event().wait()

        server._daemon._recover = never_done
        os.kill(pid, signal.SIGKILL)
        second = await given.get()
        assert is_alive(second)
    assert not is_alive(second)


async def test_a_directory_without_a_record_and_a_damaged_record_do_not_keep_others_away(config):
    async with started(config) as server:
        for name in ("v1", "v2"):
            await server.create(name, SIZE)
            await publish(server, name)
    (config.directory / "volumes/old").mkdir()
    (config.directory / "volumes/v1/record.json").write_text("{")
    async with started(config) as server:
        assert [image.key.id for image in await server.volumes()] == ["v2"]
        (await connect((await publish(server, "v2")).uri)).close()
        with pytest.raises(DataLoss):
            await publish(server, "v1")


async def test_what_a_stalled_daemon_does_late_is_found(server, monkeypatch):
    await server.create("v1", SIZE)
    await server.create("v2", SIZE)
    await publish(server, "v2")
    with monkeypatch.context() as impatient:
        impatient.setattr(block, "_OPEN_TIMEOUT_S", 0.3)
        impatient.setitem(qmp.Qmp.execute.__kwdefaults__, "timeout_s", 2.0)
        os.kill(server.daemon_pid, signal.SIGSTOP)
        try:
            for call in (publish(server), server.unpublish("v2")):
                with pytest.raises(Unavailable):
                    async with asyncio.timeout(60):
                        await call
        finally:
            os.kill(server.daemon_pid, signal.SIGCONT)
    (await connect((await publish(server)).uri)).close()
    for name in ("v1", "v2"):
        await server.unpublish(name)
        await server.delete(volume(name))


async def test_a_copy_that_began_late_is_ended_before_its_source_is_given_up(server, monkeypatch):
    await server.create("v1", SIZE)
    begin = server._core.block.qmp.execute

    async def mirror_is_late(command, *arguments, **more):
        answer = await begin(command, *arguments, **more)
        if command == "blockdev-mirror":
            raise Unavailable("it did not answer in time")
        return answer

    monkeypatch.setattr(server._core.block.qmp, "execute", mirror_is_late)
    with pytest.raises(Unavailable):
        await server.copy(volume("v1"), volume("v2"), SIZE, timeout_s=60)
    await server.delete(volume("v1"))
    seen = await server._core.block.observe()
    assert (seen.jobs, seen.nodes) == (frozenset(), frozenset())
