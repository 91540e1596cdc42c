"""Drop-and-Restore on unmodified transformers models."""
