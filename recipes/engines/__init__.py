"""Who has the guest's disk on B until it is complete."""
