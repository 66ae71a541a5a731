"""Policy hybrid: the disk is copied before the cut-over, while the guest runs on A."""
