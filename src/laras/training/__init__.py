"""The training loop: TRL's SFTTrainer composed with Laras' step, checkpoints, trackers and callbacks."""
