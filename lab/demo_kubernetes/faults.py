"""All of the driver and of the node dies once while two pods write and verify: no error, and all of it comes back."""

import time
from collections.abc import Callable
from typing import Any

from lab.cluster.control_plane import ControlPlane
from lab.cluster.node import NodeMachine
from lab.demo_kubernetes import helm
from lab.demo_kubernetes.life import Shown
from lab.demo_kubernetes.writers import PODS, Writers

AWAY_S = 300
"""How long the API server is away."""
_AGENT, _NODE, _CONTROLLER = "agent", "node", "controller"
_CONTAINERS = (
    (_AGENT, "agent"),
    (_NODE, "node"),
    (_CONTROLLER, "controller"),
    (_CONTROLLER, "csi-provisioner"),
    (_CONTROLLER, "csi-attacher"),
    (_CONTROLLER, "csi-resizer"),
    (_CONTROLLER, "csi-snapshotter"),
)
"""Component of the driver, and a container of its pods."""


def begin(shown: Shown) -> None:
    """Two writers, one on each node."""
    shown.story.step("Write and verify in two pods, one on each node")
    writers = Writers(shown.kubectl, shown.story)
    writers.start()
    shown.story.seen(shown.kubectl("get", "vdusevolumes"))
    writers.during("ten seconds in which nothing happens", lambda: time.sleep(10))


def kill_containers(shown: Shown) -> None:
    """Each container of the driver is killed: those of a node on each node's turn, the controller's in one pod."""
    shown.story.step("kill -9 each container of the driver")
    for component, container in _CONTAINERS:
        pods = _pods(shown, component)
        for pod in pods if component != _CONTROLLER else pods[:1]:
            where = pod["spec"]["nodeName"]
            _during(shown, f"kill -9 {container} on {where}", lambda p=pod, c=container: _kill(shown, p, c))  # type: ignore[misc]


def restart_services(shown: Shown) -> None:
    """Kubelet and containerd die on each node, and are started again."""
    shown.story.step("kill -9 kubelet, then containerd, and start them again")
    for machine in shown.machines:
        for service in ("kubelet", "containerd"):

            def restart(machine: NodeMachine = machine, service: str = service) -> None:
                machine.kill(service)
                machine.start(service)
                _wait_for_kubelet(shown, machine.node.name)

            _during(shown, f"{service} on {machine.node.name}", restart)


def api_away(shown: Shown) -> None:
    """The API server is away for minutes."""
    shown.story.step(f"The API server is away for {AWAY_S} s")
    plane = ControlPlane(shown.cluster.layout)

    def away() -> None:
        plane.stop("kube-apiserver", kill=True)
        time.sleep(AWAY_S)
        plane.start("kube-apiserver")
        plane.wait_for_api()
        for node in shown.cluster.layout.nodes:
            _wait_for_kubelet(shown, node.name)

    _during(shown, "no API server", away)


def end(shown: Shown) -> None:
    """All data is compared, and the driver is whole."""
    shown.story.step("Compare every block, and look at the driver")
    Writers(shown.kubectl, shown.story).finish()
    helm.wait(shown.cluster)
    shown.story.seen(shown.driver("get", "pods", "-o", "wide"))


STEPS = (begin, kill_containers, restart_services, api_away, end)


def _during(shown: Shown, what: str, act: Callable[[], None]) -> None:
    Writers(shown.kubectl, shown.story).during(what, act)


def _pods(shown: Shown, component: str) -> list[Any]:
    selector = f"app.kubernetes.io/component={component}"
    return [
        pod
        for pod in shown.driver.objects("pods", f"--selector={selector}")
        if "deletionTimestamp" not in pod["metadata"]
    ]


def _kill(shown: Shown, pod: Any, container: str) -> None:  # noqa: ANN401 -- JSON
    """Kill a container's first process, and wait until kubelet has started it again and it is ready."""
    name = pod["metadata"]["name"]
    before = _status(shown, name, container)
    machine = next(each for each in shown.machines if each.node.name == pod["spec"]["nodeName"])
    identifier = before["containerID"].rpartition("/")[2]
    machine.kill_container(identifier)

    def back() -> bool:
        now = _status(shown, name, container)
        return bool(now["ready"]) and now["restartCount"] > before["restartCount"]

    shown.driver.wait_until(back, f"{container} of {name} is back")


def _status(shown: Shown, pod: str, container: str) -> Any:  # noqa: ANN401 -- JSON
    statuses = shown.driver.object("pod", pod)["status"]["containerStatuses"]
    return next(each for each in statuses if each["name"] == container)


def _wait_for_kubelet(shown: Shown, node: str) -> None:
    """Wait until kubelet answers again: what is asked about a pod's log comes from it."""
    pod = next(pod for pod in PODS if shown.kubectl.object("pod", pod)["spec"]["nodeName"] == node)
    shown.kubectl.wait_until(lambda: shown.kubectl.succeeds("logs", pod, "--tail=1"), f"{node} answers")
