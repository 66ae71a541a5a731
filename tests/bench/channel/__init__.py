"""``make bench-channel``: a migration's bytes through the single channel and through two."""
