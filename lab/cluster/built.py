"""Results of long builds, kept in the cache by the content that they are made of.

What is kept true: a result is complete or absent (it appears by one rename); the same inputs are built once; a result
of older inputs is removed when a newer one of the same name is there, so that the cache does not grow.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lab.cluster.steps import step
from lab.host import say
from lab.paths import cache_dir


def digest(words: Iterable[str] = (), files: Iterable[Path] = (), root: Path = Path("/")) -> str:
    """A short name for that content: words (versions, flags), and files by their path below `root` and content."""
    summary = hashlib.sha256()
    for word in words:
        summary.update(f"{len(word)}:{word}".encode())
    for file in sorted(files):
        content = file.read_bytes()
        summary.update(f"{file.relative_to(root)}:{file.stat().st_mode & 0o111:o}:{len(content)}:".encode())
        summary.update(content)
    return summary.hexdigest()[:16]


def built(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder with the result `name` for the content `key`; `build` fills it if it is not in the cache."""
    parent = cache_dir() / "built"
    result = parent / f"{name}.{key}"
    if result.is_dir():
        say(f"cluster: {name}: in the cache")
        return result
    parent.mkdir(parents=True, exist_ok=True)
    with step(f"{name}: building"), tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as work:
        fresh = Path(work) / "fresh"
        fresh.mkdir()
        build(fresh)
        fresh.rename(result)
    for older in parent.glob(f"{name}.*"):
        if older != result:
            shutil.rmtree(older)
    return result
