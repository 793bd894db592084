"""Only what pyproject.toml cannot say: the C engine is built by cffi."""

from setuptools import setup

setup(cffi_modules=["csi_vduse/dataplane/_build.py:ffibuilder"])
