"""An NBD server, and the NBD plumbing that the overlay and the recipes stand on."""

__version__ = "0.1.0"
