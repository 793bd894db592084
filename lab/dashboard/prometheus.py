"""Prometheus on a cluster of the laboratory: Debian's program, in the cluster's network, for as long as it is asked.

What is kept true: it scrapes the ports and sets the label `node` as the chart's PodMonitor says, so that what is seen
there is what a user's Prometheus would have; nothing of it stays.
"""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lab.cluster import access
from lab.cluster.layout import Layout
from lab.demo_kubernetes import helm
from lab.errors import LabSetupError
from lab.host import run, tail

ADDRESS = "127.0.0.1:9090"
SCRAPE_S = 5
_READY_S = 60.0
_END_S = 30.0
_ASK_S = 30.0


def config(layout: Layout) -> str:
    """Its configuration; JSON, which is YAML too. Source: the chart's templates/monitoring/podmonitor.yaml."""
    pod = "__meta_kubernetes_pod_"
    scrape = {
        "job_name": "csi-vduse",
        "kubernetes_sd_configs": [
            {
                "role": "pod",
                "kubeconfig_file": str(layout.folder / f"{access.ADMIN}.kubeconfig"),
                "namespaces": {"names": [helm.NAMESPACE]},
            }
        ],
        "relabel_configs": [
            {
                "source_labels": [f"{pod}label_app_kubernetes_io_component"],
                "regex": "controller|node",
                "action": "keep",
            },
            {"source_labels": [f"{pod}container_port_name"], "regex": "http|m-.*", "action": "keep"},
            {"source_labels": [f"{pod}node_name"], "target_label": "node"},
        ],
    }
    return json.dumps({"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": [scrape]}, indent=1)


@contextlib.contextmanager
def scraping(layout: Layout) -> Iterator[str]:
    """Have it run; yields its URL, as it is called in the cluster's network, when every target has answered.

    Raises LabSetupError when it does not start, or a target does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="lab-prometheus-") as folder:
        file, log = Path(folder, "prometheus.yml"), Path(folder, "log")
        file.write_text(config(layout))
        argv = [
            *("prometheus", f"--config.file={file}", f"--web.listen-address={ADDRESS}"),
            f"--storage.tsdb.path={folder}/data",
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                layout.inside(*argv), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            _wait_for_targets(layout, process, log)
            yield f"http://{ADDRESS}"
        finally:
            process.terminate()
            process.wait(_END_S)


def _wait_for_targets(layout: Layout, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not _all_up(layout):
        if process.poll() is not None or time.monotonic() > deadline:
            raise LabSetupError(f"Prometheus does not scrape every target:\n{tail(log, 20)}")
        time.sleep(1)


def _all_up(layout: Layout) -> bool:
    """Whether there are targets, and the last scrape of each went well."""
    asked = ["promtool", "query", "instant", f"http://{ADDRESS}", "min(up)"]
    try:
        return " => 1 " in run(layout.inside(*asked), timeout_s=_ASK_S)
    except LabSetupError:  # it does not listen yet
        return False
