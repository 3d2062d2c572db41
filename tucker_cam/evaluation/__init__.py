"""Measures how good saliency maps are, beside controls: metrics, annotated pictures, tables, figures, spectra."""

GROUPS = ("localisation", "drop", "curves", "road")
"""The groups of measures, as a user names them; defined here so that they can be listed without PyTorch."""
