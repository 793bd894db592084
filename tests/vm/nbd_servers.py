"""Real NBD servers for the VM suite: each serves an image, and can be killed as `kill -9` does it and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm.conftest import wait_until
from tests.vm.exports import tool

PORT = 10809


@dataclass
class NbdServer:
    """A server of one export, which argv starts."""

    argv: list[str]
    export: str
    host: str = "127.0.0.1"
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def uri(self) -> str:
        return f"nbd://{self.host}:{PORT}/{self.export}"

    def start(self) -> None:
        self.process = subprocess.Popen(self.argv, start_new_session=True, stdin=subprocess.DEVNULL)
        wait_until(self._answers, f"{self.argv[0]} listening")

    def hang(self) -> None:
        """Have it answer nothing any more, until it is killed."""
        self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Send it with all its children: they are its group."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None
        with socket.socket() as probe:
            probe.settimeout(10)
            return probe.connect_ex((self.host, PORT)) == 0 and bool(probe.recv(1))


def nbdkit(image: Path, *options: str, host: str = "127.0.0.1") -> NbdServer:
    argv = ["nbdkit", "--foreground", f"--port={PORT}", f"--ipaddr={host}", *options]
    return NbdServer([*argv, "file", str(image)], "", host)


def qemu(image: Path, kind: str = "raw") -> NbdServer:
    """kind: the image's format."""
    file = f"file.driver=file,file.filename={image}"
    argv = ["qemu-storage-daemon", "--blockdev", f"driver={kind},{file},node-name=n,discard=unmap"]
    argv += ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={PORT}"]
    return NbdServer([*argv, "--export", "nbd,id=e,node-name=n,name=disk,writable=on"], "disk")


@contextmanager
def serving(server: NbdServer) -> Iterator[NbdServer]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


def make_keys(folder: Path) -> None:
    """A CA, a server for 127.0.0.1, a client, and a key that alice knows."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    ca = ["-CA", folder / "ca-cert.pem", "-CAkey", folder / "ca-key.pem"]
    subject = ["req", "-x509", "-days", "30", *key]
    out = ["-keyout", folder / "ca-key.pem", "-out", folder / "ca-cert.pem"]
    tool("openssl", *subject, "-subj", "/CN=test ca", *out)
    for name, more in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "keyUsage=digitalSignature")):
        out = ["-keyout", folder / f"{name}-key.pem", "-out", folder / f"{name}-cert.pem"]
        tool("openssl", *subject, *ca, "-subj", f"/CN={name}", "-addext", more, *out)
    (folder / "keys.psk").write_text(f"alice:{'5a' * 32}\n")
