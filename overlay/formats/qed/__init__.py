"""The QED image format, as QEMU's docs/interop/qed_spec defines it."""
