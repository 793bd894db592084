"""The cluster's own network: a namespace with a bridge, the nodes' taps on it, and the control plane inside.

Nothing in it reaches the host's network or the world. There is no kube-proxy and no DNS: pods need one Service only,
`kubernetes`, and its address is simply one of the bridge's. What is kept true: `lay` finds no namespace of that name
(its processes would be another cluster's), and `remove` leaves none, nor a process in it.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

from lab.cluster.layout import API_SERVICE, HOST_ADDRESS, Layout
from lab.errors import LabError, LabSetupError
from lab.host import run

END_S = 30.0
_IP_S = 60.0


def exists(layout: Layout) -> bool:
    """Whether the cluster's network is there, which is to say whether the cluster is up, or half so."""
    return Path("/run/netns", layout.namespace).exists()


def commands(layout: Layout) -> list[list[str]]:
    """What makes the network, in order."""
    outside = [["ip", "netns", "add", layout.namespace]]
    inside = [
        "ip link set lo up",
        "ip link add br0 type bridge",
        f"ip address add {HOST_ADDRESS}/24 dev br0",
        f"ip address add {API_SERVICE}/32 dev br0",
        "ip link set br0 up",
    ]
    for node in layout.nodes:
        inside += [
            f"ip tuntap add {node.nic.device} mode tap vnet_hdr",
            f"ip link set {node.nic.device} master br0 up",
            f"ip route add {node.pods} via {node.address}",
        ]
    inside.append("sysctl -q -w net.ipv4.ip_forward=1")
    return outside + [layout.inside(*line.split()) for line in inside]


def lay(layout: Layout) -> None:
    """Make the network.

    Raises LabError when it is there already.
    """
    if exists(layout):
        raise LabError(f"the cluster `{layout.name}` is up, or half so; `make cluster-down` ends it")
    for command in commands(layout):
        run(command, timeout_s=_IP_S)


def processes(layout: Layout) -> list[int]:
    """The processes in the network: the control plane, and whoever talks to it."""
    if not exists(layout):
        return []
    return [int(word) for word in run(["ip", "netns", "pids", layout.namespace], timeout_s=_IP_S).split()]


def remove(layout: Layout) -> None:
    """End every process in the network and remove it; nothing happens when there is none.

    Raises LabError when a process does not die.
    """
    deadline = time.monotonic() + END_S
    while pids := processes(layout):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"processes of the cluster `{layout.name}` do not die: {pids}")
        time.sleep(0.05)
    if exists(layout):
        with contextlib.suppress(LabSetupError):  # somebody else may have been faster
            run(["ip", "netns", "delete", layout.namespace], timeout_s=_IP_S)
