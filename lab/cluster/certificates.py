"""The cluster's certificate authority, and the keys that it vouches for.

Everything is P-256 and valid for a month: a cluster of the laboratory lives for hours. What is kept true: keys are
readable for their owner only; making them again replaces all of them, so that no mixture is ever trusted.
"""

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = dt.timedelta(days=30)


@dataclass(frozen=True)
class Identity:
    """Who a certificate is for: its common name is the user and its organization the group (RBAC)."""

    file: str
    name: str
    group: str = ""
    addresses: tuple[str, ...] = ()
    """IP addresses and DNS names that it serves; none for a client."""


class Authority:
    """A certificate authority with its key in memory."""

    def __init__(self, folder: Path) -> None:
        """Make a new one; its certificate goes to `ca.crt` in the folder, which must exist."""
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name("csi-vduse lab", "")
        usage = x509.BasicConstraints(ca=True, path_length=0)
        builder = _builder(name, name, self._key.public_key()).add_extension(usage, critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.file = folder / "ca.crt"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, identity: Identity) -> None:
        """Write `FILE.key` and `FILE.crt` for that identity."""
        key = write_key(self._folder / f"{identity.file}.key")
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        subject = _name(identity.name, identity.group)
        builder = _builder(subject, self._certificate.subject, key.public_key())
        if identity.addresses:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
            builder = builder.add_extension(_alternatives(identity.addresses), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        (self._folder / f"{identity.file}.crt").write_bytes(pem)


def write_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a private key and write it as PEM, for its owner only."""
    key = ec.generate_private_key(ec.SECP256R1())
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    return key


def _name(common: str, organization: str) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organization:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    start = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)  # a guest's clock may be behind
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + VALID)
    )


def _alternatives(addresses: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for address in addresses:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            names.append(x509.DNSName(address))
    return x509.SubjectAlternativeName(names)
