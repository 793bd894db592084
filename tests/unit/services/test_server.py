"""The server as a client sees it: statuses, locks, calls that outlive their callers, the socket, the log."""

import asyncio
import os
import socket
from contextlib import asynccontextmanager
from functools import partial

import grpc
import pytest
import structlog

from csi_vduse import DRIVER_NAME
from csi_vduse.errors import FailedPrecondition, InvalidArgument, Unavailable
from csi_vduse.proto import csi_pb2, csi_pb2_grpc
from csi_vduse.services.identity import Identity
from csi_vduse.services.server import start_server
from csi_vduse.volumes.ids import volume_id
from tests.unit.services.stack import MIB, create_request


@pytest.fixture
def socket_path(tmp_path):
    return tmp_path / "csi.sock"


@asynccontextmanager
async def served(stack, path, observe=None):
    server = await start_server(
        path,
        [
            partial(csi_pb2_grpc.add_IdentityServicer_to_server, Identity(stack.agent)),
            partial(csi_pb2_grpc.add_ControllerServicer_to_server, stack.controller),
        ],
        observe=observe,
    )
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        yield channel
    await server.stop(5.0)


@pytest.fixture
async def channel(stack, socket_path):
    async with served(stack, socket_path) as channel:
        yield channel


@pytest.fixture
def controller(channel):
    return csi_pb2_grpc.ControllerStub(channel)


@pytest.fixture
def identity(channel):
    return csi_pb2_grpc.IdentityStub(channel)


class Gate:
    """Holds a method of the pool until it is opened."""

    def __init__(self, monkeypatch, backend, method):
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        original = getattr(backend, method)

        async def held(*args, **kwargs):
            self.entered.set()
            await self.opened.wait()
            return await original(*args, **kwargs)

        monkeypatch.setattr(backend, method, held)


async def test_a_volume_is_made_over_the_socket(controller):
    answer = await controller.CreateVolume(create_request())
    assert answer.volume.volume_id == volume_id("v")


async def test_an_error_is_a_status_with_message_and_hint(controller):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await controller.CreateVolume(create_request(nodes=("n2",)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "n1" in caught.value.details()
    assert "WaitForFirstConsumer" in caught.value.details()


async def test_an_unexpected_error_is_internal_and_tells_no_secrets(stack, controller, monkeypatch):
    def breaks(*_args):
        raise RuntimeError("password123")

    monkeypatch.setattr(stack.provisioner, "create", breaks)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await controller.CreateVolume(create_request())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "password123" not in caught.value.details()


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("ControllerPublishVolume", csi_pb2.ControllerPublishVolumeRequest),
        ("ControllerUnpublishVolume", csi_pb2.ControllerUnpublishVolumeRequest),
        ("ControllerGetVolumeHealth", csi_pb2.ControllerGetVolumeHealthRequest),
        ("ControllerListVolumeHealth", csi_pb2.ControllerListVolumeHealthRequest),
    ],
)
async def test_what_is_not_advertised_is_unimplemented(controller, method, request_type):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(controller, method)(request_type())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_service_that_is_not_there_is_unimplemented(channel):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await csi_pb2_grpc.GroupControllerStub(channel).CreateVolumeGroupSnapshot(
            csi_pb2.CreateVolumeGroupSnapshotRequest()
        )
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_second_call_for_the_volume_is_aborted_and_others_go_on(stack, controller, monkeypatch):
    gate = Gate(monkeypatch, stack.backends[0], "create")
    first = asyncio.ensure_future(controller.CreateVolume(create_request()))
    await gate.entered.wait()
    for second in (
        controller.CreateVolume(create_request()),
        controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume_id("v"))),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await second
        assert caught.value.code() is grpc.StatusCode.ABORTED
    await controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume_id("other")))
    gate.opened.set()
    await first
    await controller.CreateVolume(create_request())


async def test_a_call_goes_on_when_its_caller_is_gone(stack, controller, monkeypatch):
    gate = Gate(monkeypatch, stack.backends[0], "create")
    call = controller.CreateVolume(create_request())
    await gate.entered.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await controller.CreateVolume(create_request())
    assert caught.value.code() is grpc.StatusCode.ABORTED
    gate.opened.set()
    async with asyncio.timeout(10):
        volume = await _created_by_the_other_call(controller)
    assert (await stack.registry.get_volume(volume.volume_id)).state.value == "ready"


async def _created_by_the_other_call(controller):
    """Ask again until that call has let go of the volume."""
    while True:
        try:
            return (await controller.CreateVolume(create_request())).volume
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ABORTED:
                raise
            await asyncio.sleep(0.005)


async def test_stop_waits_for_a_call_whose_caller_is_gone(stack, socket_path, monkeypatch):
    gate = Gate(monkeypatch, stack.backends[0], "create")
    async with served(stack, socket_path) as channel:
        call = csi_pb2_grpc.ControllerStub(channel).CreateVolume(create_request())
        await gate.entered.wait()
        call.cancel()
        asyncio.get_running_loop().call_later(0.05, gate.opened.set)
    assert (await stack.registry.get_volume(volume_id("v"))).state.value == "ready"


