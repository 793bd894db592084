"""A Kubernetes API server over HTTP for tests: objects of any kind, without schemas or rights.

Honest where clients go wrong: a write with a stale resourceVersion is 409 Conflict; a PUT of an object leaves
its status and a PUT of a status leaves the rest; `generation` grows with the spec only; a deleted object with
finalizers stays until they are gone; a watch begins after its resourceVersion and is 410 if that was
forgotten; a selector that stops matching is a DELETED event. `away` refuses every request, as a server that
is restarting does, and `failing` those of a path that ends so.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

Object = dict[str, Any]

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


class FakeApi:
    """See the module; `url` is where it listens."""

    def __init__(self) -> None:
        self.url = ""
        self.away = False
        self.failing = ""
        self.forgotten = 0
        self.requests: list[str] = []
        self.before_put: list[Any] = []
        self._objects: dict[str, Object] = {}
        self._version = 100
        self._history: list[tuple[int, str, str, Object | None, Object]] = []
        self._changed = asyncio.Condition()
        self._watchers: set[asyncio.Task[Any]] = set()

    # What tests do behind everyone's back.

    def object(self, path: str) -> Object | None:
        found = self._objects.get(path)
        return copy.deepcopy(found) if found is not None else None

    def objects(self, base: str) -> list[Object]:
        return [
            copy.deepcopy(found) for path, found in self._objects.items() if path.rpartition("/")[0] == base
        ]

    async def put(self, path: str, found: Object) -> None:
        await self._store(path, copy.deepcopy(found))

    async def set_status(self, path: str, **status: Any) -> None:
        found = copy.deepcopy(self._objects[path])
        found["status"] = {**found.get("status", {}), **status}
        await self._store(path, found)

    def forget_history(self) -> None:
        """As compaction does: older versions cannot be watched from."""
        self.forgotten = self._version
        self._history.clear()

    async def go_away(self) -> None:
        """Refuse everything and break the watches."""
        self.away = True
        for task in list(self._watchers):
            task.cancel()

    # HTTP.

    async def handle(self, request: web.Request) -> web.StreamResponse:  # noqa: PLR0911 - a table of verbs
        self.requests.append(f"{request.method} {request.path}")
        if self.away or (self.failing and request.path.endswith(self.failing)):
            return _failure(503, "ServiceUnavailable", "the server is away")
        path, status = request.path, False
        if path.endswith("/status"):
            path, status = path.removesuffix("/status"), True
        try:
            match request.method:
                case "GET" if request.query.get("watch"):
                    return await self._watch(request)
                case "GET":
                    return self._get(request)
                case "POST":
                    return await self._create(path, await request.json())
                case "PUT":
                    return await self._replace(path, await request.json(), status=status)
                case "PATCH":
                    return await self._patch(path, await request.json(), request.content_type)
                case "DELETE":
                    return await self._delete(path)
        except web.HTTPException as error:
            return error
        return _failure(405, "MethodNotAllowed", request.method)

    def _get(self, request: web.Request) -> web.Response:
        found = self._objects.get(request.path)
        if found is not None:
            return web.json_response(found)
        if not _is_collection(request.path):
            return _failure(404, "NotFound", f"{request.path} not found")
        matches = _selector(request)
        items = [
            each for path, each in sorted(self._objects.items()) if path.rpartition("/")[0] == request.path
        ]
        items = [each for each in items if matches(each)]
        start = int(request.query.get("continue", 0))
        end = start + int(request.query.get("limit", len(items) or 1))
        metadata = {"resourceVersion": str(self._version)}
        if end < len(items):
            metadata["continue"] = str(end)
        return web.json_response({"items": items[start:end], "metadata": metadata})

    async def _create(self, base: str, body: Object) -> web.Response:
        name = body["metadata"].get("name") or body["metadata"]["generateName"] + str(self._version)
        # The server checks a generateName by itself, but for hyphens at its end.
        if not _NAME.fullmatch(body["metadata"].get("name") or body["metadata"]["generateName"].rstrip("-")):
            return _failure(422, "Invalid", f"{name} is no lowercase RFC 1123 subdomain")
        path = f"{base}/{name}"
        if path in self._objects:
            return _failure(409, "AlreadyExists", f"{path} already exists")
        body = {key: value for key, value in body.items() if key != "status"}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body["metadata"] = {**body["metadata"], "name": name, "creationTimestamp": now, "generation": 1}
        return web.json_response(await self._store(path, body), status=201)

    async def _replace(self, path: str, body: Object, *, status: bool) -> web.Response:
        while self.before_put:
            await self.before_put.pop(0)()
        found = self._objects.get(path)
        if found is None:
            return _failure(404, "NotFound", f"{path} not found")
        asked = body["metadata"].get("resourceVersion")
        if asked is not None and asked != found["metadata"]["resourceVersion"]:
            return _failure(409, "Conflict", "the object has been modified")
        if status:
            return web.json_response(await self._store(path, {**found, "status": body.get("status", {})}))
        return web.json_response(await self._store_spec(path, found, body))

    async def _patch(self, path: str, patch: Object, content_type: str) -> web.Response:
        if content_type != "application/merge-patch+json":
            return _failure(415, "UnsupportedMediaType", content_type)
        found = self._objects.get(path)
        if found is None:
            return _failure(404, "NotFound", f"{path} not found")
        asked = patch.get("metadata", {}).get("resourceVersion")
        if asked is not None and asked != found["metadata"]["resourceVersion"]:
            return _failure(409, "Conflict", "the object has been modified")
        return web.json_response(await self._store_spec(path, found, _merged(found, patch)))

    async def _store_spec(self, path: str, found: Object, body: Object) -> Object:
        kept = ("creationTimestamp", "generation", "deletionTimestamp", "name")
        metadata = {
            **body["metadata"],
            **{key: found["metadata"][key] for key in kept if key in found["metadata"]},
        }
        if body.get("spec") != found.get("spec"):
            metadata["generation"] = metadata.get("generation", 1) + 1
        body = {**body, "metadata": metadata, "status": found.get("status", {})}
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            await self._remove(path, body)
            return body
        return await self._store(path, body)

    async def _delete(self, path: str) -> web.Response:
        found = self._objects.get(path)
        if found is None:
            return _failure(404, "NotFound", f"{path} not found")
        if found["metadata"].get("finalizers"):
            if "deletionTimestamp" not in found["metadata"]:
                gone = copy.deepcopy(found)
                gone["metadata"]["deletionTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                gone["metadata"]["generation"] = gone["metadata"].get("generation", 1) + 1
                found = await self._store(path, gone)
            return web.json_response(found)
        await self._remove(path, found)
        return web.json_response(found)

    async def _store(self, path: str, body: Object) -> Object:
        self._version += 1
        before = self._objects.get(path)
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(self._version)
        self._objects[path] = body
        await self._record("MODIFIED" if before else "ADDED", path, before, body)
        return body

    async def _remove(self, path: str, body: Object) -> None:
        self._version += 1
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(self._version)
        before = self._objects.pop(path)
        await self._record("DELETED", path, before, body)

    async def _record(self, kind: str, path: str, before: Object | None, body: Object) -> None:
        self._history.append((self._version, kind, path, before, copy.deepcopy(body)))
        async with self._changed:
            self._changed.notify_all()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        matches = _selector(request)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if version < self.forgotten:
            error = {
                "kind": "Status",
                "code": 410,
                "reason": "Expired",
                "message": "too old resource version",
            }
            await response.write(json.dumps({"type": "ERROR", "object": error}).encode() + b"\n")
            return response
        task = asyncio.current_task()
        assert task is not None
        self._watchers.add(task)
        try:
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while not self.away:
                    newest, history = self._version, list(self._history)
                    for number, kind, path, before, body in history:
                        if number <= version or path.rpartition("/")[0] != request.path:
                            continue
                        was, is_now = before is not None and matches(before), matches(body)
                        shown = kind
                        if kind == "MODIFIED":
                            shown = {(True, False): "DELETED", (False, True): "ADDED"}.get(
                                (was, is_now), kind
                            )
                        if was or is_now:
                            line = json.dumps({"type": shown, "object": body}).encode() + b"\n"
                            await response.write(line)
                    version = newest
                    async with self._changed:
                        await self._changed.wait_for(lambda seen=newest: self._version > seen or self.away)
                return response
        except (TimeoutError, ConnectionError):
            return response
        finally:
            self._watchers.discard(task)


@asynccontextmanager
async def fake_api() -> AsyncIterator[FakeApi]:
    """Run one on a free port of the loopback."""
    api = FakeApi()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    api.url = f"http://{host}:{port}"
    try:
        yield api
    finally:
        for task in list(api._watchers):
            task.cancel()
        await runner.cleanup()


def _is_collection(path: str) -> bool:
    parts = path.strip("/").split("/")
    if "namespaces" in parts:
        return len(parts) - parts.index("namespaces") == 3
    return len(parts) == (3 if parts[0] == "api" else 4)


def _selector(request: web.Request) -> Any:
    text = request.query.get("fieldSelector", "")
    if not text:
        return lambda _found: True
    field, _, value = text.partition("=")

    def matches(found: Object) -> bool:
        part: Any = found
        for key in field.split("."):
            part = part.get(key, {}) if isinstance(part, dict) else {}
        return (part or "") == value

    return matches


def _merged(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _failure(code: int, reason: str, message: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
    return web.json_response(body, status=code)
