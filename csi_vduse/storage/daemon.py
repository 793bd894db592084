"""The qemu-storage-daemon of a storage server: started, found again, and started again when it dies.

Kept true: at most one daemon serves the directory (it locks the images it opens, and one storage server at a
time has the directory); a daemon that outlived its storage server is taken over with its clients connected,
unless it was started with other options. Whoever holds the connection is told before anybody uses it, so that
what the daemon serves is what the records say (`recover`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable

from csi_vduse import log, records
from csi_vduse.errors import DataLoss, FailedPrecondition, Unavailable, VduseError
from csi_vduse.storage.config import ServerConfig, daemon_argv
from csi_vduse.storage.qmp import Qmp, peer_pid

# Called with each new connection; True if the daemon is a fresh one, after one that may have died untidily.
Recover = Callable[[Qmp, bool], Awaitable[None]]

_RECORD = "daemon.json"
_START_TIMEOUT_S = 60.0
_QUIT_TIMEOUT_S = 30.0
_POLL_S = 0.02
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
# A daemon that lived longer did not die of how it was started.
_SOUND_S = 10.0


class Daemon:
    """See the module.

    Args:
        config: how it is started.
        recover: makes what the daemon serves what it should serve.
    """

    def __init__(self, config: ServerConfig, recover: Recover) -> None:
        self._config = config
        self._recover = recover
        self._argv = daemon_argv(config)
        self._process: asyncio.subprocess.Process | None = None
        self._qmp: Qmp | None = None
        self._supervision: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id of the daemon; 0 while there is none."""
        return self._qmp.pid if self._qmp is not None and not self._qmp.gone.is_set() else 0

    async def start(self) -> None:
        """Bring the daemon up, and keep it up from then on.

        Raises:
            FailedPrecondition: it does not start; it has said why on standard error.
        """
        await self._bring_up()
        self._supervision = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """Stop the daemon: its exports are closed when their requests in flight are done."""
        if self._supervision is not None:
            self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervision
        if self._qmp is not None:
            await self._quit(self._qmp)

    async def _supervise(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while self._qmp is not None:
            since_s = time.monotonic()
            await self._qmp.gone.wait()
            log.get().error("qemu-storage-daemon is gone", pid=self._qmp.pid)
            if time.monotonic() - since_s > _SOUND_S:
                pause_s = _FIRST_PAUSE_S
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                try:
                    await self._bring_up()
                except Exception as error:  # noqa: BLE001 - whatever it is, nobody else would try again
                    log.get().error("qemu-storage-daemon does not come up", error=repr(error))
                else:
                    break

    async def _bring_up(self) -> None:
        qmp = await self._adopt()
        fresh = qmp is None
        if qmp is None:
            qmp = await self._spawn()
        log.get().info("qemu-storage-daemon is up", pid=qmp.pid, fresh=fresh)
        try:
            await self._recover(qmp, fresh)
        except BaseException as error:
            # `close` ends what was brought up only. A daemon that was found goes on serving, unless we are to end.
            if fresh or isinstance(error, asyncio.CancelledError):
                await self._quit(qmp)
            else:
                await qmp.close()
            raise
        self._qmp = qmp

    async def _adopt(self) -> Qmp | None:
        """Return a connection to a daemon that an earlier process of ours left, if it is as we want it.

        Raises:
            Unavailable: there is one that neither answers nor dies.
        """
        pid = await peer_pid(self._config.monitor)
        if not pid:
            return None
        try:
            qmp = await Qmp.connect(self._config.monitor)
        except Unavailable as error:
            await self._kill(pid, str(error))
            return None
        try:
            record = records.read_record(self._config.run_dir / _RECORD) or {}
        except DataLoss:
            record = {}
        if record.get("argv") == self._argv:
            return qmp
        log.get().warning("replacing a qemu-storage-daemon that was started otherwise", pid=qmp.pid)
        await self._quit(qmp)
        return None

    async def _spawn(self) -> Qmp:
        self._config.monitor.unlink(missing_ok=True)
        records.write_record(self._config.run_dir / _RECORD, {"argv": self._argv})
        try:
            # A session of its own: what is sent to our group, such as ^C, is ours to act on.
            process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        except FileNotFoundError as error:
            raise FailedPrecondition(
                f"program {self._argv[0]!r} not found",
                hint="install qemu-system-common or qemu-storage-daemon",
            ) from error
        self._process = process
        try:
            return await self._greeted(process)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise

    async def _greeted(self, process: asyncio.subprocess.Process) -> Qmp:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if process.returncode is not None:
                raise FailedPrecondition(
                    f"qemu-storage-daemon ended with {process.returncode} at its start",
                    hint="it has said why above: is its address taken, are its certificates right?",
                )
            if self._config.monitor.exists():
                with contextlib.suppress(Unavailable):
                    return await Qmp.connect(self._config.monitor)
            await asyncio.sleep(_POLL_S)
        raise FailedPrecondition(f"qemu-storage-daemon is not up after {_START_TIMEOUT_S:g} s")

    async def _quit(self, qmp: Qmp) -> None:
        """End a daemon and see that it has ended; one that does not end by itself is killed."""
        if not qmp.gone.is_set():
            with contextlib.suppress(VduseError):
                await qmp.execute("quit")
            try:
                await asyncio.wait_for(_exit(qmp.pid), _QUIT_TIMEOUT_S)
            except TimeoutError:
                await self._kill(qmp.pid, "it does not end")
        await qmp.close()
        await self._reap(qmp.pid)

    async def _kill(self, pid: int, why: str) -> None:
        """End a daemon that does not listen; two must never serve one directory.

        Raises:
            Unavailable: it does not die, since it waits for a disk.
        """
        log.get().error("qemu-storage-daemon is killed", pid=pid, reason=why)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        try:
            await asyncio.wait_for(_exit(pid), _QUIT_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(
                f"qemu-storage-daemon {pid} does not die", hint="it waits for a disk: look at the kernel log"
            ) from None
        await self._reap(pid)

    async def _reap(self, pid: int) -> None:
        """Learn of the end of a daemon that has ended, if it was our child."""
        if self._process is not None and self._process.pid == pid:
            await self._process.wait()


async def _exit(pid: int) -> None:
    """Wait for the end of a process, which need not be our child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
