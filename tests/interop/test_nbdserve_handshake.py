"""Option haggling to the letter, over real sockets: the ways in that stock clients of today do not take."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import MIB, ODD_SIZE, random_disk
from tests.support.processes import check, wait_until
from tests.support.servers import Server, free_tcp_address, nbdserve
from tests.support.wire import Command, Option, Reply, Wire, export_query, meta_query, option, request

NAME, DESCRIPTION, BLOCK_SIZE = 1, 2, 3
FIXED_NEWSTYLE, NO_ZEROES = 1, 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Two exports: ``disk`` with a description, and the default one."""
    disk, other = tmp_path / "disk.img", tmp_path / "other.img"
    random_disk(disk, ODD_SIZE)
    random_disk(other, MIB)
    exports = [f"--export=disk={disk},format=raw,description=Größe: 3 MiB", f"--export=={other},format=raw"]
    with nbdserve(*exports, directory=tmp_path) as running:
        yield running


@pytest.mark.parametrize("flags", [0, FIXED_NEWSTYLE, NO_ZEROES, FIXED_NEWSTYLE | NO_ZEROES])
def test_export_name_leads_to_transmission_with_zeroes_unless_both_sides_agreed(
    server: Server, flags: int
) -> None:
    """Flags 0 is a client of newstyle before it was fixed, which knows no other option."""
    with Wire(server.address) as wire:
        assert wire.greet(flags) & FIXED_NEWSTYLE
        wire.send(option(Option.EXPORT_NAME, b"disk"))
        size, transmission_flags = struct.unpack(">QH", wire.receive(10))
        assert (size, transmission_flags & 1) == (ODD_SIZE, 1)
        if not flags & NO_ZEROES:
            assert wire.receive(124) == bytes(124)
        wire.send(request(Command.READ, 0, 10, cookie=5))
        reply = wire.simple_reply()
        assert (reply.cookie, reply.error) == (5, 0)
        wire.receive(10)


