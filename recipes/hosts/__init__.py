"""A host of the migration: the way there, what is run there, and how that ends."""
