"""How the cost grows with volumes: an agent with 1, 10 and 100 idle volumes, in the VM.

Of each worker: private memory and its share of what is shared (smaps_rollup), descriptors, threads; of all
together the CPU time over some seconds in which nobody does I/O. Volumes are attached with the null backend,
because what a backend keeps is not the subject.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results import conditions
from bench.servers import CSI_VDUSE, running, tool, wait
from csi_vduse.agent.client import AgentClient
from csi_vduse.agent.model import AttachSpec
from csi_vduse.dataplane.backend_spec import NullBackend
from csi_vduse.vdpa.model import Bus

VOLUMES = (1, 10, 100)
CAPACITY_BYTES = 64 << 20
_SETTLE_S = 3.0
_IDLE_S = 5.0


def measure(volumes: tuple[int, ...]) -> dict[str, Any]:
    """Attach, look, attach more; returns the raw figures."""
    tool("modprobe", "-a", "vduse", "virtio-vdpa", "vhost-vdpa")
    return asyncio.run(_measure(volumes))


async def _measure(volumes: tuple[int, ...]) -> dict[str, Any]:
    rows: list[dict[str, float]] = []
    queue_rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-agent-", dir="/run") as name:
        argv = [CSI_VDUSE, "agent", "--run-dir", name, "--max-volumes", str(max(volumes) + 1)]
        with running(argv, stdout=subprocess.DEVNULL) as process:
            socket = Path(name) / "agent.sock"
            wait(socket.exists, process, "the agent's socket")
            client = AgentClient(socket)
            pids: list[int] = []
            for count in volumes:
                started = time.monotonic()
                added = count - len(pids)
                while len(pids) < count:
                    pids.append(await _attach(client, f"bench-{len(pids)}", queues=1))
                rows.append(
                    {"volumes": count, "attach_s": (time.monotonic() - started) / added, **await _look(pids)}
                )
                print(rows[-1], flush=True)
            for queues in (1, 2, 4):
                pid = await _attach(client, "bench-queues", queues=queues)
                queue_rows.append({"queues": queues, **await _look([pid])})
                print(queue_rows[-1], flush=True)
                await client.detach("bench-queues")
            for number in range(len(pids)):
                await client.detach(f"bench-{number}")
            await client.close()
    return {"conditions": conditions(), "rows": rows, "queue_rows": queue_rows}


async def _attach(client: AgentClient, volume_id: str, *, queues: int) -> int:
    spec = AttachSpec(
        volume_id=volume_id,
        backend=NullBackend(),
        capacity_bytes=CAPACITY_BYTES,
        bus=Bus.VIRTIO,
        read_only=False,
        queues=queues,
        queue_size=256,
        block_size_bytes=512,
    )
    return (await client.attach(spec)).worker_pid


async def _look(pids: list[int]) -> dict[str, float]:
    """Figures of these workers: medians, and the CPU time of all of them while idle."""
    await asyncio.sleep(_SETTLE_S)
    before = _ran_ns(pids)
    await asyncio.sleep(_IDLE_S)
    used_ms = (_ran_ns(pids) - before) / 1e6
    memory = [_memory(pid) for pid in pids]
    beyond = memory[1:] or memory
    return {
        "private_mib": statistics.median(each["Private_Clean"] + each["Private_Dirty"] for each in memory),
        "private_mib_beyond_first": statistics.median(
            each["Private_Clean"] + each["Private_Dirty"] for each in beyond
        ),
        "pss_mib": statistics.median(each["Pss"] for each in memory),
        "fds": statistics.median(_entries(pid, "fd") for pid in pids),
        "threads": statistics.median(_entries(pid, "task") for pid in pids),
        "cpu_ms_per_s": used_ms / _IDLE_S,
    }


def _memory(pid: int) -> dict[str, float]:
    """The sums of smaps_rollup, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(kib) / 1024 for name, kib, *_ in (line.split() for line in lines)}


def _ran_ns(pids: list[int]) -> int:
    """How long these processes have run: the scheduler's own count, because idle ones use less than a tick."""
    files = [path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[0]) for path in files)


def _entries(pid: int, name: str) -> int:
    return len(list(Path(f"/proc/{pid}/{name}").iterdir()))
