"""`csi-vduse export`: one device of one worker in the foreground, without CSI or agent.

With --vhost-user it is no VDUSE device but a socket (export_vhost_user.py); what follows is about devices.

The first line printed is the path of the device. SIGTERM or SIGINT removes it, unless it is in use: then it
goes on, and says so. What a killed export left behind is removed by the next one of the same name.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from csi_vduse import log
from csi_vduse.agent.agent import default_queues
from csi_vduse.agent.attach import Node, attach, device_spec
from csi_vduse.agent.detach import detach
from csi_vduse.agent.model import Attachment, AttachSpec, device_name
from csi_vduse.agent.spawner import SpawnedWorker, fork_worker
from csi_vduse.agent.store import Store
from csi_vduse.agent.workers import Worker, find_worker
from csi_vduse.cli import export_vhost_user
from csi_vduse.cli.options import Subcommands, add_device_options, attach_spec
from csi_vduse.cli.processes import node_with
from csi_vduse.config import DEFAULT_RUN_DIR, AgentConfig
from csi_vduse.dataplane.worker import run_worker
from csi_vduse.errors import FailedPrecondition, InvalidArgument, Unavailable, VduseError

_START_TIMEOUT_S = 60.0


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("export", help="serve a file as a device, in the foreground")
    add_device_options(parser)
    parser.add_argument(
        "--vhost-user", type=Path, metavar="SOCKET", help="serve QEMU and its like there; no VDUSE, no root"
    )
    parser.add_argument("name", metavar="NAME", help="of the device; its serial number too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM; 0 when the device is removed, 1 when its worker died."""
    if device_name(options.name) != options.name:
        raise InvalidArgument(
            f"{options.name!r} cannot be a device name", hint="use 1 to 31 of a-z, 0-9 and '-'"
        )
    if options.vhost_user is not None:
        if options.device != "block":
            raise InvalidArgument("--vhost-user serves disks", hint="leave out --device, or --vhost-user")
        return export_vhost_user.run(options)
    spec = attach_spec(options.name, options).with_defaults(queues=default_queues())
    device_spec(spec)  # refuses an impossible geometry before anything is made
    store = Store(DEFAULT_RUN_DIR / "export")
    store.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Before there is an event loop: only a process with one thread may fork. A device that was left behind
    # may need a worker of its own to say good-bye.
    needed = 1 if store.find(spec.device_name) is None else 2
    paths = [store.directory / f"{options.name}.{os.getpid()}.{number}" for number in range(needed)]
    forked = [(path, fork_worker(run_worker, str(path))) for path in paths]
    return asyncio.run(_export(spec, store, forked))


class _Forked:
    """A WorkerSource with the workers that were forked at start."""

    def __init__(self, forked: list[tuple[Path, SpawnedWorker]]) -> None:
        self._idle = [(path, Worker(w.pid, w.pidfd, w.control, str(path))) for path, w in forked]

    async def spawn(self, listen_path: Path) -> Worker:
        """Return one of them, reachable at the path that a later export looks at."""
        path, worker = self._idle.pop()
        await worker.call({"op": "ping"}, timeout_s=_START_TIMEOUT_S)
        path.replace(listen_path)
        return worker

    async def close(self) -> None:
        """End those that nobody needed."""
        for path, worker in self._idle:
            await worker.kill()
            path.unlink(missing_ok=True)


async def _export(spec: AttachSpec, store: Store, forked: list[tuple[Path, SpawnedWorker]]) -> int:
    asked_to_stop, died = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop.set)
    async with AsyncExitStack() as running:
        source = _Forked(forked)
        running.push_async_callback(source.close)
        node = await running.enter_async_context(node_with(AgentConfig(), source, store))
        await _remove_leftover(node, spec)
        attachment, worker = await attach(node, spec)
        worker.on_exit = lambda _: died.set()
        print(attachment.path, flush=True)
        while True:
            await _first(asked_to_stop, died)
            if died.is_set():
                raise Unavailable(f"the worker of {spec.volume_id} died", hint="its log is above")
            asked_to_stop.clear()
            try:
                await detach(node, attachment, worker, adopt=lambda _: None)
            except FailedPrecondition as error:
                print(f"csi-vduse: {error}; still serving", file=sys.stderr, flush=True)
            else:
                return 0


async def _remove_leftover(node: Node, spec: AttachSpec) -> None:
    left: Attachment | None = node.store.find(spec.device_name)
    if left is None:
        return
    log.get().warning("removing what an earlier export left", device=spec.device_name)
    worker = await find_worker(node.store.control_path(spec.device_name))
    try:
        await detach(node, left, worker, adopt=lambda _: None)
    except VduseError as error:
        raise FailedPrecondition(
            f"an earlier export of {spec.volume_id} left its device behind: {error}"
        ) from error


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
