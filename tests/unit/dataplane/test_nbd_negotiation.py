"""The NBD handshake against servers of all kinds: right, old, strict, and hostile bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_vduse.dataplane import nbd_config
from csi_vduse.dataplane.backend_spec import NbdBackend, NbdTls
from csi_vduse.errors import NotFound, PermissionDenied, ProtocolError, Unavailable, VduseError
from tests.unit.fakes.nbd import (
    ABORT,
    ACK,
    EXPORT_NAME,
    EXTENDED,
    FLAGS,
    GO,
    GREETING,
    INFO,
    MAGIC,
    MIB,
    STARTTLS,
    STRUCTURED,
    TLS_REQUIRED,
    UNKNOWN,
    UNSUP,
    answering,
    export,
    option,
    receive,
    reply,
    served,
    sizes,
)


def probe(backend: NbdBackend, timeout_s: float = 10) -> nbd_config.NbdExport:
    return nbd_config.probe(backend, timeout_s=timeout_s)


def test_an_export_is_what_the_server_says(tmp_path: Path):
    go = sizes(512, 4096, MIB) + export() + reply(GO, INFO, b"\0\1name of it") + reply(GO, ACK)
    with served(tmp_path, answering({GO: go, STRUCTURED: reply(STRUCTURED, ACK)})) as backend:
        found = probe(backend)
    assert (found.size_bytes, found.min_block_bytes, found.max_payload_bytes) == (MIB, 512, MIB)
    assert (found.structured, found.extended, found.multi_conn, found.read_only) == (True, False, True, False)


def test_extended_headers_are_taken_where_they_are(tmp_path: Path):
    with served(
        tmp_path, answering({GO: export() + reply(GO, ACK), EXTENDED: reply(EXTENDED, ACK)})
    ) as backend:
        assert probe(backend).extended


def test_a_server_that_knows_only_export_names_will_do(tmp_path: Path):
    with served(tmp_path, answering({EXPORT_NAME: struct.pack(">QH", 2 * MIB, FLAGS)})) as backend:
        found = probe(backend)
    assert (found.size_bytes, found.structured) == (2 * MIB, False)


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        ({GO: reply(GO, UNKNOWN)}, NotFound, 'no export named "disk"'),
        ({GO: reply(GO, TLS_REQUIRED)}, PermissionDenied, "wants TLS"),
        ({GO: reply(GO, ACK)}, ProtocolError, "size"),
        ({GO: export(0) + reply(GO, ACK)}, ProtocolError, "size"),
        ({GO: export(1 << 63) + reply(GO, ACK)}, ProtocolError, "size"),
        ({GO: export(flags=0) + reply(GO, ACK)}, ProtocolError, "can do"),
        ({GO: sizes(3, 3, 3) + export() + reply(GO, ACK)}, ProtocolError, "block size"),
        ({GO: sizes(1 << 20, 1 << 20, 1 << 20) + export() + reply(GO, ACK)}, ProtocolError, "block size"),
        ({GO: sizes(1, 1, 1) + export() + reply(GO, ACK)}, ProtocolError, "payload"),
        ({GO: reply(GO, INFO, b"\0")}, ProtocolError, "too short"),
        ({GO: reply(GO, INFO, b"\0\0")}, ProtocolError, "wrong length"),
        ({GO: export() * 300}, ProtocolError, "does not end"),
        ({GO: reply(STRUCTURED, ACK)}, ProtocolError, "is none"),
        ({GO: struct.pack(">QIII", MAGIC, GO, INFO, 1 << 30)}, ProtocolError, "absurdly long"),
        ({STRUCTURED: reply(STRUCTURED, 77)}, ProtocolError, "is none"),
    ],
)
def test_what_is_wrong_with_an_export_is_said(
    tmp_path: Path, answers: dict[int, bytes], error: type[VduseError], words: str
):
    with served(tmp_path, answering(answers)) as backend, pytest.raises(error, match=words):
        probe(backend)


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "no NBD server"),
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(144), "newstyle"),
        (b"NBDMAGICIHAVEOPT\0\0", "newstyle"),
    ],
)
def test_who_does_not_speak_the_protocol_is_told_apart(tmp_path: Path, greeting: bytes, words: str):
    with (
        served(tmp_path, lambda c: c.sendall(greeting)) as backend,
        pytest.raises(ProtocolError, match=words),
    ):
        probe(backend)


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path):
    with served(tmp_path, lambda c: c.recv(1)) as backend, pytest.raises(Unavailable, match="in time"):
        probe(backend, timeout_s=0.2)


def test_nobody_there_is_unavailable(tmp_path: Path):
    with pytest.raises(Unavailable, match="cannot connect"):
        probe(NbdBackend(f"nbd+unix:///?socket={tmp_path}/nobody"))


def test_without_tls_nothing_but_goodbye_is_said_to_a_server_that_was_to_have_it(tmp_path: Path):
    seen = []

    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        receive(connection, 4)
        seen.append(option(connection)[0])
        connection.sendall(reply(STARTTLS, UNSUP))
        seen.append(option(connection)[0])

    with served(tmp_path, script) as backend, pytest.raises(PermissionDenied, match="does not offer TLS"):
        probe(NbdBackend(backend.uri.replace("nbd+", "nbds+"), NbdTls(certificates=tmp_path)))
    assert seen == [STARTTLS, ABORT]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.binary(max_size=64) | st.sampled_from([export(), reply(GO, ACK), sizes(1, 1, MIB), GREETING]),
        max_size=6,
    )
)
def test_hostile_bytes_give_an_export_or_an_error_of_ours(tmp_path: Path, pieces: list[bytes]):
    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING + b"".join(pieces))

    with served(tmp_path, script) as backend, contextlib.suppress(VduseError):
        assert probe(backend, timeout_s=0.5).size_bytes > 0
