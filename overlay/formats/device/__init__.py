"""Block devices in the place of an image's data file."""
