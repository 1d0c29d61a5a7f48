"""The arithmetic of the quantized formats: pure functions on tensors, no names and no disk."""
