"""What docs/storage-server.md tells people to type makes certificates that work."""

import re
import subprocess
from pathlib import Path

DOCS = Path(__file__).resolve().parents[3] / "docs/storage-server.md"


def test_the_certificates_of_the_docs_are_made_and_verify(tmp_path):
    (script,) = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for name, role in (("storage", "server"), ("csi-vduse-controller", "client"), ("node-1", "client")):
        certificate = tmp_path / name / f"{role}-cert.pem"
        purpose = f"ssl{role}"
        argv = [
            "openssl",
            "verify",
            "-purpose",
            purpose,
            "-CAfile",
            tmp_path / name / "ca-cert.pem",
            certificate,
        ]
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
        assert (tmp_path / name / f"{role}-key.pem").exists()
