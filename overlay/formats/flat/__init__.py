"""The flat layout: a sparse raw file in which every byte lies at its guest offset, and a map beside it."""
