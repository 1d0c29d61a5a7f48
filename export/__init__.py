"""The disk and the formats: schemes, fused global scales, shard layout, writing, config.json."""
