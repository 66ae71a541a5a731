"""``make bench-migrate``: a working guest is moved by this project and by QEMU's own means."""
