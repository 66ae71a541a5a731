"""nbd-overlay's command line."""
