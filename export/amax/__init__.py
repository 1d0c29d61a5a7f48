"""The quantizer state of a model: amax, one for each fused group, its file, and cache scales."""
