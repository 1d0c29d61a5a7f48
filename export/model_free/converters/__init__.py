"""Sources that are quantized already: what they are, and what becomes of them."""
