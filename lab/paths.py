"""Where the laboratory keeps things.

What is kept true: everything downloaded or built is below one cache folder that may be deleted at any time;
everything that belongs to one boot is below that machine's own folder.
"""

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
GUEST_SCRIPTS = CHECKOUT / "lab" / "guest"


def cache_dir() -> Path:
    """The cache folder: `$CSI_VDUSE_CACHE`, or `.cache/` in the checkout; made if missing."""
    path = Path(os.environ.get("CSI_VDUSE_CACHE") or CHECKOUT / ".cache").resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def results_dir() -> Path:
    """The folder that guests may write to (`$LAB_RESULTS` here and there); made if missing."""
    path = Path(os.environ.get("LAB_RESULTS") or cache_dir() / "results").resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def machines_dir() -> Path:
    """The parent of the machines' own folders; made if missing."""
    path = cache_dir() / "machines"
    path.mkdir(parents=True, exist_ok=True)
    return path
