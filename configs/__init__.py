"""Hydra configuration: the schema of every command as dataclasses, and the YAML groups beside it."""
