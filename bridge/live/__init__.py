"""A model in memory: walking it, streaming its bundles, collecting amax, filling it."""
