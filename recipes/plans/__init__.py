"""What to migrate, from where to where."""
