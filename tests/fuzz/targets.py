"""What is fuzzed: any bytes into haggling and into the transmission loop; and what must hold afterwards."""

from __future__ import annotations

import contextlib
import struct

from nbdserve.backends.base import Backend
from nbdserve.channel.wire import greeting
from nbdserve.channel.wire.frames import (
    HEADER,
    Bye,
    Close,
    CloseReason,
    Control,
    Credit,
    Data,
    Done,
    End,
    Open,
    Ping,
    Pong,
    Ram,
    RamStatus,
    Reset,
    ResetReason,
    Type,
    encode,
)
from nbdserve.channel.wire.return_path import ReturnPath
from nbdserve.channel.wire.session import Role, Session
from nbdserve.channel.wire.streams import Stream
from nbdserve.common.errors import ConnectionLostError, ProtocolError
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.protocol.constants import Command, TransmissionFlags
from nbdserve.protocol.haggling import Encryption, Haggling, State
from nbdserve.protocol.offers import BASE_ALLOCATION, Agreement, BlockSizes, Mode, Offer
from nbdserve.transmission.loop import Transmission
from nbdserve.transmission.workers import Crew, Workers
from tests.support import wire
from tests.support.memory import MemoryBackend, ScriptedStream

SIZE = 10_007
BAD = 9_000
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
EXTENDED_REPLY_MAGIC = 0x6E8A278C
MOST_ANSWER = 1 << 20


def haggle(data: bytes) -> None:
    """Feed a client's side of a handshake in two pieces; ProtocolError is the only way to fail."""
    exports = Exports([Export("", MemoryBackend(SIZE)), Export("disk", MemoryBackend(512), "a disk")])
    encryption = list(Encryption)[len(data) % 4]
    haggling = Haggling(exports, structured_replies=len(data) % 3 > 0, encryption=encryption)
    said = 0
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        try:
            said += len(haggling.receive(piece))
        except ProtocolError:
            return
        if haggling.state is State.ENCRYPTING:
            haggling.encrypted()
        assert said <= MOST_ANSWER
        assert (haggling.agreement is not None) == (haggling.state is State.TRANSMISSION)


WINDOW = 64 << 10
CHANNEL_OFFER = greeting.Offer(WINDOW, 4, 15_000)
MOST_FILLED = 200 << 10
TOKEN = b"0123456789abcdef" * 2
HELLO = greeting.Connector(TOKEN, greeting.Claim(greeting.Mode.NEW, 0, CHANNEL_OFFER), bytes(32)).first


