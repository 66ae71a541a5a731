"""What an option names that is on its host."""

from __future__ import annotations

import pytest

from recipes.discovery.command_line.host_local import ports, relative, shared_memory
from recipes.discovery.command_line.options import parse


@pytest.mark.parametrize(
    ("option", "value", "made"),
    [
        ("object", "memory-backend-file,id=m,size=1M,mem-path=m,,1", ",mem-path=/run/vm/m,,1"),
        ("object", "rng-random,id=r,filename=/dev/urandom", ",filename=/dev/urandom"),
        ("fw_cfg", "name=opt/x,file=x/../y", ",file=/run/vm/y"),
        ("fw_cfg", "name=opt/x,string=file", ",string=file"),
        ("smbios", "type=1,serial=x", ",serial=x"),
        ("smbios", "file=s", "file=/run/vm/s"),
        ("fsdev", "local,id=f,path=.,security_model=none", ",path=/run/vm,"),
        ("virtfs", "local,path=share,mount_tag=t,security_model=none", ",path=/run/vm/share,"),
        ("kernel", "bzImage", "/run/vm/bzImage"),
        ("device", "e1000,romfile=pxe.rom", ",romfile=pxe.rom"),
        ("netdev", "tap,id=n,script=no,downscript=no", ",script=no,downscript=no"),
    ],
)
def test_paths_are_absolute_where_qemu_takes_them_as_they_stand(option: str, value: str, made: str) -> None:
    [found] = parse(["qemu", f"-{option}", value]).options
    assert made in (relative(found, "/run/vm").value or "")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("netdev", "socket,id=n,listen=:4001", ["listen=:4001 of -netdev"]),
        ("nic", "socket,connect=192.0.2.1:4001", []),
        ("netdev", "socket,id=n,udp=192.0.2.1:1,localaddr=:4002", ["localaddr=:4002 of -netdev"]),
        (
            "netdev",
            "stream,id=n,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port=4003",
            ["127.0.0.1:4003 of -netdev"],
        ),
        ("netdev", "stream,id=n,addr.type=inet,addr.host=127.0.0.1,addr.port=4003", []),
        ("netdev", "user,id=n,hostfwd=tcp::2222-:22", ["hostfwd=tcp::2222-:22 of -netdev"]),
        ("chardev", "udp,id=c,port=1,localport=4004", ["UDP port 4004 of -chardev"]),
        ("chardev", "udp,id=c,port=1", []),
    ],
)
def test_what_two_qemus_cannot_both_listen_on_is_told(option: str, value: str, told: list[str]) -> None:
    [found] = parse(["qemu", f"-{option}", value]).options
    assert list(ports(found)) == told


def test_memory_is_shared_where_the_option_says_so_and_no_device_shares_it_on_purpose() -> None:
    backend = "memory-backend-file,size=1M"
    words = [
        *("-object", f"{backend},id=a,mem-path=/a,share=on"),
        *("-object", f"{backend},id=b,mem-path=/b"),
        *("-object", f"{backend},id=c,mem-path=/c,share=on", "-device", "ivshmem-plain,memdev=c"),
        *("-object", '{"qom-type": "memory-backend-file", "id": "d", "mem-path": "/d", "share": true}'),
    ]
    assert list(shared_memory(parse(["qemu", *words]).options)) == ["/a", "/d"]
