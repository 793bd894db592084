"""A card in a pod's network namespace: moved there, named, given its addresses; through netlink (pyroute2)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from ipaddress import ip_interface, ip_network
from typing import Any

from pyroute2 import IPRoute, NetNS
from pyroute2.netlink.exceptions import NetlinkError

from csi_vduse.errors import FailedPrecondition, VduseError


def move(interface: str, netns: str, name: str) -> None:
    """Give an interface of ours to a network namespace, under another name.

    Raises:
        VduseError: the kernel refused.
    """
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with IPRoute() as ours:
            index = _index(ours, interface)
            ours.link("set", index=index, state="down")
            ours.link("set", index=index, net_ns_fd=fd, ifname=name)
    except NetlinkError as error:
        raise VduseError(f"interface {interface} cannot become {name} in {netns}: {error}") from error
    finally:
        os.close(fd)


def set_up(
    netns: str, name: str, addresses: Sequence[str], routes: Sequence[dict[str, Any]], mtu: int
) -> str:
    """Bring an interface of a namespace up with these addresses and routes; returns its hardware address.

    addresses: like 10.0.0.5/24; routes: of a CNI result; mtu: bytes; 0: as it is.

    Raises:
        VduseError: the kernel refused.
    """
    with closing(NetNS(netns, flags=0)) as there:
        try:
            index = _index(there, name)
            if mtu:
                there.link("set", index=index, mtu=mtu)
            for address in map(ip_interface, addresses):
                there.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
            there.link("set", index=index, state="up")
            for route in routes:
                destination = ip_network(route["dst"], strict=False)
                gateway = {"gateway": route["gw"]} if route.get("gw") else {}
                there.route("add", dst=str(destination), oif=index, **gateway)
            (link,) = there.link("get", index=index)
            return str(link.get("address"))
        except NetlinkError as error:
            raise VduseError(f"interface {name} in {netns} cannot be set up: {error}") from error


def check(netns: str, name: str, addresses: Sequence[str]) -> None:
    """See that an interface is there, up, with these addresses.

    Raises:
        FailedPrecondition: it is not.
    """
    with closing(NetNS(netns, flags=0)) as there:
        index = _index(there, name)
        (link,) = there.link("get", index=index)
        found = {f"{each.get('address')}/{each['prefixlen']}" for each in there.get_addr(index=index)}
    if link.get("state") != "up":
        raise FailedPrecondition(f"interface {name} in {netns} is down")
    if missing := {str(ip_interface(each)) for each in addresses} - found:
        raise FailedPrecondition(f"interface {name} in {netns} lacks {', '.join(sorted(missing))}")


def _index(where: Any, name: str) -> int:  # noqa: ANN401 - IPRoute and NetNS have no type in common
    for index in where.link_lookup(ifname=name):
        return int(index)
    raise FailedPrecondition(f"there is no interface {name}")
