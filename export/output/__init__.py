"""From bundles to a finished directory: quantized tensors, config.json, index and model card."""
