"""The agent's end of the spawner's channel: each caller gets the worker that it asked for."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from pathlib import Path

import pytest

from csi_vduse.agent.workers import SpawnerClient
from csi_vduse.dataplane import channel


async def test_a_cancelled_caller_does_not_leave_its_worker_to_the_next_one():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]

    def answer(process: subprocess.Popen[bytes]) -> socket.socket:
        kept, sent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.pidfd_open(process.pid)
        channel.send(theirs, {"ok": True, "pid": process.pid}, [sent.fileno(), pidfd])
        os.close(pidfd)
        sent.close()
        return kept

    client = SpawnerClient(ours, lambda: None)
    first = asyncio.create_task(client.spawn(Path("/first")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(client.spawn(Path("/second")))
    with answer(processes[0]) as of_the_first, answer(processes[1]):
        worker = await second
        assert worker.pid == processes[1].pid
        assert await asyncio.to_thread(of_the_first.recv, 1) == b""  # nobody holds it: it ends
        worker.close()
    await client.close()
    theirs.close()
    for process in processes:
        process.kill()
        process.wait()
