"""The exceptions of the whole project. Each message is one line: what, where, and what to do.

    OperatorError            shown to the operator without a traceback; exit code 1
    ├── UsageError           the command line or a configuration file is wrong; exit code 2
    ├── ProtocolError        a peer broke the NBD protocol; its connection cannot go on
    ├── ConnectionLostError  a client went away in the middle of something
    ├── ConnectError         a server, socket or monitor could not be reached
    ├── MonitorError         the other side of a monitor does not do what it is asked    qmp/client.py
    └── ImageError           a disk image is malformed, unsafe or of an unknown kind

What may fail in a migration besides is in ``recipes/errors.py``.

In the data path failures are ``OSError`` with an errno instead, so that a guest's request fails with the
number that the disk failed with.
"""


def reason_of(error: Exception) -> str:
    """Say why in a few words: what the system calls an OSError, any other exception's message."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class OperatorError(Exception):
    """Something the operator must know. The message is one line and needs no traceback."""

    exit_code = 1


class UsageError(OperatorError):
    """The command line, a URI or a configuration file is wrong."""

    exit_code = 2


class ProtocolError(OperatorError):
    """A peer broke the NBD protocol in a way after which its byte stream means nothing."""


class ConnectionLostError(OperatorError):
    """A client went away, or fell silent, in the middle of something."""


class ConnectError(OperatorError):
    """A server, a socket or a monitor could not be reached or answered with a refusal."""


class ImageError(OperatorError):
    """A disk image is malformed, unsafe to open, or of a kind that is not known here."""
