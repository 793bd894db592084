"""The kernel's generic netlink family "vdpa" (include/uapi/linux/vdpa.h), through pyroute2.

Runs only inside the helper process (helper.py): DEV_NEW and DEV_DEL hold one lock for the whole machine
through probe and removal, every call of the family waits for it, and so any call can hang.
The family exists only in the machine's first network namespace, and needs CAP_NET_ADMIN there.
"""

from __future__ import annotations

import os
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

FAMILY = "vdpa"
FAMILY_VERSION = 1
MANAGEMENT_DEVICE = "vduse"

CMD_MGMTDEV_GET = 2
CMD_DEV_NEW = 3
CMD_DEV_DEL = 4
CMD_DEV_GET = 5
CMD_DEV_CONFIG_GET = 6


class _Message(genlmsg):  # type: ignore[misc]  # pyroute2 has no type information
    """A message of the family: names and types of its attributes, in the order of their numbers."""

    nla_map = (
        ("VDPA_ATTR_UNSPEC", "none"),
        ("VDPA_ATTR_MGMTDEV_BUS_NAME", "asciiz"),
        ("VDPA_ATTR_MGMTDEV_DEV_NAME", "asciiz"),
        ("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES", "uint64"),
        ("VDPA_ATTR_DEV_NAME", "asciiz"),
        ("VDPA_ATTR_DEV_ID", "uint32"),
        ("VDPA_ATTR_DEV_VENDOR_ID", "uint32"),
        ("VDPA_ATTR_DEV_MAX_VQS", "uint32"),
        ("VDPA_ATTR_DEV_MAX_VQ_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_MIN_VQ_SIZE", "uint16"),
        ("VDPA_ATTR_DEV_NET_CFG_MACADDR", "hex"),
        ("VDPA_ATTR_DEV_NET_STATUS", "uint8"),
        ("VDPA_ATTR_DEV_NET_CFG_MAX_VQP", "uint16"),
        ("VDPA_ATTR_DEV_NET_CFG_MTU", "uint16"),
        ("VDPA_ATTR_DEV_NEGOTIATED_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_MGMTDEV_MAX_VQS", "uint32"),
        ("VDPA_ATTR_DEV_SUPPORTED_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_QUEUE_INDEX", "uint32"),
        ("VDPA_ATTR_DEV_VENDOR_ATTR_NAME", "asciiz"),
        ("VDPA_ATTR_DEV_VENDOR_ATTR_VALUE", "uint64"),
        ("VDPA_ATTR_DEV_FEATURES", "uint64"),
        ("VDPA_ATTR_DEV_BLK_CFG_CAPACITY", "uint64"),
        ("VDPA_ATTR_DEV_BLK_CFG_SIZE_MAX", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_BLK_SIZE", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_SEG_MAX", "uint32"),
        ("VDPA_ATTR_DEV_BLK_CFG_NUM_QUEUES", "uint16"),
    )


class Netlink:
    """A socket of the family. Every method raises OSError with the kernel's error number."""

    def __init__(self) -> None:
        self._socket = GenericNetlinkSocket()
        try:
            self._socket.bind(FAMILY, _Message)
        except NetlinkError as error:
            self._socket.close()
            raise OSError(
                error.code, f"generic netlink family {FAMILY!r}: {os.strerror(error.code)}"
            ) from error

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def add(self, name: str) -> None:
        """Put the VDUSE device `name` on the bus (DEV_NEW); no bus name: "vduse" has none."""
        self._request(
            CMD_DEV_NEW,
            NLM_F_REQUEST | NLM_F_ACK,
            [("VDPA_ATTR_DEV_NAME", name), ("VDPA_ATTR_MGMTDEV_DEV_NAME", MANAGEMENT_DEVICE)],
        )

    def remove(self, name: str) -> None:
        """Take the device off the bus (DEV_DEL)."""
        self._request(CMD_DEV_DEL, NLM_F_REQUEST | NLM_F_ACK, [("VDPA_ATTR_DEV_NAME", name)])

    def devices(self) -> list[dict[str, Any]]:
        """Every device of the bus (DEV_GET): name, management device, number of queues, longest queue."""
        return [
            {
                "name": attributes.get("VDPA_ATTR_DEV_NAME"),
                "management_device": attributes.get("VDPA_ATTR_MGMTDEV_DEV_NAME"),
                "queues": attributes.get("VDPA_ATTR_DEV_MAX_VQS"),
                "queue_size": attributes.get("VDPA_ATTR_DEV_MAX_VQ_SIZE"),
            }
            for attributes in self._request(CMD_DEV_GET, NLM_F_REQUEST | NLM_F_DUMP, [])
        ]

    def management_devices(self) -> list[dict[str, Any]]:
        """Every management device (MGMTDEV_GET): name and bit mask of the virtio device types it makes."""
        return [
            {
                "name": attributes.get("VDPA_ATTR_MGMTDEV_DEV_NAME"),
                "classes": attributes.get("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES"),
            }
            for attributes in self._request(CMD_MGMTDEV_GET, NLM_F_REQUEST | NLM_F_DUMP, [])
        ]

    def configuration(self, name: str) -> dict[str, Any]:
        """The configuration the driver sees (DEV_CONFIG_GET); EAGAIN before it has agreed on features."""
        answers = self._request(CMD_DEV_CONFIG_GET, NLM_F_REQUEST | NLM_F_ACK, [("VDPA_ATTR_DEV_NAME", name)])
        attributes = answers[0] if answers else {}
        return {
            "features": attributes.get("VDPA_ATTR_DEV_NEGOTIATED_FEATURES"),
            "capacity_sectors": attributes.get("VDPA_ATTR_DEV_BLK_CFG_CAPACITY"),
            "block_size_bytes": attributes.get("VDPA_ATTR_DEV_BLK_CFG_BLK_SIZE"),
            "queues": attributes.get("VDPA_ATTR_DEV_BLK_CFG_NUM_QUEUES"),
        }

    def _request(self, command: int, flags: int, attributes: list[tuple[str, str]]) -> list[dict[str, Any]]:
        message = _Message()
        message["cmd"] = command
        message["version"] = FAMILY_VERSION
        message["attrs"] = attributes
        try:
            answers = self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=flags)
            return [dict(answer.get("attrs", ())) for answer in answers]
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error