def channel(data: bytes) -> None:
    """Feed one end of a channel's connection, which answers, in pieces; ProtocolError is the only way to
    fail.

    The first byte chooses which end, the size of the pieces, and whether what comes is delivered here.
    """
    choice = data[0] if data else 0
    role = Role.CONNECTOR if choice & 1 else Role.ACCEPTOR
    session = Session(role, CHANNEL_OFFER, CHANNEL_OFFER)
    streams = [session.open()]
    session.begin(streams[0])
    held = dict[int, int]()
    buffer = memoryview(bytearray(MOST_FILLED))
    size = (1, 7, 100, 1 << 20)[choice // 2 % 4]
    assert session.fill(buffer, _read)
    with contextlib.suppress(ProtocolError):
        for at in range(1, len(data), size):
            for stream, frame in session.receive(memoryview(data)[at : at + size]):
                _take(session, stream, frame, held, delivers=bool(choice & 8))
            assert session.fill(buffer, _read) <= len(buffer)
            assert sum(held.values()) <= WINDOW * 2 * CHANNEL_OFFER.streams
            assert len(session.streams) <= 1 + 2 * CHANNEL_OFFER.streams
            session.look(0.1)


def channel_seed(choice: int) -> bytes:
    """Every kind of frame that the end takes which a choice means, in an order that the specification has."""
    if choice & 1:
        number, own = 2, 1
    else:
        number, own = 1, 2
    frames: list[Control] = [Open(number), Ping(7), Pong(1), Credit(own, 1)]
    frames += [Ram(RamStatus.LOADED), Done()] if choice & 1 else [Bye()]
    frames += [End(number)]
    frames += [Reset(own, ResetReason.BROKEN, "why"), Close(CloseReason.STOPPED, "enough")]
    sent = [encode(frame) for frame in frames]
    sent.insert(1, HEADER.pack(Type.DATA, number, 5) + b"piece")
    return b"".join(sent)


def _take(
    session: Session, stream: Stream | None, frame: object, held: dict[int, int], *, delivers: bool
) -> None:
    """Do with a frame what the multiplexer does."""
    match frame:
        case Data(number, piece):
            assert stream is not None
            held[number] = held.get(number, 0) + len(piece)
            assert held[number] <= WINDOW
            if delivers:
                session.took(stream, held.pop(number))
        case Open(number):
            assert stream is not None
            assert number == stream.number
            session.begin(stream)
        case End(_):
            assert stream is not None
            session.finish(stream)
            session.release(stream)
        case Reset(number, _, _):
            assert stream is not None
            held.pop(number, None)
            session.release(stream)
        case _:
            assert stream is None


def _read(stream: Stream, buffers: list[memoryview]) -> int | None:
    """Something to send, on some streams."""
    return None if stream.number % 3 else min(sum(map(len, buffers)), 70_000)


def greet(data: bytes) -> None:
    """Feed both ends of the greeting, and QEMU's return path: nobody without the token comes in."""

    def decide(claim: greeting.Claim) -> greeting.Answer:
        raise AssertionError("whoever does not know the token was let in")

    acceptor = greeting.Acceptor(TOKEN, bytes(32), CHANNEL_OFFER, decide)
    connector = greeting.Connector(TOKEN, greeting.Claim(greeting.Mode.NEW, 0, CHANNEL_OFFER), bytes(32))
    for end in (acceptor, connector):
        at = 0
        try:
            while end.needed and len(data) - at >= end.needed:
                at, piece = at + end.needed, data[at : at + end.needed]
                end.receive(piece)
        except (ProtocolError, greeting.RefusedError):
            pass
    assert connector.answer is None
    path = ReturnPath()
    for at in range(0, len(data), 5):
        path.feed(data[at : at + 5])


def offer_of(backend: Backend, *, read_only: bool) -> Offer:
    """An export of the backend with every flag set."""
    flags = (
        TransmissionFlags.HAS_FLAGS
        | TransmissionFlags.SEND_FLUSH
        | TransmissionFlags.SEND_FUA
        | TransmissionFlags.SEND_TRIM
        | TransmissionFlags.SEND_WRITE_ZEROES
        | TransmissionFlags.SEND_CACHE
        | TransmissionFlags.SEND_FAST_ZERO
    )
    if read_only:
        flags |= TransmissionFlags.READ_ONLY
    return Offer("", backend.size, flags, block_sizes=BlockSizes(1, 4096, 1 << 20))


class FarBackend(MemoryBackend):
    """A disk whose requests are all served by the workers."""

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Nothing is."""
        return False


def mode_of(choice: int) -> Mode:
    """The framing that the first byte of an input to ``transmit`` chooses."""
    return tuple(Mode)[choice % 3]


def transmit(data: bytes) -> list[tuple[int, bytes]]:
    """Feed requests to the transmission loop and return its replies; it fails only as a client can make it.

    The first byte chooses the framing, the sizes of the pieces, whether the export is read-only and whether
    it is served by the workers.
    """
    choice = data[0] if data else 0
    backend = (FarBackend if choice & 128 else MemoryBackend)(SIZE, BAD)
    mode = mode_of(choice)
    contexts = ((1, BASE_ALLOCATION),) if mode is not Mode.SIMPLE else ()
    agreement = Agreement(offer_of(backend, read_only=bool(choice & 64)), mode, contexts)
    stream = ScriptedStream(data[1:], (1, 7, 100, 1 << 20)[choice // 3 % 4])
    crew = Crew(Workers(1), Workers(1))
    try:
        Transmission(stream, agreement, backend, b"", crew).run()
    except (ProtocolError, ConnectionLostError):
        pass
    finally:
        for workers in crew:
            workers.close()
    assert len(backend.content) == SIZE
    return [] if mode is Mode.SIMPLE else list(chunks(bytes(stream.sent), mode))


def chunks(sent: bytes, mode: Mode) -> list[tuple[int, bytes]]:
    """Cut structured replies into (type, payload); AssertionError where they cannot be."""
    layout = EXTENDED_CHUNK if mode is Mode.EXTENDED else wire.CHUNK
    magic = EXTENDED_REPLY_MAGIC if mode is Mode.EXTENDED else wire.STRUCTURED_REPLY_MAGIC
    found = []
    while sent:
        fields = layout.unpack_from(sent)
        assert fields[0] == magic
        kind, length = fields[2], fields[-1]
        payload = sent[layout.size : layout.size + length]
        assert len(payload) == length
        found.append((kind, payload))
        sent = sent[layout.size + length :]
    return found
