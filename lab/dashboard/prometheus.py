"""Prometheus on a cluster of the laboratory: Debian's program, in the cluster's network, for as long as it is asked.

What is kept true: it scrapes the ports and sets the label `node` as the chart's PodMonitor says, so that what is seen
there is what a user's Prometheus would have; it judges by the chart's alerts; nothing of it stays.
"""

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lab.cluster.layout import Layout
from lab.demo_kubernetes import helm
from lab.errors import LabSetupError
from lab.host import run, tail

ADDRESS = "127.0.0.1:9090"
SCRAPE_S = 5
# Source: the chart's templates/monitoring/podmonitor.yaml.
COMPONENTS = ("controller", "node")
PORTS = re.compile("http|m-.*")
_ALERTS = helm.CHART / "alerts.yaml"
_READY_S = 60.0
_END_S = 30.0
_ASK_S = 30.0


def config(pods: Iterable[Any]) -> str:
    """Its configuration; JSON, which is YAML too. pods: the driver's, as the API has them.

    The targets are a list, because Debian's Prometheus is built without discovery in Kubernetes.
    """
    targets = [
        {
            "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
            "labels": {"node": pod["spec"]["nodeName"]},
        }
        for pod in pods
        if pod["metadata"]["labels"].get("app.kubernetes.io/component") in COMPONENTS
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
        if PORTS.fullmatch(port["name"])
    ]
    return json.dumps(
        {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [str(_ALERTS)],
            "scrape_configs": [{"job_name": "csi-vduse", "static_configs": targets}],
        },
        indent=1,
    )


@contextlib.contextmanager
def scraping(layout: Layout, pods: Iterable[Any]) -> Iterator[str]:
    """Have it run; yields its URL, as it is called in the cluster's network, when every target has answered.

    pods: the driver's, as the API has them.

    Raises LabSetupError when it does not start, or a target does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="lab-prometheus-") as folder:
        file, log = Path(folder, "prometheus.yml"), Path(folder, "log")
        file.write_text(config(pods))
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


def alerts(layout: Layout) -> str:
    """The alerts that are pending or firing, one line each."""
    return _ask(layout, "ALERTS").strip()


def _ask(layout: Layout, query: str) -> str:
    argv = ["promtool", "query", "instant", f"http://{ADDRESS}", query]
    return run(layout.inside(*argv), timeout_s=_ASK_S)


def _wait_for_targets(layout: Layout, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not _all_up(layout):
        if process.poll() is not None or time.monotonic() > deadline:
            raise LabSetupError(f"Prometheus does not scrape every target:\n{tail(log, 20)}")
        time.sleep(1)


def _all_up(layout: Layout) -> bool:
    """Whether there are targets, and the last scrape of each went well."""
    try:
        return " => 1 " in _ask(layout, "min(up)")
    except LabSetupError:  # it does not listen yet
        return False
