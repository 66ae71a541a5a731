"""Certificates that are made for one migration, and where they are for as long as it lasts."""
