"""What `csi-vduse storage-server` is told, as values, and the command line of its qemu-storage-daemon. Pure."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from csi_vduse.dataplane.nbd_uri import CA_FILE
from csi_vduse.errors import InvalidArgument
from csi_vduse.storage.model import Format

CONTROLLER_NAME = "csi-vduse-controller"
VHOST_USER_SCHEME = "vhost-user"
DEFAULT_NBD_PORT = 10809
DEFAULT_CONTROL_PORT = 10808
# A socket's path has 107 bytes (unix(7)); its name is an export's: a volume's id of 20, an epoch, and 16 of chance.
_MAX_SOCKET_DIRECTORY_BYTES = 55
SERVER_FILES = ("server-cert.pem", "server-key.pem")  # QEMU's names


@dataclass(frozen=True)
class Address:
    """Where something listens: a host and a port, or the path of a unix socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        """Return HOST:PORT or unix:PATH, as `parse_address` reads it."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it; a name other than localhost may be anything."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Tls:
    """Who may connect.

    Args:
        directory: has ca-cert.pem, server-cert.pem and server-key.pem.
        nodes: patterns (*, ?) of the distinguished names that may use exports; empty: all that the CA signed.
        controllers: common names of certificates that may give orders.
    """

    directory: Path
    nodes: tuple[str, ...] = ()
    controllers: tuple[str, ...] = (CONTROLLER_NAME,)


@dataclass(frozen=True)
class ServerConfig:
    """What the storage server is told.

    Args:
        directory: the pool: images and their records.
        run_dir: on tmpfs: the daemon's monitor, and what is known of the running daemon.
        control: where controllers give orders.
        nbd: where nodes read and write.
        advertised: what nodes are told instead, such as a Service's name.
        tls: None only where everything is local.
        image_format: of new images.
        program: the daemon.
        vhost_user: directory of vhost-user sockets that take the place of `nbd`, for workers of this machine; raw images
            only: a daemon that is killed forgets of others what it has answered, and such writes are not made stable.
    """

    directory: Path
    run_dir: Path
    control: Address
    nbd: Address
    advertised: Address | None = None
    tls: Tls | None = None
    image_format: Format = Format.RAW
    program: str = "qemu-storage-daemon"
    vhost_user: Path | None = None

    def __post_init__(self) -> None:
        """Refuse to serve a network without TLS, and TLS without its files.

        Raises:
            InvalidArgument: says which.
        """
        if self.vhost_user is not None and self.image_format is not Format.RAW:
            raise InvalidArgument(
                f"--vhost-user and --format {self.image_format.value} do not go together",
                hint="use --format raw",
            )
        if self.vhost_user is not None and len(os.fsencode(self.vhost_user)) > _MAX_SOCKET_DIRECTORY_BYTES:
            raise InvalidArgument(
                f"--vhost-user {self.vhost_user} is too long for sockets in it",
                hint=f"{_MAX_SOCKET_DIRECTORY_BYTES} bytes at most, such as /run/csi-vduse-storage/disks",
            )
        if self.tls is None:
            for address in (self.control, self.nbd):
                if not address.is_local:
                    raise InvalidArgument(
                        f"{address} can be reached from other machines, and TLS is off",
                        hint="give --tls-dir, or listen on 127.0.0.1 or a unix socket",
                    )
            return
        if not self.tls.directory.is_absolute():
            raise InvalidArgument(f"--tls-dir {self.tls.directory} is not an absolute path")
        for name in (CA_FILE, *SERVER_FILES):
            if not (self.tls.directory / name).is_file():
                raise InvalidArgument(
                    f"--tls-dir {self.tls.directory} has no {name}", hint="docs/storage-server.md makes them"
                )

    @property
    def monitor(self) -> Path:
        """Where the daemon's monitor listens."""
        return self.run_dir / "qmp.sock"

    def vhost_user_socket(self, export: str) -> Path | None:
        """Return the vhost-user socket of an export; None: it is one of the NBD server."""
        return self.vhost_user / export if self.vhost_user is not None else None

    def uri(self, export: str) -> str:
        """Return where a node finds an export, by the NBD URI specification; or `vhost-user:SOCKET`."""
        if socket := self.vhost_user_socket(export):
            return f"{VHOST_USER_SCHEME}:{socket}"
        scheme = "nbds" if self.tls else "nbd"
        address = self.advertised or self.nbd
        if address.path is not None:
            return f"{scheme}+unix:///{quote(export)}?socket={quote(str(address.path))}"
        return f"{scheme}://{address}/{quote(export)}"


def parse_address(text: str, default_port: int) -> Address:
    """Parse HOST, HOST:PORT, [IPV6]:PORT or unix:/PATH.

    Raises:
        InvalidArgument: none of these.
    """
    kind, colon, path = text.partition(":")
    if kind == "unix" and colon:
        if not path.startswith("/"):
            raise InvalidArgument(f"address {text!r}: the socket's path is not absolute")
        return Address(path=Path(path))
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if bracket else "?"
    elif text.count(":") == 1:
        host, port = text.split(":")
    number = int(port) if port.isascii() and port.isdecimal() else (0 if port else default_port)
    if not host or any(one.isspace() or one in "/?#@," for one in host) or not 0 < number <= 0xFFFF:
        raise InvalidArgument(
            f"address {text!r} is not HOST:PORT or unix:/PATH", hint="for example 10.0.0.5:10809"
        )
    return Address(host, number)


def daemon_argv(config: ServerConfig) -> list[str]:
    """Return how the daemon is started; images and exports are added later, over its monitor."""
    argv = [
        config.program,
        *("--chardev", f"socket,id=qmp,path={_escaped(config.monitor)},server=on,wait=off"),
        *("--monitor", "chardev=qmp"),
    ]
    if config.vhost_user is not None:
        return argv
    nbd = config.nbd
    if nbd.path is not None:
        server = f"addr.type=unix,addr.path={_escaped(nbd.path)}"
    else:
        server = f"addr.type=inet,addr.host={nbd.host},addr.port={nbd.port}"
    if config.tls is not None:
        directory = _escaped(config.tls.directory)
        argv += ["--object", f"tls-creds-x509,id=tls,dir={directory},endpoint=server,verify-peer=on"]
        server += ",tls-creds=tls"
        if config.tls.nodes:
            rules = "".join(
                f",rules.{number}.match={_escaped(pattern)},rules.{number}.policy=allow,rules.{number}.format=glob"
                for number, pattern in enumerate(config.tls.nodes)
            )
            argv += ["--object", f"authz-list,id=nodes,policy=deny{rules}"]
            server += ",tls-authz=nodes"
    return [*argv, "--nbd-server", f"{server},max-connections=0"]


def _escaped(value: object) -> str:
    """Double commas, as QEMU's option texts want them."""
    return str(value).replace(",", ",,")
