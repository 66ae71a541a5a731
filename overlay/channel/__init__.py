"""The destination's end of a migration over one connection, in nbd-overlay itself."""
