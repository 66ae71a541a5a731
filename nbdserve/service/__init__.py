"""The process in its system: accepting clients, activation, privileges, the daemon, certificates."""
