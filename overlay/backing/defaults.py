"""What counts for the servers behind an overlay unless the operator says otherwise; needs no libnbd."""

CONNECTIONS = 3
"""Connections to each server, unless the operator says otherwise: one for guests, two that stream in turn.

More made streaming slower where few processors share the work."""
PATIENCE = 300.0
"""Seconds for which guests wait for a lost or silent server, unless the operator says otherwise.

A host that is started anew is back by then, and most guests rather wait than see an error."""
