"""The server's side of the newstyle handshake (proto.md, "Newstyle negotiation"): bytes in, bytes out.

    greeting   S: NBDMAGIC IHAVEOPT flags16          C: flags32
    option     C: IHAVEOPT option32 length32 payload
    reply      S: magic64 option32 type32 length32 payload

Each option is a row of the table ``_HANDLERS``; a handler gets the whole payload and appends replies.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum, auto
from typing import ClassVar

from nbdserve.common.errors import ProtocolError
from nbdserve.protocol.constants import (
    EXPORT_NAME_PADDING,
    GREETING_MAGIC,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlags,
    HandshakeFlags,
    Info,
    Option,
    OptionReply,
    TransmissionFlags,
)
from nbdserve.protocol.offers import Agreement, Catalog, Mode, Offer
from nbdserve.protocol.reader import Reader, decode_string

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION_HEADER = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_REPLY = struct.Struct(">QH")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
UINT16 = struct.Struct(">H")
UINT32 = struct.Struct(">I")

MAX_HELD_OPTION = 64 << 10
"""The longest option payload that is kept, in bytes; a longer one is skipped and gets ERR_TOO_BIG."""

MAX_SKIPPED_OPTION = 32 << 20
"""The longest option payload that is worth skipping, in bytes; beyond it the client is cut off."""

MAX_OPTIONS = 256
"""How many options one client may send."""


class State(Enum):
    """Where the handshake stands."""

    CLIENT_FLAGS = auto()
    OPTIONS = auto()
    TRANSMISSION = auto()
    """Agreed: ``agreement`` is set, and ``leftover`` holds what the client sent after its last option."""
    ENCRYPTING = auto()
    """Send what is pending, do the TLS handshake, call ``encrypted`` and go on."""
    CLOSED = auto()
    """Send what is pending and close the connection."""


class Encryption(Enum):
    """What a server says to STARTTLS, and to a client that does not ask for it."""

    NONE = auto()
    OFFERED = auto()
    REQUIRED = auto()
    ACTIVE = auto()
    """The client has done it already."""


class Haggling:
    """One client's handshake. Feed it bytes; send what it returns; look at ``state``.

    ``structured_replies=False`` refuses them, and the meta contexts that need them.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        structured_replies: bool = True,
        encryption: Encryption = Encryption.NONE,
    ) -> None:
        self._encryption = encryption
        self.state = State.CLIENT_FLAGS
        self.agreement: Agreement | None = None
        self._catalog = catalog
        self._offer_structured = structured_replies
        self._mode = Mode.SIMPLE
        self._no_zeroes = False
        self._fixed_newstyle = False
        self._options = 0
        self._receive_buffer = bytearray()
        self._reply_buffer = bytearray()
        self._skip = 0
        self._contexts_for: str | None = None
        self._contexts: tuple[tuple[int, str], ...] = ()

    @staticmethod
    def greeting() -> bytes:
        """Return the server's first words."""
        flags = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES
        return GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, flags)

    @property
    def leftover(self) -> bytes:
        """Return the bytes that were received and belong to the transmission phase."""
        return bytes(self._receive_buffer)

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the client and return the bytes to send.

        Raises ProtocolError when the stream can no longer be understood: close the connection without a word.
        """
        self._receive_buffer += data
        while self._step():
            pass
        replies = bytes(self._reply_buffer)
        self._reply_buffer.clear()
        return replies

    def encrypted(self) -> None:
        """Begin anew inside TLS: nothing that was said in the clear counts (proto.md, "STARTTLS")."""
        self._encryption = Encryption.ACTIVE
        self._mode = Mode.SIMPLE
        self._contexts_for, self._contexts = None, ()
        self.state = State.OPTIONS

    def _step(self) -> bool:
        """Consume one unit of input; False when there is none."""
        if self._skip:
            skipped = min(self._skip, len(self._receive_buffer))
            del self._receive_buffer[:skipped]
            self._skip -= skipped
            return skipped > 0
        if self.state is State.CLIENT_FLAGS:
            return self._take_client_flags()
        if self.state is State.OPTIONS:
            return self._take_option()
        return False

    def _take_client_flags(self) -> bool:
        if len(self._receive_buffer) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack_from(self._receive_buffer)
        del self._receive_buffer[: CLIENT_FLAGS.size]
        if flags & ~int(ClientFlags.FIXED_NEWSTYLE | ClientFlags.NO_ZEROES):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & ClientFlags.NO_ZEROES)
        self._fixed_newstyle = bool(flags & ClientFlags.FIXED_NEWSTYLE)
        self.state = State.OPTIONS
        return True

    def _take_option(self) -> bool:
        if len(self._receive_buffer) < OPTION_HEADER.size:
            return False
        magic, option, length = OPTION_HEADER.unpack_from(self._receive_buffer)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"an option starts with {magic:#018x} instead of IHAVEOPT")
        if length > MAX_HELD_OPTION:
            self._refuse_oversize(option, length)
            return True
        if len(self._receive_buffer) < OPTION_HEADER.size + length:
            return False
        payload = bytes(self._receive_buffer[OPTION_HEADER.size : OPTION_HEADER.size + length])
        del self._receive_buffer[: OPTION_HEADER.size + length]
        self._count_option()
        self._handle(option, payload)
        return True

    def _refuse_oversize(self, option: int, length: int) -> None:
        if option == Option.ABORT:
            # Acknowledged whatever comes with it, which nobody needs to read any more.
            self._abort(option, b"")
            return
        if length > MAX_SKIPPED_OPTION or option == Option.EXPORT_NAME:
            raise ProtocolError(f"option {option} announces {length} bytes")
        del self._receive_buffer[: OPTION_HEADER.size]
        self._count_option()
        self._skip = length
        if self._needs_tls(option):
            self._reply(option, OptionReply.ERR_TLS_REQD, b"this server requires TLS")
            return
        known = option in self._HANDLERS
        self._reply(
            option,
            OptionReply.ERR_TOO_BIG if known else OptionReply.ERR_UNSUP,
            f"at most {MAX_HELD_OPTION} bytes are taken here".encode(),
        )

    def _needs_tls(self, option: int) -> bool:
        """Whether it may not be answered before STARTTLS."""
        return self._encryption is Encryption.REQUIRED and option not in (Option.STARTTLS, Option.ABORT)

    def _count_option(self) -> None:
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise ProtocolError(f"more than {MAX_OPTIONS} options in one handshake")

    def _handle(self, option: int, payload: bytes) -> None:
        if self._needs_tls(option):
            if option == Option.EXPORT_NAME or not self._fixed_newstyle:
                raise ProtocolError("the client wants an export without TLS, which is required")
            self._reply(option, OptionReply.ERR_TLS_REQD, b"this server requires TLS")
            return
        handler = self._HANDLERS.get(option)
        if handler is None:
            self._reply(option, OptionReply.ERR_UNSUP, b"this option is not known here")
            return
        try:
            handler(self, option, payload)
        except ProtocolError as error:
            if option == Option.EXPORT_NAME:
                raise
            self._reply(option, OptionReply.ERR_INVALID, str(error).encode()[:MAX_STRING])

    def _reply(self, option: int, kind: OptionReply, payload: bytes = b"") -> None:
        self._reply_buffer += OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload))
        self._reply_buffer += payload

    # One handler for each option. ProtocolError becomes ERR_INVALID with its message.

    def _export_name(self, option: int, payload: bytes) -> None:
        name = decode_string(payload)
        if self._mode is Mode.EXTENDED:
            raise ProtocolError("EXPORT_NAME cannot follow EXTENDED_HEADERS")
        offer = self._catalog.offer(name)
        if offer is None:
            raise ProtocolError(f"there is no export {name!r}")
        self._reply_buffer += EXPORT_REPLY.pack(offer.size, self._flags(name, offer))
        if not self._no_zeroes:
            self._reply_buffer += bytes(EXPORT_NAME_PADDING)
        self._agree(name, offer)

    def _abort(self, option: int, payload: bytes) -> None:
        self._reply(option, OptionReply.ACK)
        self.state = State.CLOSED

    def _starttls(self, option: int, payload: bytes) -> None:
        Reader(payload).end()
        if self._encryption is Encryption.NONE:
            self._reply(option, OptionReply.ERR_UNSUP, b"this server has no certificate for TLS")
            return
        if not self._fixed_newstyle:
            # Without it there must be no TLS (proto.md, "Server-side requirements").
            self._reply(option, OptionReply.ERR_POLICY, b"TLS is for clients of fixed newstyle only")
            return
        if self._encryption is Encryption.ACTIVE:
            raise ProtocolError("TLS is active already")
        if self._receive_buffer:
            # Whoever sits in the line could have put it there to be taken for the client's (CVE-2021-3716).
            raise ProtocolError("plaintext came after STARTTLS")
        self._reply(option, OptionReply.ACK)
        self.state = State.ENCRYPTING

    def _list(self, option: int, payload: bytes) -> None:
        Reader(payload).end()
        for name, description in self._catalog.listing():
            encoded = name.encode()
            self._reply(
                option, OptionReply.SERVER, UINT32.pack(len(encoded)) + encoded + description.encode()
            )
        self._reply(option, OptionReply.ACK)

    def _info(self, option: int, payload: bytes) -> None:
        reader = Reader(payload)
        name = reader.string()
        wanted = {reader.uint16() for _ in range(reader.uint16())}
        reader.end()
        offer = self._catalog.offer(name)
        if offer is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, f"there is no export {name!r}".encode()[:MAX_STRING])
            return
        self._send_info(option, name, offer, wanted)
        self._reply(option, OptionReply.ACK)
        if option == Option.GO:
            self._agree(name, offer)

    def _send_info(self, option: int, name: str, offer: Offer, wanted: set[int]) -> None:
        items = [INFO_EXPORT.pack(Info.EXPORT, offer.size, self._flags(name, offer))]
        if Info.NAME in wanted:
            items.append(UINT16.pack(Info.NAME) + offer.name.encode())
        if Info.DESCRIPTION in wanted and offer.description:
            items.append(UINT16.pack(Info.DESCRIPTION) + offer.description.encode())
        sizes = offer.block_sizes
        items.append(INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, sizes.minimum, sizes.preferred, sizes.maximum))
        for item in items:
            self._reply(option, OptionReply.INFO, item)

    def _structured_reply(self, option: int, payload: bytes) -> None:
        Reader(payload).end()
        if not self._offer_structured:
            self._reply(option, OptionReply.ERR_UNSUP, b"this server was told to send simple replies only")
            return
        if self._mode is Mode.EXTENDED:
            self._reply(option, OptionReply.ERR_EXT_HEADER_REQD, b"extended headers are agreed already")
            return
        if self._mode is Mode.STRUCTURED:
            raise ProtocolError("structured replies are agreed already")
        self._mode = Mode.STRUCTURED
        self._reply(option, OptionReply.ACK)

    def _extended_headers(self, option: int, payload: bytes) -> None:
        Reader(payload).end()
        if not self._offer_structured:
            self._reply(option, OptionReply.ERR_UNSUP, b"this server was told to send simple replies only")
            return
        if self._mode is Mode.EXTENDED:
            raise ProtocolError("extended headers are agreed already")
        self._mode = Mode.EXTENDED
        self._reply(option, OptionReply.ACK)

    def _meta_context(self, option: int, payload: bytes) -> None:
        selecting = option == Option.SET_META_CONTEXT
        if selecting:
            self._contexts_for, self._contexts = None, ()
        if self._mode is Mode.SIMPLE:
            raise ProtocolError("agree on structured replies first")
        reader = Reader(payload)
        name = reader.string()
        queries = [reader.string() for _ in range(reader.uint32())]
        reader.end()
        offer = self._catalog.offer(name)
        if offer is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, f"there is no export {name!r}".encode()[:MAX_STRING])
            return
        found = _matching_contexts(offer, queries, listing=not selecting)
        if selecting:
            self._contexts_for, self._contexts = name, found
        for identifier, context in found:
            # A listed context has no id (proto.md: "the server SHOULD set it to zero").
            shown = identifier if selecting else 0
            self._reply(option, OptionReply.META_CONTEXT, UINT32.pack(shown) + context.encode())
        self._reply(option, OptionReply.ACK)

    def _flags(self, name: str, offer: Offer) -> TransmissionFlags:
        """The export's flags, and those that depend on how replies are framed."""
        flags = offer.flags
        if self._mode is not Mode.SIMPLE:
            flags |= TransmissionFlags.SEND_DF
        if self._mode is Mode.EXTENDED and self._contexts_of(name):
            flags |= TransmissionFlags.BLOCK_STATUS_PAYLOAD
        return flags

    def _agree(self, name: str, offer: Offer) -> None:
        self.agreement = Agreement(offer, self._mode, self._contexts_of(name))
        self.state = State.TRANSMISSION

    def _contexts_of(self, name: str) -> tuple[tuple[int, str], ...]:
        """Contexts that were negotiated for another export name do not count (proto.md, SET_META_CONTEXT)."""
        return self._contexts if self._contexts_for == name else ()

    _HANDLERS: ClassVar[dict[int, Callable[[Haggling, int, bytes], None]]] = {
        Option.EXPORT_NAME: _export_name,
        Option.ABORT: _abort,
        Option.STARTTLS: _starttls,
        Option.LIST: _list,
        Option.INFO: _info,
        Option.GO: _info,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _meta_context,
        Option.SET_META_CONTEXT: _meta_context,
        Option.EXTENDED_HEADERS: _extended_headers,
    }


def _matching_contexts(offer: Offer, queries: list[str], *, listing: bool) -> tuple[tuple[int, str], ...]:
    """The contexts that the queries name; in a listing no query means all, and `base:` a prefix."""
    found = []
    for identifier, context in enumerate(offer.contexts, start=1):
        namespace = context.partition(":")[0] + ":"
        if context in queries or (listing and (not queries or namespace in queries)):
            found.append((identifier, context))
    return tuple(found)
