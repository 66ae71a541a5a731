"""What becomes of real command lines, with what QEMU says of their guests."""

from __future__ import annotations

import dataclasses
import posixpath
import shlex
from typing import Any

import pytest

from nbdserve.common.errors import UsageError
from recipes.discovery.command_line.chardevs import monitors
from recipes.discovery.command_line.options import parse
from recipes.discovery.derive import Derived, derive, made_paths
from recipes.discovery.guest import Drive, Guest, Node
from recipes.qemu.machine import Machine
from tests.unit.recipes.discovery.real_lines import BY_SCRIPT, LIBVIRT, OLD_LIBVIRT, PROXMOX

PC = Machine("pc-i440fx-7.2", 1, 16 << 20, 0)


def node(name: str, file: str, **changes: Any) -> Node:
    """A raw disk of 1 GiB."""
    return dataclasses.replace(Node(name, "raw", file, 1 << 30), **changes)


def guest(*drives: Drive, **changes: Any) -> Guest:
    """A guest that runs, with these drives."""
    plugged = tuple(drive.id for drive in drives if drive.id)
    made = Guest((7, 2, 22), PC, "running", "", drives, plugged=plugged)
    return dataclasses.replace(made, **changes)


def derived(line: str, found: Guest, **options: Any) -> Derived:
    """What is derived of it; its first QMP monitor is B's anyway."""
    command = parse(shlex.split(line)).settled()
    monitor = next(monitors(command), None)
    return derive(command, found, "/home/vm", address="/q", monitor=monitor, **options)


def words(made: Derived) -> list[str]:
    """The options, each as one string."""
    return [str(line.option) for line in made.lines]


HD = Drive("ide0-hd0", "/machine/unattached/device[23]", "ide-hd", "ide.0", (("unit", 0),), waits=True)
CD = Drive(
    "ide1-cd0", "/machine/unattached/device[24]", "ide-cd", "ide.1", (("unit", 0),), True, removable=True
)
FLOPPY = Drive(
    "floppy0", "/machine/unattached/device[16]", "floppy", "floppy-bus.0", (("unit", 0),), removable=True
)
SD = Drive("sd0", removable=True)
VIRTIO = Drive(
    "virtio0", "/machine/peripheral-anon/device[0]", "virtio-blk-pci", "pci.0", (("addr", 40),), True
)


def has(drive: Drive, file: str = "/images/vm.raw", name: str = "#block123", **changes: Any) -> Drive:
    """The drive with a medium."""
    path = str(changes.pop("path", drive.path))
    return dataclasses.replace(drive, path=path, node=node(name, file, **changes))


def test_a_guest_that_was_typed_by_hand_gets_its_disk_and_its_empty_drives_as_devices() -> None:
    made = derived("qemu-system-x86_64 -hda vm.raw -m 2G", guest(has(HD, "vm.raw"), CD, FLOPPY, SD))
    assert made.refused == ()
    assert words(made) == [
        "-machine pc-i440fx-7.2",
        "-m 2G",
        "-device ide-hd,bus=ide.0,unit=0,drive=ide0-hd0,rerror=stop,werror=stop",
        "-device ide-cd,bus=ide.1,unit=0",
    ]
    [disk] = made.disks
    assert (disk.image, disk.node, disk.drive) == ("/home/vm/vm.raw", "#block123", "ide0-hd0")


def test_a_drive_of_the_interface_virtio_becomes_a_device_at_the_same_place() -> None:
    line = "kvm -drive file=/images/vm.raw,if=virtio,format=raw,cache=directsync -device virtio-rng-pci -M pc"
    made = derived(line, guest(has(VIRTIO)))
    assert words(made) == [
        "-device virtio-rng-pci",
        "-machine pc-i440fx-7.2",
        "-device virtio-blk-pci,bus=pci.0,addr=0x5,drive=virtio0,rerror=stop,werror=stop,write-cache=off",
    ]


