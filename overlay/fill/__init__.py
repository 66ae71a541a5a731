"""What fetches a disk's blocks: for guests that miss them, and in the background until all are there."""
