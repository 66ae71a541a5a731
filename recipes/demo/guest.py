"""The demo's guest as the host sees it: QEMU's options, what it announces, the commands it takes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import MigrationError

NODE = "disk0"  # the block node that the guest's disk refers to
MEMORY = 192  # MiB
COMMAND_LIMIT = 120.0  # seconds for a command that is answered at once
POLL = 0.1  # seconds between two looks at the console
VERIFY_LIMIT = 900.0  # seconds; a record takes some 5 ms under TCG


@dataclass(frozen=True)
class Memory:
    """What the guest found when it compared its disk with what it remembers.

    written    the number of its last record
    live       records that were re-read: the newest in each place
    bad        how many of them are not what was written
    complaint  a description of the first of these, or nothing
    """

    written: int
    live: int
    bad: int
    complaint: str


@dataclass(frozen=True)
class Guest:
    """One of the two machines that the guest runs in; each has its own console and control.

    disks              how many it has, up to four
    kernel, initramfs  what it boots
    console            file that its first serial port is written to
    control            Unix socket of its second serial port
    """

    kernel: Path
    initramfs: Path
    console: Path
    control: Path
    disks: int = 1

    @property
    def drives(self) -> list[str]:
        """Return the block nodes that its disks' devices refer to."""
        return [NODE, *(f"disk{number}" for number in range(1, self.disks))]

    @property
    def qemu(self) -> tuple[str, ...]:
        """Return QEMU's command line without disk drives and monitor; the disks' devices are there."""
        return (
            *("qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-m", str(MEMORY), "-smp", "1"),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", f"console=ttyS0 quiet panic=-1 mitigations=off no_timer_check disks={self.disks}"),
            *("-serial", f"file:{self.console}"),
            *(
                "-chardev",
                f"socket,id=control,path={self.control},server=on,wait=off",
                "-serial",
                "chardev:control",
            ),
            *(
                word
                for drive in self.drives
                for word in ("-device", f"virtio-blk-pci,drive={drive},rerror=stop,werror=stop")
            ),
        )

    @property
    def announced(self) -> int:
        """Return the number of the last record that the guest has announced on this machine, 0 before the
        first.
        """
        numbers = re.findall(r"^record (\d+)$", self._said, re.MULTILINE)
        return int(numbers[-1]) if numbers else 0

    @property
    def ready(self) -> bool:
        """Tell whether the guest has booted and found its disk."""
        return "\nready " in f"\n{self._said}"

    @property
    def _said(self) -> str:
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        failure = re.search(r"^failed: (.*)$", text, re.MULTILINE)
        if failure:
            raise MigrationError(f"the guest gave up: {failure[1].strip()}")
        return text.replace("\r", "")

    async def reach(self, number: int, seconds: float) -> None:
        """Wait until record ``number`` is announced on this machine.

        Raises MigrationError when ``seconds`` have passed, or the machine is gone.
        """
        what = f"the guest to write record {number}"
        async with self._connected(what, seconds) as (reader, _):
            # The guest says nothing unasked, so this ends when QEMU does.
            ended = asyncio.ensure_future(reader.read(1))
            try:
                while self.announced < number:
                    await asyncio.wait({ended}, timeout=POLL)
                    if ended.done():
                        raise MigrationError(f"waited for {what}, but its QEMU has ended")
            finally:
                ended.cancel()

    async def command(self, word: str, seconds: float = COMMAND_LIMIT) -> Sequence[str]:
        """Give the guest a command and return the words of its answer.

        Raises MigrationError when there is no answer within ``seconds``, or the machine is gone.
        """
        async with self._connected(f"the guest to answer '{word}'", seconds) as (reader, writer):
            writer.write(f"{word}\n".encode())
            answer = (await reader.readline()).decode(errors="replace").split()
            if answer[:1] != [word]:
                raise MigrationError(f"the guest answered '{word}' with '{' '.join(answer)}'")
            if word == "stop":
                await reader.read()
            return answer[1:]

    async def verify(self) -> Memory:
        """Let the guest stop writing and compare its disk with what it remembers."""
        answer = await self.command("verify", VERIFY_LIMIT)
        match answer:
            case ["written", written, "live", live, "bad", bad, *complaint]:
                return Memory(int(written), int(live), int(bad), " ".join(complaint))
        raise MigrationError(f"the guest answered 'verify' with '{' '.join(answer)}'")

    async def stop(self) -> None:
        """Switch the guest off and wait until its QEMU has closed the disk and ended."""
        await self.command("stop")

    @asynccontextmanager
    async def _connected(
        self, what: str, seconds: float
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect to the control port; the block may take ``seconds``, then MigrationError says for what."""
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(self.control)
                try:
                    yield reader, writer
                finally:
                    writer.close()
        except TimeoutError as error:
            raise MigrationError(f"waited {seconds:g} s in vain for {what}") from error
        except OSError as error:
            raise MigrationError(f"waited for {what}, but: {error.strerror or error}") from error
