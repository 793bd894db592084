"""Requests to the Kubernetes API: plain objects in and out, bounded in time, errors told in our words.

Keeps true: nothing waits longer than its deadline; an API server that is away is Unavailable, a write that
met a newer version is Conflict, and an object that is not there is None or NotFound. Nothing is tried twice
here: whoever calls knows whether that is right.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration

from csi_vduse.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    VduseError,
)
from csi_vduse.kube.resources import Object, Resource, name_of

_TIMEOUT_S = 20.0
_PAGE = 500
# A watch ends by itself after about so long: a connection that died unnoticed is found out by then.
_WATCH_S = 90
_WATCH_SLACK_S = 15.0
MERGE_PATCH = "application/merge-patch+json"
JSON = "application/json"


class Conflict(FailedPrecondition):
    """The object has changed since it was read; read it again and decide again."""


class Expired(VduseError):
    """The server no longer knows the version to watch from; list again."""


@dataclass(frozen=True)
class Event:
    """One change that a watch saw: ADDED, MODIFIED, DELETED or BOOKMARK, and the object as it is then."""

    type: str
    object: Object


class ApiServer:
    """A client of one API server; made by `connect`, which also closes it.

    Args:
        client: of the package `kubernetes`: knows address, certificates and tokens.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def get(self, resource: Resource, name: str) -> Object | None:
        """Return an object, or None."""
        try:
            return await self._call("GET", resource.named(name))
        except NotFound:
            return None

    async def list(
        self, resource: Resource, field_selector: str = "", label_selector: str = ""
    ) -> tuple[list[Object], str]:
        """Return all objects of a kind, and the version that a watch goes on from.

        Args:
            resource: the kind.
            field_selector: such as "spec.nodeName=n1"; the CRD must offer the field.
            label_selector: such as "app=x".
        """
        found: list[Object] = []
        query = {"limit": str(_PAGE)} | ({"fieldSelector": field_selector} if field_selector else {})
        query |= {"labelSelector": label_selector} if label_selector else {}
        while True:
            answer = await self._call("GET", resource.base, query=query)
            found += answer["items"]
            token = answer["metadata"].get("continue")
            if not token:
                return found, answer["metadata"]["resourceVersion"]
            query["continue"] = token

    async def create(self, resource: Resource, body: Object) -> Object:
        """Create an object.

        Raises:
            AlreadyExists: there is one of that name.
        """
        return await self._call("POST", resource.base, body=body)

    async def replace(self, resource: Resource, body: Object, *, status: bool = False) -> Object:
        """Replace an object as it was read, or its status only.

        Args:
            resource: the kind.
            body: with the resourceVersion that it was read with.
            status: replace the status; all else of the body is ignored by the server.

        Raises:
            Conflict: it has changed since.
            NotFound: it is gone.
        """
        path = resource.status(name_of(body)) if status else resource.named(name_of(body))
        return await self._call("PUT", path, body=body)

    async def patch(self, resource: Resource, name: str, patch: Object) -> Object:
        """Merge into an object (RFC 7396); with a resourceVersion in the patch only if that is current."""
        return await self._call("PATCH", resource.named(name), body=patch, content_type=MERGE_PATCH)

    async def delete(self, resource: Resource, name: str) -> None:
        """Ask for an object to be deleted; it stays while it has finalizers. Fine if it is gone."""
        try:
            await self._call("DELETE", resource.named(name), body={"propagationPolicy": "Background"})
        except NotFound:
            return

    async def read_text(self, path: str) -> str:
        """Return what a path answers that is no object, such as a pod's metrics through the API server.

        Raises:
            Unavailable: it does not answer.
        """
        try:
            async with await self._request("GET", path) as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{path} does not answer: {error!r}") from error

    async def watch(self, resource: Resource, version: str, field_selector: str = "") -> AsyncIterator[Event]:
        """Yield changes since `version` until the server ends the watch, as it does every minute or two.

        Raises:
            Expired: list again.
            Unavailable: the connection broke.
        """
        # Not all at the same moment: many nodes start together.
        duration_s = _WATCH_S * random.uniform(0.7, 1.0)  # noqa: S311 - no secret
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(duration_s)),
        } | ({"fieldSelector": field_selector} if field_selector else {})
        timeout = aiohttp.ClientTimeout(total=duration_s + _WATCH_SLACK_S, sock_connect=_TIMEOUT_S)
        try:
            response = await self._request("GET", resource.base, query=query, timeout=timeout)
            try:
                async for line in response.content:
                    yield _event(json.loads(line))
            finally:
                response.close()
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            raise Unavailable(
                f"the watch of {resource.kind} broke: {error!r}", hint="it begins again"
            ) from error

    async def _call(
        self,
        verb: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = JSON,
    ) -> Object:
        try:
            response = await self._request(verb, path, query=query, body=body, content_type=content_type)
            async with response:
                answer: Object = await response.json(content_type=None)
                return answer
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            raise Unavailable(
                f"the Kubernetes API does not answer {verb} {path}: {error!r}", hint="retry when it is back"
            ) from error

    async def _request(
        self,
        verb: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = JSON,
        timeout: aiohttp.ClientTimeout | None = None,  # noqa: ASYNC109 - aiohttp's own, of the whole answer
    ) -> aiohttp.ClientResponse:
        arguments = await self._client.param_serialize(
            verb,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": JSON, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = await self._client.call_api(
            *arguments, _request_timeout=timeout or aiohttp.ClientTimeout(total=_TIMEOUT_S)
        )
        response: aiohttp.ClientResponse = answer.response
        if response.status >= 400:
            async with response:
                raise _error(verb, path, response.status, await response.read())
        return response


