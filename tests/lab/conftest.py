from lab.pytest_plugin import _session_machine, machine

__all__ = ["_session_machine", "machine"]
