#!/usr/bin/env python3
"""Regenerate csi_vduse/proto from proto/*.proto, or check that it is up to date.

    python tools/generate_proto.py           write the generated files
    python tools/generate_proto.py --check   exit 1 and name the files that differ, write nothing

Every proto file gives a `_pb2.py` and its stub `_pb2.pyi`; a file that declares services gives
`_pb2_grpc.py` and `_pb2_grpc.pyi` too. Keeps true: the same input and the pinned generators give the
same bytes, so a difference always means that somebody forgot to run this or edited by hand.

Needs the development dependencies grpcio-tools and mypy-protobuf in exactly the versions below:
the generated code names the oldest grpcio and protobuf that it runs with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.resources
import re
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_DIR = ROOT / "proto"
OUT_DIR = ROOT / "csi_vduse" / "proto"
GENERATORS = {"grpcio-tools": "1.85.1", "mypy-protobuf": "5.1.0"}
GENERATED_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")

_SIBLING_IMPORT = re.compile(r"^import (\w+_pb2) as ", re.MULTILINE)
# Section rules of the proto files end up as docstrings of whatever follows them.
_RULE_ALONE = re.compile(r'^ *"""-{8,} [^\n"]+"""\n', re.MULTILINE)
_RULE_BEFORE_TEXT = re.compile(r'"""-{8,} [^\n"]+\n\n *')
_SERVICE = re.compile(r"^service \w+", re.MULTILINE)
_TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)


def check_generators() -> None:
    """Make sure that the pinned generators are installed. Raises SystemExit with what to install."""
    for name, wanted in GENERATORS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found != wanted:
            sys.exit(
                f"generate_proto: needs {name}=={wanted}, found {found}; run: pip install {name}=={wanted}"
            )


def tidy(text: str) -> str:
    """Turn sibling imports into relative ones and drop section rules and trailing blanks."""
    text = _SIBLING_IMPORT.sub(r"from . import \1 as ", text)
    text = _RULE_ALONE.sub("", text)
    text = _RULE_BEFORE_TEXT.sub('"""', text)
    return _TRAILING_SPACE.sub("", text).rstrip("\n") + "\n"


def generate() -> dict[str, str]:
    """Run protoc over all of proto/ and return file name -> text. Raises SystemExit if protoc fails."""
    # Here and not at the top: check_generators() explains a missing package better than an ImportError.
    from grpc_tools import protoc  # type: ignore[import-untyped]  # noqa: PLC0415

    sources = sorted(PROTO_DIR.glob("*.proto"))
    scripts = Path(sysconfig.get_path("scripts"))
    with tempfile.TemporaryDirectory(prefix="csi-vduse-proto-") as out:
        argv = [
            "protoc",
            f"--proto_path={PROTO_DIR}",
            f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *(source.name for source in sources),
        ]
        if protoc.main(argv) != 0:
            sys.exit("generate_proto: protoc refused the input; its messages above name file and line")
        with_services = {source.stem for source in sources if _SERVICE.search(source.read_text())}
        return {
            path.name: tidy(path.read_text())
            for path in sorted(Path(out).iterdir())
            if "_pb2_grpc." not in path.name or path.name.partition("_pb2_grpc.")[0] in with_services
        }


def present() -> dict[str, str]:
    """Return the generated files that are there now, name -> text."""
    return {
        path.name: path.read_text()
        for path in sorted(OUT_DIR.iterdir())
        if path.name.endswith(GENERATED_SUFFIXES)
    }


def main() -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description="Regenerate csi_vduse/proto from proto/*.proto.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    args = parser.parse_args()

    check_generators()
    wanted, found = generate(), present()
    stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if args.check:
        for name in stale:
            print(f"out of date: csi_vduse/proto/{name}")
        if stale:
            print("run: python tools/generate_proto.py")
        return 1 if stale else 0
    for name in stale:
        if name in wanted:
            (OUT_DIR / name).write_text(wanted[name])
            print(f"wrote csi_vduse/proto/{name}")
        else:
            (OUT_DIR / name).unlink()
            print(f"removed csi_vduse/proto/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
