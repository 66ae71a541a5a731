"""The six steps of a migration that moves the disk after the machine."""
