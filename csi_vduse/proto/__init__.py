"""Protobuf messages and gRPC stubs.

All `*_pb2*` files here are generated from proto/*.proto by tools/generate_proto.py and never edited
by hand; `tools/generate_proto.py --check` fails on a difference. Written by hand: compat.py, which
adds what callers of CSI 1.12 still read.
"""
