"""The stories of the demo on a real cluster, step by step: their own functions, whose claims are the assertions.

Needs a cluster of the laboratory that is up (`make cluster-up`); `make test-e2e` sees to it. The steps of a story build
on each other, so the first one that fails ends it, and the rest fail with it.
"""

import pytest

from lab.cluster import bundle
from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.demo.story import Story
from lab.demo_kubernetes.life import Shown
from lab.demo_kubernetes.stories import STORIES


@pytest.fixture(scope="module")
def shown():
    cluster = Cluster(Layout())
    cluster.ensure_up()
    return Shown(Story(), cluster)


@pytest.fixture(scope="module")
def failed():
    return {}


@pytest.mark.parametrize(
    ("story", "step"),
    [
        pytest.param(name, step, id=f"{name}-{step.__name__}")
        for name, steps in STORIES.items()
        for step in steps
    ],
)
def test_it_goes_as_the_story_says(story, step, shown, failed):
    assert story not in failed, f"step {failed[story]} failed before"
    try:
        step(shown)
    except BaseException:
        failed[story] = step.__name__
        bundle.collect(shown.cluster.layout)
        raise
