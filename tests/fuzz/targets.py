"""What is fuzzed: any bytes into haggling and into the transmission loop; and what must hold afterwards."""

from __future__ import annotations

import struct

from nbdserve.backends.base import Backend
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
