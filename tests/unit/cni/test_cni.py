"""The CNI plugin: what it answers a container runtime, and what it leaves when it fails (csi_vduse/cni)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from csi_vduse.agent.model import Attachment, AttachSpec, Probe, State
from csi_vduse.cni import plugin
from csi_vduse.cni.model import card_name
from csi_vduse.errors import Pending, VduseError
from csi_vduse.vdpa.model import BusDevice

ADDRESS = "10.9.0.5/24"
POD = {
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/pod",
    "CNI_IFNAME": "net1",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
}


@dataclass
class Fakes:
    """The agent, and the pod's namespace."""

    cards: dict[str, AttachSpec] = field(default_factory=dict)
    moved: list[tuple[str, ...]] = field(default_factory=list)
    busy: bool = False
    up: list[Any] = field(default_factory=list)
    refuse: bool = False

    async def close(self) -> None: ...

    async def attach(self, spec: AttachSpec) -> Attachment:
        if self.busy:
            raise Pending("a detach is under way", hint="retry")
        self.cards[spec.volume_id] = spec
        return Attachment(spec, State.ATTACHED, device=BusDevice(Path("/sys/class/net/eth7")))

    async def detach(self, volume_id: str) -> None:
        self.cards.pop(volume_id, None)

    async def inspect(self, volume_id: str) -> AttachSpec:
        return self.cards[volume_id]

    async def list(self) -> list[Attachment]:
        return [Attachment(spec, State.ATTACHED) for spec in self.cards.values()]

    async def probe(self) -> Probe:
        return Probe("1", ready=not self.busy, problems=("no kernel module",), max_volumes=0)

    def move(self, *what: str) -> None:
        self.moved.append(what)

    def set_up(self, *what: object, mtu: int) -> str:
        if self.refuse:
            raise VduseError("the kernel says no")
        self.up.append((*what, mtu))
        return "02:00:00:00:00:01"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr(plugin, "AgentClient", lambda _: made)
    monkeypatch.setattr(plugin, "interfaces", made)
    return made


@pytest.fixture
def ipam(tmp_path: Path) -> Path:
    """A plugin that gives an address, and notes what it was asked."""
    answer = {"ips": [{"address": ADDRESS}], "routes": [{"dst": "0.0.0.0/0", "gw": "10.9.0.1"}]}
    script = tmp_path / "static-one"
    script.write_text(
        f"#!/bin/sh\ncat >/dev/null\necho $CNI_COMMAND >>{tmp_path}/asked\necho '{json.dumps(answer)}'\n"
    )
    script.chmod(0o755)
    return script


def call(
    command: str, network: dict[str, Any] | None = None, **environment: str
) -> tuple[int, dict[str, Any]]:
    stdin = {
        "cniVersion": "1.1.0",
        "name": "fast",
        "socket": "/run/vhost/{namespace}-{pod}.sock",
        **(network or {}),
    }
    code, text = plugin.main({"CNI_COMMAND": command, **POD, **environment}, json.dumps(stdin))
    return code, json.loads(text) if text else {}


def test_versions(fakes: Fakes):
    code, said = call("VERSION")
    assert code == 0
    assert "1.1.0" in said["supportedVersions"]
    assert not fakes.cards


def test_a_pod_gets_a_card_with_an_address_and_loses_it(fakes: Fakes, ipam: Path):
    """By the server's socket for that pod; a DEL is fine when there is nothing."""
    network = {"ipam": {"type": ipam.name}, "mtu": 1400}
    code, said = call("ADD", network, CNI_PATH=str(ipam.parent))
    assert code == 0, said
    assert said["interfaces"] == [{"name": "net1", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/pod"}]
    assert said["ips"] == [{"address": ADDRESS, "interface": 0}]
    (spec,) = fakes.cards.values()
    assert spec.is_network
    assert str(spec.backend.socket) == "/run/vhost/shop-web-0.sock"  # type: ignore[union-attr]
    assert fakes.moved == [("eth7", "/run/netns/pod", "net1")]
    assert fakes.up == [("/run/netns/pod", "net1", [ADDRESS], said["routes"], 1400)]
    for _ in range(2):
        assert call("DEL", network, CNI_PATH=str(ipam.parent), CNI_NETNS="") == (0, {})
    assert not fakes.cards
    assert (ipam.parent / "asked").read_text().split() == ["ADD", "DEL", "DEL"]


def test_an_add_that_fails_leaves_nothing(fakes: Fakes, ipam: Path):
    """Neither the card nor the address."""
    fakes.refuse = True
    code, said = call("ADD", {"ipam": {"type": ipam.name}}, CNI_PATH=str(ipam.parent))
    assert (code, said["code"], said["msg"]) == (1, 100, "the kernel says no")
    assert not fakes.cards
    assert (ipam.parent / "asked").read_text().split() == ["ADD", "DEL"]


def test_what_passes_is_to_be_tried_again(fakes: Fakes):
    fakes.busy = True
    assert call("ADD")[1]["code"] == 11
    assert call("STATUS")[1]["code"] == 11


@pytest.mark.parametrize(
    ("command", "network", "environment", "words"),
    [
        ("WIN", {}, {}, "CNI_COMMAND"),
        ("ADD", {}, {"CNI_NETNS": ""}, "CNI_NETNS"),
        ("ADD", {"socket": "relative"}, {}, "absolute"),
        ("ADD", {"socket": "/{nobody}"}, {}, "nobody"),
        ("ADD", {"cniVersion": "9.0"}, {}, "9.0"),
        ("ADD", {"name": None}, {}, "name"),
        ("DEL", {"ipam": {"type": "../sh"}}, {"CNI_PATH": "/bin"}, "CNI_PATH"),
    ],
)
def test_what_it_refuses(
    fakes: Fakes, command: str, network: dict[str, Any], environment: dict[str, str], words: str
):
    code, said = call(command, network, **environment)
    assert (code, said["code"]) == (1, 7)
    assert words in said["msg"]
    assert not fakes.cards


def test_cards_that_no_container_has_are_collected(fakes: Fakes):
    """Of this network and no other; volumes are not cards."""
    for container in ("c1", "c2"):
        assert call("ADD", CNI_CONTAINERID=container)[0] == 0
    assert call("ADD", {"name": "other"})[0] == 0
    fakes.cards["vol-1"] = next(iter(fakes.cards.values()))
    assert call("GC", {"cni.dev/valid-attachments": [{"containerID": "c2", "ifname": "net1"}]})[0] == 0
    assert set(fakes.cards) == {card_name("fast", "c2", "net1"), card_name("other", "c1", "net1"), "vol-1"}
