"""Commands that lack address families, as on a kernel without IPv6 or under RestrictAddressFamilies=."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

_SOCKET_CALL = {"x86_64": 41, "aarch64": 198}
"""The number of socket(2)."""
_LOAD, _IS, _RETURN = 0x20, 0x15, 0x06
"""Instructions of the kernel's filters: load a word, jump if it is equal, and return."""
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVILEGES, _SET_FILTER, _MODE_FILTER = 38, 22, 2


def without(*families: socket.AddressFamily) -> list[str]:
    """The words before a command for which socket(2) with one of these families fails with EAFNOSUPPORT."""
    return [sys.executable, "-I", __file__, ",".join(str(int(family)) for family in families)]


def _filter(families: list[int]) -> bytes:
    """A program of BPF: of the system call's number and first argument."""
    program = [(_LOAD, 0, 0, 0), (_IS, 0, len(families) + 1, _SOCKET_CALL[platform.machine()])]
    program.append((_LOAD, 0, 0, 16))
    program += [(_IS, len(families) - index, 0, family) for index, family in enumerate(families)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _confine(families: list[int]) -> None:
    code = _filter(families)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    pointer = ctypes.create_string_buffer(program, len(program))
    if prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or prctl(
        _SET_FILTER, _MODE_FILTER, ctypes.addressof(pointer), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


if __name__ == "__main__":
    _confine([int(family) for family in sys.argv[1].split(",")])
    os.execvp(sys.argv[2], sys.argv[2:])
