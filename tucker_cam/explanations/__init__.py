"""Pictures, a model and methods in, explanations out."""
