"""QEMU's monitor protocol, spoken by servers of this project (QEMU's docs/interop/qmp-spec).

Messages are those of the library qemu.qmp, and so is the life of a connection. What is added is the server's
side: cutting a stream of JSON into commands, a table of commands, and events.
"""
