"""What an operator sees and does while nbd-overlay runs: its monitor, events, and metrics."""
