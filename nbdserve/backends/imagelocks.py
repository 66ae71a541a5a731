"""QEMU's image locks: who may do what with an image file, agreed between processes through byte-range locks.

For each permission two bytes of the file are set aside, and a process that works on the image keeps a shared
OFD lock on the bytes that say what it does and what it does not want others to do:

    byte 100 + bit    locked by whoever uses the permission
    byte 200 + bit    locked by whoever does not let others use it (has "unshared" it)

A process first takes its locks and then looks whether anyone else holds the opposite byte, so that of two
that come at once at least one is refused. Nothing is ever written to these bytes. The kernel drops the locks
when the last descriptor of the open file is closed, also when the process is killed.

From QEMU's block/file-posix.c (bits of BlockPermission). Measured on 7.2: with a format that has metadata
(qed, qcow2) a writer uses READ, WRITE and RESIZE, a reader READ, and both unshare WRITE and RESIZE; with raw,
qemu-io unshares nothing, qemu-nbd RESIZE. ``--force-share`` uses READ and unshares nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntFlag

from nbdserve.common import file_locks
from nbdserve.common.errors import ImageError

_USED_BASE = 100
_UNSHARED_BASE = 200


class Permission(IntFlag):
    """What a process does with an image (QEMU's BlockPermission)."""

    NONE = 0
    READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8


READER = Permission.READ
"""What a reader uses."""

WRITER = Permission.READ | Permission.WRITE | Permission.RESIZE
"""What a writer uses whose image can grow."""

EXCLUSIVE = Permission.WRITE | Permission.RESIZE
"""What readers and writers of a format with metadata both unshare; alone, a fence against all writers."""

_DOING = {
    Permission.READ: "reading it",
    Permission.WRITE: "writing to it",
    Permission.WRITE_UNCHANGED: "copying into it",
    Permission.RESIZE: "resizing it",
}


class ImageLocks:
    """The locks that one open image file holds. Closing the descriptor releases them too."""

    def __init__(self, fd: int, path: str) -> None:
        """``fd`` stays the caller's; ``path`` is for messages only."""
        self._fd = fd
        self._path = path
        self._held: set[int] = set()

    def hold(self, used: Permission, unshared: Permission) -> None:
        """Hold exactly these permissions from now on, whatever was held before.

        Raises ImageError if another process's locks forbid it or the file cannot be locked; then what was
        held before is still held.
        """
        wanted = {_USED_BASE + bit for bit in _bits(used)} | {_UNSHARED_BASE + bit for bit in _bits(unshared)}
        gained: set[int] = set()
        try:
            for byte in sorted(wanted - self._held):
                self._lock(byte)
                gained.add(byte)
            self._refuse_conflicts(used, unshared)
        except BaseException:
            self._unlock(gained)
            raise
        self._unlock(self._held - wanted)
        self._held = wanted

    def fence(self) -> None:
        """From now on keep others from starting to write or resize, without asking who does so already.

        A process that writes keeps the permission it has. Once it has given it up, as QEMU does when its
        guest has migrated away, it cannot take it again, so that ``cont`` fails there (measured on 7.2).
        Raises ImageError if the file cannot be locked.
        """
        wanted = {_UNSHARED_BASE + bit for bit in _bits(EXCLUSIVE)}
        for byte in sorted(wanted - self._held):
            self._lock(byte)
        self._held |= wanted

    def release(self) -> None:
        """Give every lock back."""
        self._unlock(self._held)
        self._held = set()

    def _refuse_conflicts(self, used: Permission, unshared: Permission) -> None:
        for bit in _bits(used):
            if self._held_by_another(_UNSHARED_BASE + bit):
                self._refuse(f"keeps others from {_DOING[Permission(1 << bit)]}")
        for bit in _bits(unshared):
            if self._held_by_another(_USED_BASE + bit):
                self._refuse(f"is {_DOING[Permission(1 << bit)]}")

    def _refuse(self, reason: str) -> None:
        raise ImageError(
            f"{self._path}: the image is in use: another process {reason}; stop that process first"
        )

    def _held_by_another(self, byte: int) -> bool:
        """Whether another open file holds the byte: whether an exclusive lock, not taken, would fail."""
        try:
            return file_locks.is_locked_by_another(self._fd, file_locks.WRITE, byte, 1)
        except OSError as error:
            raise self._no_locks(error) from error

    def _lock(self, byte: int) -> None:
        self._set(file_locks.READ, byte)

    def _unlock(self, held: set[int]) -> None:
        for byte in held:
            self._set(file_locks.NONE, byte)

    def _set(self, kind: int, byte: int) -> None:
        try:
            file_locks.lock(self._fd, kind, byte, 1)
        except BlockingIOError as error:
            raise ImageError(f"{self._path}: another process has locked the image; stop it first") from error
        except OSError as error:
            raise self._no_locks(error) from error

    def _no_locks(self, error: OSError) -> ImageError:
        advice = "keep it on a file system that has locks"
        return ImageError(f"{self._path}: cannot lock the image: {error.strerror}; {advice}")


def _bits(permissions: Permission) -> Iterator[int]:
    return (bit for bit in range(permissions.bit_length()) if permissions >> bit & 1)
