"""A model of each family at sizes that GPU kernels have, plain and quantized, and the logits that must come out.

    python -m tests.real_vllm.gpu.prepare_families OUT_DIR [NAME …]

Runs in our environment, without a GPU. Rows of tests/support/tiny_models.py, without those that carry images or differ
in Megatron alone. Qwen3 and Qwen3-MoE are quantized in FP8 blocks, too, with each kind of scales.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from amaxbridge.export.schemes import Groups, Recipe, named_scheme
from tests.real_vllm.families import AS_PUBLISHED, prepare
from tests.support.tiny_models import TINY_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RECIPES: Mapping[str, str | Recipe] = {scheme: scheme for scheme in ("fp8_dynamic", "nvfp4a16", "w4a16")}
BLOCKS: Mapping[str, str | Recipe] = {
    "fp8_block": "fp8_block",
    "fp8_block_ue8m0": Groups.of(named_scheme("fp8_block", scales="ue8m0")),
}
IN_BLOCKS = ("Qwen3", "Qwen3-MoE")
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "expert_hidden_dim": 256,
    "moe_latent_size": 128,
    "attention_chunk_size": 16,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "head_dim": 64,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
}


def main(out: Path, names: list[str]) -> None:
    for name, tiny in TINY_MODELS.items():
        if (names and name not in names) or tiny.save is not None or "images" in name or "HybridModel" in name:
            continue
        directory = out / name.replace(" ", "_").replace(",", "")
        directory.mkdir(parents=True)
        try:
            prepare(tiny, directory, recipes={**RECIPES, **(BLOCKS if name in IN_BLOCKS else {})}, fit=wide)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        else:
            print(name, flush=True)


def wide(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The configuration at these sizes, with the fields of published ones. MLA's `head_dim` is that of its rope."""
    for field, value in AS_PUBLISHED.get(config.architectures[0], {}).items():
        setattr(config, field, value)
    text = config.get_text_config()
    for field, value in WIDE.items():
        if getattr(text, field, None):
            setattr(text, field, value)
    return config


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
