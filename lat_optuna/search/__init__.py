"""Length configurations as an Optuna multi-objective study."""
