"""Structured logging: one set-up for every process, JSON or text, to standard error.

Context such as the RPC or the volume id is bound with ``structlog.contextvars`` at the edge (the gRPC
interceptor, the worker's start) and appears on every line below it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

LogFormat = Literal["text", "json"]


def configure(*, log_format: LogFormat = "text", level: str = "INFO", component: str) -> None:
    """Set up logging for this process.

    Args:
        log_format: ``json`` for one object per line, ``text`` for people.
        level: a name of the logging module, such as ``INFO``.
        component: which of our processes this is; on every line.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(component=component)


def get() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; its context is whatever the calling task has bound."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
