"""What is logged of a backend's connections: each change once, whoever serves it."""

from structlog.testing import capture_logs

from csi_vduse.dataplane.backend_log import BackendLog
from csi_vduse.dataplane.engine import BackendStatus


class Engine:
    def __init__(self, *statuses):
        self.statuses = list(statuses)

    def failure(self):
        return None

    def backend_status(self):
        return self.statuses.pop(0)


def test_a_server_that_goes_and_comes_back_is_logged_once_each():
    up = BackendStatus("connected", "", 1, 0)
    away = BackendStatus("connecting", "cannot connect: Connection refused", 1, 3)
    engine = Engine(up, away, away, up, None)
    backend_log = BackendLog()
    with capture_logs() as logs:
        while engine.statuses:
            backend_log.tell(engine)
    assert [(entry["event"], entry.get("reason", "")) for entry in logs] == [
        ("no connection to the server; requests wait", away.reason),
        ("connected to the server", ""),
    ]
