"""Wrong usage is refused with what was wrong, before anything is made; and what a plan looks like."""

import pytest

from csi_vduse.agent.model import Attachment, AttachSpec, State
from csi_vduse.agent.store import Store
from csi_vduse.cli.main import main
from csi_vduse.dataplane.backend_spec import NullBackend


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("export", "--backend", "file:/nowhere/image", "x"), "/nowhere/image"),
        (
            ("export", "--backend", "disk:/dev/null", "x"),
            "file:PATH, null:SIZE, vhost-user:SOCKET or an NBD URI",
        ),
        (("export", "--backend", "null:lots", "x"), "lots"),
        (("export", "--backend", "null:16M", "--queue-size", "100", "x"), "100"),
        (("export", "--backend", "null:16M", "--block-size", "300", "x"), "300"),
        (("export", "--backend", "null:16M", "--iops", "-1", "x"), "-1 requests per second"),
        (("export", "--backend", "null:16M", "--bandwidth", "1", "x"), "4096"),
        (("export", "--backend", "null:16M", "--burst-seconds", "0", "x"), "0.01"),
        (("export", "--backend", "null:16M", "a/b"), "a/b"),
        (("standalone", "--endpoint", "tcp://x", "--node-id", "n", "--pool", "p=file:/p"), "tcp://x"),
        (("standalone", "--endpoint", "unix:///run/x", "--node-id", "n"), "no pool"),
        (("standalone", "--endpoint", "unix:///run/x", "--node-id", "n", "--pool", "p=tape:/p"), "tape"),
        (("storage-server", "--directory", "/p"), "either --tls-dir DIR or --no-tls"),
        (("storage-server", "--directory", "/p", "--no-tls", "--nbd", "0.0.0.0"), "TLS is off"),
        (("storage-server", "--directory", "/p", "--no-tls", "--node-name", "CN=x"), "name certificates"),
        (("storage-server", "--directory", "/p", "--tls-dir", "/nowhere"), "ca-cert.pem"),
        (("volume", "detach", "--run-dir", "/nowhere", "vol"), "no agent listens"),
        (("upgrade", "--run-dir", "/nowhere"), "no agent listens"),
        (("shutdown", "--run-dir", "/nowhere"), "no agent listens"),
        (("volume", "list", "--endpoint", "http:x"), "http:x"),
    ],
)
def test_error_names_what_was_wrong(capsys, argv, said):
    assert main(list(argv)) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [(), ("exprot",), ("volume", "create", "--endpoint", "unix:///x", "--size", "big", "v")]
)
def test_usage_errors_end_with_2(argv):
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 2


def test_without_permission_the_file_is_named_and_nothing_is_made(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("csi_vduse.cli.export.DEFAULT_RUN_DIR", tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/run/csi-vduse/export")

    monkeypatch.setattr("csi_vduse.agent.store.Store.find", refuse)
    assert main(["export", "--backend", "null:16M", "x"]) == 1
    assert "/run/csi-vduse/export: Permission denied (run as root)" in capsys.readouterr().err


def test_doctor_prints_what_the_next_agent_would_do_and_does_not_do_it(capsys, tmp_path):
    store = Store(tmp_path / "volumes")
    spec = AttachSpec("vol-1", NullBackend(), 1 << 20)
    store.save(Attachment(spec, State.ATTACHED))
    assert main(["doctor", "--plan", "--run-dir", str(tmp_path)]) == 0
    assert "forget vol-1: its device does not exist" in capsys.readouterr().out
    assert store.find("vol-1")
    (tmp_path / "volumes/vol-1/record.json").write_text('{"version": 99}')
    assert main(["doctor", "--plan", "--run-dir", str(tmp_path), "--output", "json"]) == 1
    assert "leave vol-1 alone" in capsys.readouterr().out
