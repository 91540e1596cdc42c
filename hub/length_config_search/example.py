"""The screened search on a function that stands in for a model: early layers bear the loss of words badly."""

import optuna
import optunahub

LAYERS, MAX_LENGTH = 6, 128


def objective(trial: optuna.Trial) -> tuple[float, float]:
    """A metric and a cost of six lengths."""
    lengths = [trial.suggest_int(f"length_{layer:02d}", 1, MAX_LENGTH) for layer in range(1, LAYERS + 1)]
    dropped = [1 - length / MAX_LENGTH for length in lengths]
    metric = 90 - sum(30 * share**2 / (1 + 2 * layer) for layer, share in enumerate(dropped))
    return metric, sum(lengths) / (LAYERS * MAX_LENGTH)


if __name__ == "__main__":
    package = optunahub.load_local_module("length_config_search", registry_root=".")
    sampler = package.LengthConfigSampler(LAYERS, MAX_LENGTH, p=0.36, preset="default")
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(objective, n_trials=60)
    for trial in sorted(study.best_trials, key=lambda trial: trial.values[1]):
        print(f"{trial.values[1]:.3f}  {trial.values[0]:.2f}  {list(trial.params.values())}")  # noqa: T201
