"""The greeting: how the two ends of a new connection prove that they know the session's token.

    connector                     acceptor
    hello: a nonce          ->
                            <-    hello: a nonce
    claim, with a proof     ->                      new or resume, epoch, what it takes
                            <-    answer, with a proof      accepted or refused, epoch, what it takes

A proof is an HMAC over all that was said before it, with the role of who proves, so that it proves nothing
anywhere else, and never again (docs/channel.md, "Greeting"). Nothing but a nonce leaves an end to one that
has not proven itself, but for the claim, which is what the connector proves itself with.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from nbdserve.common.errors import OperatorError, ProtocolError

MAGIC = b"nbd-chan"
VERSION = 1
NONCE = 32
"""Bytes of a nonce."""
LEAST_TOKEN = 32
"""Bytes of a token, at least."""
_HELLO = struct.Struct(f">8sII{NONCE}s")
_PROOF = 32
_CLAIM = struct.Struct(">IQIII")
_TEXT = 96
_ANSWER = struct.Struct(f">IQIII{_TEXT}s")
_NO_PROOF = bytes(_PROOF)
_MOST_EPOCH = (1 << 64) - 1

LEAST_WINDOW, MOST_WINDOW = 64 << 10, 1 << 30
MOST_STREAMS = 1 << 16
LEAST_SILENCE, MOST_SILENCE = 1000, 3_600_000


def next_epoch(epoch: int) -> int:
    """Return the epoch behind this one, or the first behind 0, which is none."""
    return epoch % _MOST_EPOCH + 1


def is_newer(epoch: int, last: int) -> bool:
    """Tell whether an epoch comes behind ``last``, if there was one; in a circle: none is the last."""
    return not last or 0 < (epoch - last) % _MOST_EPOCH <= _MOST_EPOCH // 2


class Mode(IntEnum):
    """What a connection is for."""

    NEW = 1
    """To begin a session."""
    RESUME = 2
    """To go on with one whose connection was lost."""


class Refusal(IntEnum):
    """Why a connection is refused, by its number on the wire, where 0 says that it is accepted."""

    TOKEN = 1
    """The token is another. Only this is said without a proof."""
    BUSY = 2
    """A session is under way, or the guest has arrived: it can only be resumed."""
    NOTHING = 3
    """There is no session to resume."""
    STALE = 4
    """A newer connection has been accepted."""
    STOPPED = 5
    """The destination ends."""


class RefusedError(OperatorError):
    """The other end does not accept this connection."""

    def __init__(self, refusal: Refusal, text: str) -> None:
        super().__init__(text)
        self.refusal = refusal


@dataclass(frozen=True)
class Offer:
    """What an end takes."""

    window: int
    """Bytes that may be sent to it on a new stream before it grants more."""
    streams: int
    """Streams that may be open at a time, of those that the other end opens."""
    silence: int
    """Milliseconds after which an end of which nothing is heard is dead."""

    def numbers(self) -> tuple[int, ...]:
        """Return them in the order in which they go over the wire."""
        return self.silence, self.window, self.streams

    @classmethod
    def of(cls, silence: int, window: int, streams: int) -> Offer:
        """Return what the numbers say; ProtocolError for such as are not in the specification."""
        fair = LEAST_WINDOW <= window <= MOST_WINDOW and LEAST_SILENCE <= silence <= MOST_SILENCE
        if not (fair and 1 <= streams <= MOST_STREAMS):
            raise ProtocolError("channel: the greeting offers what the specification forbids")
        return cls(window, streams, silence)


@dataclass(frozen=True)
class Claim:
    """What a connector wants. ``epoch`` counts the connections of a session; 0 asks for the next."""

    mode: Mode
    epoch: int
    offer: Offer


@dataclass(frozen=True)
class Answer:
    """What an acceptor says to a claim: refused or not, the epoch, and what it takes."""

    refusal: Refusal | None
    epoch: int
    offer: Offer
    text: str = ""


class Connector:
    """The connector's side. Send ``first``; then receive ``needed`` bytes at a time, send what it returns."""

    def __init__(self, token: bytes, claim: Claim, nonce: bytes) -> None:
        self.first = _HELLO.pack(MAGIC, VERSION, 0, nonce)
        self.needed = _HELLO.size
        """How many bytes are to be received next; 0 when the greeting is over."""
        self.answer: Answer | None = None
        self._token = token
        self._claim = claim
        self._said = self.first

    def receive(self, data: bytes) -> bytes:
        """Take the bytes that were needed; what is to be sent now.

        Raises ProtocolError for what is no greeting, RefusedError when this connection is not accepted.
        """
        assert len(data) == self.needed
        if len(self._said) == _HELLO.size:
            _check_hello(data)
            claim = _CLAIM.pack(self._claim.mode, self._claim.epoch, *self._claim.offer.numbers())
            self._said += data + claim
            proof = _proof(self._token, b"connector", self._said)
            self._said += proof
            self.needed = _ANSWER.size + _PROOF
            return claim + proof
        self.needed = 0
        self.answer = self._checked(data[: _ANSWER.size], data[_ANSWER.size :])
        return b""

    def _checked(self, answer: bytes, proof: bytes) -> Answer:
        code, epoch, *numbers, padded = _ANSWER.unpack(answer)
        if code == Refusal.TOKEN:
            why = "the destination refuses the token: give both ends the same --token-file"
            raise RefusedError(Refusal.TOKEN, why)
        if not hmac.compare_digest(proof, _proof(self._token, b"acceptor", self._said + answer)):
            why = "whoever listens there cannot prove to know the token: it is no destination of this session"
            raise RefusedError(Refusal.TOKEN, why)
        text = _unpadded(padded)
        if code:
            try:
                refusal = Refusal(code)
            except ValueError:
                raise ProtocolError(f"channel: the destination refuses with code {code}") from None
            raise RefusedError(refusal, f"the destination refuses the connection: {text or refusal.name}")
        return Answer(None, epoch, Offer.of(*numbers), text)


