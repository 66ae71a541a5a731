"""A QEMU over its monitor, and what keeps every QEMU from a disk."""
