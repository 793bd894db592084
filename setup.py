"""Only what pyproject.toml cannot say: the C engine, and what Python lacks of system calls, are built by cffi."""

from setuptools import setup

setup(
    cffi_modules=[
        "csi_vduse/dataplane/_build.py:ffibuilder",
        "csi_vduse/dataplane/_system_build.py:ffibuilder",
    ]
)