def test_export_name_after_structured_replies_uses_them(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        wire.send(option(Option.EXPORT_NAME, b"disk"))
        assert struct.unpack(">QH", wire.receive(10))[1] & 1 << 7, "DF"
        wire.send(request(Command.FLUSH, cookie=5))
        assert wire.chunks()[-1].cookie == 5


@pytest.mark.parametrize("name", [b"unknown", b"d\0isk", b"\xff\xfe", b"x" * 5000])
def test_export_name_can_only_be_refused_by_closing(server: Server, name: bytes) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        wire.send(option(Option.EXPORT_NAME, name))
        assert wire.is_closed_by_server()


@pytest.mark.parametrize("flags", [4, 0x80000003, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(server: Server, flags: int) -> None:
    with Wire(server.address) as wire:
        wire.greet(flags)
        assert wire.is_closed_by_server()


def test_info_says_what_go_will_say_and_names_in_unicode_survive(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        query = export_query("disk", (NAME, DESCRIPTION, BLOCK_SIZE, 77))
        told = [reply.data for reply in wire.haggle(Option.INFO, query)]
        assert told == [reply.data for reply in wire.haggle(Option.GO, query)]
    items = {struct.unpack(">H", item[:2])[0]: item[2:] for item in told if item}
    assert struct.unpack(">Q", items[0][:8]) == (ODD_SIZE,)
    assert items[NAME] == b"disk"
    assert items[DESCRIPTION].decode() == "Größe: 3 MiB"
    minimum, preferred, maximum = struct.unpack(">III", items[BLOCK_SIZE])
    assert (minimum, preferred) == (1, 4096)
    assert maximum >= 64 * MIB


def test_list_names_every_export_with_its_description(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        *listed, last = wire.haggle(Option.LIST)
        assert last.kind == Reply.ACK
        assert [reply.data for reply in listed] == [
            b"\0\0\0\4disk" + "Größe: 3 MiB".encode(),
            b"\0\0\0\0",
        ]


def test_contexts_are_listed_and_selected_as_the_specification_says(server: Server) -> None:
    both = {b"base:allocation", b"qemu:allocation-depth"}
    listed: list[tuple[tuple[str, ...], set[bytes]]] = [
        ((), both),
        (("base:",), {b"base:allocation"}),
        (("qemu:", "base:allocation"), both),
        (("other:", "base:nothing", "no-colon"), set()),
    ]
    selected: list[tuple[tuple[str, ...], set[bytes]]] = [
        ((), set()),
        (("base:",), set()),
        (("base:allocation", "base:allocation"), {b"base:allocation"}),
        (("other:x", "qemu:allocation-depth", "base:allocation"), both),
    ]
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        for step, cases in ((Option.LIST_META_CONTEXT, listed), (Option.SET_META_CONTEXT, selected)):
            for queries, expected in cases:
                *contexts, last = wire.haggle(step, meta_query("disk", *queries))
                assert last.kind == Reply.ACK
                assert len(contexts) == len(expected)
                assert {context.data[4:] for context in contexts} == expected
                assert step == Option.LIST_META_CONTEXT or len({c.data[:4] for c in contexts}) == len(
                    contexts
                )


def test_contexts_of_another_export_do_not_count(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        assert len(wire.haggle(Option.SET_META_CONTEXT, meta_query("disk", "base:allocation"))) == 2
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
        wire.send(request(Command.BLOCK_STATUS, 0, 512))
        assert wire.chunks()[-1].error == 22


@pytest.mark.parametrize("data", [b"", b"junk", bytes(60_000), bytes(64 * 1024 + 1), bytes(MIB)])
def test_abort_is_acknowledged_whatever_comes_with_it(server: Server, data: bytes) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        assert [reply.kind for reply in wire.haggle(Option.ABORT, data)] == [Reply.ACK]
        assert wire.is_closed_by_server()


def test_an_oversize_option_is_skipped_and_the_next_one_understood(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        for number, kind in [
            (Option.GO, Reply.ERR_TOO_BIG),
            (Option.LIST, Reply.ERR_TOO_BIG),
            (99, Reply.ERR_UNSUP),
        ]:
            answer = wire.haggle(number, bytes(MIB))[-1]
            assert (answer.kind, bool(answer.data.decode())) == (kind, True)
        assert wire.haggle(Option.GO, export_query("disk"))[-1].kind == Reply.ACK


def test_after_256_options_the_next_one_ends_the_connection(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        for _ in range(256):
            assert wire.haggle(99)[-1].kind == Reply.ERR_UNSUP
        wire.send(option(99))
        assert wire.is_closed_by_server()


def test_malformed_queries_are_invalid_and_the_stream_stays_in_step(server: Server) -> None:
    valid = export_query("disk", (NAME,))
    metas = meta_query("disk", "base:allocation")
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        cases = [
            *((step, data) for step in (Option.INFO, Option.GO) for data in (
                b"", valid[:3], valid[:-1], valid + b"x", b"\xff\xff\xff\xffdisk\0\0",
                b"\0\0\0\4disk\0\7\0\1", export_query("d\0sk"), export_query("x" * 4097),
                b"\0\0\0\2\xff\xfe\0\0",
            )),
            *((step, data) for step in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT) for data in (
                b"", metas[:-1], metas + b"x", meta_query("disk")[:-4] + b"\xff\xff\xff\xff",
            )),
        ]  # fmt: skip
        for step, data in cases:
            answer = wire.haggle(step, data)[-1]
            assert (answer.option, answer.kind) == (step, Reply.ERR_INVALID), data
            assert answer.data.decode()
        assert wire.haggle(Option.GO, valid)[-1].kind == Reply.ACK


def test_a_second_context_selection_replaces_the_first_even_when_it_fails(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        assert len(wire.haggle(Option.SET_META_CONTEXT, meta_query("disk", "base:allocation"))) == 2
        failed = wire.haggle(Option.SET_META_CONTEXT, meta_query("unknown", "base:allocation"))
        assert failed[-1].kind == Reply.ERR_UNKNOWN
        assert wire.haggle(Option.GO, export_query("disk"))[-1].kind == Reply.ACK
        wire.send(request(Command.BLOCK_STATUS, 0, 512))
        assert wire.chunks()[-1].error == 22


def test_dead_tcp_clients_will_be_noticed(tmp_path: Path) -> None:
    """The kernel asks a silent client every so often whether it is still there."""
    image = tmp_path / "disk.img"
    random_disk(image, MIB)
    address = free_tcp_address()
    with (
        nbdserve("-f", "raw", image, directory=tmp_path, at=address) as server,
        Wire(server.address) as wire,
    ):
        wire.go()
        timers = ["ss", "-tnoH", "state", "established", "sport", f"= :{address.port}"]
        # Until the last reply is acknowledged another timer runs.
        wait_until(lambda: "timer:(keepalive," in check(*timers), "the keepalive timer runs")
