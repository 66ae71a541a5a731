"""How far a migration is, and what is asked of it, while it runs."""
