"""``nbdserve channel``: RAM and disks over one connection, and what becomes of it when something is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from nbdserve.channel.destination import Event, Limits
from nbdserve.client.libnbd import nbd
from tests.support.channels import LOADED, SIZE, Scene, Sender, receive, resumed
from tests.support.processes import is_alive, wait_until

QUICK = Limits(silence=2.0)


def test_ram_and_disks_go_over_one_connection_and_the_source_ends_when_it_is_told(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.send()
        qemu = scene.arrive()
        ram, received = os.urandom(5 << 20), bytearray()
        writing = threading.Thread(target=sender.write, args=(ram,), daemon=True)
        writing.start()
        while len(received) < len(ram):
            received += qemu.recv(1 << 20)
        assert received == ram
        assert scene.read_disk()
        assert scene.status.ram == "under-way"
        qemu.sendall(LOADED)
        assert sender.read(len(LOADED)) == LOADED
        scene.wait_for(Event.RAM_LOADED)
        assert sender.end() == 0
        qemu.close()
        assert is_alive(sender.worker)
        assert scene.read_disk()
        worker = sender.worker
        scene.destination.done(60.0)
        wait_until(lambda: not is_alive(worker), "the worker's end")
        assert scene.road is not None
        assert scene.road.passed == 1
        assert scene.events == [Event.BEGUN, Event.RAM_BEGUN, Event.RAM_LOADED, Event.DONE]
        assert "channel: done" in sender.log.read_text()


def test_qemu_is_not_kept_waiting_and_what_is_left_holds_none_of_its_pipes(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.migrate()
        places = Path(f"/proc/{sender.worker}/fd")

        def holds_pipes() -> bool:
            return any(os.readlink(each).startswith("pipe:") for each in places.iterdir())

        wait_until(lambda: not holds_pipes(), "the end of the pipes")
        assert os.getpgid(sender.worker) != os.getpgid(0)
        assert os.getsid(sender.worker) != os.getsid(0)


def test_what_qemu_lets_through_to_what_it_executes_does_not_outlive_it_there(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene, socket.create_server(("127.0.0.1", 0)) as monitor:
        sender = Sender(scene.options(), tmp_path, [monitor.fileno()])
        with contextlib.closing(sender):
            qemu = scene.arrive()
            held = os.readlink(f"/proc/self/fd/{monitor.fileno()}")
            for process in (sender.process.pid, sender.worker):
                places = list(Path(f"/proc/{process}/fd").iterdir())
                assert places
                assert held not in [os.readlink(each) for each in places]
            qemu.close()


@pytest.mark.parametrize("who", ["source's qemu", "destination's qemu", "road", "worker", "destination"])
def test_what_breaks_before_all_ram_is_loaded_fails_the_migration_and_another_may_begin(
    who: str, tmp_path: Path
) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.send()
        qemu = scene.arrive()
        sender.write(b"RAM")
        assert qemu.recv(3) == b"RAM"
        worker = sender.worker
        match who:
            case "source's qemu":
                sender.hang_up()
            case "destination's qemu":
                qemu.close()
            case "road":
                assert scene.road is not None
                scene.road.cut()
            case "worker":
                os.kill(worker, signal.SIGKILL)
            case _:
                scene.destination.close()
        assert sender.wait() == 1
        if who != "destination's qemu":
            assert qemu.recv(1) == b""
        if who != "source's qemu":
            assert sender.read(1) == b""
        wait_until(lambda: not is_alive(worker), "the worker's end")
        [line] = sender.errors.splitlines()
        assert line.startswith("nbdserve channel: ")
        scene.wait_for(Event.RAM_FAILED)
        if who == "destination":
            scene.begin(arrived=False)
        wait_until(lambda: not scene.status.connected, "the end of the connection")
        scene.migrate()
        assert scene.read_disk()


def test_ram_that_could_not_be_loaded_has_failed_although_its_stream_came_to_its_end(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.send()
        qemu = scene.arrive()
        qemu.sendall(LOADED[:-1] + b"\1")
        assert sender.read(8) == LOADED[:-1] + b"\1"
        assert sender.end() == 1
        scene.wait_for(Event.RAM_FAILED)


def test_a_broken_connection_is_made_again_once_the_guest_has_arrived(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        scene.migrate()
        assert scene.road is not None
        for number in (1, 2):
            client = scene.client()
            scene.road.cut()
            with pytest.raises(nbd.Error):
                client.pread(512, 0)
            scene.wait_for(Event.BACK, number)
            assert scene.read_disk()
        scene.destination.done(60.0)


def test_while_the_source_is_away_no_stream_is_opened_and_nothing_hangs(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        scene.migrate()
        assert scene.road is not None
        scene.road.is_closed = True
        scene.road.cut()
        scene.wait_for(Event.LOST)
        with pytest.raises(OSError, match="not connected"):
            scene.destination.open()
        with pytest.raises(TimeoutError):
            scene.destination.done(0.1)
        scene.road.is_closed = False
        # It is told when it is back.
        scene.wait_for(Event.DONE)


@pytest.mark.parametrize("arrived", [False, True], ids=["ram", "disks"])
def test_a_peer_that_falls_silent_is_noticed_by_both_ends(arrived: bool, tmp_path: Path) -> None:
    with Scene(tmp_path, limits=QUICK) as scene:
        assert scene.road is not None
        if arrived:
            scene.migrate("--silence", "2")
        else:
            sender = scene.send("--silence", "2")
            scene.arrive()
        scene.road.open.clear()
        scene.wait_for(Event.LOST)
        assert "nothing was heard for 2 s" in scene.reasons[-1]
        if arrived:
            scene.road.cut()
            scene.road.open.set()
            scene.wait_for(Event.BACK)
            assert scene.read_disk()
        else:
            assert sender.wait() == 1
            assert "nothing was heard for 2 s" in sender.errors


def test_a_connection_that_is_idle_stays(tmp_path: Path) -> None:
    with Scene(tmp_path, limits=Limits(silence=3.0)) as scene:
        scene.migrate("--silence", "3")
        before = scene.status.received
        wait_until(lambda: scene.status.received >= before + 10 * 20, "ten pings")
        assert Event.LOST not in scene.events
        assert scene.read_disk()


def test_a_source_end_that_was_killed_is_started_again_by_hand(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        os.kill(scene.migrate().worker, signal.SIGKILL)
        scene.wait_for(Event.LOST)
        with resumed(scene) as process:
            scene.wait_for(Event.BACK)
            assert scene.read_disk()
            scene.destination.done(60.0)
            assert process.wait(60.0) == 0


def test_a_destination_that_was_started_again_is_found_by_the_source(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        scene.migrate()
        scene.destination.close()
        scene.begin(arrived=True)
        scene.wait_for(Event.BACK)
        assert scene.read_disk()
        scene.destination.done(60.0)


def test_who_resumes_takes_over_and_the_former_source_end_ends(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.migrate()
        worker = sender.worker
        client = scene.client()
        with resumed(scene) as process:
            scene.wait_for(Event.BACK)
            wait_until(lambda: not is_alive(worker), "the former's end")
            assert "another connection has taken the session over" in sender.log.read_text()
            with pytest.raises(nbd.Error):
                client.pread(512, 0)
            assert scene.read_disk()
            assert process.poll() is None
            assert Event.LOST not in scene.events


@pytest.mark.parametrize("loaded", [False, True])
def test_a_second_migration_is_refused_while_one_is_under_way_or_arrived(
    loaded: bool, tmp_path: Path
) -> None:
    with Scene(tmp_path) as scene:
        if loaded:
            scene.migrate()
        else:
            scene.send()
            scene.arrive()
        second = scene.send()
        assert second.wait() == 1
        expected = "the guest has arrived" if loaded else "a session is under way"
        assert expected in second.errors
        assert len(second.errors.splitlines()) == 1
        assert scene.status.connected


def test_there_is_nothing_to_resume_before_a_session_has_begun(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene, resumed(scene) as process:
        _, errors = process.communicate(timeout=60.0)
        assert process.returncode == 1
        assert "there is no session to resume" in errors


def test_a_wrong_token_is_refused_in_one_line(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        other = tmp_path / "other"
        other.touch(mode=0o600)
        other.write_text("x" * 40)
        sender = scene.send("--token-file", other)
        assert sender.wait() == 1
        [line] = sender.errors.splitlines()
        assert "the destination refuses the token" in line
        assert scene.events == []


def test_nothing_is_said_to_who_says_nothing_and_he_goes_in_time(tmp_path: Path) -> None:
    with Scene(tmp_path, limits=Limits(greeting=0.5)) as scene:
        with socket.create_connection(("127.0.0.1", scene.port), 60.0) as silent:
            assert silent.recv(1) == b""
        scene.migrate()


def test_of_many_who_do_not_prove_themselves_few_are_kept_and_they_keep_nobody_out(tmp_path: Path) -> None:
    with Scene(tmp_path, limits=Limits(unproven=2, greeting=60.0)) as scene, contextlib.ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", scene.port), 60.0)) for _ in range(4)
        ]
        for each in crowd[:2]:
            assert each.recv(1) == b""
        for each in crowd[2:]:
            each.settimeout(0.2)
            with pytest.raises(TimeoutError):
                each.recv(1)
        scene.migrate()
        crowd[2].settimeout(60.0)
        assert crowd[2].recv(1) == b""
        crowd[3].settimeout(60.0)
        crowd[3].sendall(b"GET / HTTP/1.1\r\n" * 10)
        with contextlib.suppress(ConnectionResetError):
            assert crowd[3].recv(1) == b""
        assert scene.read_disk()


def test_ram_that_is_not_taken_delays_no_disk_and_a_disk_that_is_not_taken_delays_no_ram(
    tmp_path: Path,
) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.send()
        qemu = scene.arrive()
        # More than all windows and buffers hold.
        ram = os.urandom(64 << 20)
        writing = threading.Thread(target=sender.write, args=(ram,), daemon=True)
        writing.start()
        wait_until(lambda: scene.status.held > 14 << 20, "a window full of RAM")
        assert scene.read_disk()
        assert scene.read_disk()
        assert scene.status.held <= scene.status.bound
        # Somebody who asks for a lot and takes nothing.
        greedy = scene.destination.open()
        greedy.setblocking(True)
        ask_for_everything(greedy)
        wait_until(lambda: scene.status.held > 28 << 20, "a window full of the disk")
        received = 0
        while received < len(ram):
            received += len(qemu.recv(1 << 20))
        writing.join(60.0)
        assert scene.read_disk()
        assert scene.status.held <= scene.status.bound
        greedy.close()
        wait_until(lambda: scene.status.streams == 1, "the end of the greedy one's stream")
        qemu.sendall(LOADED)
        assert sender.read(8) == LOADED
        assert sender.end() == 0


def ask_for_everything(sock: socket.socket) -> None:
    """Ask an NBD server for far more than the windows hold, and take no answer."""
    from tests.support import wire

    assert receive(sock, 18)
    name = b"disk"
    sock.sendall((3).to_bytes(4, "big") + wire.option(wire.Option.EXPORT_NAME, name))
    assert receive(sock, 10)
    for _ in range(10):
        sock.sendall(wire.request(wire.Command.READ, 0, SIZE))


def test_garbage_behind_the_greeting_ends_the_connection_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import secrets

    from nbdserve.channel.dialling import Attempt, Way
    from nbdserve.channel.places import TcpPlace
    from nbdserve.channel.terms import REQUESTS
    from nbdserve.channel.wire.greeting import Claim, Mode

    with Scene(tmp_path) as scene:
        claim = Claim(Mode.NEW, 0, Limits().offer(REQUESTS))
        way = Way(TcpPlace("127.0.0.1", scene.port))
        transport, _ = Attempt(way, scene.token.read_bytes(), lambda: claim, 60.0).result()
        transport.send(memoryview(b"\xff" + secrets.token_bytes(1000)))
        scene.wait_for(Event.LOST)
        assert "there is no frame of type" in scene.reasons[-1]
        transport.close()
        scene.migrate()


def test_a_worker_that_is_told_to_end_takes_leave_and_can_be_resumed(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.migrate()
        worker = sender.worker
        os.kill(worker, signal.SIGTERM)
        wait_until(lambda: not is_alive(worker), "the worker's end")
        scene.wait_for(Event.LOST)
        assert "the source was stopped" in scene.reasons[-1]
        with resumed(scene):
            scene.wait_for(Event.BACK)
            assert scene.read_disk()


def test_where_nobody_waits_for_ram_the_migration_fails_and_says_where(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        (tmp_path / "incoming").unlink()
        sender = scene.send()
        assert sender.wait() == 1
        assert "QEMU does not wait at" in sender.errors
        scene.wait_for(Event.LOST)


def test_where_nobody_listens_the_migration_fails_at_once(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        scene.destination.close()
        assert scene.road is not None
        scene.road.close()
        sender = scene.send()
        assert sender.wait() == 1
        assert "Connection refused" in sender.errors


def test_other_ways_are_tried_in_turn(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        dead = socket.create_server(("127.0.0.1", 0))
        place = f"127.0.0.1:{dead.getsockname()[1]}"
        dead.close()
        scene.send_with(["--connect", place, *scene.options()])
        scene.arrive()


def test_a_source_gives_up_a_destination_that_is_lost_for_too_long(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.migrate("--reconnect-timeout", "0.5")
        worker = sender.worker
        scene.destination.close()
        wait_until(lambda: not is_alive(worker), "the worker's end")
        assert "given up after 0.5 s" in sender.log.read_text()


def test_descriptors_that_run_out_refuse_streams_and_nothing_else(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.migrate()
        import resource

        _, most = resource.prlimit(sender.worker, resource.RLIMIT_NOFILE)
        resource.prlimit(sender.worker, resource.RLIMIT_NOFILE, (3, most))
        lost = scene.destination.open()
        lost.setblocking(True)
        lost.settimeout(60.0)
        assert lost.recv(1) == b""
        lost.close()
        resource.prlimit(sender.worker, resource.RLIMIT_NOFILE, (most, most))
        assert scene.read_disk()
        assert Event.LOST not in scene.events


def test_descriptors_that_run_out_while_the_source_connects_again_do_not_end_it(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.migrate()
        assert scene.road is not None
        import resource

        _, most = resource.prlimit(sender.worker, resource.RLIMIT_NOFILE)

        def complaints() -> int:
            return sender.log.read_text().count("Too many open files")

        for more in (1, 2, 3):
            scene.road.is_closed = True
            scene.road.cut()
            wait_until(lambda: not scene.status.connected, "the connection is lost")
            time.sleep(0.1)
            used = set(map(int, os.listdir(f"/proc/{sender.worker}/fd")))
            free = [number for number in range(len(used) + more + 1) if number not in used]
            resource.prlimit(sender.worker, resource.RLIMIT_NOFILE, (free[more], most))
            before = complaints()
            scene.road.is_closed = False
            wait_until(
                lambda: scene.status.connected or complaints() > before or not is_alive(sender.worker),  # noqa: B023 - it is over before the next round
                "the source has tried",
            )
            assert is_alive(sender.worker)
            resource.prlimit(sender.worker, resource.RLIMIT_NOFILE, (most, most))
            wait_until(lambda: scene.status.connected, "the source is back")
        assert complaints()
        assert scene.read_disk()


def test_streams_that_end_leave_nothing_behind(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.migrate()
        assert scene.read_disk()

        def descriptors() -> tuple[int, int]:
            return len(os.listdir(f"/proc/{sender.worker}/fd")), len(os.listdir("/proc/self/fd"))

        wait_until(lambda: scene.status.streams == 0, "the end of the first stream")
        time.sleep(0.2)
        before = descriptors()
        for number in range(50):
            client = scene.client()
            client.pread(512, 0)
            if number % 2:
                client.shutdown()
            del client
        wait_until(lambda: scene.status.streams == 0 and descriptors() <= before, "nothing left behind")


def test_signals_that_come_one_upon_the_other_end_the_source_in_good_order(tmp_path: Path) -> None:
    with Scene(tmp_path, arrived=True) as scene:
        for _ in range(6):
            with resumed(scene) as source:
                wait_until(lambda: scene.status.connected, "the source is there")
                with contextlib.suppress(ProcessLookupError):
                    for number in (signal.SIGTERM, signal.SIGHUP):
                        os.kill(source.pid, number)
                # Minus a signal's number where that came when Python had given its handlers back.
                assert source.wait(30.0) in (1, -signal.SIGTERM, -signal.SIGHUP)
                wait_until(lambda: not scene.status.connected, "it has taken leave")
