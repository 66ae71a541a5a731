"""The plan of a migration: its file, and every mistake in it that can be seen without a host."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from pathlib import Path

import pytest

from nbdserve.common.errors import UsageError
from recipes.plans.limits import GONE, Limits
from recipes.plans.plan import Plan
from recipes.plans.planfile import build, load
from tests.support.vms import as_toml

MINIMAL = """
[source]
qmp = "/run/a.qmp"
image = "/images/vm.raw"
[export]
uri = "nbd://192.0.2.1/vm"
[destination]
qemu = ["qemu-system-x86_64", "-device", "virtio-blk-pci,drive=disk0,rerror=stop,werror=stop"]
image = "/images/vm.qed"
qmp = "192.0.2.2:4000"
migration = "tcp:[2001:db8::2]:4444"
"""


def plan_of(tmp_path: Path, text: str) -> Plan:
    """The plan that a file with this text holds."""
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return load(path)


def test_a_plan_needs_no_more_than_what_cannot_be_guessed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MINIMAL)
    assert plan.source.shell == ()
    assert [(disk.drive, disk.node) for disk in plan.disks] == [("disk0", "")]
    assert plan.export.address.port == 10809
    assert (plan.limits.speed, plan.limits.connections, plan.destination.engine) == (0, 3, "overlay")
    assert plan.finish.move_aside == ""


def test_a_plan_survives_being_written_and_read(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, MINIMAL + '[limits]\nspeed = 1000\nsilence = 5\n[finish]\nmove_aside = "/images/old"\n'
    )
    assert plan.limits.silence == 5.0
    assert plan_of(tmp_path, as_toml(plan)) == plan


@pytest.mark.parametrize(
    ("limit", "complaint"),
    [
        ("connections = 0", "limits.connections: 0 is too small"),
        ("connections = 65", "limits.connections: 65 is too large: at most 64 connections"),
        ("reconnect_timeout = 0", "limits.reconnect_timeout: 0.0 is too small"),
        ("reconnect_timeout = 86401", "is too large: at most 86400 seconds"),
    ],
)
def test_nbd_overlay_is_not_asked_for_what_it_would_refuse(
    tmp_path: Path, limit: str, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        plan_of(tmp_path, f"{MINIMAL}[limits]\n{limit}\n")


@pytest.mark.parametrize("limit", GONE)
def test_a_limit_that_is_no_more_is_refused_with_what_there_is_instead(tmp_path: Path, limit: str) -> None:
    with pytest.raises(UsageError, match=rf"limits\.{limit}: .* any more.*limits\.silence .*; leave it out$"):
        plan_of(tmp_path, f"{MINIMAL}[limits]\n{limit} = 60\n")


def test_a_link_local_address_names_its_interface(tmp_path: Path) -> None:
    here = "[fe80::5054:ff:fe12:3456%br-mgmt]"
    text = MINIMAL.replace("tcp:[2001:db8::2]", f"tcp:{here}").replace("192.0.2.2:4000", f"{here}:4000")
    plan = plan_of(tmp_path, text.replace("nbd://192.0.2.1/", f"nbd://{here}/"))
    assert plan.destination.migration == f"tcp:{here}:4444"
    assert plan.destination.qmp == f"{here}:4000"
    assert plan.export.address.host == here[1:-1]


def test_an_option_of_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(MINIMAL)
    plan = load(path, {"source": {"qmp": "/run/other.qmp"}, "limits": {"speed": 7}})
    assert (plan.source.qmp, plan.limits.speed) == ("/run/other.qmp", 7)
    assert plan.source.image == "/images/vm.raw"


@pytest.mark.parametrize(
    ("line", "changed", "complaint"),
    [
        ("[source]", "[sauce]", "[sauce]: no such section; there are source, export, "),
        ("[source]", "source = 1\n[other]", "[other]: no such section"),
        ('image = "/images/vm.raw"', "", "source.image: this is missing"),
        ('image = "/images/vm.raw"', "image = 3", "source.image: a string is wanted, not 3"),
        ('image = "/images/vm.raw"', 'imago = "x"', "source.imago: no such key; there are qmp, image, node"),
        ('image = "/images/vm.raw"', 'image = "vm.raw"', "source.image: 'vm.raw' must be an absolute path"),
        (
            'qmp = "/run/a.qmp"',
            'qmp = "a.qmp"',
            "source.qmp: 'a.qmp' is not usable: write a socket's",
        ),
        ('qmp = "/run/a.qmp"', 'qmp = "a:99999"', "source.qmp: 'a:99999' is not usable"),
        ('qmp = "/run/a.qmp"', 'qmp = "2001:db8::1:4000"', "source.qmp: '2001:db8::1:4000' is not usable"),
        ('"192.0.2.2:4000"', '"/run/a.qmp"', "destination.qmp: /run/a.qmp is the source's monitor"),
        (
            "nbd://192.0.2.1/vm",
            "http://192.0.2.1/vm",
            "export.uri: 'http://192.0.2.1/vm' is not an NBD",
        ),
        ("nbd://192.0.2.1/vm", "nbds://192.0.2.1/vm", "export.uri: 'nbds://192.0.2.1/vm': TLS"),
        ("nbd://192.0.2.1/vm", "nbd+unix:///vm?socket=x", "export.uri: 'x' must be an absolute path"),
        ('"-device"', '"-incoming"', "destination.qemu: leave -incoming out"),
        ('"-device"', '"--daemonize"', "destination.qemu: leave -daemonize out"),
        ('"-device"', '"-S"', "destination.qemu: leave -S out"),
        ('"-device"', "3", "destination.qemu: a list of strings is wanted"),
        ('["qemu', '[]\nnode = ["qemu', "destination.node: a string is wanted"),
        (
            "tcp:[2001:db8::2]:4444",
            "tcp:2001:db8::2:4444",
            "destination.migration: 'tcp:2001:db8::2:",
        ),
        (
            "tcp:[2001:db8::2]:4444",
            "tcp:[fe80::1%]:4444",
            "destination.migration: 'tcp:[fe80::1%]:4444' is not",
        ),
        (
            "tcp:[2001:db8::2]:4444",
            "tcp:[fe80::g%e0]:1",
            "destination.migration: 'tcp:[fe80::g%e0]:1' is not",
        ),
        ("tcp:[2001:db8::2]:4444", "tcp:[]:4444", "destination.migration: 'tcp:[]:4444' is not usable"),
        ("tcp:[2001:db8::2]:4444", "tcp:a..b:4444", "destination.migration: 'tcp:a..b:4444' is not usable"),
        ("tcp:[2001:db8::2]:4444", "unix:migration", "destination.migration: 'unix:migration' is not usable"),
        (
            "tcp:[2001:db8::2]:4444",
            f"unix:/{'m' * 107}",
            f"destination.migration: /{'m' * 107} has 108 bytes, a Unix socket's path at most 107",
        ),
        (
            "/run/a.qmp",
            f"/{'a' * 107}",
            f"source.qmp: /{'a' * 107} has 108 bytes, a Unix socket's path at most",
        ),
        (
            "192.0.2.2:4000",
            f"/{'b' * 107}",
            f"destination.qmp: /{'b' * 107} has 108 bytes, a Unix socket's path",
        ),
        ("/images/vm.qed", f"/{'i' * 103}", "is too long for the sockets beside it"),
        (
            "nbd://192.0.2.1/vm",
            f"nbd+unix:///vm?socket=/{'s' * 107}",
            "the socket's path has 108 bytes; 107 are possible",
        ),
        ("tcp:[2001:db8::2]:4444", "exec:cat", "destination.migration: 'exec:cat' is not usable"),
        ("[destination]", '[destination]\nnode = "0"', "destination.node: '0' is not usable"),
        ("[source]", "[limits]\nspeed = -1\n[source]", "limits.speed: -1 is too small"),
        ("[source]", "[limits]\nstop = 0\n[source]", "limits.stop: 0.0 is too small"),
        (
            "[source]",
            "[limits]\nspeed = 9223372036854775808\n[source]",
            "limits.speed: 9223372036854775808 is too large",
        ),
        (
            "[source]",
            "[limits]\nstop = inf\n[source]",
            "limits.stop: inf is too large: at most 1000000 seconds",
        ),
        ("[source]", "[limits]\nstop = nan\n[source]", "limits.stop: nan is not a number of seconds"),
        (
            "[source]",
            "[limits]\nreconnect_delay = 5000000000\n[source]",
            "limits.reconnect_delay: 5000000000 is too",
        ),
        ("/images/vm.raw", "/images/\\u0000", "source.image: '/images/\\x00' has a NUL in it"),
        ('"-device"', '"\\u0000"', "destination.qemu: '\\x00' has a NUL in it"),
        ("[source]", "[limits]\nspeed = 1.5\n[source]", "limits.speed: a whole number is wanted, not 1.5"),
        ("[source]", "[limits]\nstop = true\n[source]", "limits.stop: a number is wanted, not True"),
        (
            "[source]",
            '[finish]\nmove_aside = "/images/vm.raw"\n[source]',
            "finish.move_aside: this is the image",
        ),
        ("[source]", "[source", "plan.toml: not a TOML file: "),
    ],
)
def test_a_mistake_is_named_with_its_section_and_key(
    tmp_path: Path, line: str, changed: str, complaint: str
) -> None:
    assert line in MINIMAL
    with pytest.raises(UsageError) as caught:
        plan_of(tmp_path, MINIMAL.replace(line, changed, 1))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "plan.toml" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_plan_may_come_from_any_editor(tmp_path: Path, encoding: str, end: str) -> None:
    text = MINIMAL.replace("/images/vm.raw", "/images/Gäste.raw").replace("\n", end)
    path = tmp_path / "plan.toml"
    path.write_bytes(text.encode(encoding))
    assert load(path).source.image == "/images/Gäste.raw"


def test_the_defaults_in_the_manual_are_those_of_the_program() -> None:
    text = (Path(__file__).parents[4] / "docs" / "migrate.md").read_text()
    block = text.partition("    [limits]")[2].partition("    [finish]")[0]
    told = dict(re.findall(r"^    (\w+) = (\S+)", block, re.MULTILINE))
    assert {name: float(value) for name, value in told.items()} == dataclasses.asdict(Limits())


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"a = '\xe4'", b"\x00\x01"])
def test_a_file_that_is_not_text_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"plan\.toml: not a TOML file"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        f"[limits]\nspeed = {'1' * 5000}\n",
        f"[limits]\nspeed = {'[' * 20000}",
        f"x = {'{a = ' * 5000}",
    ],
)
def test_a_file_that_is_too_much_for_toml_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"plan\.toml: not a TOML file: "):
        plan_of(tmp_path, content)


@pytest.mark.parametrize("key", ["stop", "speed", "connections"])
@pytest.mark.parametrize("number", ["1" + "0" * 400, "0x" + "f" * 5000, "-1" + "0" * 4000])
def test_a_number_that_python_cannot_handle_is_named(tmp_path: Path, key: str, number: str) -> None:
    with pytest.raises(UsageError, match=rf"plan\.toml: limits\.{key}: no number can be as large"):
        plan_of(tmp_path, f"{MINIMAL}[limits]\n{key} = {number}\n")


@pytest.mark.parametrize("value", ["[0x" + "f" * 5000 + "]", "{" + ".".join("a" * 5000) + " = 1}"])
def test_what_cannot_be_shown_in_a_complaint_is_named(tmp_path: Path, value: str) -> None:
    for key, kind in (("speed", "a whole number"), ("stop", "a number")):
        with pytest.raises(UsageError, match=rf"limits\.{key}: {kind} is wanted, not a (list|section)$"):
            plan_of(tmp_path, f"{MINIMAL}[limits]\n{key} = {value}\n")


@pytest.mark.timeout(60)
def test_a_plan_that_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "plan.toml"
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match=r"plan\.toml: not a regular file; write the plan to one"):
        load(fifo)
    with pytest.raises(UsageError, match="not a regular file"):
        load(tmp_path)


LONG_WAY = ("/dev/../images/x", "//images/x", "/images/./x", "/images//x", "/images/x/", "/..")


@pytest.mark.parametrize("path", LONG_WAY)
@pytest.mark.parametrize(
    ("section", "key", "form"),
    [
        ("source", "image", "{}"),
        ("source", "qmp", "{}"),
        ("export", "uri", "nbd+unix:///vm?socket={}"),
        ("destination", "image", "{}"),
        ("destination", "qmp", "{}"),
        ("destination", "migration", "unix:{}"),
        ("destination", "seed", "{}"),
        ("destination", "same", "{}"),
        ("destination", "overwrite", "{}"),
        ("finish", "move_aside", "{}"),
        ("flash", "image", "{}"),
        ("flash", "target", "{}"),
    ],
)
def test_what_a_path_is_can_be_told_by_its_letters(section: str, key: str, form: str, path: str) -> None:
    document = tomllib.loads(MINIMAL)
    said = form.format(path)
    value = {key: [said] if key in ("same", "overwrite") else said}
    if section == "flash":
        document["flash"] = [{"image": "/a", "target": "/b"} | value]
    else:
        document[section] = document.get(section, {}) | value
    with pytest.raises(UsageError) as caught:
        build(document, {})
    assert f"{section}.{key}: {path!r} has parts that it does not need: write /" in str(caught.value)


def test_a_directory_may_end_with_a_slash(tmp_path: Path) -> None:
    text = DISKS.replace('/b/data.raw"', '/dev/vg/data"\nstate = "/s/"')
    plan = plan_of(tmp_path, f'{text}[log]\ndirectory = "/var/log/"\n[finish]\nmove_aside = "/old/"\n')
    assert plan.disks[1].map == "/s/data.map"
    assert plan.moved_to(plan.disks[0]) == "/old/system.raw"
    with pytest.raises(UsageError, match=r"log.directory: '/var/../log' has parts that it does not need"):
        plan_of(tmp_path, MINIMAL + '[log]\ndirectory = "/var/../log"\n')


def test_a_plan_that_is_built_by_a_program_is_checked_as_well(tmp_path: Path) -> None:
    plan = build({}, dataclasses.asdict(plan_of(tmp_path, MINIMAL)))
    with pytest.raises(UsageError, match=r"source\.image"):
        dataclasses.replace(plan, source=dataclasses.replace(plan.source, image="vm.raw"))


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("/dev/vg/lv", "dev-vg-lv"),
        ("/dev/new-a", "dev-new--a"),
        ("/dev/mapper/vg-lv", "dev-mapper-vg--lv"),
    ],
)
def test_nothing_of_a_destination_among_the_devices_is_beside_it(
    tmp_path: Path, image: str, name: str
) -> None:
    text = MINIMAL.replace("/images/vm.qed", image)
    [disk] = plan_of(tmp_path, text).disks
    assert disk.on_device
    stem = f"/var/lib/nbd-migrate/{name}/{Path(image).name}"
    assert disk.beside[1:] == (f"{stem}.map", f"{stem}.nbd", f"{stem}.qmp")
    with pytest.raises(UsageError, match="is a block device, which cannot hold a QED image"):
        plan_of(tmp_path, text.replace("[destination]", '[destination]\nengine = "qemu"'))


def test_only_devices_to_which_disks_move_are_overwritten(tmp_path: Path) -> None:
    overwrite = '[destination]\noverwrite = ["/dev/vg/lv"]'
    text = MINIMAL.replace("[destination]", overwrite)
    assert plan_of(tmp_path, text.replace("/images/vm.qed", "/dev/vg/lv")).destination.overwrite == (
        "/dev/vg/lv",
    )
    with pytest.raises(UsageError, match="overwrite: /dev/vg/lv is no block device to which a disk moves"):
        plan_of(tmp_path, text.replace("/images/vm.qed", "/dev/vg/other"))
    with pytest.raises(UsageError, match=r"to which a disk moves \(there are none\); leave it out"):
        plan_of(tmp_path, text)


def test_a_destination_in_memory_is_a_file_like_any_other(tmp_path: Path) -> None:
    assert plan_of(tmp_path, MINIMAL.replace("/images/vm.qed", "/dev/shm/vm.raw"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('owner = "a b"', "destination.owner: 'a b' is not usable: write USER or USER:GROUP"),
        ('owner = "a:b:c"', "destination.owner: 'a:b:c' is not usable"),
        ('mode = "rw"', "destination.mode rw: write an octal mode"),
        ("mode = 660", "destination.mode: a string is wanted, not 660"),
    ],
)
def test_an_owner_or_mode_that_cannot_be_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        plan_of(tmp_path, f"{MINIMAL}{line}\n")


def test_an_owner_may_be_a_user_a_group_or_both(tmp_path: Path) -> None:
    for owner in ("qemu", "107:36", ":kvm"):
        there = plan_of(tmp_path, f'{MINIMAL}owner = "{owner}"\nmode = "0660"\n').destination
        assert there.ownership("--x-") == ["--x-owner", owner, "--x-mode", "0660"]
    assert plan_of(tmp_path, MINIMAL).destination.ownership("--") == []


DISKS = """
[source]
qmp = "/run/a.qmp"
[export]
uri = "nbd://192.0.2.1/vm"
[destination]
qemu = ["qemu-system-x86_64"]
qmp = "/run/b.qmp"
migration = "tcp:192.0.2.2:4444"
[[disk]]
image = "/images/system.raw"
target = "/b/system.raw"
drive = "disk0"
[[disk]]
image = "/dev/vg/data"
target = "/b/data.raw"
drive = "disk1"
node = "data"
"""


def test_a_plan_may_have_several_disks(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, DISKS)
    first, second = plan.disks
    assert (first.image, first.target, first.drive, first.node) == (
        *("/images/system.raw", "/b/system.raw", "disk0", ""),
    )
    assert (second.image, second.node) == ("/dev/vg/data", "data")
    assert [str(plan.export_of(disk)) for disk in plan.disks] == [
        "nbd://192.0.2.1:10809/vm-disk0",
        "nbd://192.0.2.1:10809/vm-disk1",
    ]
    assert plan_of(tmp_path, as_toml(plan)) == plan


def test_a_single_disk_is_exported_under_the_name_of_the_uri(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, DISKS[: DISKS.rindex("[[disk]]")])
    [disk] = plan.disks
    assert plan.export_of(disk) == plan.export.address
    assert plan_of(tmp_path, MINIMAL).disks[0].target == "/images/vm.qed"


def test_several_images_are_moved_into_a_directory(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, DISKS + '[finish]\nmove_aside = "/old"\n')
    assert [plan.moved_to(disk) for disk in plan.disks] == ["/old/system.raw", "/old/data"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("/dev/vg/data", "/images/system.raw", "disk.image: /images/system.raw is that of two disks"),
        ("/b/data.raw", "/b/system.raw", "disk.target: /b/system.raw is that of two disks"),
        ("disk1", "disk0", "disk.drive: disk0 is that of two disks"),
        ("disk1", "disk0-local", "disk.drive: disk0-local is what a node beside disk0 is called"),
        ("/b/data.raw", "/b/system.raw.map", "is where nbd-overlay has a file of /b/system.raw"),
        (
            'drive = "disk1"',
            'drive = "disk1"\nstate = "/x"',
            "disk.state: this is for a target that is a block",
        ),
        ('/b/data.raw"', '/dev/vg/data"\nstate = "x"', "disk.state: 'x' must be an absolute path"),
        ('/b/data.raw"', '/dev/vg/data"\nstate = "/dev/x"', "disk.state: '/dev/x' is among the devices"),
        ('/b/data.raw"', '/dev/vg/data"\nstate = "/x/.."', "disk.state: '/x/..' has parts that"),
        ("/b/data.raw", "/dev/../b", "disk.target: '/dev/../b' has parts that it does not need: write /b"),
        ("/b/data.raw", "data.raw", "disk.target: 'data.raw' must be an absolute path"),
        ("/dev/vg/data", "data", "disk.image: 'data' must be an absolute path"),
        ('node = "data"', 'cache = ["none"]', "disk.cache: 'none' is neither direct nor no-flush"),
        ('node = "data"', 'aio = "posix"', "disk.aio: 'posix' is neither threads nor native nor io_uring"),
        ('node = "data"', 'aio = "native"', 'disk.aio: native needs cache = ["direct"]'),
        (
            'node = "data"',
            'detect_zeroes = "yes"',
            "disk.detect_zeroes: 'yes' is neither off nor on nor unmap",
        ),
        ('drive = "disk1"', "", "disk.drive: this is missing, in [[disk]] number 2"),
        ('node = "data"', 'noode = "data"', "disk.noode: no such key"),
        ('node = "data"', "node = 7", "disk.node: a string is wanted, not 7, in [[disk]] number 2"),
        ("/run/b.qmp", "/b/data.raw.qmp", "destination.qmp: /b/data.raw.qmp is where nbd-overlay has"),
        ("[export]", 'image = "/x"\n[export]', "source.image: with [[disk]] say it there"),
        ("migration", 'node = "x"\nmigration', "destination.node: with [[disk]] say it there"),
    ],
)
def test_what_is_wrong_with_several_disks_is_said(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(tmp_path, DISKS.replace(old, new))
    assert complaint in str(caught.value)


def test_a_disk_is_a_table_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"disk: write it as \[\[disk\]\], once for each disk"):
        plan_of(tmp_path, "disk = 3\n" + MINIMAL)


def test_images_of_one_name_are_not_moved_into_one_directory(tmp_path: Path) -> None:
    text = DISKS.replace("/dev/vg/data", "/other/system.raw") + '[finish]\nmove_aside = "/old"\n'
    with pytest.raises(UsageError, match="two images have the same name, and cannot both be moved to /old"):
        plan_of(tmp_path, text)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ('policy = "precopy"', r"destination\.policy: 'precopy' is neither postcopy nor hybrid"),
        (
            'policy = "hybrid"\nengine = "qemu"',
            r"hybrid needs the engine overlay; with the engine qemu",
        ),
        ('cutover = "auto"', r"destination\.cutover: this is for the policy hybrid"),
        ('policy = "hybrid"\ncutover = "soon"', r"destination\.cutover: 'soon' is none: write auto, "),
    ],
)
def test_a_policy_that_cannot_be_is_refused_with_what_to_use(
    tmp_path: Path, keys: str, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        plan_of(tmp_path, MINIMAL.replace("[destination]", f"[destination]\n{keys}"))


def test_a_plan_says_when_the_disk_goes_and_when_the_guest_does(tmp_path: Path) -> None:
    assert not plan_of(tmp_path, MINIMAL).hybrid
    keys = 'policy = "hybrid"\ncutover = "at-window 20"'
    plan = plan_of(tmp_path, MINIMAL.replace("[destination]", f"[destination]\n{keys}"))
    assert plan.hybrid
    assert (plan.cutover.kind, plan.cutover.window) == ("at-window", 20.0)
    assert plan_of(tmp_path, as_toml(plan)) == plan
