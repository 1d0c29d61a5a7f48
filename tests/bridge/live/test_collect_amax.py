"""What is collected of single quantizers: real ones of ModelOpt, without ranks."""

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from amaxbridge.bridge.live.collect_amax import collect_scalars, state_parameters
from amaxbridge.bridge.live.model_walk import walk_all_quantizers
from amaxbridge.mappings.families.qwen3 import QWEN3
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.ranks import LOCAL

MXFP8 = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


def test_amax_that_calibration_left_on_mx_quantizers_have_no_effect() -> None:
    """ModelOpt 0.47 leaves them there when it calibrates layer by layer, and its quantizers ignore them."""
    model, layer, linear = nn.Module(), nn.Module(), nn.Linear(32, 8)
    for kind, amax in (("weight", torch.rand(8, 1) + 1), ("input", torch.tensor(3.0))):
        quantizer = TensorQuantizer(QuantizerAttributeConfig(**MXFP8))
        quantizer.register_buffer("_amax", amax)
        linear.add_module(f"{kind}_quantizer", quantizer)
        assert quantizer.amax is None
    model.decoder, layer.mlp = nn.Module(), nn.Module()
    model.decoder.layers, layer.mlp.linear_fc2 = nn.ModuleList([layer]), linear
    quantizers = list(walk_all_quantizers([model]))
    assert len(quantizers) == 2
    assert not list(state_parameters(quantizers))
    state = collect_scalars(quantizers, QWEN3.registry, ModelConfig(), LOCAL)
    assert state.formats == {"model.layers.0.mlp.down_proj": "mxfp8"}
    assert not state.amax and not state.missing
