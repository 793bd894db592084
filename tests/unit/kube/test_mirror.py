"""The copy of the API's objects: nothing is missed, whatever the server does in between."""

import asyncio

import pytest

from csi_vduse.errors import DeadlineExceeded
from csi_vduse.kube import mirror as mirror_module
from csi_vduse.kube.mirror import Mirror, mirroring
from csi_vduse.kube.resources import VOLUMES

TIMEOUT_S = 30.0


def volume(name, node="n1", **spec):
    return {"metadata": {"name": name}, "spec": {"nodeName": node, **spec}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(mirror_module, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(mirror_module, "_MAX_DELAY_S", 0.05)


async def until(mirror, name, done):
    return await mirror.wait_for(name, done, timeout_s=TIMEOUT_S, what="the test's change")


async def test_it_lists_in_pages_and_follows(api, server, monkeypatch):
    monkeypatch.setattr("csi_vduse.kube.api._PAGE", 2)
    for name in ("a", "b", "c", "d", "e"):
        await api.create(VOLUMES, volume(name))
    mirror = Mirror(api, VOLUMES)
    async with mirroring(mirror):
        await mirror.wait_synced()
        assert sorted(found["metadata"]["name"] for found in mirror.all()) == ["a", "b", "c", "d", "e"]
        await api.create(VOLUMES, volume("f"))
        await until(mirror, "f", bool)
        await api.delete(VOLUMES, "a")
        await until(mirror, "a", lambda found: found is None)


async def test_changes_while_the_server_was_away_are_seen_when_it_is_back(api, server):
    await api.create(VOLUMES, volume("a"))
    await api.create(VOLUMES, volume("b"))
    mirror = Mirror(api, VOLUMES)
    async with mirroring(mirror):
        await until(mirror, "a", bool)
        await server.go_away()
        await server.set_status(VOLUMES.named("a"), state="Ready")
        server.forget_history()
        server.away = False
        seen = await until(mirror, "a", lambda found: found.get("status", {}).get("state") == "Ready")
        assert seen["metadata"]["name"] == "a"
        assert mirror.get("b") is not None


async def test_a_version_that_the_server_forgot_is_listed_again(api, server):
    await api.create(VOLUMES, volume("a"))
    mirror = Mirror(api, VOLUMES)
    async with mirroring(mirror):
        await until(mirror, "a", bool)
        server.forget_history()
        for task in list(server._watchers):
            task.cancel()  # the watch ends; its version is too old for a new one
        await api.create(VOLUMES, volume("b"))
        await until(mirror, "b", bool)


async def test_only_the_objects_of_the_selector_are_held(api):
    await api.create(VOLUMES, volume("a", node="n1"))
    await api.create(VOLUMES, volume("b", node="n2"))
    mirror = Mirror(api, VOLUMES, "spec.nodeName=n1")
    async with mirroring(mirror):
        await until(mirror, "a", bool)
        await api.create(VOLUMES, volume("c", node="n2"))
        await api.create(VOLUMES, volume("d", node="n1"))
        await until(mirror, "d", bool)
        assert mirror.get("b") is None
        assert mirror.get("c") is None


async def test_listeners_hear_of_every_change(api):
    heard = asyncio.Queue()
    mirror = Mirror(api, VOLUMES)
    mirror.listen(heard.put_nowait)
    async with mirroring(mirror):
        await mirror.wait_synced()
        await api.create(VOLUMES, volume("a"))
        assert await asyncio.wait_for(heard.get(), TIMEOUT_S) == "a"
        await api.delete(VOLUMES, "a")
        assert await asyncio.wait_for(heard.get(), TIMEOUT_S) == "a"


async def test_waiting_in_vain_ends_with_what_was_waited_for(api):
    mirror = Mirror(api, VOLUMES)
    async with mirroring(mirror):
        await mirror.wait_synced()
        with pytest.raises(DeadlineExceeded, match="volume a"):
            await mirror.wait_for("a", bool, timeout_s=0.05, what="volume a")
