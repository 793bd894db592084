"""A node has its export renewed: what came through the old one is over, and who asks late closes nothing."""

import asyncio
import json
import os
import signal

import pytest

from csi_vduse.errors import NotFound, Unavailable
from csi_vduse.storage import block
from csi_vduse.storage.model import Format
from tests.unit.fakes.held_disk import HeldDisk
from tests.unit.storage.conftest import started
from tests.unit.storage.nbd_client import WRITE, CutOff, Refused
from tests.unit.storage.test_storage_restarts import until_served
from tests.unit.storage.use import BLOCK, SIZE, connect, publish

OTHER = bytes(reversed(BLOCK))


async def test_the_old_export_is_gone_for_good_and_the_node_is_known_as_before(server):
    await server.create("v1", SIZE)
    published = await publish(server)
    old = await connect(published.uri)
    old.write(0, BLOCK)
    renewed = await server.renew(published.export, published.export)
    assert renewed.epoch == published.epoch + 1
    with pytest.raises(CutOff):
        old.write(0, bytes(len(BLOCK)))
    with pytest.raises(Refused):
        await connect(published.uri)
    new = await connect(renewed.uri)
    assert new.read(0, len(BLOCK)) == BLOCK
    assert await publish(server) == published
    assert new.read(0, len(BLOCK)) == BLOCK, "publishing again has cut the node off"
    await server.unpublish("v1", "a")
    with pytest.raises(CutOff):
        new.write(0, bytes(len(BLOCK)))
    assert (await publish(server)).epoch == renewed.epoch + 1


async def test_a_request_that_comes_again_or_late_cuts_nobody_off(server):
    await server.create("v1", SIZE)
    published = await publish(server)
    second = await server.renew(published.export, published.export)
    assert await server.renew(published.export, published.export) == second
    third = await server.renew(published.export, second.export)
    node = await connect(third.uri)
    for late in (published.export, second.export, ""):
        assert await server.renew(published.export, late) == third
    node.write(0, BLOCK)


async def test_each_node_has_its_own_renewed(server):
    await server.create("v1", SIZE)
    source = await publish(server, node="a", shared=True)
    target = await publish(server, node="b", shared=True)
    there = await connect(target.uri)
    renewed = await server.renew(source.export, source.export)
    assert renewed.epoch == target.epoch + 1
    there.write(0, BLOCK)
    (await connect(renewed.uri)).write(0, BLOCK)


async def test_who_does_not_know_the_name_that_was_given_is_told_nothing(server):
    await server.create("v1", SIZE)
    published = await publish(server)
    renewed = await server.renew(published.export, published.export)
    for wrong in ("v1.1.0000000000000000", renewed.export, "v2.1.0000000000000000"):
        with pytest.raises(NotFound):
            await server.renew(wrong, "")
    await server.unpublish("v1")
    await publish(server)
    with pytest.raises(NotFound, match="not published under this name") as caught:
        await server.renew(published.export, renewed.export)
    assert "unstage" in caught.value.hint


async def leave_a_write_on(server, disk):
    """Publish the volume v1 over a disk that holds one write of its node; returns what was published, and the node."""
    await server.create("v1", SIZE)
    node = {"driver": "nbd", "node-name": "v-v1", "server": {"type": "unix", "path": str(disk.path)}}
    await server._core.block.qmp.execute("blockdev-add", node)
    server._core.block.nodes.add("v-v1")
    published = await publish(server)
    dead = await connect(published.uri)
    dead.submit(WRITE, 0, len(BLOCK), BLOCK)
    await asyncio.to_thread(disk.holds.wait, 30)
    return published, dead


async def test_a_write_that_a_dead_worker_left_in_flight_is_never_done_after_its_successors(server, tmp_path):
    with HeldDisk(tmp_path / "disk.sock", SIZE, BLOCK) as disk:
        published, dead = await leave_a_write_on(server, disk)
        dead.close()
        renewing = asyncio.create_task(server.renew(published.export, published.export))
        _, waits = await asyncio.wait({renewing}, timeout=1)
        if not waits:
            (await connect(renewing.result().uri)).write(0, OTHER)
        disk.release()
        if waits:
            (await connect((await renewing).uri)).write(0, OTHER)
        await asyncio.sleep(0.5)
        assert disk.content(len(BLOCK)) == OTHER
        await server.unpublish("v1")


