"""The destination's overlay: image formats, copy-on-read and streaming."""
