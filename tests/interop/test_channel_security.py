"""The channel over TLS and ssh, and who is let in: nobody else gets a byte of RAM or disk."""

from __future__ import annotations

import getpass
import os
import shlex
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from nbdserve.channel.destination import Event, Limits
from tests.support.channels import LOADED, NBDSERVE, Scene
from tests.support.processes import Argument, dying_with_parent, run
from tests.support.sshd import sshd
from tests.support.tls import Authority


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Directories of a destination, of a source, and of one that another authority signed."""
    place = tmp_path_factory.mktemp("pki")
    ours, theirs = Authority.create(place / "ours"), Authority.create(place / "theirs")
    return (
        ours.issue(place / "server", "server"),
        ours.issue(place / "client", "client"),
        theirs.issue(place / "stranger", "client", trust=ours),
    )


def test_over_tls_both_ends_are_verified_and_everything_works(
    authorities: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server, client, _ = authorities
    with Scene(tmp_path, tls=server) as scene:
        sender = scene.send("--tls-certificates", client)
        qemu = scene.arrive()
        ram, received = bytes(range(256)) * (20 << 10), bytearray()
        threading.Thread(target=sender.write, args=(ram,), daemon=True).start()
        while len(received) < len(ram):
            received += qemu.recv(1 << 20)
        assert received == ram
        qemu.sendall(LOADED)
        assert sender.read(8) == LOADED
        assert sender.end() == 0
        assert scene.read_disk()
        assert scene.road is not None
        scene.road.cut()
        scene.wait_for(Event.BACK)
        assert scene.read_disk()
        scene.destination.done(60.0)


def test_a_source_of_another_authority_is_refused(
    authorities: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server, _, stranger = authorities
    with Scene(tmp_path, tls=server) as scene:
        sender = scene.send("--tls-certificates", stranger)
        assert sender.wait() == 1
        [line] = sender.errors.splitlines()
        assert line.startswith("nbdserve channel: ")
        assert scene.events == []


def test_a_destination_of_another_authority_or_name_is_refused(
    authorities: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    server, client, _ = authorities
    with Scene(tmp_path, tls=server) as scene:
        for more, why in (
            (("--tls-hostname", "elsewhere.example"), "Hostname mismatch"),
            (("--tls-certificates", other_authority(tmp_path)), "the other end's certificate is refused"),
        ):
            sender = scene.send("--tls-certificates", client, *more)
            assert sender.wait() == 1
            [line] = sender.errors.splitlines()
            assert why in line
        assert scene.events == []


def other_authority(place: Path) -> Path:
    """A client's directory that trusts somebody else."""
    return Authority.create(place / "other").issue(place / "elsewhere", "client")


