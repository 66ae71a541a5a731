"""The certificates of one migration between nbdserve and its clients, on a host whose shell places them."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from nbdserve.common import clock
from recipes.certificates import authority
from recipes.certificates.authority import Issued, issue
from recipes.certificates.placing import NAMES, TOKEN, files_of, place, remove
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from tests.support.disks import MIB, random_bytes
from tests.support.processes import Argument, Process, run
from tests.support.servers import NBDSERVE, free_tcp_address

HERE = Host("A")
SECONDS = 120.0
"""For anything, on a busy machine."""
NBD_MIGRATE = Path(NBDSERVE).with_name("nbd-migrate")


@pytest.fixture
def issued() -> Issued:
    """One migration's."""
    return issue(["127.0.0.1"], ["b.example"])


def placed(directory: Path, name: str, issued: Issued, owner: str = "") -> Path:
    """The directory of ``a`` or ``b``."""
    where = directory / f"{name}.tls"
    clock.run(place(HERE, str(where), files_of(issued.authority, getattr(issued, name)), owner, SECONDS))
    return where


@pytest.fixture
def port(tmp_path: Path, issued: Issued) -> Iterator[int]:
    """A server as a migration starts it."""
    image, address = tmp_path / "disk.raw", free_tcp_address()
    image.write_bytes(random_bytes(MIB))
    where = ("-b", address.host, "-p", str(address.port), "-x", "vm")
    trust = ("--tls-certificates", str(placed(tmp_path, "a", issued)), "--tls-require", "--tls-verify-peer")
    with Process([NBDSERVE, "-r", "-f", "raw", *where, *trust, image], tmp_path / "nbdserve.log") as server:
        server.wait_for_line("serving")
        yield address.port


def probed(port: int, scheme: str = "nbds", certificates: Argument = "", host: str = "127.0.0.1") -> int:
    """How it ends when somebody looks at the export."""
    query = f"?tls-type=x509&tls-certificates={certificates}" if certificates else ""
    return run(NBD_MIGRATE, "probe", f"{scheme}://{host}:{port}/vm{query}").returncode


def test_host_b_alone_gets_the_export(tmp_path: Path, issued: Issued, port: int) -> None:
    assert probed(port, certificates=placed(tmp_path, "b", issued)) == 0
    assert probed(port, "nbd") == 1
    assert probed(port) == 1
    other = tmp_path / "other"
    other.mkdir()
    assert probed(port, certificates=placed(other, "b", issue(["127.0.0.1"], ["b.example"]))) == 1


def test_a_server_is_not_started_with_those_that_have_expired_and_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority, "LIFE", timedelta(hours=-1))
    where = placed(tmp_path, "a", issue(["127.0.0.1"], ["b.example"]))
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    trust = ("--tls-certificates", str(where), "--tls-require", "--tls-verify-peer")
    done = run(NBDSERVE, "-r", "-f", "raw", "-k", tmp_path / "socket", *trust, tmp_path / "disk.raw")
    assert done.returncode != 0
    [line] = done.stderr.splitlines()
    assert re.search(r"\.tls/.*-cert\.pem: the certificate of .* has expired, on 20.*: renew it", line), line


def test_host_b_takes_nobody_for_a_by_another_address(tmp_path: Path, issued: Issued, port: int) -> None:
    assert probed(port, certificates=placed(tmp_path, "b", issued), host="localhost") == 1


def test_the_place_of_a_device_is_made_and_others_may_pass_through_it(tmp_path: Path, issued: Issued) -> None:
    # Beside a device nothing is kept, and where it is kept instead nothing may have been yet.
    where = placed(tmp_path / "nbd-migrate" / "dev-loop0", "a", issued)
    assert where.stat().st_mode & 0o7777 == 0o700
    for parent in (where.parent, where.parent.parent):
        assert parent.stat().st_mode & 0o7777 == 0o755


