"""A guest of 512 bytes, that writes numbered records to its disks and reads all over them, for ever.

Record number n goes to disk n % (number of disks), 128 times, to sector 2048 + n % 1024. The guest counts on
when a record was acknowledged, so its counter says what must be on each disk.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

SECTOR = 512

RECORDS = range(2048, 3072)
"""The sectors that the guest writes."""

COUNTER = 0x5E00
"""Where in its memory is the number of the record that it writes, or has written last."""

_ORIGIN = 0x7C00
_FIRST_DRIVE = 0x80

# Assembler, of which every line is code, a label, or a jump to one with so many bytes for the distance.
_CODE = """
31c0 8ed8 8ec0 8ed0 bc0070 fc fb              xor ax,ax; mov ds,ax; es; ss; mov sp,0x7000; cld; sti
:again
66ff06005e                                    inc dword [COUNTER]
fec2 80fa{end} 7202 b280                      inc dl; cmp dl,0x80+DISKS; jb +2; mov dl,0x80
66a1005e 66bf00800000 b98000 66f3ab           EAX = [COUNTER]; mov edi,0x8000; mov cx,128; rep stosd
66a1005e 6625ff030000 660500080000 b743       EAX = [COUNTER] & 1023 + 2048; mov bh,0x43 (write)
>access 2 e8
66a1005e 6669c0b179379e                       mov eax,[COUNTER]; imul eax,eax,0x9e3779b1
0fb6da c1e302 662387{masks}                   movzx bx,dl; shl bx,2; and eax,[bx+MASKS-0x200]
b742                                          mov bh,0x42 (read)
>access 2 e8
52 baf803 b02e ee 5a                          push dx; mov dx,0x3f8; mov al,'.'; out dx,al; pop dx
f606005e03                                    test byte [COUNTER],3
>again 1 75
f4                                            hlt, until the next tick of 55 ms: others use the processor too
>look 1 eb
:access                                       DL is the drive, BH the function, EAX the sector; buffer: 0x8000
66c706105e10000100 66c706145e00800000         mov dword [0x5e10],0x10010; mov dword [0x5e14],0x8000
66a3185e 66c7061c5e00000000                   mov [0x5e18],eax; mov dword [0x5e1c],0
be105e 88fc b000 52 cd13 5a 7201 c3           mov si,0x5e10; mov ah,bh; int 0x13 with DL saved; jc +1; ret
baf803 b021 ee fa f4                          mov dx,0x3f8; mov al,'!'; out dx,al; cli; hlt
:look
b401 cd16                                     mov ah,1; int 0x16
>off 1 75
>again 2 e9
:off                                          once a key was pressed
ba0406 b80020 ef fa f4                        mov dx,0x604; mov ax,0x2000; out dx,ax (ACPI's S5)
:masks
"""


def boot_sector(sizes: Sequence[int]) -> bytes:
    """The guest: 16-bit code for address 0x7c00, for disks of these sizes in bytes, each a power of two.

    The counter is at 0x5e00, the disk address packet of INT 13h's extensions at 0x5e10, the buffer at 0x8000,
    the stack below 0x7000: on the page of the code each write would have it translated again.
    """
    end = f"{_FIRST_DRIVE + len(sizes):02x}"
    places = {"masks": 0}
    # Twice, as the first time the labels are not known yet.
    for _ in range(2):
        masks = struct.pack("<H", (_ORIGIN + places["masks"] - 4 * _FIRST_DRIVE) & 0xFFFF).hex()
        code = _assembled(_CODE.format(end=end, masks=masks), places)
    code += b"".join(struct.pack("<I", size // SECTOR - 1) for size in sizes)
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"


def _assembled(lines: str, places: dict[str, int]) -> bytes:
    """Machine code; ``places`` are those of the labels, and are set anew."""
    code = b""
    for line in lines.strip().splitlines():
        if line[0] == ":":
            places[line[1:].split()[0]] = len(code)
        elif line[0] == ">":
            label, width, opcode = line[1:].split()
            after = len(code) + 1 + int(width)
            distance = places.get(label, after) - after
            code += bytes.fromhex(opcode) + distance.to_bytes(int(width), "little", signed=True)
        else:
            code += bytes.fromhex(line.partition("   ")[0])
    return code


def number_in(content: bytes) -> int | None:
    """The number of the record that a sector holds; None where it is none."""
    return struct.unpack_from("<I", content)[0] if content == content[:4] * (SECTOR // 4) else None


def is_record(sector: int, content: bytes) -> bool:
    """Whether the guest may have written this to this sector."""
    number = number_in(content)
    return number is not None and sector in RECORDS and sector == RECORDS.start + number % len(RECORDS)


def newest(sector: int, counter: int, disk: int, disks: int) -> int:
    """The number of the last record up to ``counter`` that belongs to this sector of a disk; 0: none."""
    for number in range(counter, max(0, counter - disks * len(RECORDS)), -1):
        if number % disks == disk and RECORDS.start + number % len(RECORDS) == sector:
            return number
    return 0
