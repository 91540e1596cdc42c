"""Two processes train as one does on the doubled batch, and resume. Run by torchrun, this file is one of them."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STEPS = 6  # four an epoch
STAGES = ("plain", "adaptive")


def train(folder: Path, stage: str, batch_size: int) -> None:
    """Train, and resume in the middle of the second epoch."""
    from test_trainer import MAX_LENGTH, arguments, bert, collate, rows

    from lat_optuna.trainer import ExactTrainer, LengthAdaptation, LengthAdaptiveTrainer

    adaptation = LengthAdaptation(p=0.3, layer_drop=0.5, max_length=MAX_LENGTH)
    args = arguments(
        folder / f"{stage}-{batch_size}",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=5,
        train_sampling_strategy="random",
        max_grad_norm=1.0,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    data = {"train_dataset": rows(32), "data_collator": collate}

    def new_trainer():
        if stage == "adaptive":
            return LengthAdaptiveTrainer(bert(), args, adaptation=adaptation, **data)
        return ExactTrainer(bert(), args, **data)

    trainer = new_trainer()
    trainer.train()
    resumed = new_trainer()
    resumed.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-5"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    rank = os.environ.get("RANK", "alone")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [[value for name, value in sorted(entry.items()) if name.startswith("loss")] for entry in logs]
    assert len(losses) == STEPS
    save_file(trainer.model.state_dict(), folder / f"{stage}.weights.{rank}")
    save_file({"losses": torch.tensor(losses)}, folder / f"{stage}.losses.{rank}")


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    for stage in STAGES:
        train(tmp_path, stage, batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in STAGES:
        for what in ("weights", "losses"):
            alone, first, second = (load_file(tmp_path / f"{stage}.{what}.{rank}") for rank in ("alone", 0, 1))
            for key, value in alone.items():
                assert torch.equal(first[key], second[key]), (stage, what, key)
                torch.testing.assert_close(first[key], value, atol=2e-6, rtol=1e-5)


if __name__ == "__main__":
    for stage in STAGES:
        train(Path(sys.argv[1]), stage, batch_size=2)
