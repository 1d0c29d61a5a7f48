"""What changed between two checkpoints, or two steps of one training run, and how to apply it. See `docs/refit.md`."""
