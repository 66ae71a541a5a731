"""What a server says of an export, without a server."""

from __future__ import annotations

from nbdserve.client import Export

PLAIN = Export(
    size=1 << 40,
    read_only=False,
    multi_conn=False,
    flush=True,
    fua=True,
    trim=True,
    zero=True,
    fast_zero=True,
    cache=True,
    rotational=False,
    structured_replies=True,
    contexts=(),
    minimum_block=0,
    preferred_block=0,
    maximum_block=0,
)
"""Able to do everything, with no constraints on requests."""
