"""The NBD protocol as pure code: bytes in, values out; no socket, thread, ssl or os import."""