async def test_while_something_is_in_flight_the_next_export_is_not_served_and_a_retry_goes_on(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(block, "DRAIN_TIMEOUT_S", 0.2)
    with HeldDisk(tmp_path / "disk.sock", SIZE, BLOCK) as disk:
        published, _ = await leave_a_write_on(server, disk)
        for again in (
            lambda: server.renew(published.export, published.export),
            lambda: server.renew(published.export, ""),
            lambda: publish(server),
        ):
            with pytest.raises(Unavailable, match="still in flight"):
                await again()
        (recorded,) = (await server.volumes())[0].publications
        with pytest.raises(Refused):
            await connect(published.uri.replace(published.export, recorded.served))
        disk.release()
        renewed = await server.renew(published.export, published.export)
        assert renewed.export == recorded.served
        (await connect(renewed.uri)).write(0, OTHER)
        await server.unpublish("v1")


async def test_a_volume_that_was_renewed_grows_and_its_node_comes_back(server):
    await server.create("v1", SIZE)
    published = await publish(server)
    renewed = await server.renew(published.export, published.export)
    await server.expand("v1", 2 * SIZE)
    assert (await connect(renewed.uri)).size_bytes == 2 * SIZE
    with pytest.raises(Refused):
        await connect(published.uri)


async def test_a_killed_daemon_comes_back_with_what_was_renewed(server):
    await server.create("v1", SIZE)
    published = await publish(server)
    renewed = await server.renew(published.export, published.export)
    pid = server.daemon_pid
    os.kill(pid, signal.SIGKILL)
    await until_served(server, pid)
    (await connect(renewed.uri)).write(0, BLOCK)
    with pytest.raises(Refused):
        await connect(published.uri)


class Killed(BaseException):
    """The process is gone: nobody catches this."""


class Life:
    """Counts the steps of a renewal, and ends before or after one of them."""

    def __init__(self, server, fatal, *, after):
        self.steps = 0
        self.fatal, self._after = fatal, after
        store, daemon = server._core.store, server._core.block
        save = store.save

        def counted_save(image):
            fatal = self._begin()
            save(image)
            self._end(fatal=fatal)

        store.save = counted_save
        for name in ("remove_export", "add_export"):
            setattr(daemon, name, self._counted(getattr(daemon, name)))

    def _counted(self, act):
        async def counted(*args, **named):
            fatal = self._begin()
            await act(*args, **named)
            self._end(fatal=fatal)

        return counted

    def _begin(self):
        self.steps += 1
        fatal = self.steps == self.fatal
        if fatal and not self._after:
            raise Killed
        return fatal

    def _end(self, *, fatal):
        if fatal:
            raise Killed


@pytest.mark.parametrize("image_format", [Format.RAW], indirect=True)
@pytest.mark.parametrize("daemon_dies", [False, True], ids=["daemon lives", "daemon dies"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_killed_at_any_step_one_export_is_served_afterwards_and_the_retry_has_it(
    server, daemon_dies, after
):
    fatal, was_killed = 0, True
    while was_killed:
        fatal += 1
        name = f"v{fatal}"
        await server.create(name, SIZE)
        published = await publish(server, name)
        old = await connect(published.uri)
        old.write(0, BLOCK)
        life = Life(server, fatal, after=after)
        try:
            await server.renew(published.export, published.export)
        except Killed:
            pass
        else:
            was_killed = False
        steps, life.fatal = life.steps, 0
        pid = server.daemon_pid
        if daemon_dies:
            os.kill(pid, signal.SIGKILL)
            await until_served(server, pid)
        else:  # as the next storage server does, which knows the records only
            await server._publications.recover(server._core.block.qmp, fresh=False)
        assert await publish(server, name) == published
        renewed = await server.renew(published.export, published.export)
        with pytest.raises(CutOff):
            old.write(0, bytes(len(BLOCK)))
        seen = await server._core.block.observe()
        assert [one for one in seen.exports if one.startswith(f"{name}.")] == [renewed.export]
        new = await connect(renewed.uri)
        new.write(0, OTHER)
        assert await server.renew(published.export, published.export) == renewed
        new.write(0, OTHER)
        await server.unpublish(name)
    assert steps >= 4


async def test_a_publication_that_an_earlier_release_recorded_is_served_and_can_be_renewed(config):
    async with started(config) as server:
        await server.create("v1", SIZE)
        published = await publish(server)
    (path,) = config.directory.glob("volumes/v1/record.json")
    record = json.loads(path.read_text())
    (publication,) = record["publications"]
    for field in ("served", "served_epoch", "replaced"):
        del publication[field]
    path.write_text(json.dumps(record))
    async with started(config) as server:
        assert await publish(server) == published
        (await connect(published.uri)).close()
        renewed = await server.renew(published.export, published.export)
        (await connect(renewed.uri)).close()