def test_proxmox_line_keeps_all_but_the_disk_the_monitor_and_the_daemon() -> None:
    disk = Drive(
        "drive-virtio0", "/machine/peripheral/virtio0", "virtio-blk-pci", "pci.0", (("addr", 80),), True
    )
    cd = Drive(
        "drive-ide2", "/machine/peripheral/ide2", "ide-cd", "ide.1", (("unit", 0),), True, removable=True
    )
    opened: dict[str, Any] = {"cache": ("direct",), "detect_zeroes": "on"}
    found = guest(
        cd, has(disk, "/dev/pve/vm-100-disk-0", **opened), plugged=("pci.1", "vga", "ide2", "virtio0", "net0")
    )
    names = {"/var/run/qemu-server/100.vnc": "/b.vnc"}
    made = derived(PROXMOX, found, names=names)
    assert made.refused == ()
    options = words(made)
    for kept in ("-drive if=none,id=drive-ide2", "-device ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2"):
        assert any(each.startswith(kept) for each in options)
    assert not any("vm-100-disk-0" in each or "100.qmp" in each or "daemonize" in each for each in options)
    device = "-device virtio-blk-pci,drive=drive-virtio0,id=virtio0,bus=pci.0,addr=0xa,"
    assert f"{device}iothread=iothread-virtio0,rerror=stop,werror=stop" in options
    assert "-vnc unix:/b.vnc,password=on" in options
    [moves] = made.disks
    assert (moves.cache, moves.aio, moves.detect_zeroes) == (("direct",), "io_uring", "on")
    assert "-pidfile /var/run/qemu-server/100.pid" in options
    assert "-machine pc-i440fx-7.2" in options
    assert [str(each) for each in made.local] == [
        "the file /var/lib/qemu-server/pve-bridge of -netdev",
    ]


@pytest.mark.parametrize(
    ("options", "cache", "aio"),
    [
        ("-drive file=/images/vm.raw,if=none,id=d,aio=native,cache=none", (), "native"),
        (
            "-drive file=/images/vm.raw,if=none,id=d,file.aio=io_uring,cache.no-flush=on",
            ("no-flush",),
            "io_uring",
        ),
        ("-drive file=/images/vm.raw,if=none,id=d,aio=threads", (), ""),
        (
            "-blockdev driver=raw,node-name=d,file.driver=file,file.filename=/images/vm.raw,file.aio=native,"
            "file.cache.direct=on",
            ("direct",),
            "native",
        ),
        (
            """-blockdev '{"driver":"file","filename":"/images/vm.raw","aio":"native","node-name":"f","""
            """"cache":{"direct":true,"no-flush":false}}' """
            """-blockdev '{"driver":"raw","node-name":"d","file":"f"}'""",
            ("direct",),
            "native",
        ),
    ],
)
def test_how_a_disk_is_opened_is_told_by_the_command_line_and_the_monitor(
    options: str, cache: tuple[str, ...], aio: str
) -> None:
    drive = dataclasses.replace(VIRTIO, backend="d" if "-drive" in options else "")
    line = f"kvm -M pc {options} -device virtio-blk-pci,drive=d"
    [disk] = derived(line, guest(has(drive, name="#block1" if "-drive" in options else "d"))).disks
    assert (disk.cache, disk.aio, disk.detect_zeroes) == (cache, aio, "")
    # What -drive cache=none means is told by the monitor.
    [disk] = derived(line, guest(has(drive, name="d", cache=("direct",), detect_zeroes="unmap"))).disks
    assert "direct" in disk.cache
    assert disk.detect_zeroes == "unmap"


