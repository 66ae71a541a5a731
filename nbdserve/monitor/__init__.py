"""What an operator sees and does while a server runs: its monitor, and metrics."""