async def connect(kubeconfig: str | None = None, context: str | None = None) -> ApiServer:
    """Connect as a pod does, by its service account, or as a person does, by a kubeconfig.

    Args:
        kubeconfig: path of a kubeconfig; None: the service account if there is one, else the usual kubeconfig.
        context: which context of the kubeconfig; None: the current one.

    Raises:
        FailedPrecondition: neither is there or usable.
    """
    configuration = Configuration()
    # The chain is verified as ever; Python 3.13's strict mode would refuse the CAs that many clusters have
    # (no key identifiers).
    configuration.disable_strict_ssl_verification = True
    try:
        if kubeconfig is None and context is None:
            try:
                kube_config.load_incluster_config(client_configuration=configuration)
            except kube_config.ConfigException:
                await kube_config.load_kube_config(client_configuration=configuration)
        else:
            await kube_config.load_kube_config(
                config_file=kubeconfig, context=context, client_configuration=configuration
            )
    except (kube_config.ConfigException, OSError) as error:
        raise FailedPrecondition(
            f"no way to the Kubernetes API: {error}",
            hint="run in a pod with a service account, or give --kubeconfig",
        ) from error
    return ApiServer(ApiClient(configuration))


def at(url: str) -> ApiServer:
    """Return a client of an API server without authentication: `kubectl proxy`, and tests."""
    return ApiServer(ApiClient(Configuration(host=url)))


async def pause(seconds: float, wake: asyncio.Event) -> None:
    """Wait so long, or until `wake` is set."""
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return


def _event(change: Any) -> Event:  # noqa: ANN401 - JSON
    found = change["object"]
    if change["type"] == "ERROR":
        code = found.get("code", 0)
        if code == 410:
            raise Expired(f"the watch cannot go on: {found.get('message', '')}")
        raise Unavailable(f"the watch ended: {found.get('message', found)}")
    return Event(change["type"], found)


_MEANING: dict[int, tuple[type[VduseError], str]] = {
    400: (InvalidArgument, ""),
    401: (PermissionDenied, "the token was not accepted"),
    403: (PermissionDenied, "the service account lacks a rule; compare with the chart's RBAC"),
    404: (NotFound, ""),
    410: (Expired, ""),
    413: (ResourceExhausted, ""),
    422: (InvalidArgument, ""),
    429: (Unavailable, "the API server is busy; retry"),
}


def _error(verb: str, path: str, code: int, body: bytes) -> VduseError:
    """Return what an answer means; the API tells conflicts and duplicates apart by `reason` (both are 409)."""
    try:
        status = json.loads(body)
        reason, message = status.get("reason", ""), status.get("message", "")
    except (ValueError, AttributeError):
        reason, message = "", body[:200].decode(errors="replace")
    text = f"{verb} {path}: {message or code}"
    if code == 409:
        return AlreadyExists(text) if reason == "AlreadyExists" else Conflict(text, hint="read it again")
    kind, hint = _MEANING.get(code, (Unavailable, "retry"))
    return kind(text, hint=hint)
