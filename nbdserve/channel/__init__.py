"""The single channel: a migration's RAM, its disks' NBD traffic and control over one connection."""
