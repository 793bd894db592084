"""How the daemon is started, and which configurations are refused: pure."""

from pathlib import Path

import pytest

from csi_vduse.errors import InvalidArgument
from csi_vduse.storage.config import Address, ServerConfig, Tls, daemon_argv, parse_address

LOOPBACK = Address("127.0.0.1", 10809)


def a_config(**changes):
    values = {
        "directory": Path("/pool"),
        "run_dir": Path("/run/x"),
        "control": Address(path=Path("/run/x/control.sock")),
        "nbd": LOOPBACK,
    }
    return ServerConfig(**{**values, **changes})


def a_tls_dir(tmp_path):
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("address", ["10.0.0.5:1", "0.0.0.0:1", "[::]:1", "storage.example:1"])
@pytest.mark.parametrize("which", ["nbd", "control"])
def test_a_network_is_not_served_without_tls(which, address):
    with pytest.raises(InvalidArgument, match="TLS is off"):
        a_config(**{which: parse_address(address, 1)})


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/x.sock"])
def test_this_machine_may_be_served_without_tls(address):
    a_config(nbd=parse_address(address, 1), control=parse_address(address, 1))


def test_tls_without_its_files_is_refused_by_name(tmp_path):
    directory = a_tls_dir(tmp_path)
    (directory / "server-key.pem").unlink()
    with pytest.raises(InvalidArgument, match=r"server-key\.pem"):
        a_config(tls=Tls(directory))


def test_with_tls_every_client_shows_a_certificate_and_only_named_ones_are_let_in(tmp_path):
    tls = Tls(a_tls_dir(tmp_path), nodes=("CN=node-*", "CN=a,O=b"))
    text = " ".join(daemon_argv(a_config(tls=tls, nbd=parse_address("0.0.0.0:7", 1))))
    assert "verify-peer=on" in text
    assert "authz-list,id=nodes,policy=deny" in text
    assert "rules.0.match=CN=node-*" in text
    assert "rules.1.match=CN=a,,O=b" in text
    assert "addr.host=0.0.0.0,addr.port=7,tls-creds=tls,tls-authz=nodes" in text


def test_nodes_are_told_the_advertised_address():
    config = a_config(advertised=parse_address("storage.example:7", 1))
    assert config.uri("vol.1.ab") == "nbd://storage.example:7/vol.1.ab"
    assert a_config().uri("e") == "nbd://127.0.0.1:10809/e"
    assert a_config(nbd=parse_address("unix:/a b.sock", 1)).uri("e") == "nbd+unix:///e?socket=/a%20b.sock"


@pytest.mark.parametrize("text", ["", ":1", "a:0", "a:65536", "a:x", "unix:x", "a b:1", "[::1", "a/b:1"])
def test_addresses_that_are_none_are_refused(text):
    with pytest.raises(InvalidArgument):
        parse_address(text, 1)


@pytest.mark.parametrize("text", ["a:7", "[::1]:7", "unix:/x", "10.0.0.1:9"])
def test_addresses_read_as_they_are_written(text):
    assert str(parse_address(text, 1)) == text


def test_the_port_may_be_left_out():
    assert parse_address("a", 7) == Address("a", 7)
