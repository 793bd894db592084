"""A volume's limits: set at birth, changed while it is attached, remembered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from csi_vduse.agent.model import AttachSpec
from csi_vduse.dataplane.backend_spec import NullBackend
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import InvalidArgument, NotFound, Unavailable
from csi_vduse.proto import csi_pb2
from csi_vduse.volumes.model import volume_from_json, volume_to_json
from tests.unit.services.stack import MIB, Stack, create_request


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    made = Stack(tmp_path)
    await made.start()
    yield made
    made.close()


async def modify(stack: Stack, volume_id: str, **parameters: str) -> None:
    request = csi_pb2.ControllerModifyVolumeRequest(volume_id=volume_id, mutable_parameters=parameters)
    await stack.controller.ControllerModifyVolume(request, None)


async def throttle_of(stack: Stack, volume_id: str) -> Throttle:
    volume = await stack.registry.get_volume(volume_id)
    found: Throttle = volume.throttle
    return found


async def test_a_storage_class_and_an_attributes_class_limit_a_new_volume(stack: Stack):
    request = create_request(parameters={"maxIops": "100", "burstSeconds": "2"})
    request.mutable_parameters["maxIops"] = "200"
    volume = (await stack.controller.CreateVolume(request, None)).volume
    assert await throttle_of(stack, volume.volume_id) == Throttle(200, 0, 2)


async def test_an_unknown_mutable_parameter_is_refused(stack: Stack):
    request = create_request()
    request.mutable_parameters["queues"] = "2"
    with pytest.raises(InvalidArgument, match="'queues' is not mutable"):
        await stack.controller.CreateVolume(request, None)


async def test_limits_of_an_attached_volume_change_at_once(stack: Stack):
    volume = await stack.create(parameters={"maxIops": "100"})
    await stack.agent.attach(AttachSpec(volume.volume_id, NullBackend(), 4 * MIB))
    await modify(stack, volume.volume_id, maxBandwidth="1Mi")
    assert await throttle_of(stack, volume.volume_id) == Throttle(100, MIB)
    assert stack.agent.attachments[volume.volume_id].spec.throttle == Throttle(100, MIB)


async def test_limits_of_a_volume_that_is_not_attached_are_recorded(stack: Stack):
    volume = await stack.create()
    await modify(stack, volume.volume_id, maxIops="7")
    assert await throttle_of(stack, volume.volume_id) == Throttle(7)


async def test_a_modified_volume_is_still_the_one_that_was_created(stack: Stack):
    volume = await stack.create(parameters={"maxIops": "100"})
    await modify(stack, volume.volume_id, maxIops="7")
    assert (await stack.create(parameters={"maxIops": "100"})).volume_id == volume.volume_id
    assert await throttle_of(stack, volume.volume_id) == Throttle(7)


async def test_without_an_agent_the_change_is_recorded_and_the_call_can_be_repeated(stack: Stack):
    volume = await stack.create()
    await stack.agent.attach(AttachSpec(volume.volume_id, NullBackend(), 4 * MIB))
    stack.agent.fail["list"] = Unavailable("no agent")
    with pytest.raises(Unavailable):
        await modify(stack, volume.volume_id, maxIops="7")
    assert await throttle_of(stack, volume.volume_id) == Throttle(7)
    stack.agent.fail.clear()
    await modify(stack, volume.volume_id, maxIops="7")
    assert stack.agent.attachments[volume.volume_id].spec.throttle == Throttle(7)


async def test_what_cannot_be_modified_is_refused(stack: Stack):
    volume = await stack.create()
    with pytest.raises(InvalidArgument):
        await modify(stack, volume.volume_id, maxIops="many")
    with pytest.raises(InvalidArgument, match="volume_id"):
        await modify(stack, "")
    with pytest.raises(NotFound):
        await modify(stack, "vol-0123456789abcdef", maxIops="1")


async def test_a_record_from_before_there_were_limits_has_none(stack: Stack):
    volume = await stack.create(parameters={"maxIops": "100"})
    record = volume_to_json(await stack.registry.get_volume(volume.volume_id))
    assert volume_from_json(record).throttle == Throttle(100)
    del record["throttle"]
    assert volume_from_json(record).throttle == Throttle()
