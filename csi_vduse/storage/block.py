"""The block layer of one running qemu-storage-daemon: images opened, exported, resized, copied.

One object for each QMP connection; it remembers what was done over it. A command that was given up may be done all the
same, later: what it was about is asked for before it is touched again.

Facts this rests on (QEMU 7.2, qapi/block-export.json and block-core.json; tests/unit/storage shows them):
- `block-export-del` mode hard cuts the clients off at once; the export stays listed as shutting down until
  the requests it had taken are done, and then BLOCK_EXPORT_DELETED is sent. Its name is free from the start.
- An NBD export does not let its node be resized, so a volume grows between two exports of one name.
- `blockdev-mirror` in mode write-blocking keeps a copy up to date once it is ready, and `block-job-cancel` then
  leaves it as the source is at that moment: a consistent cut, without holding anybody. (`blockdev-backup` would
  cut at the start, but allocates all of a raw target.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener

from csi_vduse.errors import DataLoss, DeadlineExceeded, Unavailable, VduseError
from csi_vduse.storage.model import Format
from csi_vduse.storage.qmp import Qmp, QmpRefused, is_refusal

# How long requests in flight may take once their client is cut off.
DRAIN_TIMEOUT_S = 45.0
_OPEN_TIMEOUT_S = 60.0
_CANCEL_TIMEOUT_S = 30.0
_VHOST_USER_QUEUES = 64  # as many as a device of ours can have
# A copy that takes longer than was reckoned goes on for as long as it gets on within this.
_STALL_S = 60.0
# Ways to reach a file, best first: not every file system knows O_DIRECT, not every sandbox io_uring.
_ACCESS: tuple[dict[str, Any], ...] = (
    {"aio": "io_uring", "cache": {"direct": True}},
    {"aio": "threads", "cache": {"direct": True}},
    {"aio": "threads"},
)
_CANNOT = ("O_DIRECT", "io_uring", "Invalid argument", "not supported")


@dataclass(frozen=True)
class Seen:
    """What a daemon had when we connected.

    Args:
        exports: ids, those that are shutting down among them.
        nodes: names of nodes that were given one.
        jobs: ids.
    """

    exports: frozenset[str]
    nodes: frozenset[str]
    jobs: frozenset[str]


@dataclass
class Block:
    """See the module.

    Args:
        qmp: the connection.
        nodes: open nodes by name.
        exports: ids of exports that are open.
        unsure: names of nodes and exports that a command was given up about.
        lost_copies: jobs, which have their target's name, that nobody waits for any more and that may run.
    """

    qmp: Qmp
    nodes: set[str] = field(default_factory=set)
    exports: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    lost_copies: set[str] = field(default_factory=set)

    async def observe(self) -> Seen:
        """Ask the daemon what it has."""
        exports = await self.qmp.execute("query-block-exports")
        nodes = await self.qmp.execute("query-named-block-nodes", {"flat": True})
        jobs = await self.qmp.execute("query-jobs")
        # Nodes that the daemon named itself begin with '#' and belong to others.
        named = frozenset(str(one["node-name"]) for one in nodes if not one["node-name"].startswith("#"))
        self.nodes = set(named)
        self.exports = {str(one["id"]) for one in exports if not one["shutting-down"]}
        return Seen(
            frozenset(str(one["id"]) for one in exports), named, frozenset(str(one["id"]) for one in jobs)
        )

    async def open(self, node: str, path: Path, image_format: Format, *, read_only: bool = False) -> None:
        """Open an image under a name; fine if the name is open already.

        Raises:
            DataLoss: there is no such file, or it is not an image of this format.
            Unavailable: the file is locked by another process, or the daemon is away.
        """
        await self._make_sure(node)
        if node in self.nodes:
            return
        failure: QmpRefused | None = None
        for access in _ACCESS:
            file = {"driver": "file", "filename": str(path), "discard": "unmap", **access}
            cache = {"cache": access["cache"]} if "cache" in access else {}
            options = {
                "driver": image_format.value,
                "node-name": node,
                "read-only": read_only,
                "discard": "unmap",
                "file": file,
                **cache,
            }
            try:
                await self.qmp.execute("blockdev-add", options, timeout_s=_OPEN_TIMEOUT_S)
            except QmpRefused as error:
                failure = error
                if not any(text in error.message for text in _CANNOT):
                    break
            except Unavailable:
                self.unsure.add(node)
                raise
            else:
                self.nodes.add(node)
                return
        assert failure is not None  # noqa: S101 - the loop has run
        if is_refusal(failure, '" lock'):
            raise Unavailable(f"image {path} is in use by another process", hint="retry") from failure
        raise DataLoss(
            f"image {path} cannot be opened: {failure.message}", hint="is the file there and untouched?"
        ) from failure

    async def close(self, node: str) -> None:
        """Close a node; fine if it is not open."""
        await self._make_sure(node)
        for job in sorted(self.lost_copies):
            await self.end_job(job)  # it may hold the node
            self.lost_copies.discard(job)
            if job != node:
                await self.close(job)  # its target
        if node not in self.nodes:
            return
        try:
            await self.qmp.execute("blockdev-del", {"node-name": node}, timeout_s=_OPEN_TIMEOUT_S)
        except QmpRefused as error:
            if not is_refusal(error, "find node"):
                raise
        self.nodes.discard(node)

    async def size_bytes(self, node: str) -> int:
        """Return the size that a guest sees."""
        for one in await self.qmp.execute("query-named-block-nodes", {"flat": True}):
            if one["node-name"] == node:
                return int(one["image"]["virtual-size"])
        raise Unavailable(f"image {node} is not open", hint="retry")

    async def resize(self, node: str, size_bytes: int) -> None:
        """Set the size of an open image that has no export."""
        arguments = {"node-name": node, "size": size_bytes}
        await self.qmp.execute("block_resize", arguments, timeout_s=_OPEN_TIMEOUT_S)

    async def add_export(self, export: str, node: str, *, read_only: bool, socket: Path | None) -> None:
        """Export a node under a name, which is the export's id too; fine if it is.

        socket: of a vhost-user export; None: it is one of the NBD server.
        """
        await self._make_sure(export)
        if export in self.exports:
            return
        arguments: dict[str, Any] = {"id": export, "node-name": node, "writable": not read_only}
        if socket is None:
            arguments |= {"type": "nbd", "name": export}
        else:
            address = {"type": "unix", "path": str(socket)}
            arguments |= {"type": "vhost-user-blk", "addr": address, "num-queues": _VHOST_USER_QUEUES}
        try:
            await self.qmp.execute("block-export-add", arguments)
        except Unavailable:
            self.unsure.add(export)
            raise
        self.exports.add(export)

    async def remove_export(self, export: str) -> None:
        """Cut an export's clients off and wait until nothing of theirs is in flight; fine if it is gone.

        Raises:
            Unavailable: requests are still in flight; a retry goes on waiting.
        """
        async with self.qmp.events("BLOCK_EXPORT_DELETED") as deleted:
            try:
                await self.qmp.execute("block-export-del", {"id": export, "mode": "hard"})
            except QmpRefused as error:
                if is_refusal(error, "not found"):
                    self.exports.discard(export)
                    return
                if not is_refusal(error, "already shutting down"):
                    raise
            self.exports.discard(export)
            left = {one["id"] for one in await self.qmp.execute("query-block-exports")}
            if export not in left:
                return
            if not await self.qmp.wait_for(deleted, lambda data: data.get("id") == export, DRAIN_TIMEOUT_S):
                raise Unavailable(
                    f"requests of export {export} are still in flight after {DRAIN_TIMEOUT_S:g} s",
                    hint="its clients are cut off; retry, and look at the storage server's disks",
                )

    async def copy(self, source: str, target: str, *, until_s: float) -> None:
        """Copy an open image onto a blank one of the same size, as it is when this returns.

        Raises:
            DeadlineExceeded: time.monotonic() until_s came first, and the copy stands still; the target's content is
                worthless.
            DataLoss: the source could not be read, or the target not written.
        """
        job, statuses = target, [""]

        def is_in(*wanted: str) -> Callable[[Mapping[str, Any]], bool]:
            def matches(data: Mapping[str, Any]) -> bool:
                if data.get("id") == job:
                    statuses.append(str(data.get("status")))
                return data.get("id") == job and statuses[-1] in wanted

            return matches

        async with self.qmp.events("JOB_STATUS_CHANGE") as changes:
            arguments = {
                "job-id": job,
                "device": source,
                "target": target,
                "sync": "full",
                "copy-mode": "write-blocking",
                "auto-dismiss": False,
                "on-source-error": "report",
                "on-target-error": "report",
            }
            try:
                await self.qmp.execute("blockdev-mirror", arguments)
                late = not await self._wait_while_it_moves(
                    job, changes, is_in("ready", "concluded"), until_s - time.monotonic()
                )
                if late or statuses[-1] == "ready":
                    await self.qmp.execute("block-job-cancel", {"device": job, "force": late})
                    if not await self.qmp.wait_for(changes, is_in("concluded"), _CANCEL_TIMEOUT_S):
                        raise Unavailable(
                            f"the copy of {source} does not end", hint="look at the server's disks"
                        )
                jobs = await self.qmp.execute("query-jobs")
                failure = next((str(one.get("error", "")) for one in jobs if one["id"] == job), "")
                await self.qmp.execute("job-dismiss", {"id": job})
            except (Unavailable, asyncio.CancelledError):
                self.lost_copies.add(job)
                raise
        if late:
            raise DeadlineExceeded(
                f"the copy of {source} took too long", hint="retry when the storage server is less busy"
            )
        if failure:
            raise DataLoss(f"{source} could not be copied: {failure}", hint="look at the server's disks")

    async def _wait_while_it_moves(
        self, job: str, changes: EventListener, wanted: Callable[[Mapping[str, Any]], bool], timeout_s: float
    ) -> bool:
        """Wait for an event as Qmp.wait_for does, but for as long as the job gets on."""
        if timeout_s <= 0:
            return False
        moved_bytes = -1
        while not await self.qmp.wait_for(changes, wanted, timeout_s):
            now_bytes, _ = await self.progress(job)
            if now_bytes <= moved_bytes:
                return False
            moved_bytes, timeout_s = now_bytes, _STALL_S
        return True

    async def progress(self, target: str) -> tuple[int, int]:
        """Return how many bytes of how many the copy to a node has moved, about; zeros if there is none."""
        for one in await self.qmp.execute("query-jobs"):
            if one["id"] == target:
                return int(one["current-progress"]), int(one["total-progress"])
        return 0, 0

    async def _make_sure(self, name: str) -> None:
        """Learn whether a node or an export that a command was given up about is there.

        The daemon does one command after the other, so its answer comes after that command.
        """
        if name not in self.unsure:
            return
        nodes = await self.qmp.execute("query-named-block-nodes", {"flat": True})
        if any(one["node-name"] == name for one in nodes):
            self.nodes.add(name)
        exports = await self.qmp.execute("query-block-exports")
        if any(one["id"] == name and not one["shutting-down"] for one in exports):
            self.exports.add(name)
        self.unsure.discard(name)

    async def end_job(self, job: str) -> None:
        """End a job that nobody waits for any more."""
        async with self.qmp.events("JOB_STATUS_CHANGE") as changes:
            try:
                await self.qmp.execute("job-cancel", {"id": job})
                await self.qmp.wait_for(
                    changes,
                    lambda data: data.get("id") == job and data.get("status") in {"concluded", "null"},
                    _CANCEL_TIMEOUT_S,
                )
            except QmpRefused:  # concluded already
                pass
            try:
                await self.qmp.execute("job-dismiss", {"id": job})
            except VduseError:
                if any(one["id"] == job for one in await self.qmp.execute("query-jobs")):
                    raise
