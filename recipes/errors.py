"""What may fail in a migration. Each message is one line: what, where, and what to do.

OperatorError                of nbdserve/common/errors.py
└── MigrationError           a step of the migration failed
    ├── HostError            there is no way to a host                      hosts/calls.py
    ├── VmGoneError          a QEMU has ended, or its monitor hung up       qemu/vm.py
    ├── VmSilentError        a QEMU did not answer in time                  qemu/vm.py
    ├── CommandError         a QEMU refused a command                       qemu/vm.py
    ├── ServerAwayError      nobody serves a disk that is to be pivoted            qemu/pivot.py
    ├── RefusedGuestError    a QEMU says that its migration has failed      qemu/vm.py
    └── AdvisedError         the message says already what to do            migrate/runtime.py
"""

from __future__ import annotations

from nbdserve.common.errors import OperatorError


class MigrationError(OperatorError):
    """A step of the migration failed; the message says what state the guest is in."""
