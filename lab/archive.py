"""Debian packages for the laboratory, fetched and unpacked without touching the host's own package state.

First through the host's own configuration, if its lists know the package; else through a private one:
sources and lists of our own below the cache, the host's trusted keys. What is kept true: nothing is
installed, and nothing outside the cache changes.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabSetupError
from lab.host import run, say
from lab.paths import cache_dir

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LISTS_S = 600.0
_DOWNLOAD_S = 1200.0


@dataclass(frozen=True)
class Release:
    """A Debian release in the public archive; `security` says whether it has a security suite too."""

    name: str
    security: bool

    def sources(self) -> str:
        """The lines of a sources.list."""
        options = f"[arch=amd64 signed-by={KEYRING}]"
        lines = [f"deb {options} {mirror()}/debian {self.name} main"]
        if self.security:
            lines.append(f"deb {options} {mirror()}/debian-security {self.name}-security main")
        return "\n".join(lines) + "\n"


def mirror() -> str:
    """Where Debian's archive is: `$LAB_DEBIAN_MIRROR`, or http://deb.debian.org."""
    return os.environ.get("LAB_DEBIAN_MIRROR") or "http://deb.debian.org"


def unpack_kernel(metapackage: str, release: Release, target: Path, *, host_first: bool) -> None:
    """Unpack the kernel packages behind a metapackage into the folder `target`.

    The concrete packages move with every update of the archive, so they are looked up each time.
    host_first: ask the host's own configuration before the private one.
    Raises LabSetupError when they cannot be had.
    """
    options: list[str] = []
    packages = _packages(metapackage, options) if host_first else []
    if not packages:
        options = _private(release)
        packages = _packages(metapackage, options)
    if not packages:
        raise LabSetupError(f"Debian {release.name} has no package {metapackage}")
    _fetch(packages, options, target)


def unpack(packages: list[str], release: Release, target: Path) -> None:
    """Unpack packages of a release, whatever the host's own is, into the folder `target`.

    Raises LabSetupError when they cannot be had.
    """
    _fetch(packages, _private(release), target)


def _fetch(packages: list[str], options: list[str], target: Path) -> None:
    say(f"downloading {' '.join(packages)}")
    target.mkdir(parents=True)
    run(["apt-get", *options, "-q", "download", *packages], timeout_s=_DOWNLOAD_S, cwd=target.parent)
    for deb in target.parent.glob("*.deb"):
        run(["dpkg-deb", "-x", str(deb), str(target)], timeout_s=300)
        deb.unlink()


def _packages(metapackage: str, options: list[str]) -> list[str]:
    """The concrete packages: the source, or the image and what it is split into in newer releases."""
    found: list[str] = []
    wanted = [metapackage]
    while wanted:
        name = wanted.pop()
        try:
            answer = run(["apt-cache", *options, "depends", name], timeout_s=120)
        except LabSetupError:
            return []
        for needed in re.findall(
            r"^ *Depends: (linux-(?:image|binary|modules|source)-\d\S*)$", answer, re.MULTILINE
        ):
            if needed not in found:
                found.append(needed)
                wanted.append(needed)
    return found


def _private(release: Release) -> list[str]:
    """Options that give apt a configuration of its own, its lists up to date."""
    if not KEYRING.is_file():
        raise LabSetupError(f"{KEYRING} is missing: run lab/install-deps.sh (package debian-archive-keyring)")
    home = cache_dir() / "apt" / release.name
    for folder in ("lists/partial", "archives/partial"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "sources.list").write_text(release.sources())
    settings = {
        "Dir::Etc::sourcelist": home / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State::lists": home / "lists",
        "Dir::Cache": home,
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    say(f"reading the package lists of Debian {release.name}")
    run(["apt-get", *options, "-q", "update"], timeout_s=_LISTS_S)
    return options
