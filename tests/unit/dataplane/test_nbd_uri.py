"""What NBD URIs mean, and that what cannot work is refused with words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.dataplane import backend_spec, nbd_uri
from csi_vduse.dataplane.backend_spec import NbdBackend, NbdTls
from csi_vduse.dataplane.nbd_uri import NbdAddress
from csi_vduse.errors import InvalidArgument

TLS = NbdTls(certificates=Path("/pki"))


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://example.com", NbdAddress("example.com", 10809, None, "", tls=False, identity="")),
        ("nbd://example.com/disk", NbdAddress("example.com", 10809, None, "disk", tls=False, identity="")),
        ("nbd://[::1]:10810/a/b", NbdAddress("::1", 10810, None, "a/b", tls=False, identity="")),
        ("nbd://h//absolute", NbdAddress("h", 10809, None, "/absolute", tls=False, identity="")),
        ("nbds://alice@h/x%20y%3F", NbdAddress("h", 10809, None, "x y?", tls=True, identity="alice")),
        ("nbd+unix:///d?socket=/run/a%20b", NbdAddress("", 0, Path("/run/a b"), "d", tls=False, identity="")),
        ("nbds+unix:///?socket=/s", NbdAddress("", 0, Path("/s"), "", tls=True, identity="")),
        ("NBD://Host/Disk", NbdAddress("host", 10809, None, "Disk", tls=False, identity="")),
        ("NBDS+Unix:///?socket=/s", NbdAddress("", 0, Path("/s"), "", tls=True, identity="")),
        ("nbd://my%2Dhost/e", NbdAddress("my-host", 10809, None, "e", tls=False, identity="")),
        ("nbd://%4dy_host:1/e", NbdAddress("my_host", 1, None, "e", tls=False, identity="")),
        ("nbd://[fe80::1%25eth0]/e", NbdAddress("fe80::1%eth0", 10809, None, "e", tls=False, identity="")),
        ("nbd://[FE80::1%25Eth%2D0]:7/e", NbdAddress("fe80::1%Eth-0", 7, None, "e", tls=False, identity="")),
    ],
)
def test_a_uri_says_where_the_export_is(uri: str, address: NbdAddress):
    assert nbd_uri.parse(uri) == address
    assert nbd_uri.parse(nbd_uri.render(address)) == address


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "nbd:",
        "nbd:host",
        "http://host/",
        "nbd:///export",
        "nbd://host:0/",
        "nbd://host:65536/",
        "nbd://host:port/",
        "nbd://host/?socket=/x",
        "nbd+unix:///",
        "nbd+unix:///?socket=relative",
        "nbd+unix://host/?socket=/x",
        "nbd+unix:///?socket=/a&socket=/b",
        f"nbd+unix:///?socket=/{'x' * 107}",
        "nbd://host/%00",
        "nbd://host/%ff",
        "nbd://host/#fragment",
        f"nbd://host/{'x' * 4097}",
        "nbd://host/?unknown=1",
        "nbd://[::1/",
        "nbd://my%2Fhost/",
        "nbd://my%00host/",
        "nbd://my%host/",
        "nbd://my%20host/",
        "nbd://%3A%3A1/",
        "nbd://[fe80::1%25]/",
        "nbd://[fe80::1%25a%2Fb]/",
    ],
)
def test_what_is_no_nbd_uri_is_refused(uri: str):
    with pytest.raises(InvalidArgument):
        nbd_uri.parse(uri)


def test_keys_for_tls_come_out_of_the_uri():
    uri, tls = nbd_uri.parse_with_tls("nbds://bob@h:1/x?tls-psk-file=/keys&tls-hostname=other")
    assert (uri, tls) == ("nbds://bob@h:1/x", NbdTls(psk_file=Path("/keys"), hostname="other"))
    assert nbd_uri.parse_with_tls("nbd://h/x") == ("nbd://h:10809/x", None)


@pytest.mark.parametrize(
    "uri", ["nbds://h/", "nbd://h/?tls-psk-file=/k", "nbds://h/?tls-psk-file=/k&tls-certificates=/d"]
)
def test_tls_without_keys_and_keys_without_tls_are_refused(uri: str):
    with pytest.raises(InvalidArgument, match="TLS"):
        nbd_uri.parse_with_tls(uri)


@pytest.mark.parametrize(
    "backend",
    [
        NbdBackend("nbd://h/x"),
        NbdBackend("nbds://h/x", TLS),
        NbdBackend("nbds://h/x", TLS, write_through=True),
        NbdBackend("nbds://n@h/x", NbdTls(psk_file=Path("/k"), hostname="n")),
    ],
)
def test_a_backend_survives_the_journey_to_the_worker(backend: NbdBackend):
    assert backend_spec.from_json(backend_spec.to_json(backend)) == backend


def test_a_backend_needs_keys_if_and_only_if_its_uri_asks_for_tls():
    with pytest.raises(InvalidArgument, match="do not fit"):
        NbdBackend("nbd://h/x", TLS)
    with pytest.raises(InvalidArgument, match="do not fit"):
        NbdBackend("nbds://h/x")


@given(st.text())
def test_any_text_is_a_uri_or_an_error_of_ours(text: str):
    for uri in (text, f"nbd://{text}", f"nbd+unix:///{text}"):
        try:
            address = nbd_uri.parse(uri)
        except InvalidArgument:
            continue
        assert nbd_uri.parse(nbd_uri.render(address)) == address