async def test_equal_creates_at_once_make_one_volume(stack, controller):
    answers = await asyncio.gather(
        *(controller.CreateVolume(create_request()) for _ in range(10)), return_exceptions=True
    )
    made = {answer.volume.volume_id for answer in answers if not isinstance(answer, Exception)}
    codes = {answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
    assert made == {volume_id("v")}
    assert codes <= {grpc.StatusCode.ABORTED}
    assert len(await stack.registry.list_volumes()) == 1


# Identity.


async def test_identity_says_who_we_are_and_what_we_can(identity):
    info = await identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest())
    assert info.name == DRIVER_NAME
    assert info.vendor_version
    answer = await identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest())
    service, expansion = csi_pb2.PluginCapability.Service, csi_pb2.PluginCapability.VolumeExpansion
    assert {one.service.type for one in answer.capabilities if one.HasField("service")} == {
        service.CONTROLLER_SERVICE,
        service.VOLUME_ACCESSIBILITY_CONSTRAINTS,
    }
    assert [one.volume_expansion.type for one in answer.capabilities if one.HasField("volume_expansion")] == [
        expansion.ONLINE
    ]


async def test_probe_follows_the_agent(stack, identity):
    assert (await identity.Probe(csi_pb2.ProbeRequest())).ready.value
    stack.agent.problems = ("modprobe vduse",)
    assert not (await identity.Probe(csi_pb2.ProbeRequest())).ready.value
    stack.agent.fail["probe"] = Unavailable("no agent")
    answer = await identity.Probe(csi_pb2.ProbeRequest())
    assert answer.HasField("ready")
    assert not answer.ready.value


async def test_every_advertised_capability_is_implemented(controller):
    answer = await controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest())
    rpc = csi_pb2.ControllerServiceCapability.RPC
    old_volume_condition = 11
    assert {one.rpc.type for one in answer.capabilities} == {
        rpc.CREATE_DELETE_VOLUME,
        rpc.LIST_VOLUMES,
        rpc.GET_CAPACITY,
        rpc.CREATE_DELETE_SNAPSHOT,
        rpc.LIST_SNAPSHOTS,
        rpc.CLONE_VOLUME,
        rpc.EXPAND_VOLUME,
        rpc.GET_VOLUME,
        rpc.SINGLE_NODE_MULTI_WRITER,
        rpc.GET_SNAPSHOT,
        rpc.MODIFY_VOLUME,
        old_volume_condition,
    }


# The socket.


async def test_a_socket_left_by_a_dead_process_is_replaced(stack, socket_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    async with served(stack, socket_path) as channel:
        await csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest())
    assert not socket_path.exists()


async def test_a_socket_that_answers_is_left_alone(stack, socket_path, channel):
    with pytest.raises(FailedPrecondition, match="another process listens"):
        await start_server(socket_path, [])
    await csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest())


async def test_a_file_in_the_sockets_place_is_not_removed(socket_path):
    socket_path.write_text("precious")
    with pytest.raises(FailedPrecondition, match="not a socket"):
        await start_server(socket_path, [])
    assert socket_path.read_text() == "precious"


async def test_a_socket_path_that_cannot_be_is_a_clear_error(tmp_path):
    with pytest.raises(InvalidArgument, match="107"):
        await start_server(tmp_path / ("x" * 120), [])
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="check --endpoint"):
        await start_server(tmp_path / "file" / "csi.sock", [])


async def test_only_owner_and_group_may_use_the_socket(channel, socket_path):
    assert socket_path.stat().st_mode & 0o007 == 0
    assert sorted(os.listdir(socket_path.parent)).count("csi.sock") == 1


# The log and the measurement.


async def test_ids_are_logged_and_secrets_are_not(controller):
    request = create_request(parameters={"pool": "default"})
    request.secrets["key"] = "hunter2"
    request.volume_capabilities[0].mount.mount_flags.append("password=hunter2")
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        await controller.CreateVolume(request)
        with pytest.raises(grpc.aio.AioRpcError):
            await controller.ControllerExpandVolume(
                csi_pb2.ControllerExpandVolumeRequest(volume_id=volume_id("v"), secrets={"key": "hunter2"})
            )
    assert "hunter2" not in repr(lines)
    ended = [line for line in lines if "code" in line]
    created = next(line for line in ended if line.get("rpc") == "CreateVolume")
    assert (created["name"], created["code"]) == ("v", "OK")
    refused = next(line for line in ended if line.get("rpc") == "ControllerExpandVolume")
    assert (refused["volume_id"], refused["code"]) == (volume_id("v"), "INVALID_ARGUMENT")


async def test_every_call_is_measured_with_its_status(stack, socket_path):
    seen = []
    async with served(stack, socket_path, observe=lambda *call: seen.append(call)) as channel:
        stub = csi_pb2_grpc.ControllerStub(channel)
        await stub.CreateVolume(create_request())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.CreateVolume(create_request(required=8 * MIB))
    assert [(method, code) for method, code, _ in seen] == [
        ("CreateVolume", "OK"),
        ("CreateVolume", "ALREADY_EXISTS"),
    ]
    assert all(duration >= 0 for _, _, duration in seen)
