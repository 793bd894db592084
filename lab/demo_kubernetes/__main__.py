"""Tells the demo on the cluster of the laboratory: `python -m lab.demo_kubernetes`, or `make demo-kubernetes`.

A cluster that is up is used; otherwise one is brought up, and stays for looking around. What is kept true: the first
claim that fails ends the demo with 1, the cluster's logs collected.
"""

import argparse
import sys
import time

from lab.cluster import bundle, network
from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.demo.story import ClaimFailed, Story
from lab.demo_kubernetes.life import STEPS, Shown
from lab.errors import LabError


def main() -> int:
    """Tell the whole story; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="dev", help="which cluster (default: dev)")
    cluster = Cluster(Layout(parser.parse_args().name))
    started = time.monotonic()
    story = Story()
    shown = Shown(story, cluster)
    try:
        if not network.exists(cluster.layout):
            cluster.up()
        for step in STEPS:
            step(shown)
    except (ClaimFailed, LabError) as error:
        print(f"\ndemo: FAILED: {error}", flush=True)
        bundle.collect(cluster.layout)
        return 1
    print(f"\ndemo: all {story.claims} claims hold, {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
