"""How disk and RAM travel from A to B, and who else is kept out."""
