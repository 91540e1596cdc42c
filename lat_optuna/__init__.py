"""Length-Adaptive Transformers, searched as an Optuna study. Imports nothing heavy until it is used."""
