"""What everything here may use: errors, addresses, sizes, logs, time limits, threads, standard streams."""
