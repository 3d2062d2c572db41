"""Finds, opens and decodes the pictures that a user names, and reports why one cannot be used."""
