"""One shared ssh connection to each host, and the monitors that are reached over it."""
