"""Certificates for tests: an authority, a server and clients, in directories with QEMU's names. Made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=120)


class Authority:
    """A certificate authority in `directory`."""

    def __init__(self, directory: Path, name: str = "test") -> None:
        directory.mkdir()
        self._directory = directory
        self._name = name
        self._certificate, self._key = directory / "ca-cert.pem", directory / "ca-key.pem"
        openssl(
            *("req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *(
                "-days",
                "2",
                "-subj",
                f"/CN={name} authority",
                "-keyout",
                self._key,
                "-out",
                self._certificate,
            ),
            *("-addext", "keyUsage=critical,keyCertSign"),
        )

    def issue(self, role: str, common_name: str) -> Path:
        """Make the directory of a server or a client; role is "server" or "client"."""
        target = self._directory / f"{role}-{common_name}"
        target.mkdir()
        key, request, certificate = (target / f"{role}-{part}" for part in ("key.pem", "csr", "cert.pem"))
        openssl(
            *("req", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-subj", f"/CN={common_name}", "-keyout", key, "-out", request),
        )
        extensions = target / "extensions"
        extensions.write_text(
            f"subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage={role}Auth\n"
            "keyUsage=critical,digitalSignature\n"
        )
        openssl(
            *("x509", "-req", "-days", "2", "-in", request, "-out", certificate, "-extfile", extensions),
            *("-CA", self._certificate, "-CAkey", self._key, "-CAcreateserial"),
        )
        shutil.copy(self._certificate, target / "ca-cert.pem")
        return target