def test_libvirts_line_is_understood_and_its_descriptors_are_refused() -> None:
    line = LIBVIRT
    disk = Drive("", "/machine/peripheral/virtio-disk0", "virtio-blk-pci", "pci.1", (("addr", 0),), True)
    found = guest(
        has(disk, "/var/lib/libvirt/images/vm.raw", "libvirt-1-format"),
        plugged=("pci.1", "virtio-disk0"),
        machine=Machine("pc-q35-7.2", 1, 1 << 30, 0),
    )
    made = derived(line, found)
    # Its monitor is the one that B gets otherwise.
    assert made.refused == ()
    options = words(made)
    assert not any("libvirt-1-storage" in each or "charmonitor" in each for each in options)
    assert any('"drive": "libvirt-1-format"' in each and '"werror": "stop"' in each for each in options)
    again = derived(f"{line} -netdev tap,fd=28,id=n", found)
    assert again.refused == (
        "-netdev fd=28: a descriptor that was opened by whoever started QEMU cannot be opened again on B",
    )


def test_an_option_that_newer_qemus_have_no_more_is_refused_by_its_name() -> None:
    with pytest.raises(UsageError, match="the option -realtime is not known here"):
        parse(shlex.split(OLD_LIBVIRT))


def test_a_script_with_firmware_in_flash_and_a_user_network_is_understood() -> None:
    code = Drive("pflash0", "/machine/system.flash0", "cfi.pflash01")
    found = guest(
        has(code, "/usr/share/OVMF/OVMF_CODE.fd", read_only=True),
        has(dataclasses.replace(VIRTIO, bus="pcie.0"), path="/machine/peripheral-anon/device[1]"),
        machine=Machine("pc-q35-7.2", 2, 4 << 30, 0),
        anonymous=("usb-tablet", "virtio-blk-pci"),
    )
    made = derived(BY_SCRIPT, found)
    assert made.refused == ()
    options = words(made)
    assert "-machine pc-q35-7.2,smm=on" in options
    assert "-drive if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd" in options
    assert options[-1] == "-device virtio-blk-pci,bus=pcie.0,addr=0x5,drive=virtio0,rerror=stop,werror=stop"
    assert [str(each) for each in made.local] == ["the file /usr/share/OVMF/OVMF_CODE.fd of -drive"]
    assert made.busy == ("hostfwd=tcp::2222-:22 of -nic",)


def test_the_node_of_a_disk_has_a_name_that_plans_take_and_nobody_else_has() -> None:
    line = "qemu -device virtio-blk-pci,drive=a-name-of-more-than-twenty-letters -drive if=none,id=disk0"
    drive = dataclasses.replace(VIRTIO, backend="")
    made = derived(
        line, guest(has(drive, name="a-name-of-more-than-twenty-letters"), Drive("disk0", removable=True))
    )
    assert [disk.drive for disk in made.disks] == ["disk1"]
    assert "-device virtio-blk-pci,drive=disk1,rerror=stop,werror=stop" in words(made)
    assert "-drive if=none,id=disk0" in words(made)


CODE = Drive("pflash0", "/machine/system.flash0", "cfi.pflash01")
VARS = Drive("pflash1", "/machine/system.flash1", "cfi.pflash01")
IN_JSON = '{"node-name": "v", "driver": "raw", "file": {"driver": "file", "filename": "%s"}}'


@pytest.mark.parametrize(
    ("line", "become", "changes"),
    [
        (
            "-drive if=pflash,unit=1,file=vars.fd,format=raw",
            "-drive if=pflash,unit=1,format=raw,file=/b/vars.fd",
            {},
        ),
        ("-pflash code.fd -pflash vars.fd", "-drive if=pflash,format=raw,file=/b/vars.fd", {}),
        (
            "-M pflash1=v -blockdev qcow2,node-name=v,file=f -blockdev file,node-name=f,filename=vars.fd",
            "-blockdev raw,node-name=v,file.driver=file,file.filename=/b/vars.fd",
            {"name": "v", "driver": "qcow2"},
        ),
        (
            f"-blockdev '{IN_JSON % 'vars.fd'}' -machine pflash1=v",
            f"-blockdev {IN_JSON % '/b/vars.fd'}",
            {"name": "v"},
        ),
    ],
)
def test_flash_that_the_guest_writes_to_gets_a_file_of_its_own(
    line: str, become: str, changes: dict[str, str]
) -> None:
    found = guest(has(HD, "vm.raw"), has(CODE, "code.fd", read_only=True), has(VARS, "vars.fd", **changes))
    made = derived(
        f"qemu -hda vm.raw {line}", found, target=lambda image, _: f"/b/{image.rpartition('/')[2]}"
    )
    assert made.refused == ()
    assert [(each.image, each.target) for each in made.flash] == [("/home/vm/vars.fd", "/b/vars.fd")]
    options = words(made)
    assert become in options
    assert not any("node-name=f," in each for each in options)
    assert not any("vars.fd" in str(each) for each in made.local)


