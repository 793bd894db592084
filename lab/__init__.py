"""The laboratory: virtual machines with a VDUSE kernel, made from this very host.

A machine boots Debian's kernel under QEMU with the host's root file system inside, copy-on-write, and this
checkout at its usual path. Nothing is installed on the host and no image is built: see `lab.machine.Machine`
for the programmer's view and `python -m lab --help` for the one at the command line.
"""
