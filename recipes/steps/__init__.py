"""The six steps, and what is done about an interruption in them."""
