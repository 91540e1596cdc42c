"""``python -m lat_optuna``, for launchers such as torchrun."""

from lat_optuna.cli import main

main()
