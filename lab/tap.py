"""A tap device in a network namespace, opened from outside it.

A lab that needs machines to see each other keeps its bridge in a network namespace of its own, while QEMU stays
outside, because its SSH port must be reachable from the host. What is kept true: only the thread that opens the
device enters the namespace, and it ends there; the descriptor works anywhere.
"""

import fcntl
import os
import struct
import threading
from dataclasses import dataclass

from pyroute2 import netns

from lab.errors import LabSetupError

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000


@dataclass(frozen=True)
class Nic:
    """A second network card of a machine: the tap device behind it, and the card's address in the guest."""

    namespace: str
    device: str
    mac: str


def open_tap(nic: Nic, *, offloads: bool) -> int:
    """Open the (existing) tap device; the caller closes the descriptor.

    offloads: each packet has a header before it, with what is left to do (checksum, segments).

    Raises LabSetupError when it cannot be opened: no such namespace, or another QEMU holds it.
    """
    opened: list[int] = []
    failed: list[OSError] = []

    def enter_and_open() -> None:
        try:
            netns.setns(nic.namespace)
            opened.append(_attach(nic.device, _IFF_VNET_HDR if offloads else 0))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter_and_open)
    thread.start()
    thread.join()
    if failed:
        raise LabSetupError(f"cannot open the tap device {nic.device} in {nic.namespace}: {failed[0]}")
    return opened[0]


def _attach(device: str, flags: int) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", device.encode(), _IFF_TAP | _IFF_NO_PI | flags)
        fcntl.ioctl(tun, _TUNSETIFF, request)
    except OSError:
        os.close(tun)
        raise
    return tun
