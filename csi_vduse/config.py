"""What the processes are told at start, as values: parsed and checked once, trusted afterwards.

Sizes are in bytes, times in seconds. Parsing of option texts lives here too, so that every subcommand
reads `--pool` and sizes the same way and refuses them with the same words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from csi_vduse.errors import InvalidArgument

POOL_KINDS = ("file", "nbd", "qsd")
DEFAULT_RUN_DIR = Path("/run/csi-vduse")
DEFAULT_STATE_DIR = Path("/var/lib/csi-vduse")
_MAX_SOCKET_PATH_BYTES = 107  # sun_path less its terminator, unix(7)
_POOL_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_SIZE = re.compile(r"(\d+)\s*([kmgtpe]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}


@dataclass(frozen=True)
class PoolConfig:
    """A place volumes are made in.

    location: DIR[?OPTION=VALUE] for kind "file"; ADDRESS[?tls=DIR] of a storage server for the others.
    """

    name: str
    kind: str
    location: str

    @property
    def directory(self) -> Path:
        """Of a pool of kind "file"."""
        return Path(self.location.partition("?")[0])


@dataclass(frozen=True)
class AgentConfig:
    """What the agent is told.

    Args:
        run_dir: on tmpfs; `agent.sock` and `volumes/` are below it.
        msg_timeout_s: how long the kernel waits for a worker's answer before it gives the device up.
        vhost_msg_timeout_s: the same for devices given to VMs, where a reset can meet a busy worker.
        step_timeout_s: bound on one step of attach or detach that can hang in the kernel.
        max_volumes: how many attachments this node takes; 0: computed from what the node has.
        metrics_address: HOST:PORT of the Prometheus endpoint, or None.
        take_over: take the place of the agent that has the run directory now, and of its workers.
        ready_file: made when the agent is ready, workers taken over; removed at start; or None.
    """

    run_dir: Path = DEFAULT_RUN_DIR
    msg_timeout_s: int = 30
    vhost_msg_timeout_s: int = 120
    step_timeout_s: float = 60.0
    max_volumes: int = 0
    metrics_address: str | None = None
    take_over: bool = False
    ready_file: Path | None = None

    @property
    def socket_path(self) -> Path:
        """Where the agent listens."""
        return self.run_dir / "agent.sock"


@dataclass(frozen=True)
class StandaloneConfig:
    """What `csi-vduse standalone` is told: controller, node and agent in one.

    Args:
        endpoint: "unix:///PATH" of the CSI socket.
        node_id: name of this node in CSI answers.
        state_dir: survives a reboot; the registry is below it.
        pools: at least one, names unique.
        agent: the agent's part.
        peer_nodes: ids of other nodes that volumes may be published to.
    """

    endpoint: str
    node_id: str
    state_dir: Path
    pools: tuple[PoolConfig, ...]
    agent: AgentConfig = field(default_factory=AgentConfig)
    peer_nodes: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run directory, shared with the agent."""
        return self.agent.run_dir


@dataclass(frozen=True)
class NodeConfig:
    """What `csi-vduse node` is told: the node plugin of a Kubernetes node.

    Args:
        node_id: the node's name in the Kubernetes API.
        endpoint: path of the CSI socket, the same for kubelet as for us.
        registration: path of the socket in kubelet's plugins_registry.
        state_dir: survives a reboot; remembers the pools' marks.
        agent_socket: where the node's agent listens.
        pools: those of this node; may be none.
        http_address: HOST:PORT of health and metrics.
        startup_taint: key of the taint that is taken off the node when the driver is registered; "": none.
    """

    node_id: str
    endpoint: Path
    registration: Path
    state_dir: Path
    agent_socket: Path
    pools: tuple[PoolConfig, ...]
    http_address: str
    startup_taint: str = ""


@dataclass(frozen=True)
class ControllerConfig:
    """What `csi-vduse controller` is told.

    Args:
        endpoint: path of the CSI socket, shared with the sidecars.
        http_address: HOST:PORT of health and metrics.
        lease_namespace: where the lease of the leader is.
        identity: of this process among the controllers.
        pools: those that are on no node.
        state_dir: remembers which pool is which, as long as it lasts.
    """

    endpoint: Path
    http_address: str
    lease_namespace: str
    identity: str
    pools: tuple[PoolConfig, ...] = ()
    state_dir: Path = DEFAULT_STATE_DIR


def parse_pool(text: str) -> PoolConfig:
    """Parse `NAME=KIND:LOCATION`.

    Raises:
        InvalidArgument: says which part is wrong and what is allowed.
    """
    name, equals, rest = text.partition("=")
    kind, colon, location = rest.partition(":")
    if not equals or not colon or not location:
        raise InvalidArgument(
            f"pool {text!r} is not NAME=KIND:LOCATION", hint="for example default=file:/var/lib/pool"
        )
    if not _POOL_NAME.fullmatch(name):
        raise InvalidArgument(f"pool name {name!r} is not 1 to 63 of a-z, 0-9, '-', '.'")
    if kind not in POOL_KINDS:
        raise InvalidArgument(
            f"pool {name!r} has unknown kind {kind!r}", hint=f"known kinds: {', '.join(POOL_KINDS)}"
        )
    if kind == "file" and not location.startswith("/"):
        raise InvalidArgument(f"pool {name!r}: {location!r} is not an absolute path")
    return PoolConfig(name, kind, location)


def parse_pools(texts: list[str]) -> tuple[PoolConfig, ...]:
    """Parse every `--pool`; names must differ.

    Raises:
        InvalidArgument: one is malformed, two have one name, or there is none.
    """
    pools = tuple(parse_pool(text) for text in texts)
    names = [pool.name for pool in pools]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument(f"pool name {name!r} is given twice")
    if not pools:
        raise InvalidArgument(
            "no pool is given", hint="for example --pool default=file:/var/lib/csi-vduse/pool"
        )
    return pools


def parse_endpoint(text: str) -> Path:
    """Return the path of `unix:///PATH` or `unix:/PATH`.

    Raises:
        InvalidArgument: another scheme, a relative path, or one too long for a socket address.
    """
    scheme, colon, path = text.partition(":")
    if scheme != "unix" or not colon or not path.startswith("/"):
        raise InvalidArgument(f"endpoint {text!r} is not unix:///PATH")
    path = path.removeprefix("//")
    if not path.startswith("/"):
        raise InvalidArgument(
            f"endpoint {text!r} is not unix:///PATH", hint="three slashes: the path is absolute"
        )
    check_socket_path(Path(path))
    return Path(path)


def check_socket_path(path: Path) -> None:
    """Refuse a path that does not fit a socket address (unix(7)).

    Raises:
        InvalidArgument: longer than 107 bytes.
    """
    length_bytes = len(str(path).encode())
    if length_bytes > _MAX_SOCKET_PATH_BYTES:
        raise InvalidArgument(
            f"socket path {path} has {length_bytes} bytes; the kernel allows {_MAX_SOCKET_PATH_BYTES}",
            hint="choose a shorter directory",
        )


def parse_size(text: str) -> int:
    """Return bytes for "1073741824", "1G", "1GiB" (1024-based), "1GB" (1000-based).

    Raises:
        InvalidArgument: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InvalidArgument(f"{text!r} is not a size", hint="for example 512M, 10GiB or a number of bytes")
    number, unit, binary = match.groups()
    decimal = unit and not binary and text.strip().lower().endswith("b")
    return int(number) * int((1000 if decimal else 1024) ** _POWERS[unit.lower()])
