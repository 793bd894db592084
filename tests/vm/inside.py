"""System calls made by another process, as what had taken it over would make them (ptrace(2), x86_64).

Its main thread is stopped wherever it is, made to do one call with its own credentials, filters and namespaces, and goes
on as if nothing had happened.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ATTACH, _DETACH, _CONT, _GETREGS, _SETREGS, _SINGLESTEP, _POKE = 16, 17, 7, 12, 13, 9, 4
_REGISTERS = 27  # of struct user_regs_struct, 8 bytes each
_RAX, _RCX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP, _RSP, _R8, _R9, _R10 = 10, 11, 12, 13, 14, 15, 16, 19, 9, 8, 7
_ARGUMENTS = (_RDI, _RSI, _RDX, _R10, _R8, _R9)
_SYSCALL = b"\x0f\x05"
_STACK_ROOM = 4096  # below the red zone, for what arguments point to

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: int | ctypes.Array[ctypes.c_char] = 0) -> None:
    pointer = ctypes.cast(data, ctypes.c_void_p) if isinstance(data, ctypes.Array) else ctypes.c_void_p(data)
    if _libc.ptrace(request, pid, ctypes.c_void_p(address), pointer) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request} of {pid}: {os.strerror(ctypes.get_errno())}")


def _wait(pid: int) -> None:
    os.waitpid(pid, 0x40000000)  # __WALL


def _registers(pid: int) -> list[int]:
    room = ctypes.create_string_buffer(_REGISTERS * 8)
    _ptrace(_GETREGS, pid, 0, room)
    return list(struct.unpack(f"={_REGISTERS}Q", room.raw))


def _set_registers(pid: int, values: list[int]) -> None:
    _ptrace(_SETREGS, pid, 0, ctypes.create_string_buffer(struct.pack(f"={_REGISTERS}Q", *values)))


class Inside:
    """A stopped process that does what it is told."""

    def __init__(self, pid: int, registers: list[int], instruction: int) -> None:
        self._pid = pid
        self._registers = registers
        self._instruction = instruction

    def call(self, number: int, *arguments: int | bytes) -> int:
        """Have it make the call; bytes are passed by address. Returns what the kernel answers: -errno for an error."""
        registers, values = list(self._registers), []
        place = registers[_RSP] - _STACK_ROOM
        with Path(f"/proc/{self._pid}/mem").open("r+b", buffering=0) as memory:
            for argument in arguments:
                if isinstance(argument, bytes):
                    memory.seek(place)
                    memory.write(argument)
                    values.append(place)
                    place += (len(argument) + 15) // 16 * 16
                else:
                    values.append(argument & (1 << 64) - 1)
        registers[_RAX], registers[_RIP], registers[_ORIG_RAX] = number, self._instruction, (1 << 64) - 1
        for register, value in zip(_ARGUMENTS, values, strict=False):
            registers[register] = value
        _set_registers(self._pid, registers)
        _ptrace(_SINGLESTEP, self._pid)
        _wait(self._pid)
        answer = _registers(self._pid)[_RAX]
        return answer - (1 << 64) if answer >> 63 else answer


@contextmanager
def inside(pid: int) -> Iterator[Inside]:
    """Stop the process and give it orders; it goes on afterwards."""
    _ptrace(_ATTACH, pid)
    _wait(pid)
    try:
        registers = _registers(pid)
        # It was stopped in a call, or just after one: the instruction is right before where it goes on.
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(registers[_RIP] - 2)
            assert memory.read(2) == _SYSCALL, "it is not in a system call"
        try:
            yield Inside(pid, registers, registers[_RIP] - 2)
        finally:
            _set_registers(pid, registers)
    finally:
        _ptrace(_DETACH, pid, 0, 0)
        os.kill(pid, signal.SIGCONT)
