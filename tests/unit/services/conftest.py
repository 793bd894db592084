import pytest

from tests.unit.services.stack import Stack


@pytest.fixture
def stack(tmp_path):
    stack = Stack(tmp_path)
    yield stack
    stack.close()
