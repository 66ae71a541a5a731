"""Processes on a host that end with whoever started them, or live on when they are released."""
