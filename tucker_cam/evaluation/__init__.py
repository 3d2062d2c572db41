"""How good saliency maps are, with controls: metrics, pictures with boxes or masks, tables, figures, spectra."""

GROUPS = ("localisation", "drop", "curves", "road")
"""Of measures, by the name that a user asks for them; here, as the command line lists them without PyTorch."""
