from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """`main` sets up logging for its process, to a standard error that here ends with the test."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
