"""Draws the chart's dashboard from the metrics of a running cluster: `python -m lab.dashboard`, or `make dashboard`.

Two pods write and verify while Prometheus scrapes what the chart's PodMonitor names. What is kept true: every panel of
the dashboard has something to show and none of the chart's alerts is raised; otherwise it ends with 1.
"""

import argparse
import sys
import time
from pathlib import Path

from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.dashboard import page, prometheus
from lab.demo.story import ClaimFailed, Story
from lab.demo_kubernetes import faults, life
from lab.demo_kubernetes.life import Shown
from lab.errors import LabError
from lab.paths import CHECKOUT

_PICTURE = CHECKOUT / "docs" / "images" / "grafana-dashboard.png"


def main() -> int:
    """Tell the whole story; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="dev", help="which cluster (default: dev)")
    parser.add_argument("--seconds", type=int, default=300, help="how long to scrape (default: 300)")
    parser.add_argument(
        "--picture", type=Path, default=_PICTURE, help=f"default: {_PICTURE.relative_to(CHECKOUT)}"
    )
    options = parser.parse_args()
    shown = Shown(Story(), Cluster(Layout(options.name)))
    try:
        shown.cluster.ensure_up()
        life.install(shown)
        with prometheus.scraping(shown.cluster.layout, shown.driver.objects("pods")) as address:
            faults.begin(shown)
            _draw(shown, address, options.seconds, options.picture)
            alerts = prometheus.alerts(shown.cluster.layout)
            shown.story.seen(alerts)
            shown.story.check(not alerts, "no alert of the chart is pending or firing")
            faults.end(shown)
    except (ClaimFailed, LabError) as error:
        print(f"\ndashboard: FAILED: {error}", flush=True)
        return 1
    return 0


def _draw(shown: Shown, address: str, seconds: int, picture: Path) -> None:
    shown.story.step(f"Scrape for {seconds} s, and draw what Prometheus has")
    time.sleep(seconds)
    empty = page.draw(shown.cluster.layout, address, seconds, picture)
    shown.story.check(not empty, f"every panel shows something{': not ' if empty else ''}{', '.join(empty)}")
    shown.story.seen(str(picture))


if __name__ == "__main__":
    sys.exit(main())
