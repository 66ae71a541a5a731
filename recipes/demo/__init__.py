"""The demonstration: a real guest, moved live on this machine, that checks its own disk."""