def test_who_speaks_no_tls_is_refused_in_time(authorities: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with Scene(tmp_path, tls=authorities[0], limits=Limits(greeting=0.5)) as scene:
        sender = scene.send()
        assert sender.wait() == 1
        with socket.create_connection(("127.0.0.1", scene.port), 60.0) as silent:
            assert silent.recv(1) == b""
        assert scene.events == []


@pytest.mark.parametrize("kill", [False, True])
def test_through_ssh_nothing_but_its_own_connection_is_needed(kill: bool, tmp_path: Path) -> None:
    place = tmp_path / "sshd"
    place.mkdir()
    with sshd(place) as server, Scene(tmp_path, unix=True) as scene:
        words = server.prefix[:-1]
        # The port and the user stand in the address.
        options = [word for word in words if word not in ("-p", str(server.address.port))]
        address = f"ssh://{getpass.getuser()}@{server.address.host}:{server.address.port}{scene.path}"
        ways: list[Argument] = ["--connect", address, "--ssh", shlex.join(options), "--remote", NBDSERVE]
        sender = scene.migrate_with([*ways, *scene.options()[2:]])
        assert scene.read_disk()
        if kill:
            import psutil

            [child] = psutil.Process(sender.worker).children()
            child.kill()
            scene.wait_for(Event.BACK)
            assert scene.read_disk()
        scene.destination.done(60.0)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_relay_passes_everything_on_whatever_its_standard_input_is(kind: str, tmp_path: Path) -> None:
    path, data = tmp_path / "path", os.urandom(3 << 20)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(60.0)
        if kind == "pipe":
            taken, given = os.pipe()
        else:
            taken, given = (each.detach() for each in socket.socketpair())
        process = subprocess.Popen(
            [*dying_with_parent(signal.SIGKILL), NBDSERVE, "channel", "--relay", path],
            stdin=taken,
            stdout=subprocess.PIPE,
        )
        os.close(taken)

        def feed() -> None:
            with open(given, "wb") as stdin:
                stdin.write(data)

        feeding = threading.Thread(target=feed)
        feeding.start()
        peer, _ = listener.accept()
        with process, peer:
            peer.settimeout(60.0)
            received = bytearray()
            while piece := peer.recv(1 << 20):
                received += piece
            feeding.join()
            assert received == data
            peer.sendall(b"answer")
            peer.shutdown(socket.SHUT_WR)
            assert process.communicate(timeout=60.0)[0] == b"answer"


def test_a_relay_to_nowhere_fails_in_one_line(tmp_path: Path) -> None:
    done = run(NBDSERVE, "channel", "--relay", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr == f"nbdserve channel: unix:{tmp_path}/nowhere: No such file or directory\n"


WRONG = {
    "no place": ([], "--connect PLACE"),
    "a place in the open": (["--connect", "192.0.2.1:1"], "without TLS only the loopback"),
    "every address": (["--connect", ":1"], "without TLS only the loopback"),
    "no port": (["--connect", "localhost"], "write HOST:PORT"),
    "an option for ssh": (["--connect", "ssh://-oProxyCommand=true/x"], "write ssh://"),
    "no path": (["--connect", "ssh://host"], "write ssh://"),
    "a name without TLS": (["--connect", "unix:x", "--tls-hostname", "b"], "without --tls-certificates"),
    "no certificates": (["--connect", "unix:x", "--tls-certificates", "/nowhere"], "ca-cert.pem"),
    "a broken command": (["--connect", "ssh://b/x", "--ssh", "ssh '"], "No closing quotation"),
    "one file twice": (["--connect", "unix:x", "--log", "l", "--pid-file", "./l"], "the same file as --log"),
    "no log": (["--connect", "unix:x", "--log", "/nowhere/log"], "--log /nowhere/log"),
    "a short silence": (["--connect", "unix:x", "--silence", "0.1"], "not a time of 1 to 3600"),
    "no terminal's pipes": (["--connect", "unix:x"], "start this by migrate exec:"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_makes_no_sense_is_refused_before_anything_is_done(what: str, tmp_path: Path) -> None:
    options, why = WRONG[what]
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("x" * 32)
    done = run(NBDSERVE, "channel", "--token-file", token, *options)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("nbdserve channel: ")
    assert why in line


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (None, 0o600, "No such file"),
        ("x" * 32, 0o644, "others may read it"),
        ("x" * 31, 0o600, "are no token"),
    ],
)
def test_a_token_that_is_none_or_no_secret_is_refused(
    content: str | None, mode: int, why: str, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.touch()
        token.chmod(mode)
        token.write_text(content)
    done = run(NBDSERVE, "channel", "--connect", "unix:x", "--token-file", token)
    assert done.returncode == 2
    assert why in done.stderr
    if "make one by" in done.stderr:
        command = done.stderr.partition("make one by ")[2]
        assert run("sh", "-c", command).returncode == 0
        assert (
            "are no token"
            not in run(NBDSERVE, "channel", "--connect", "unix:x", "--token-file", token).stderr
        )


def test_a_greeting_that_was_recorded_does_not_open_the_door_again(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        said = bytearray()
        with socket.create_server(("127.0.0.1", 0)) as spy:
            place = f"127.0.0.1:{spy.getsockname()[1]}"
            sender = scene.send_with(["--connect", place, *scene.options()[2:]])
            client, _ = spy.accept()
            with client, socket.create_connection(("127.0.0.1", scene.port)) as server:
                for source, target, length in (
                    (client, server, 48),
                    (server, client, 48),
                    (client, server, 56),
                ):
                    piece = exactly(source, length)
                    target.sendall(piece)
                    if source is client:
                        said += piece
        assert sender.wait() == 1
        with socket.create_connection(("127.0.0.1", scene.port), 60.0) as again:
            again.settimeout(60.0)
            again.sendall(said)
            answer = exactly(again, 48 + 152)
            assert answer[48:52] == b"\0\0\0\1"
            assert not any(answer[-32:])
            assert again.recv(1) == b""
        # The one that was recorded may have begun a session, at any moment since.
        assert scene.events.count(Event.BEGUN) <= 1


def exactly(sock: socket.socket, length: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        assert piece, f"the end behind {len(data)} bytes"
        data += piece
    return data


@pytest.mark.parametrize(
    ("command", "why"), [("no-such-ssh", "no-such-ssh: No such file"), ("false", "ssh has ended with 1")]
)
def test_where_ssh_does_not_lead_anywhere_that_is_said(command: str, why: str, tmp_path: Path) -> None:
    with Scene(tmp_path, unix=True) as scene:
        place = ["--connect", f"ssh://localhost{scene.path}", "--ssh", command]
        sender = scene.send_with([*place, *scene.options()[2:]])
        assert sender.wait() == 1
        [line] = sender.errors.splitlines()
        assert why in line
