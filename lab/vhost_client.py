"""A vhost-vdpa and vhost-user client that is not ours: qemu-io with libblkio, QEMU's own means for such disks.

Debian 13 has the block driver `virtio-blk-vhost-vdpa`, Debian 12 has not. So its packages are unpacked into
the cache with the libraries that they need (some MB), and the program runs with the loader and the C library
of its own release. What is kept true: the folder in the cache is complete or absent; in a guest, where the
cache cannot be written, nothing is downloaded.
"""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.archive import Release, unpack
from lab.errors import CommandFailed, CommandTimeout, LabSetupError
from lab.paths import cache_dir

DRIVER = "virtio-blk-vhost-vdpa"
_DEBIAN = Release("trixie", security=True)
_PROGRAMS = ["qemu-utils", "qemu-block-extra", "libblkio1"]
# What qemu-io and its one driver need; all that qemu-block-extra depends on would bring Ceph along.
_LIBRARIES = [
    "libaio1t64",
    "libatomic1",
    "libblkid1",
    "libc6",
    "libffi8",
    "libfuse3-4",
    "libgcc-s1",
    "libglib2.0-0t64",
    "libgmp10",
    "libgnutls30t64",
    "libhogweed6t64",
    "libidn2-0",
    "libmount1",
    "libnettle8t64",
    "libnuma1",
    "libp11-kit0",
    "libpcre2-8-0",
    "libselinux1",
    "libtasn1-6",
    "libunistring5",
    "liburing2",
    "libzstd1",
    "zlib1g",
]
_LIBRARY_FOLDER = "usr/lib/x86_64-linux-gnu"
_TIMEOUT_S = 120.0
# One line of `read -v`: an address, then up to sixteen bytes in hexadecimal, then their characters.
_DUMP_LINE = re.compile(r"^[0-9a-f]{8,}: {2}((?:[0-9a-f]{2} ){1,16})", re.MULTILINE)


@dataclass(frozen=True)
class VhostClient:
    """The unpacked client; `root` has its files, `driver` is `virtio-blk-vhost-user` for a socket."""

    root: Path
    driver: str = DRIVER

    def version(self) -> str:
        """The first line of what it says about itself."""
        return self._execute(["--version"]).splitlines()[0]

    def run(self, device: Path, commands: list[str]) -> str:
        """Run commands of qemu-io on a device such as /dev/vhost-vdpa-0 and return what they print.

        commands: for example `write -P 0x41 0 4096`, `flush`, `read -P 0x41 0 4096`.
        Raises CommandFailed when the device cannot be opened, a request fails or a pattern differs, and
        CommandTimeout when the device does not answer.
        """
        return self._execute(self._words(device, commands))

    def start(self, device: Path, commands: list[str]) -> subprocess.Popen[bytes]:
        """Run commands in the background; nobody sees what they print."""
        argv, environment = self._command(self._words(device, commands))
        return subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def read(self, device: Path, offset_bytes: int, length_bytes: int) -> bytes:
        """Read bytes of a device; offset and length are multiples of its block size."""
        text = self.run(device, [f"read -v {offset_bytes} {length_bytes}"])
        content = b"".join(bytes.fromhex(line) for line in _DUMP_LINE.findall(text))
        if len(content) != length_bytes:
            raise CommandFailed(f"qemu-io showed {len(content)} bytes instead of {length_bytes}:\n{text}")
        return content

    def _words(self, device: Path, commands: list[str]) -> list[str]:
        image = f"driver={self.driver},path={device},cache.direct=on"
        return ["--image-opts", image, *(word for command in commands for word in ("-c", command))]

    def qemu_img(self, words: list[str]) -> tuple[list[str], dict[str, str]]:
        """How to run its qemu-img with these arguments: argv and environment."""
        return self._command(words, "qemu-img")

    def _command(self, words: list[str], program: str = "qemu-io") -> tuple[list[str], dict[str, str]]:
        libraries = self.root / _LIBRARY_FOLDER
        loader = libraries / "ld-linux-x86-64.so.2"
        argv = [str(loader), "--library-path", str(libraries), str(self.root / "usr/bin" / program), *words]
        # The C library that this environment is for is another one: nothing of it may be preloaded.
        environment = {"PATH": os.environ.get("PATH", ""), "QEMU_MODULE_DIR": str(libraries / "qemu")}
        return argv, environment

    def _execute(self, words: list[str]) -> str:
        argv, environment = self._command(words)
        try:
            done = subprocess.run(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CommandTimeout(
                f"qemu-io {' '.join(words)} did not end within {_TIMEOUT_S:.0f} s"
            ) from error
        if done.returncode != 0:
            raise CommandFailed(f"qemu-io {' '.join(words)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout


def obtain() -> VhostClient:
    """The client, downloaded if the cache has none.

    Raises LabSetupError when it cannot be had.
    """
    cached = cache_dir() / "vhost-clients"
    if not cached.is_dir():
        if os.environ.get("LAB") == "guest":
            raise LabSetupError(
                "no vhost-vdpa client in the cache: run `python -m lab.vhost_client` on the host first"
            )
        with tempfile.TemporaryDirectory(prefix=".vhost-client-", dir=cache_dir()) as work:
            made = Path(work) / "root"
            unpack([*_PROGRAMS, *_LIBRARIES], _DEBIAN, made)
            _strip(made)
            _check(VhostClient(made))
            try:
                made.rename(cached)
            except OSError:
                if not cached.is_dir():  # another process may have been faster
                    raise
    return VhostClient(cached)


def _strip(root: Path) -> None:
    """Keep qemu-io, qemu-img, their block driver and the libraries: what is not needed only fills the cache."""
    libraries = root / _LIBRARY_FOLDER
    for path in (root / "usr/bin").iterdir():
        if path.name not in {"qemu-io", "qemu-img"}:
            path.unlink()
    for path in (libraries / "qemu").iterdir():
        if path.name != "block-blkio.so":
            path.unlink()
    for name in ("etc", "var", "usr/share", "usr/sbin", "usr/libexec"):
        shutil.rmtree(root / name, ignore_errors=True)


def _check(client: VhostClient) -> None:
    """Prove, without a device, that program, libraries and block driver fit together."""
    client.version()
    try:
        client.run(Path("/dev/null"), ["flush"])
    except CommandFailed as error:
        if "unknown driver" not in str(error).lower() and "not supported" not in str(error).lower():
            return  # the driver is there, and refused what is no device of its kind
        raise LabSetupError(f"the qemu-io of Debian {_DEBIAN.name} has no {DRIVER} here: {error}") from error


if __name__ == "__main__":
    print(obtain().version())
