"""The engine's second transport: a vhost-user-blk back-end (server) for QEMU, libblkio and their like.

`protocol` is bytes ↔ values, `connection` is the socket, `memory` the front-end's address map, `ring` one queue,
`session` what the messages do, `server` the process. No VDUSE, no kernel module and no root rights are needed.
"""
