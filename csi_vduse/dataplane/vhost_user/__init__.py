"""The engine's second transport, vhost-user: a back-end (server) for QEMU, libblkio and their like, and a front-end.

Server: `protocol` is bytes ↔ values, `connection` is the socket, `memory` the front-end's address map, `ring` one queue,
`session` what the messages do, `server` the process. No VDUSE, no kernel module and no root rights are needed.

Front-end of a volume whose server is somebody else's: `requests` is values ↔ bytes, `frontend` is the socket, `offer`
what a server can do, `relayed` what it is given, `server_session` its life; in an Engine's place stand `relay`, if the
server works on the driver's rings, and `mediator`, if it works on the engine's.
"""