def test_a_cd_stays_in_its_drive_and_is_what_is_in_it_now() -> None:
    cd = has(CD, "tools.iso", read_only=True)
    made = derived("qemu -hda vm.raw -cdrom old.iso", guest(has(HD, "vm.raw"), cd))
    assert made.refused == ()
    assert words(made)[-2:] == [
        "-drive if=none,id=ide1-cd0,media=cdrom,readonly=on,format=raw,file=/home/vm/tools.iso",
        "-device ide-cd,bus=ide.1,unit=0,drive=ide1-cd0",
    ]
    assert made.same == ("/home/vm/tools.iso",)
    line = "qemu -hda vm.raw -drive id=cd,if=none,media=cdrom,file=old.iso -device scsi-cd,drive=cd,id=a"
    a = Drive("cd", "/machine/peripheral/a", "scsi-cd", "scsi.0", (), True, removable=True)
    made = derived(line, guest(has(HD, "vm.raw"), has(a, "/x,y.iso", read_only=True)))
    assert "-drive id=cd,if=none,media=cdrom,file=/x,,y.iso,format=raw" in words(made)
    assert "-device scsi-cd,drive=cd,id=a" in words(made)
    assert made.same == ("/x,y.iso",)


def test_a_read_only_disk_stays_as_it_is_with_what_is_below_it() -> None:
    line = (
        """qemu -hda vm.raw -blockdev '{"driver": "qcow2", "node-name": "n", "read-only": true, "file": """
        """{"driver": "file", "filename": "/data.qcow2"}}' -device virtio-blk-pci,drive=n,id=data"""
    )
    data = Drive("", "/machine/peripheral/data", "virtio-blk-pci", "pci.0", (), True)
    found = has(data, "/data.qcow2", "n", driver="qcow2", read_only=True, below=("/base.raw",))
    made = derived(line, guest(has(HD, "vm.raw"), found))
    assert made.refused == ()
    assert made.same == ("/data.qcow2", "/base.raw")
    assert "-device virtio-blk-pci,drive=n,id=data" in words(made)
    assert [disk.image for disk in made.disks] == ["/home/vm/vm.raw"]
    # A disk that the guest could not wait with is none that it has to wait for.
    made = derived(
        "qemu -hda vm.raw -device nvme,serial=1,drive=d,id=data -drive if=none,id=d,file=/d,readonly=on",
        guest(has(HD, "vm.raw"), dataclasses.replace(found, backend="d", type="nvme", waits=False)),
    )
    assert made.refused == ()
    assert "-drive if=none,id=d,readonly=on,file=/data.qcow2,format=qcow2" in words(made)


def test_another_medium_than_that_of_the_start_is_named_anew() -> None:
    line = "qemu -hda vm.raw -blockdev file,node-name=f,filename=/x.iso -device ide-cd,drive=f,id=b"
    b = Drive("", "/machine/peripheral/b", "ide-cd", "ide.0", (), True, removable=True)
    made = derived(line, guest(has(HD, "vm.raw"), has(b, "/new.iso", "#block7", read_only=True)))
    assert made.refused == ()
    assert "-drive if=none,id=medium0,media=cdrom,readonly=on,format=raw,file=/new.iso" in words(made)
    assert "-device ide-cd,drive=medium0,id=b" in words(made)
    assert not any("/x.iso" in each for each in words(made))


