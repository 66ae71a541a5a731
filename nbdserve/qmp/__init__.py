"""QEMU's monitor protocol, the server's side and the client's (QEMU's docs/interop/qmp-spec).

Messages are those of the library qemu.qmp, and so is the life of a connection. To the server's side is added
cutting a stream of JSON into commands, a table of commands, and events; to the client's that every wait ends.
"""
