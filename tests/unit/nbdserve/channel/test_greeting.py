"""The greeting: who knows the token comes in, and nobody else, however much of it he has heard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.channel.wire.greeting import (
    NONCE,
    Acceptor,
    Answer,
    Claim,
    Connector,
    Mode,
    Offer,
    Refusal,
    RefusedError,
    is_newer,
    next_epoch,
)
from nbdserve.common.errors import ProtocolError

EPOCHS = st.integers(1, (1 << 64) - 1)
TOKEN = b"0123456789abcdef0123456789abcdef"
OURS = Offer(1 << 20, 5, 15_000)
THEIRS = Offer(64 << 10, 7, 9_000)
CLAIM = Claim(Mode.RESUME, 41, OURS)


def accept(claim: Claim) -> Answer:
    """Let everybody in."""
    return Answer(None, claim.epoch + 1, THEIRS)


def ends(
    token: bytes = TOKEN, nonces: tuple[bytes, bytes] = (b"c" * NONCE, b"a" * NONCE)
) -> tuple[Connector, Acceptor]:
    """Both sides, of which the connector knows ``token``."""
    return Connector(token, CLAIM, nonces[0]), Acceptor(TOKEN, nonces[1], THEIRS, accept)


def test_both_learn_what_the_other_takes() -> None:
    connector, acceptor = ends()
    claim = connector.receive(acceptor.receive(connector.first))
    assert connector.receive(acceptor.receive(claim)) == b""
    assert connector.needed == acceptor.needed == 0
    assert acceptor.claim == CLAIM
    assert connector.answer == Answer(None, 42, THEIRS)


def test_a_wrong_token_is_refused_and_nothing_is_told_or_decided() -> None:
    connector, acceptor = ends(b"x" * 32)
    answer = acceptor.receive(connector.receive(acceptor.receive(connector.first)))
    assert acceptor.claim is None
    assert acceptor.answer is not None
    assert acceptor.answer.refusal is Refusal.TOKEN
    with pytest.raises(RefusedError, match="refuses the token"):
        connector.receive(answer)


def test_what_was_recorded_is_refused_when_it_is_played_again() -> None:
    connector, acceptor = ends()
    claim = connector.receive(acceptor.receive(connector.first))
    acceptor.receive(claim)
    assert acceptor.claim is not None
    again = Acceptor(TOKEN, b"b" * NONCE, THEIRS, accept)
    again.receive(connector.first)
    again.receive(claim)
    assert again.claim is None


def test_an_acceptor_that_does_not_know_the_token_is_not_believed() -> None:
    connector, _ = ends()
    liar = Acceptor(b"y" * 32, b"a" * NONCE, THEIRS, accept)
    liar._token = TOKEN  # it takes the claim, as one would who does not care for proofs
    claim = connector.receive(liar.receive(connector.first))
    liar._token = b"y" * 32
    answer = bytearray(liar.receive(claim))
    answer[:4] = bytes(4)
    with pytest.raises(RefusedError, match="cannot prove"):
        connector.receive(bytes(answer))


def test_a_connectors_own_proof_is_none_of_an_acceptor() -> None:
    connector, acceptor = ends()
    claim = connector.receive(acceptor.receive(connector.first))
    answer = bytearray(acceptor.receive(claim))
    answer[-32:] = claim[-32:]
    with pytest.raises(RefusedError, match="cannot prove"):
        connector.receive(bytes(answer))


@pytest.mark.parametrize("refusal", [each for each in Refusal if each is not Refusal.TOKEN])
def test_a_refusal_is_proven_and_says_why(refusal: Refusal) -> None:
    connector = Connector(TOKEN, CLAIM, b"c" * NONCE)
    acceptor = Acceptor(TOKEN, b"a" * NONCE, THEIRS, lambda claim: Answer(refusal, 5, THEIRS, "not now, ü"))
    answer = acceptor.receive(connector.receive(acceptor.receive(connector.first)))
    with pytest.raises(RefusedError, match="not now, ü") as caught:
        connector.receive(answer)
    assert caught.value.refusal is refusal


@given(st.integers(0, 400), st.integers(0, 7))
def test_any_bit_that_was_changed_on_the_way_is_noticed(place: int, bit: int) -> None:
    connector, acceptor = ends()

    def spoil(data: bytes, begins: int) -> bytes:
        at = place - begins
        if not 0 <= at < len(data):
            return data
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    lengths = 0
    try:
        first = spoil(connector.first, lengths)
        lengths += len(first)
        hello = spoil(acceptor.receive(first), lengths)
        lengths += len(hello)
        claim = spoil(connector.receive(hello), lengths)
        lengths += len(claim)
        answer = spoil(acceptor.receive(claim), lengths)
        lengths += len(answer)
        connector.receive(answer)
    except (ProtocolError, RefusedError):
        return
    assert place >= lengths


@given(st.binary(min_size=48, max_size=48))
def test_what_is_no_hello_is_refused(data: bytes) -> None:
    connector, acceptor = ends()
    for end in (connector, acceptor):
        with pytest.raises(ProtocolError):
            end.receive(data)


def test_a_claim_that_offers_nothing_is_refused_although_it_is_proven() -> None:
    greedy = Offer(0, 5, 15_000)
    connector = Connector(TOKEN, Claim(Mode.NEW, 0, greedy), b"c" * NONCE)
    _, acceptor = ends()
    claim = connector.receive(acceptor.receive(connector.first))
    with pytest.raises(ProtocolError, match="forbids"):
        acceptor.receive(claim)


@given(EPOCHS)
def test_behind_each_epoch_comes_a_newer_one(epoch: int) -> None:
    after = next_epoch(epoch)
    assert 1 <= after < 1 << 64
    assert is_newer(after, epoch)
    assert not is_newer(epoch, after)
    assert not is_newer(epoch, epoch)
    assert is_newer(epoch, 0)


@given(EPOCHS, EPOCHS)
def test_of_two_epochs_one_is_the_newer(one: int, other: int) -> None:
    assert one == other or is_newer(one, other) != is_newer(other, one)