def test_a_medium_that_was_taken_out_stays_out() -> None:
    line = (
        "qemu -drive file=/vm.raw,if=virtio "
        "-drive file=/cd.iso,if=none,id=cd,media=cdrom,format=raw "
        "-device scsi-cd,drive=cd,id=a -blockdev file,node-name=f,filename=/x.iso "
        "-device ide-cd,drive=f,id=b"
    )
    a = Drive("cd", "/machine/peripheral/a", "scsi-cd", "scsi.0", (), True, removable=True)
    b = Drive("", "/machine/peripheral/b", "ide-cd", "ide.0", (), True, removable=True)
    made = derived(line, guest(has(VIRTIO), a, b))
    assert made.refused == ()
    assert words(made)[1:4] == [
        "-drive if=none,id=cd,media=cdrom",
        "-device scsi-cd,drive=cd,id=a",
        "-device ide-cd,id=b",
    ]


def test_a_guest_that_has_come_by_a_migration_is_recognised_behind_its_pivot() -> None:
    line = (
        "qemu -machine pc -device virtio-rng-pci -device virtio-blk-pci,drive=disk0,rerror=stop,werror=stop "
        """-blockdev '{"node-name": "disk0", "driver": "nbd", "server": {"path": "/x.nbd"}}' """
        "-incoming defer -qmp unix:/q,server=on,wait=off"
    )
    drive = dataclasses.replace(VIRTIO, backend="", path="/machine/peripheral-anon/device[1]")
    found = guest(has(drive, name="disk0-local"), anonymous=("virtio-rng-pci", "virtio-blk-pci"))
    made = derived(line, found)
    assert made.refused == ()
    assert [(disk.node, disk.drive) for disk in made.disks] == [("disk0-local", "disk0")]
    assert words(made) == [
        "-machine pc-i440fx-7.2",
        "-device virtio-rng-pci",
        "-device virtio-blk-pci,drive=disk0,rerror=stop,werror=stop",
    ]
    assert made.notes == ()


@pytest.mark.parametrize(
    ("line", "found", "reason"),
    [
        ("qemu -snapshot", guest(), "-snapshot: what the guest writes to a snapshot"),
        ("qemu -drive file=/x,snapshot=on", guest(), "-drive file=/x,snapshot=on: what the guest writes"),
        ("qemu -hda x", guest(has(HD, driver="vmdk")), "is vmdk, and only raw and qcow2 disks can move"),
        ("qemu -hda x", guest(has(HD, driver="qcow2", fault="it is odd")), "cannot move: it is odd"),
        ("qemu -hda x", guest(has(HD, limited="iops=5")), "is throttled (iops=5)"),
        ("qemu -hda x", guest(has(HD, "/dev/sda", read_only=True)), "is a device of A's host, and read-only"),
        ("qemu -cdrom x", guest(has(CD, "/dev/sr0", driver="host_cdrom", read_only=True)), "is host_cdrom"),
        ("qemu -hda x", guest(has(HD, "nbd://h/x")), "is no file or block device of its own on A"),
        ("qemu -hda x", guest(has(HD, 'json:{"driver":"raw","offset":512}')), "is no file or block device"),
        ("qemu -hda x", guest(has(HD, "/dev/fdset/1")), "was passed to QEMU as a file descriptor"),
        ("qemu -cdrom x", guest(has(CD, "/x.iso")), "eject '{\"device\": \"ide1-cd0\"}'"),
        ("qemu", guest(has(Drive("pflash0", "/machine/f", "cfi.pflash01"))), "flash chip pflash0"),
        ("qemu -pflash nbd://h/x", guest(has(Drive("pflash0", "/machine/f", "cfi.pflash01"), "nbd://h/x")),
         "flash chip pflash0 (nbd://h/x) is in no file that the command line names"),
        ("qemu -device nvme,drive=d,serial=1", guest(has(dataclasses.replace(
            VIRTIO, type="nvme", waits=False))), "is in a nvme, which cannot wait"),
        ("qemu", guest(state="paused"), "in state paused; start it first"),
        ("qemu", guest(state="inmigrate"), "in state inmigrate"),
        ("qemu", guest(blocked=("vfio",)), "QEMU says that it cannot migrate: vfio"),
        ("qemu", guest(plugged=("new",)), "the device new was plugged in while it ran"),
        ("qemu -device x,id=old", guest(), "the device old of its command line was unplugged"),
        ("qemu", guest(anonymous=("e1000",)), "devices without a name (e1000) some were plugged in"),
        ("qemu -fda x", guest(has(FLOPPY)), "-fda x is not understood here"),
        ("qemu -chardev socket,id=c,fd=3", guest(), "-chardev fd=3: a descriptor"),
        ("qemu -add-fd fd=3,set=1", guest(), "-add-fd fd=3,set=1: a descriptor"),
        ("qemu -drive if=sd,file=x", guest(), "drives of this interface"),
    ],
)  # fmt: skip
def test_what_cannot_be_moved_is_refused_by_its_name(line: str, found: Guest, reason: str) -> None:
    assert any(reason in each for each in derived(line, found).refused), derived(line, found).refused


