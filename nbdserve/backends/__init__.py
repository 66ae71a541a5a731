"""What an export can be made of: one Backend interface, and one module for each kind."""
