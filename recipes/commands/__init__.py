"""What an operator's command does from its beginning to its end."""
