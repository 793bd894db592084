"""What a container runtime asks of a CNI plugin, read and checked (https://www.cni.dev/docs/spec/, version 1.1).

Pure functions of the environment and of the network's configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from csi_vduse.config import DEFAULT_RUN_DIR
from csi_vduse.errors import InvalidArgument

VERSIONS: Final = ("0.4.0", "1.0.0", "1.1.0")
# What each command cannot do without.
NEEDED: Final = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
    "VERSION": (),
}


@dataclass(frozen=True)
class Request:
    """One call of the plugin.

    Args:
        command: of NEEDED.
        container: the runtime's id of the pod's sandbox.
        netns: of the pod; empty when it is gone already.
        interface: what the card is to be called there.
        arguments: of CNI_ARGS, such as K8S_POD_NAME.
        path: where other plugins are.
        network: the configuration.
    """

    command: str
    container: str
    netns: str
    interface: str
    arguments: dict[str, str]
    path: list[Path]
    network: dict[str, Any]

    @property
    def version(self) -> str:
        """Of the specification that the configuration is written for."""
        return str(self.network.get("cniVersion", "0.4.0"))

    @property
    def run_dir(self) -> Path:
        """Of the agent."""
        return Path(self.network.get("runDir", DEFAULT_RUN_DIR))

    @property
    def card(self) -> str:
        """Name of the card, which says whose it is."""
        return card_name(self.network["name"], self.container, self.interface)

    def socket(self) -> Path:
        """The vhost-user server's socket for this pod.

        Raises:
            InvalidArgument: there is none in the configuration, or it asks for what is not known.
        """
        names = {
            "container": self.container,
            "interface": self.interface,
            "namespace": self.arguments.get("K8S_POD_NAMESPACE", ""),
            "pod": self.arguments.get("K8S_POD_NAME", ""),
        }
        try:
            path = Path(str(self.network["socket"]).format(**names))
        except (KeyError, ValueError, IndexError) as error:
            raise InvalidArgument(
                f"`socket` of network {self.network['name']!r} is missing or cannot be filled in: {error}",
                hint="a path with {container}, {interface}, {namespace} or {pod} in it",
            ) from error
        if not path.is_absolute():
            raise InvalidArgument(f"`socket` {path} is no absolute path")
        return path


def card_name(network: str, container: str, interface: str) -> str:
    """Name of a card: a device's name, which begins with that of its network's cards."""
    return f"{cards_of(network)}{_digest(f'{container}/{interface}', 16)}"


def cards_of(network: str) -> str:
    """What the names of all cards of a network begin with."""
    return f"cni-{_digest(network, 8)}-"


def read(environment: Mapping[str, str], stdin: str) -> Request:
    """Read a call.

    Raises:
        InvalidArgument: the environment or the configuration is not what the specification says.
    """
    command = environment.get("CNI_COMMAND", "")
    if command not in NEEDED:
        raise InvalidArgument(
            f"CNI_COMMAND {command!r}", hint=f"a container runtime sets it: {', '.join(NEEDED)}"
        )
    if missing := [name for name in NEEDED[command] if not environment.get(name)]:
        raise InvalidArgument(f"{command} without {', '.join(missing)}")
    try:
        network = json.loads(stdin)
    except ValueError as error:
        raise InvalidArgument(f"the network's configuration is no JSON: {error}") from error
    if not isinstance(network, dict) or (command != "VERSION" and not isinstance(network.get("name"), str)):
        raise InvalidArgument("the network's configuration is no object with a name")
    pairs = (pair.partition("=") for pair in environment.get("CNI_ARGS", "").split(";"))
    return Request(
        command,
        environment.get("CNI_CONTAINERID", ""),
        environment.get("CNI_NETNS", ""),
        environment.get("CNI_IFNAME", ""),
        {key: value for key, _, value in pairs},
        [Path(each) for each in environment.get("CNI_PATH", "").split(":") if each],
        network,
    )


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]
