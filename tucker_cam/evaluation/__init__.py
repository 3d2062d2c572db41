"""How good saliency maps are, with controls: metrics, pictures with boxes or masks, tables, figures, spectra."""
