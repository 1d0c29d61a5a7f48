"""A checkpoint on the disk: its format, the model in it, its saved arguments."""