def test_one_file_that_is_two_disks_is_refused() -> None:
    other = dataclasses.replace(VIRTIO, backend="d", path="/machine/peripheral/d")
    line = "qemu -drive file=/images/vm.raw,if=virtio -device virtio-blk-pci,id=d,drive=d"
    assert "/images/vm.raw is two of its disks" in derived(line, guest(has(VIRTIO), has(other))).refused


def test_what_is_made_at_the_start_is_called_otherwise_where_b_has_it() -> None:
    line = (
        "qemu -hda x -pidfile vm.pid -D /log/vm.log -serial file:c -monitor unix:m,server,nowait "
        "-qmp unix:q,server -chardev socket,id=s,path=s.sock,server=on,logfile=s.log -qmp unix:q2,server "
        "-qmp stdio -vnc unix:v"
    )
    found = guest(has(HD))
    made = made_paths(parse(line.split()), "/home/vm")
    assert made == [
        *("/home/vm/vm.pid", "/log/vm.log", "/home/vm/c", "/home/vm/m", "/home/vm/q", "/home/vm/s.sock"),
        *("/home/vm/s.log", "/home/vm/q2", "/home/vm/v"),
    ]
    derivation = derived(line, found, names={path: f"{path}.b" for path in made})
    assert words(derivation)[1:-1] == [
        "-pidfile /home/vm/vm.pid.b",
        "-D /log/vm.log.b",
        "-serial file:/home/vm/c.b",
        "-monitor unix:/home/vm/m.b,server=on,wait=off",
        "-chardev socket,id=s,path=/home/vm/s.sock.b,server=on,logfile=/home/vm/s.log.b",
        "-chardev socket,id=monitor1,path=/home/vm/q2.b,server=on,wait=off",
        "-mon chardev=monitor1,mode=control",
        "-vnc unix:/home/vm/v.b",
    ]
    assert derivation.notes == ("-qmp stdio, as B's QEMU has no terminal",)


