"""What the storage server's gRPC service makes of requests that no client of ours sends."""

from unittest.mock import Mock

import grpc
import pytest

from csi_vduse.proto import storage_pb2
from csi_vduse.storage.service import StorageServicer


class Aborted(Exception):
    """What gRPC raises to end a call."""


class Context:
    async def abort(self, code, message, metadata):
        raise Aborted(code, message)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("GetImage", storage_pb2.GetImageRequest(kind=7, id="v1")),
        ("DeleteImage", storage_pb2.DeleteImageRequest(kind=7, id="v1")),
        ("CopyImage", storage_pb2.CopyImageRequest(source_kind=7, source_id="v1", target_id="v1")),
    ],
)
async def test_an_image_of_an_unknown_kind_is_refused_in_words(method, request_):
    with pytest.raises(Aborted) as caught:
        await getattr(StorageServicer(Mock()), method)(request_, Context())
    code, message = caught.value.args
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'v1' is neither" in message
