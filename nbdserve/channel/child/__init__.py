"""What QEMU starts as its migration's child: it splits in two, has QEMU's pipes, and fences the disks."""