def test_files_are_for_their_user_alone_and_go_without_a_trace(tmp_path: Path, issued: Issued) -> None:
    for _ in range(2):
        where = placed(tmp_path, "a", issued)
    assert {each.name for each in where.iterdir()} == {*NAMES} - {TOKEN}
    assert where.stat().st_mode & 0o7777 == 0o700
    assert {each.stat().st_mode & 0o7777 for each in where.iterdir()} == {0o600}
    assert (where / "client-key.pem").read_text() == issued.a.key
    assert (where / "server-cert.pem").read_text() == issued.a.certificate
    for _ in range(2):
        clock.run(remove(HERE, str(where), SECONDS))
        assert not where.exists()


def test_a_token_is_kept_as_the_keys_are_with_them_or_alone(tmp_path: Path, issued: Issued) -> None:
    where = tmp_path / "a.tls"
    for files in ({}, files_of(issued.authority, issued.a)):
        clock.run(place(HERE, str(where), {**files, TOKEN: "5ec2e7"}, "", SECONDS))
        assert (where / TOKEN).read_text() == "5ec2e7\n"
        assert {each.stat().st_mode & 0o7777 for each in where.iterdir()} == {0o600}
        assert {each.name for each in where.iterdir()} == ({*NAMES} if files else {TOKEN})
    clock.run(remove(HERE, str(where), SECONDS))
    assert not where.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_they_are_given_to_the_user_of_a_qemu(tmp_path: Path, issued: Issued) -> None:
    where, nobody = placed(tmp_path, "b", issued, "nobody"), pwd.getpwnam("nobody").pw_uid
    assert {each.stat().st_uid for each in (where, *where.iterdir())} == {nobody}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_they_are_given_to_the_group_of_a_qemu_where_images_are(tmp_path: Path, issued: Issued) -> None:
    where, nogroup = tmp_path / "b.tls", grp.getgrnam("nogroup").gr_gid
    for owner in (":nogroup", "root:nogroup"):
        files_of_b = files_of(issued.authority, issued.b)
        clock.run(place(HERE, str(where), files_of_b, owner, SECONDS, for_group=True))
        files = [where / name for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem")]
        assert {(each.stat().st_uid, each.stat().st_gid) for each in (where, *files)} == {(0, nogroup)}
        assert where.stat().st_mode & 0o7777 == 0o750
        assert {each.stat().st_mode & 0o7777 for each in files} == {0o640}
    clock.run(place(HERE, str(where), files_of_b, ":nogroup", SECONDS))
    assert where.stat().st_mode & 0o7777 == 0o700


def test_what_is_not_of_a_migration_is_neither_removed_nor_written_to(tmp_path: Path, issued: Issued) -> None:
    where = placed(tmp_path, "a", issued)
    (where / "mine").write_text("x")
    with pytest.raises(MigrationError, match="not empty"):
        clock.run(remove(HERE, str(where), SECONDS))
    with pytest.raises(MigrationError, match="not empty"):
        placed(tmp_path, "a", issued)
    assert (where / "mine").read_text() == "x"
    other = tmp_path / "elsewhere"
    other.mkdir()
    (tmp_path / "b.tls").symlink_to(other)
    with pytest.raises(MigrationError, match="File exists"):
        placed(tmp_path, "b", issued)
    assert list(other.iterdir()) == []


def test_no_command_line_and_no_message_has_a_key(tmp_path: Path, issued: Issued) -> None:
    seen = tmp_path / "seen"
    spy = tmp_path / "spy"
    spy.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {seen}\nexec "$@"\n')
    spy.chmod(0o755)
    host, files = Host("A", (str(spy),)), {**files_of(issued.authority, issued.a), TOKEN: "5ec2e7"}
    clock.run(place(host, str(tmp_path / "a.tls"), files, "", SECONDS))
    with pytest.raises(MigrationError) as caught:
        # Below a file.
        clock.run(place(host, str(seen / "a"), files, "", SECONDS))
    for secret in (issued.a.key.splitlines()[1], "5ec2e7"):
        assert secret not in seen.read_text()
        assert secret not in str(caught.value)
