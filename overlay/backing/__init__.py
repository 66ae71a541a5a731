"""The servers behind an overlay: one, several, whether they have the same disk, and what is zeros there."""
