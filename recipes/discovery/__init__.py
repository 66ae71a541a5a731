"""Finding out what a running guest is, and how QEMU has to be started for it on another host."""
