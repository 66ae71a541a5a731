"""What the command line of a QEMU says."""