@pytest.mark.parametrize(
    ("option", "made", "after"),
    [
        (
            "-netdev stream,id=n,server=on,addr.type=unix,addr.path=net",
            ["net"],
            "-netdev stream,id=n,server=on,addr.type=unix,addr.path=/home/vm/net.b",
        ),
        (
            "-netdev dgram,id=n,local.type=unix,local.path=/r/l,remote.type=unix,remote.path=/r/r",
            ["/r/l"],
            "-netdev dgram,id=n,local.type=unix,local.path=/r/l.b,remote.type=unix,remote.path=/r/r",
        ),
        ("-object filter-dump,id=d,netdev=n,file=d.pcap", ["d.pcap"], None),
        ("-trace enable=x,file=/log/trace", ["/log/trace"], "-trace x,file=/log/trace.b"),
        ("-spice unix=on,addr=/r/spice", ["/r/spice"], "-spice unix=on,addr=/r/spice.b"),
        ("-display vnc=unix:/r/v", ["/r/v"], "-display vnc=unix:/r/v.b"),
        ("-audiodev wav,id=a,path=/r/a.wav", ["/r/a.wav"], "-audiodev wav,id=a,path=/r/a.wav.b"),
        ("-chardev pty,id=t,path=/r/t", ["/r/t"], "-chardev pty,id=t,path=/r/t.b"),
        ("-chardev file,id=f,path=/r/f", ["/r/f"], "-chardev file,id=f,path=/r/f.b"),
        # These are somebody else's, or nobody's file.
        (
            "-netdev stream,id=n,addr.type=unix,addr.path=/r/n",
            [],
            "-netdev stream,id=n,addr.type=unix,addr.path=/r/n",
        ),
        ("-chardev pipe,id=p,path=/r/p", [], "-chardev pipe,id=p,path=/r/p"),
        (
            "-chardev socket,id=s,path=vm,abstract=on,server=on",
            [],
            "-chardev socket,id=s,path=vm,abstract=on,server=on",
        ),
        ("-spice port=5900,addr=127.0.0.1", [], "-spice port=5900,addr=127.0.0.1"),
    ],
)
def test_whatever_names_what_qemu_makes_gets_another_name_where_b_has_it(
    option: str, made: list[str], after: str | None
) -> None:
    paths = [posixpath.join("/home/vm", path) for path in made]
    assert made_paths(parse(["qemu", *shlex.split(option)]), "/home/vm") == paths
    found = derived(f"qemu -hda x {option}", guest(has(HD)), names={path: f"{path}.b" for path in paths})
    expected = after or "-object filter-dump,id=d,netdev=n,file=/home/vm/d.pcap.b"
    assert expected in words(found)
    # What B's QEMU makes need not be there before.
    assert not [each for each in found.local if each.name in (*paths, *(f"{path}.b" for path in paths))]


def test_what_must_be_on_b_and_what_only_one_qemu_can_have_is_listed() -> None:
    line = (
        "qemu -hda x -kernel vmlinuz -initrd /i -bios bios-256k.bin -netdev tap,id=t,ifname=tap0,script=no "
        "-netdev bridge,id=b,br=br1 -nic user,hostfwd=tcp::2222-:22 "
        "-object memory-backend-file,id=m,mem-path=/huge -fw_cfg name=opt/x,file=/f -vnc :1 "
        "-spice port=5930 -monitor tcp::4000,server -device vfio-pci,host=01:00.0"
    )
    made = derived(line, guest(has(HD)))
    assert [each.path for each in made.local] == [
        *("/home/vm/vmlinuz", "/i", "/sys/class/net/tap0", "/sys/class/net/br1", "/huge", "/f"),
        "/sys/bus/pci/devices/0000:01:00.0",
    ]
    assert made.busy == (
        "hostfwd=tcp::2222-:22 of -nic",
        "the VNC display :1",
        "the SPICE port 5930",
        ":4000 of -monitor",
    )


def test_b_opens_no_window_and_starts_nothing_again() -> None:
    line = "qemu -hda x -display gtk,gl=on -loadvm s -incoming tcp:0:1 -S"
    made = derived(line, guest(has(HD), window=True))
    assert words(made)[1:-1] == ["-display none"]
    assert made.notes == ("-loadvm s, which was for A's start",)
    assert words(derived("qemu -hda x", guest(has(HD), window=True)))[-1] == "-display none"
    assert derived("qemu -hda x -runas vm", guest(has(HD))).user == "vm"


def test_an_idle_block_node_is_left_out_and_told() -> None:
    line = (
        "qemu -drive if=virtio,file=/x -blockdev file,node-name=f,filename=/y "
        "-blockdev raw,node-name=r,file=f"
    )
    made = derived(line, guest(has(VIRTIO)))
    assert made.notes == ("the block node f, which no device uses", "the block node r, which no device uses")
    pinned = f"{line} -machine pc,pflash0=r"
    assert sum("node-name" in each for each in words(derived(pinned, guest(has(VIRTIO))))) == 2
