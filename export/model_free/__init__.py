"""Model-free PTQ: a directory of safetensors in, a compressed-tensors checkpoint out."""
