"""Command lines: thin Hydra mains, each about a screen."""
