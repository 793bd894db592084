"""Control messages are decoded and answered as include/uapi/linux/vduse.h lays them out."""

import struct

from csi_vduse.dataplane import messages


def packet(kind: int, request_id: int, payload: bytes) -> bytes:
    return struct.pack("=II16x128s", kind, request_id, payload)


def test_status_is_the_first_byte_of_the_payload():
    assert messages.decode(packet(1, 7, b"\x0f")) == messages.SetStatus(7, 15)


def test_queue_index_is_decoded():
    assert messages.decode(packet(0, 8, struct.pack("=I", 3))) == messages.GetQueueState(8, 3)


def test_address_range_is_decoded():
    message = messages.decode(packet(2, 9, struct.pack("=QQ", 4096, (1 << 64) - 1)))
    assert message == messages.UpdateIotlb(9, 4096, (1 << 64) - 1)


def test_unknown_message_is_kept_with_its_type():
    assert messages.decode(packet(77, 1, b"")) == messages.Other(1, 77)


def test_answers_have_the_kernels_size_and_clean_reserved_bytes():
    answer = messages.encode_answer(5, ok=False)
    assert len(answer) == messages.MESSAGE_BYTES
    assert struct.unpack("=II", answer[:8]) == (5, 1)
    assert not any(answer[8:])


def test_queue_state_carries_index_and_available_index():
    answer = messages.encode_queue_state(5, 2, 65535)
    assert struct.unpack_from("=IH", answer, 24) == (2, 65535)


def test_packed_queue_state_carries_wrap_counters_and_indices():
    answer = messages.encode_queue_state(5, 2, 0x8003_7FFF, packed=True)
    assert struct.unpack_from("=I4H", answer, 24) == (2, 0, 0x7FFF, 1, 3)
