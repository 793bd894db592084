"""The driver's main job on a real cluster, step by step: the demo's own functions, whose claims are the assertions.

Needs a cluster of the laboratory that is up (`make cluster-up`); `make test-e2e` sees to it. The steps build on each
other, so the first one that fails ends the story, and the rest fail with it.
"""

import pytest

from lab.cluster import bundle, network
from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.demo.story import Story
from lab.demo_kubernetes.life import STEPS, Shown


@pytest.fixture(scope="module")
def shown():
    cluster = Cluster(Layout())
    if not network.exists(cluster.layout):
        cluster.up()
    return Shown(Story(), cluster)


@pytest.fixture(scope="module")
def failed():
    return []


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_volumes_life(step, shown, failed):
    assert not failed, f"step {failed[0]} failed before"
    try:
        step(shown)
    except BaseException:
        failed.append(step.__name__)
        bundle.collect(shown.cluster.layout)
        raise
