"""The page that draws the dashboard: built once by npm into the cache, opened in Chromium in the cluster's network.

What is kept true: what is drawn is the chart's file of today; only the page itself, which does not know it, is built.
"""

import shutil
from pathlib import Path

from lab.cluster.built import built, digest
from lab.cluster.layout import Layout
from lab.dashboard.prometheus import SCRAPE_S
from lab.demo_kubernetes import helm
from lab.host import run

DASHBOARD = helm.CHART / "dashboards" / "csi-vduse.json"
_PAGE = Path(__file__).parent / "page"
_BUILD_S = 1800.0
_DRAW_S = 300.0


def obtain() -> Path:
    """The folder of the built page and of what draws it, built if it is not in the cache.

    Raises LabSetupError when npm fails.
    """
    return built("dashboard-page", digest(files=_PAGE.iterdir(), root=_PAGE), _build)


def draw(layout: Layout, prometheus: str, seconds: int, picture: Path) -> list[str]:
    """Draw the last seconds that Prometheus has, into a PNG file; returns the titles of panels without a value.

    Raises LabSetupError when a query is refused or the page fails.
    """
    argv = [
        "node",
        "draw.mjs",
        str(DASHBOARD),
        prometheus,
        str(seconds),
        str(SCRAPE_S),
        str(picture.absolute()),
    ]
    return run(layout.inside(*argv), timeout_s=_DRAW_S, cwd=obtain()).splitlines()


def _build(target: Path) -> None:
    shutil.copytree(_PAGE, target, dirs_exist_ok=True)
    for argv in (["npm", "install", "--no-audit", "--no-fund"], ["npx", "vite", "build"]):
        run(argv, timeout_s=_BUILD_S, cwd=target)
