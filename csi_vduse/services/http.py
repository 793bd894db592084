"""/healthz, /readyz and /metrics of the controller and the node plugin.

/healthz says whether a restart of this process would help: it answers as long as the event loop runs, and
nothing else can make it fail. /readyz says whether the process can do its work now, and if not, why not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from csi_vduse import log
from csi_vduse.errors import FailedPrecondition
from csi_vduse.metrics import parse_address

# What is needed, by name: an empty text if it is there, else what is wrong.
Checks = Mapping[str, Callable[[], str]]


@asynccontextmanager
async def serving(address: str, ready: Checks) -> AsyncIterator[None]:
    """Serve while the body runs.

    Args:
        address: HOST:PORT.
        ready: what /readyz looks at.

    Raises:
        InvalidArgument: not HOST:PORT.
        FailedPrecondition: the address cannot be bound.
    """
    host, port = parse_address(address)

    async def healthz(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_request: web.Request) -> web.Response:
        wrong = {name: problem for name, check in ready.items() if (problem := check())}
        text = "".join(f"{name}: {wrong.get(name, 'ok')}\n" for name in ready)
        return web.Response(text=text or "ok\n", status=503 if wrong else 200)

    async def metrics(_request: web.Request) -> web.Response:
        # In a thread: the collector of the workers' counters asks the agent and waits.
        body = await asyncio.to_thread(generate_latest, REGISTRY)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise FailedPrecondition(
                f"health and metrics cannot be served at {address}: {error.strerror}"
            ) from error
        log.get().info("health and metrics", address=address)
        yield
    finally:
        await runner.cleanup()
