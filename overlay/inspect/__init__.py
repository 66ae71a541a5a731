"""An overlay looked at from outside: what it says of itself, its map, and whether it equals its source."""
