"""A guest whose QEMU on B is lost while part of its disk is on A only: its disk, and its start, on A."""
