"""Turns pictures, a model and methods into explanations."""
