"""Every architecture of transformers, tiny and random, through `model_free_ptq`, judged by independent oracles."""
