"""Who has which volume: publications given, renewed and taken back, and a daemon made to serve exactly those.

Kept true, at every point where this process or its daemon may die: the record is written before the act, and
`recover` makes a daemon serve what the records say: no export without a publication, no publication without an
export. A publication that was taken back is never served again, nor is an export that was replaced: its name is used
once. What replaces it is opened when nothing that came through it is in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace

from csi_vduse import log
from csi_vduse.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable, VduseError
from csi_vduse.run import run
from csi_vduse.storage.block import Block, Seen
from csi_vduse.storage.core import Core, node_of
from csi_vduse.storage.model import (
    Format,
    Image,
    Key,
    Kind,
    Publication,
    new_export,
    objection,
    volume_of,
)
from csi_vduse.storage.qmp import Qmp, QmpRefused

_CHECK_TIMEOUT_S = 600.0
_MEND_INTERVAL_S = 5.0


@dataclass(frozen=True)
class Published:
    """Where a node finds its export, whether what it writes has to be made stable at once, and whether it can be renewed.

    qemu-storage-daemon keeps where the clusters of a qcow2 image are in memory until a flush: killed, it forgets writes
    that were answered. What was written to a raw image is the kernel's by then.
    """

    epoch: int
    export: str
    uri: str
    write_through: bool
    renewable: bool


class Publications:
    """See the module.

    Args:
        core: what the parts of the server share.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._unserved: set[Key] = set()

    async def publish(self, volume_id: str, node_id: str, *, read_only: bool, shared: bool) -> Published:
        """Give a node an epoch and an export of its own; the same again gives the same.

        Args:
            volume_id: what.
            node_id: to whom.
            read_only: the export refuses writes.
            shared: beside another node that may write (model.objection says when).

        Raises:
            NotFound: there is no such volume.
            AlreadyExists: the node has it otherwise.
            FailedPrecondition: another node has it, and that excludes this one; or it cannot be served in this way.
        """
        key = Key(Kind.VOLUME, volume_id)
        async with self._core.alone(key):
            image = await self._core.require(key)
            if self._core.config.vhost_user is not None and image.format is Format.QCOW2:
                raise FailedPrecondition(
                    f"{volume_id} is a qcow2 image, whose writes would be lost with the daemon over vhost-user",
                    hint="serve it over NBD, or convert it to raw: qemu-img convert",
                )
            block = self._core.require_block()
            found = image.of_node(node_id)
            if found is not None and found.closing:
                image, found = await self._close_publications(block, image, (found,)), None
            if found is not None:
                if (found.read_only, found.shared) != (read_only, shared):
                    raise AlreadyExists(
                        f"{volume_id} is published at {node_id} {_manner(found)}", hint="unpublish it first"
                    )
                await self._serve(block, image)
                return self._published(image, found.epoch, found.export)
            reason = objection(image, node_id=node_id, read_only=read_only, shared=shared)
            if reason:
                raise FailedPrecondition(f"{volume_id}: {reason}", hint="unpublish it there first")
            epoch = image.epoch + 1
            export = new_export(volume_id, epoch)
            new = Publication(node_id, epoch, export, read_only, shared, served=export, served_epoch=epoch)
            image = replace(image, epoch=epoch, publications=(*image.publications, new))
            await self._core.disk(self._core.store.save, image)
            try:
                await self._serve(block, image)
            except Unavailable:
                raise  # the next daemon serves what the record says, and the caller's retry finds it
            except VduseError:
                await self._close_publications(block, image, (new,))
                raise
            log.get().info(
                "published", volume_id=volume_id, node_id=node_id, epoch=epoch, read_only=read_only
            )
            return self._published(image, epoch, export)

    def _published(self, image: Image, epoch: int, export: str) -> Published:
        uri = self._core.config.uri(export)
        # What reaches the daemon through a vhost-user socket has ended before it takes another client.
        renewable = self._core.config.vhost_user is None
        return Published(epoch, export, uri, write_through=image.format is Format.QCOW2, renewable=renewable)

    async def renew(self, export: str, instead_of: str) -> Published:
        """Close what is served to a node for good and serve another export, of the next epoch, in its place.

        Nothing that came through the closed one is in flight when this returns. The node is known as before: `publish`
        gives what it gave.

        Args:
            export: what `publish` named. Who knows it may ask.
            instead_of: what is to be closed. If that is not what is served now, nothing is closed: this is a request
                again whose answer was lost, or one that comes so late that others have gone on.

        Returns:
            What is served now.

        Raises:
            NotFound: no volume is published under this name (any more).
            Unavailable: requests are still in flight; a retry goes on waiting.
        """
        key = volume_of(export)
        async with self._core.alone(key):
            image = await self._core.require(key)
            block = self._core.require_block()
            found = image.of_export(export)
            if found is None:
                raise NotFound(
                    f"{key.id} is not published under this name",
                    hint="it was taken back from the node: unstage the volume there, and stage it again",
                )
            image = await self._serve(block, image)
            if found.served == instead_of:
                epoch = image.epoch + 1
                found = replace(
                    found, served=new_export(key.id, epoch), served_epoch=epoch, replaced=found.served
                )
                image = replace(_with(image, found), epoch=epoch)
                await self._core.disk(self._core.store.save, image)
                await self._serve(block, image)
                log.get().info("renewed", volume_id=key.id, node_id=found.node_id, epoch=epoch)
            return self._published(image, found.served_epoch, found.served)

    async def unpublish(self, volume_id: str, node_id: str = "") -> None:
        """Take a volume back from a node, or from all; nothing of theirs is in flight when this returns.

        Fine if it is not published there, or if there is no such volume.

        Raises:
            Unavailable: requests are still in flight; the node is cut off, and a retry goes on waiting.
        """
        key = Key(Kind.VOLUME, volume_id)
        async with self._core.alone(key):
            image = await self._core.disk(self._core.store.find, key)
            if image is None:
                return
            unwanted = tuple(one for one in image.publications if node_id in {"", one.node_id})
            if unwanted:
                image = await self._close_publications(self._core.require_block(), image, unwanted)
                log.get().info("unpublished", volume_id=volume_id, epochs=[one.epoch for one in unwanted])

    async def recover(self, qmp: Qmp, fresh: bool) -> None:  # noqa: FBT001 - the type Recover
        """Make a daemon serve what the records say, and nothing else."""
        self._core.block = None
        block = Block(qmp)
        seen = await block.observe()
        images = await self._core.disk(self._core.store.list, Kind.VOLUME)
        await self._remove_strays(block, seen, images)
        self._unserved = {image.key for image in images if image.publications}
        for key in sorted(self._unserved, key=lambda one: one.id):
            await self._serve_again(block, key, repair=fresh)
        if qmp.gone.is_set():
            raise Unavailable("qemu-storage-daemon died while it was given its exports")
        self._core.block = block

    async def mend(self) -> None:
        """Try again what could not be served when the daemon came up."""
        while True:
            await asyncio.sleep(_MEND_INTERVAL_S)
            if self._core.block is not None and not self._core.block.qmp.gone.is_set():
                for key in sorted(self._unserved, key=lambda one: one.id):
                    await self._serve_again(self._core.block, key, repair=False)

    async def _serve_again(self, block: Block, key: Key, *, repair: bool) -> None:
        """Serve a volume as its record says; one bad image must not keep the others away."""
        async with self._core.alone(key):
            try:
                image = await self._core.disk(self._core.store.find, key)
                if image is not None and repair:
                    await self._repair(image)
                closing = tuple(one for one in image.publications if one.closing) if image else ()
                if image is not None and closing:
                    image = await self._close_publications(block, image, closing)
                if image is not None and image.publications:
                    await self._serve(block, image)
            except VduseError as error:
                log.get().error("volume cannot be served yet", volume_id=key.id, error=str(error))
            else:
                self._unserved.discard(key)

    async def resume(self, block: Block, image: Image) -> Image:
        """Serve a volume again whose exports were closed for a moment; what does not work now is tried again.

        The caller has the image for itself. Returns it as it is recorded then.
        """
        try:
            return await self._serve(block, image)
        except VduseError as error:
            log.get().error("volume cannot be served yet", volume_id=image.key.id, error=str(error))
            self._unserved.add(image.key)
            return image

    async def _close_publications(self, block: Block, image: Image, unwanted: Iterable[Publication]) -> Image:
        """Close exports for good: record that, close, record that it is done."""
        going = {one.export for one in unwanted}
        marked = tuple(
            replace(one, closing=True) if one.export in going else one for one in image.publications
        )
        image = replace(image, publications=marked)
        await self._core.disk(self._core.store.save, image)
        for one in marked:
            if one.export in going:
                for name in one.exports:
                    await block.remove_export(name)
        image = replace(image, publications=tuple(one for one in marked if one.export not in going))
        if not image.publications and not self._core.copied[image.key]:
            await block.close(node_of(image))
        await self._core.disk(self._core.store.save, image)
        return image

    async def _serve(self, block: Block, image: Image) -> Image:
        """Have an export for every open publication, once what it replaces is closed; return what is recorded then."""
        await block.open(node_of(image), self._core.store.image_path(image), image.format)
        for one in image.publications:
            if one.replaced and not one.closing:
                await block.remove_export(one.replaced)
                image = _with(image, replace(one, replaced=""))
                await self._core.disk(self._core.store.save, image)
        for one in image.publications:
            if not one.closing:
                socket = self._core.config.vhost_user_socket(one.served)
                await block.add_export(one.served, node_of(image), read_only=one.read_only, socket=socket)
        return image

    async def _remove_strays(self, block: Block, seen: Seen, images: Iterable[Image]) -> None:
        """Remove what a daemon has that no record asks for: copies begun, exports taken back, nodes of both."""
        for job in sorted(seen.jobs):
            await block.end_job(job)
        published = {one.served for image in images for one in image.publications if not one.closing}
        for export in sorted(seen.exports - published):
            try:
                await block.remove_export(export)
            except (
                Unavailable
            ) as error:  # cut off, but not empty: a record says that it is closing or replaced
                log.get().error("an export is not closed yet", export=export, error=str(error))
        wanted = {node_of(image) for image in images if image.publications}
        for node in sorted(seen.nodes - wanted):
            try:
                await block.close(node)
            except QmpRefused as error:  # a node between others; it goes with them
                log.get().warning("a node stays open", node=node, error=error.message)

    async def _repair(self, image: Image) -> None:
        """After a daemon died: give back the clusters that a qcow2 image had taken and not yet used."""
        if image.format is Format.QCOW2:
            path = str(self._core.store.image_path(image))
            await run(["qemu-img", "check", "-q", "-r", "leaks", path], timeout_s=_CHECK_TIMEOUT_S)


def _with(image: Image, changed: Publication) -> Image:
    """Return an image with one of its publications changed."""
    publications = tuple(changed if one.export == changed.export else one for one in image.publications)
    return replace(image, publications=publications)


def _manner(publication: Publication) -> str:
    return ("read-only" if publication.read_only else "writable") + (", shared" if publication.shared else "")
