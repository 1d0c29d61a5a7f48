"""Blocks that Megatron's shards cut: which they are, and that imports and exports of quantizers name them."""

import json
from pathlib import Path

import pytest

from amaxbridge.bridge.plan.whole_blocks import ShardedWeight, cut_weights
from amaxbridge.export import model_free_ptq
from amaxbridge.export.kernels.scaled import Blocks
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.mappings import ColumnParallelMapping, GatedMLPMapping, QKVMapping, RowParallelMapping
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from tests.support.launcher import Launcher
from tests.support.paths import WORKERS
from tests.support.tiny_models import config, randomize

QKV = QKVMapping("qkv.weight", q="q.weight", k="k.weight", v="v.weight")
GATED = GatedMLPMapping("fc1.weight", gate="gate.weight", up="up.weight")
DOWN = RowParallelMapping("fc2.weight", "down.weight")
UP = ColumnParallelMapping("fc1.weight", "up.weight")
SIZES = ModelConfig(num_attention_heads=4, num_query_groups=2)
SQUARE, COLUMNS, TENSOR = SCHEMES["fp8_block"].blocks, SCHEMES["nvfp4"].blocks, SCHEMES["fp8"].blocks


@pytest.mark.parametrize(
    ("mapping", "shape", "ranks", "blocks", "cut"),
    [
        (DOWN, (64, 24), 2, COLUMNS, [0]),
        (DOWN, (64, 24), 1, COLUMNS, []),  # an incomplete last block is the same one everywhere
        (DOWN, (64, 32), 2, COLUMNS, []),
        (DOWN, (64, 24), 2, TENSOR, []),
        (UP, (24, 24), 2, COLUMNS, []),
        (UP, (192, 128), 2, SQUARE, [0]),
        (UP, (192, 128), 1, SQUARE, []),
        (GATED, (2 * 192, 128), 1, SQUARE, [1]),  # gate's last rows share a block with up's first ones
        (GATED, (2 * 256, 128), 2, SQUARE, []),
        (QKV, (512, 256), 1, SQUARE, [1, 2]),  # heads of 64
        (QKV, (1024, 256), 1, SQUARE, []),  # heads of 128
        (QKV, (512, 256), 2, SQUARE, []),
        (DOWN, (128, 192), 2, SQUARE, [0]),
    ],
)
def test_cut_weights(
    mapping: MegatronParamMapping,
    shape: tuple[int, int],
    ranks: int,
    blocks: Blocks,
    cut: list[int],
) -> None:
    assert cut_weights(ShardedWeight(mapping, shape, ranks), blocks, SIZES) == cut


def test_import_and_export_name_them(launch: Launcher, tmp_path: Path) -> None:
    """48 and 24 columns: whole blocks for one rank; at TP=2 a block lies on both."""
    import transformers

    made = config("Qwen3ForCausalLM", hidden_size=64, intermediate_size=48, tie_word_embeddings=False)()
    model = transformers.AutoModelForCausalLM.from_config(made)
    randomize(model)
    model.bfloat16().save_pretrained(tmp_path / "plain")
    model_free_ptq(str(tmp_path / "plain"), str(tmp_path / "nvfp4a16"), scheme="nvfp4a16")
    launch(WORKERS / "live_cut_blocks.py", str(tmp_path), processes=2)
    report = json.loads((tmp_path / "report.json").read_text())
    for case in ("import", "live"):
        message = report[case]
        assert message.startswith("2 weights have blocks that Megatron's fused shards cut"), message
        assert "model.layers.1.mlp.down_proj.weight, of decoder.layers.1.mlp.linear_fc2.weight [64, 24]" in message
        assert "on each of 2 ranks: nvfp4a16" in message
    assert report["ignored"] == "written"
    assert not (tmp_path / "checkpoint").exists()
