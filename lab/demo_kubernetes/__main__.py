"""Tells a story on the cluster of the laboratory: `python -m lab.demo_kubernetes [STORY]`, or `make demo-kubernetes`.

The stories are a volume's life, faults, an upgrade, and a remote volume that moves. A cluster that is up is used;
otherwise one is brought up, and stays for looking around. What is kept true: the first claim that fails ends the story
with 1, the cluster's logs collected.
"""

import argparse
import sys
import time

from lab.cluster import bundle
from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.demo.story import ClaimFailed, Story
from lab.demo_kubernetes.life import Shown
from lab.demo_kubernetes.stories import STORIES
from lab.errors import LabError


def main() -> int:
    """Tell the whole story; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="dev", help="which cluster (default: dev)")
    parser.add_argument("story", nargs="?", choices=list(STORIES), default="life", help="default: life")
    options = parser.parse_args()
    cluster = Cluster(Layout(options.name))
    started = time.monotonic()
    story = Story()
    shown = Shown(story, cluster)
    try:
        cluster.ensure_up()
        for step in STORIES[options.story]:
            step(shown)
    except (ClaimFailed, LabError) as error:
        print(f"\ndemo: FAILED: {error}", flush=True)
        bundle.collect(cluster.layout)
        return 1
    print(f"\ndemo: all {story.claims} claims hold, {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
