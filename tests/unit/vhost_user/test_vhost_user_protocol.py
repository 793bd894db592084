"""The parser of vhost-user messages takes any bytes, and refuses with its own error and no other."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.dataplane.vhost_user import protocol
from csi_vduse.dataplane.vhost_user.protocol import Header, Request
from csi_vduse.errors import ProtocolError

U64 = st.integers(0, 2**64 - 1)


def header(request: int, flags: int = 1, size: int = 0) -> bytes:
    return struct.pack("=III", request, flags, size)


def decode(request: int, payload: bytes = b"", fds: int = 0) -> protocol.Payload:
    return protocol.decode(Header(request, needs_reply=False, payload_bytes=len(payload)), payload, fds)


@given(st.binary(max_size=64))
def test_random_bytes_are_a_header_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert protocol.decode_header(data).payload_bytes <= protocol.MAX_PAYLOAD_BYTES


@given(st.integers(0, 60), st.binary(max_size=300), st.integers(0, 9))
def test_random_payloads_are_decoded_or_refused(request: int, payload: bytes, fds: int) -> None:
    with contextlib.suppress(ProtocolError):
        decode(request, payload, fds)


@given(st.sampled_from(list(Request)), st.lists(U64, min_size=0, max_size=34), st.integers(0, 9))
def test_payloads_of_numbers_are_decoded_or_refused(request: Request, numbers: list[int], fds: int) -> None:
    with contextlib.suppress(ProtocolError):
        decode(request, struct.pack(f"={len(numbers)}Q", *numbers), fds)


@given(st.lists(st.tuples(U64, U64, U64, U64), max_size=9), st.integers(0, 9))
def test_a_memory_table_has_a_descriptor_for_each_region_and_none_wraps(
    regions: list[tuple[int, int, int, int]], fds: int
) -> None:
    payload = struct.pack("=II", len(regions), 0) + b"".join(struct.pack("=4Q", *r) for r in regions)
    try:
        table = decode(Request.SET_MEM_TABLE, payload, fds)
    except ProtocolError:
        return
    assert isinstance(table, protocol.MemoryTable)
    assert len(table.regions) == len(regions) == fds
    for region in table.regions:
        assert region.size_bytes
        assert region.guest_address + region.size_bytes <= 2**64
        assert region.user_address + region.size_bytes <= 2**64
        assert region.mmap_offset + region.size_bytes < 2**63


@given(st.integers(0, 300), st.integers(0, 300), st.binary(max_size=300))
def test_the_configuration_space_is_accessed_within_its_bounds(offset: int, size: int, data: bytes) -> None:
    try:
        access = decode(Request.GET_CONFIG, struct.pack("=III", offset, size, 0) + data)
    except ProtocolError:
        return
    assert isinstance(access, protocol.ConfigAccess)
    assert access.offset + access.size_bytes <= protocol.MAX_CONFIG_BYTES
    assert len(access.data) == access.size_bytes


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 1 | 16, 1 | 1 << 31])
def test_headers_of_other_versions_and_replies_are_refused(flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        protocol.decode_header(header(Request.GET_FEATURES, flags))


def test_a_payload_longer_than_any_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="payload"):
        protocol.decode_header(header(Request.SET_MEM_TABLE, size=1 << 31))


def test_the_need_of_a_reply_is_seen() -> None:
    assert protocol.decode_header(header(Request.SET_OWNER, 1 | 8)).needs_reply
    assert not protocol.decode_header(header(Request.SET_OWNER)).needs_reply


@pytest.mark.parametrize("request_number", [0, 6, 7, 19, 20, 22, 23, 26, 28, 33, 35, 39, 40, 41, 2**32 - 1])
def test_requests_of_features_that_are_not_offered_are_refused(request_number: int) -> None:
    with pytest.raises(ProtocolError, match="nothing that was offered"):
        decode(request_number)


def test_kick_without_a_descriptor_is_told_from_kick_with_one() -> None:
    assert decode(Request.SET_VRING_KICK, struct.pack("=Q", 3), 1) == protocol.VringFd(3, has_fd=True)
    assert decode(Request.SET_VRING_KICK, struct.pack("=Q", 3 | 256)) == protocol.VringFd(3, has_fd=False)
    for value, fds in ((3, 0), (3 | 256, 1), (3, 2), (1 << 9, 1)):
        with pytest.raises(ProtocolError):
            decode(Request.SET_VRING_KICK, struct.pack("=Q", value), fds)


@pytest.mark.parametrize("size", [20, 24])
def test_inflight_descriptions_are_answered_as_long_as_they_were_asked(size: int) -> None:
    asked = decode(Request.GET_INFLIGHT_FD, struct.pack("=QQHH", 1, 2, 3, 4).ljust(size, b"\0"))
    assert isinstance(asked, protocol.Inflight)
    assert (asked.mmap_size, asked.mmap_offset, asked.queues, asked.queue_size) == (1, 2, 3, 4)
    assert protocol.encode_inflight(asked) == struct.pack("=QQHH", 1, 2, 3, 4).ljust(size, b"\0")


def test_answers_carry_version_and_reply_flag() -> None:
    reply = protocol.encode_reply(Request.GET_QUEUE_NUM, protocol.encode_number(4))
    assert reply == struct.pack("=IIIQ", 17, 5, 8, 4)
    assert protocol.encode_request(protocol.BackendRequest.CONFIG_CHANGE) == struct.pack("=III", 2, 1, 0)
