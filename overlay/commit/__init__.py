"""An overlay whose guest has ended, brought into the disk that it lies over."""
