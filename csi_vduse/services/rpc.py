"""Wrapping gRPC handlers: what the interceptors share. All our methods take one message and give one."""
# ruff: noqa: ANN401 - interceptors see messages of every type

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Around = Callable[[Callable[[], Awaitable[Any]], Any], Awaitable[Any]]
AroundWithContext = Callable[[Callable[[], Awaitable[Any]], Any, Any], Awaitable[Any]]


def method_name(details: grpc.HandlerCallDetails) -> str:
    """Return "CreateVolume" for "/csi.v1.Controller/CreateVolume"."""
    method: str = details.method
    return method.rpartition("/")[2]


def rewrapped(handler: Any, around: Around) -> Any:
    """Return a handler that calls `around(behaviour, request)`; see rewrapped_with_context."""

    async def without_context(behaviour: Callable[[], Awaitable[Any]], request: Any, _context: Any) -> Any:
        return await around(behaviour, request)

    return rewrapped_with_context(handler, without_context)


def rewrapped_with_context(handler: Any, around: AroundWithContext) -> Any:
    """Return a handler that calls `around(behaviour, request, context)`, which calls `behaviour()`.

    A handler that is None (unknown method) or streams is returned as it is. Methods that a service does not
    implement are plain functions in generated code; they are called as such.
    """
    if handler is None or handler.unary_unary is None:
        return handler

    async def call(request: Any, context: Any) -> Any:
        async def behaviour() -> Any:
            result = handler.unary_unary(request, context)
            return await result if inspect.isawaitable(result) else result

        return await around(behaviour, request, context)

    return grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
