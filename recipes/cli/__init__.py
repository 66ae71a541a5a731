"""The command line of nbd-migrate, and the small programs that it calls on hosts."""
