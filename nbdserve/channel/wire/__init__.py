"""The channel's protocol as values: bytes in, values out, without input or output."""