class Acceptor:
    """The acceptor's side. Receive ``needed`` bytes at a time and send what comes of them.

    ``decide`` is asked, once, when the connector has proven itself.
    """

    def __init__(self, token: bytes, nonce: bytes, offer: Offer, decide: Callable[[Claim], Answer]) -> None:
        self.needed = _HELLO.size
        """How many bytes are to be received next; 0 when the greeting is over."""
        self.claim: Claim | None = None
        """What was claimed, once it is proven."""
        self.answer: Answer | None = None
        self._token = token
        self._nonce = nonce
        self._offer = offer
        self._decide = decide
        self._said = b""

    def receive(self, data: bytes) -> bytes:
        """Take the bytes that were needed; what is to be sent now. ProtocolError for what is no greeting."""
        assert len(data) == self.needed
        if not self._said:
            _check_hello(data)
            hello = _HELLO.pack(MAGIC, VERSION, 0, self._nonce)
            self._said = data + hello
            self.needed = _CLAIM.size + _PROOF
            return hello
        self.needed = 0
        claim, proof = data[: _CLAIM.size], data[_CLAIM.size :]
        if not hmac.compare_digest(proof, _proof(self._token, b"connector", self._said + claim)):
            self.answer = Answer(Refusal.TOKEN, 0, self._offer)
            return self._packed(self.answer) + _NO_PROOF
        mode, epoch, *numbers = _CLAIM.unpack(claim)
        try:
            self.claim = Claim(Mode(mode), epoch, Offer.of(*numbers))
        except ValueError:
            raise ProtocolError(f"channel: there is no mode {mode}") from None
        self.answer = self._decide(self.claim)
        answer = self._packed(self.answer)
        return answer + _proof(self._token, b"acceptor", self._said + data + answer)

    def _packed(self, answer: Answer) -> bytes:
        code = 0 if answer.refusal is None else answer.refusal
        text = answer.text.encode()[:_TEXT].decode(errors="ignore").encode()
        return _ANSWER.pack(code, answer.epoch, *answer.offer.numbers(), text)


def _proof(token: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.new(token, b"nbd-channel " + role + b"\0" + said, hashlib.sha256).digest()


def _check_hello(data: bytes) -> None:
    magic, version, zero, _ = _HELLO.unpack(data)
    if magic != MAGIC:
        raise ProtocolError("channel: what has connected there does not speak this protocol")
    if version != VERSION or zero:
        raise ProtocolError(f"channel: the other end speaks version {version}, this one {VERSION}")


def _unpadded(padded: bytes) -> str:
    try:
        text = padded.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        text = "\0"
    if text and not text.isprintable():
        raise ProtocolError("channel: the text of the answer cannot be read")
    return text
