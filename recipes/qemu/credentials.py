"""The credentials of a QEMU for its migration stream: both ends show a certificate, and verify the other's.

Nothing at the guest's start has to foresee them: a QEMU that runs is given them by its monitor, and what was
set before comes back (7.2 and 10.0).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from recipes.qemu.vm import CommandError, Vm

ID = "nbd-migrate-tls"
"""Of the object that a QEMU gets for its migration stream."""


@dataclass(frozen=True)
class Parameters:
    """The migration parameters that say with what, and whom to expect at the other end; empty: no TLS."""

    tls_creds: str = ""
    tls_hostname: str = ""


async def parameters_of(vm: Vm) -> Parameters:
    """Return what is set; raises as Vm.execute() does."""
    found = await vm.execute("query-migrate-parameters")
    return Parameters(str(found.get("tls-creds", "")), str(found.get("tls-hostname", "")))


async def wanted_back(vm: Vm) -> Parameters:
    """Return what is to be set again in the end: no rest of an earlier migration that was killed."""
    found = await parameters_of(vm)
    return Parameters() if found.tls_creds == ID else found


async def use_credentials(vm: Vm, endpoint: str, directory: str, hostname: str = "") -> None:
    """Have the migration go over TLS with the certificates of a directory.

    ``endpoint`` is ``client`` for a source, which expects ``hostname``, and ``server`` for a destination.
    Raises CommandError, as where its user may not read them.
    """
    await _delete(vm)
    await vm.call("object-add", {"id": ID, **use_object(endpoint, directory)})
    await _set(vm, Parameters(ID, hostname))


def use_object(endpoint: str, directory: str) -> dict[str, object]:
    """Return the object of a QEMU that shows the certificate of a directory, and verifies the other end's."""
    return {"qom-type": "tls-creds-x509", "endpoint": endpoint, "dir": directory, "verify-peer": True}


async def drop_credentials(vm: Vm, before: Parameters) -> None:
    """Have everything as it was before; also where nothing was changed. Raises as Vm.execute() does."""
    if await parameters_of(vm) != before:
        await _set(vm, before)
    await _delete(vm)


async def _set(vm: Vm, wanted: Parameters) -> None:
    given = {"tls-creds": wanted.tls_creds, "tls-hostname": wanted.tls_hostname}
    await vm.call("migrate-set-parameters", given)


async def _delete(vm: Vm) -> None:
    # It may not be there.
    with suppress(CommandError):
        await vm.execute("object-del", id=ID)
