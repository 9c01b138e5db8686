"""The training loop: configuration, step, checkpoints, metrics."""
