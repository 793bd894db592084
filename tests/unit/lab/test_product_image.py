"""The product's image is built from the checkout as a release of any version."""

import re

from lab.cluster import product_image
from lab.cluster.cluster import Cluster
from lab.cluster.layout import Layout
from lab.demo_kubernetes.kubectl import MANIFESTS


def test_the_context_is_the_checkout_as_another_release(tmp_path):
    product_image.copy_context(tmp_path, "9.8.7")
    assert '\nversion = "9.8.7"\n' in (tmp_path / "pyproject.toml").read_text()
    assert '__version__ = "9.8.7"' in (tmp_path / "csi_vduse/__init__.py").read_text()
    copied = re.findall(r"^COPY ((?!--from).+) \S+$", (tmp_path / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    assert all((tmp_path / name).exists() for words in copied for name in words.split())
    assert not (tmp_path / "tests").exists()


def test_the_writers_run_in_the_image_that_the_nodes_have():
    image = f"{product_image.NAME}:{Cluster(Layout()).version}"
    assert (MANIFESTS / "writers.yaml").read_text().count(image) == 2
