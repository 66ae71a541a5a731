"""One migration while it runs, who watches over it, and what the operator sees of it."""
