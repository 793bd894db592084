"""NBD URIs: what `nbd://HOST:PORT/EXPORT` and its kin mean, as values.

The NBD URI specification (NetworkBlockDevice/nbd, doc/uri.md): schemes nbd, nbds (TLS), nbd+unix and nbds+unix; the
path without its first slash, percent-decoded, is the export's name; a unix socket is the parameter `socket`. Its
parameter tls-psk-file, and tls-certificates and tls-hostname of libnbd(3), say what TLS is done with. Letters' case in
schemes and hosts, and percent-encoding in hosts, are RFC 3986 (3.1, 3.2.2); an IPv6 address with a zone, which is
written after `%25`, RFC 6874.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, quote, unquote_to_bytes, urlsplit

from csi_vduse.errors import InvalidArgument

DEFAULT_PORT: Final = 10809
# QEMU's names for what is in a folder of certificates.
CA_FILE: Final = "ca-cert.pem"
CLIENT_FILES: Final = ("client-cert.pem", "client-key.pem")
MAX_NAME_BYTES: Final = 4096  # of an export (NBD protocol, "Values", strings)
_MAX_SOCKET_PATH_BYTES = 107  # unix(7)
_MAX_PORT = 65535
_SCHEMES = {
    "nbd": (False, False),
    "nbds": (False, True),
    "nbd+unix": (True, False),
    "nbds+unix": (True, True),
}
_TLS_PARAMETERS = ("tls-certificates", "tls-psk-file", "tls-hostname")
# What is before the zone of an IPv6 address, and the zone; urlsplit does not decode it.
_ZONE = re.compile(r"([^:/?#]+://[^/?#\[\]]*\[[^\]%/?#]*)%25([^\]/?#]*)")
_HINT = "for example nbd://HOST:10809/EXPORT or nbd+unix:///EXPORT?socket=/PATH"


@dataclass(frozen=True)
class NbdTls:
    """What TLS is done with; files are read anew for each connection, so they may be replaced.

    Args:
        certificates: folder with ca-cert.pem, and client-cert.pem and client-key.pem if the server wants them.
        psk_file: lines of IDENTITY:HEX, as psktool(1) writes them; instead of certificates.
        hostname: whom the server's certificate is for, if not the URI's host.
    """

    certificates: Path | None = None
    psk_file: Path | None = None
    hostname: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if (self.certificates is None) == (self.psk_file is None):
            raise InvalidArgument("TLS needs either certificates or a PSK file")
        for path in (self.certificates, self.psk_file):
            if path is not None and not path.is_absolute():
                raise InvalidArgument(f"{path} is not an absolute path")


@dataclass(frozen=True)
class NbdAddress:
    """Where an export is; socket is None for TCP, host is empty for a unix socket."""

    host: str
    port: int
    socket: Path | None
    export: str
    tls: bool
    identity: str


def parse(uri: str) -> NbdAddress:
    """Return what a URI without TLS parameters says.

    Raises:
        InvalidArgument: it is not such a URI.
    """
    address, options = _split(uri)
    if options:
        raise InvalidArgument(f"unknown parameter {min(options)!r} in {uri!r}", hint=_HINT)
    return address


def parse_with_tls(text: str) -> tuple[str, NbdTls | None]:
    """Return the URI without its TLS parameters, and what they say; for command lines.

    Raises:
        InvalidArgument: it is no NBD URI, or TLS lacks its keys.
    """
    address, options = _split(text)
    chosen = {name: options.pop(name) for name in _TLS_PARAMETERS if name in options}
    if options:
        raise InvalidArgument(f"unknown parameter {min(options)!r} in {text!r}", hint=_HINT)
    if not address.tls:
        if chosen:
            raise InvalidArgument(
                f"{min(chosen)} without TLS in {text!r}", hint="use nbds:// or nbds+unix://"
            )
        return render(address), None
    paths = {name: Path(chosen[name]).absolute() if name in chosen else None for name in _TLS_PARAMETERS[:2]}
    tls = NbdTls(paths["tls-certificates"], paths["tls-psk-file"], chosen.get("tls-hostname", ""))
    return render(address), tls


def render(address: NbdAddress) -> str:
    """Return the URI of an address; `parse` gives it back."""
    scheme = "nbds" if address.tls else "nbd"
    user = f"{quote(address.identity, safe='')}@" if address.identity else ""
    export = quote(address.export, safe="/")
    if address.socket is not None:
        return f"{scheme}+unix://{user}/{export}?socket={quote(str(address.socket), safe='/')}"
    host = quote(address.host, safe="")
    if ":" in address.host:
        ip, percent, zone = address.host.partition("%")
        host = f"[{ip}%25{quote(zone, safe='')}]" if percent else f"[{ip}]"
    return f"{scheme}://{user}{host}:{address.port}/{export}"


def tls_to_json(tls: NbdTls | None) -> dict[str, Any] | None:
    """Encode for the control channel and the records."""
    if tls is None:
        return None
    return {
        "certificates": str(tls.certificates) if tls.certificates else None,
        "psk_file": str(tls.psk_file) if tls.psk_file else None,
        "hostname": tls.hostname,
    }


def tls_from_json(value: dict[str, Any] | None) -> NbdTls | None:
    """Decode what ``tls_to_json`` made."""
    if value is None:
        return None
    certificates, psk_file = value.get("certificates"), value.get("psk_file")
    return NbdTls(
        Path(certificates) if certificates else None,
        Path(psk_file) if psk_file else None,
        str(value.get("hostname") or ""),
    )


def _split(uri: str) -> tuple[NbdAddress, dict[str, str]]:
    zoned = _ZONE.match(uri)
    try:
        parts = urlsplit(zoned[1] + uri[zoned.end() :] if zoned else uri)
        port, host = parts.port, _host(parts.hostname or "", uri, _decode(zoned[2], uri) if zoned else None)
    except ValueError as error:
        raise InvalidArgument(f"{uri!r} is not a URI: {error}", hint=_HINT) from error
    if parts.scheme not in _SCHEMES or not uri.lower().startswith(f"{parts.scheme}://") or parts.fragment:
        raise InvalidArgument(f"{uri!r} is not an NBD URI", hint=_HINT)
    unix, tls = _SCHEMES[parts.scheme]
    options = _parameters(parts, uri)
    socket = options.pop("socket", None)
    if unix:
        if not socket or not Path(socket).is_absolute() or len(socket.encode()) > _MAX_SOCKET_PATH_BYTES:
            raise InvalidArgument(f"{uri!r} names no socket of at most 107 bytes", hint=_HINT)
        if host or port is not None:
            raise InvalidArgument(f"{uri!r} has both a socket and a host", hint=_HINT)
    elif not host or socket is not None:
        raise InvalidArgument(f"{uri!r} names no host, or a socket too", hint=_HINT)
    if port is not None and not 0 < port <= _MAX_PORT:
        raise InvalidArgument(f"{uri!r} has an impossible port", hint=_HINT)
    address = NbdAddress(
        host=host,
        port=0 if unix else port or DEFAULT_PORT,
        socket=Path(socket) if socket else None,
        export=_decode(parts.path.removeprefix("/"), uri),
        tls=tls,
        identity=_decode(parts.username or "", uri),
    )
    if len(address.export.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"the export's name is longer than {MAX_NAME_BYTES} bytes")
    return address, options


def _host(raw: str, uri: str, zone: str | None) -> str:
    """Return the host as the system's look-up takes it: decoded, and with a zone after `%`."""
    if ":" in raw and "%" not in raw:
        if zone is not None and not _is_name(zone):
            raise InvalidArgument(f"{uri!r} has a zone that cannot be one", hint=_HINT)
        return raw if zone is None else f"{raw}%{zone}"
    host = _decode(raw, uri).lower()
    if zone is not None or (host and not _is_name(host)):
        raise InvalidArgument(
            f"{uri!r} names a host that none can have", hint="a zone is written so: [fe80::1%25eth0]"
        )
    return host


def _is_name(text: str) -> bool:
    """Tell whether text can be a host or a zone: something that shows, and nothing that means something in a URI."""
    return bool(text) and text.isprintable() and not set(text) & set(" :/?#[]@%")


def _parameters(parts: SplitResult, uri: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in filter(None, parts.query.replace(";", "&").split("&")):
        name, equals, value = piece.partition("=")
        name = _decode(name, uri)
        if not equals or name in found:
            raise InvalidArgument(f"parameter {name!r} of {uri!r} is given twice or has no value", hint=_HINT)
        found[name] = _decode(value, uri)
    return found


def _decode(text: str, uri: str) -> str:
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeError as error:
        raise InvalidArgument(f"{uri!r} is not UTF-8 when decoded", hint=_HINT) from error
    if "\0" in decoded:
        raise InvalidArgument(f"{uri!r} has a NUL in it", hint=_HINT)
    return decoded
