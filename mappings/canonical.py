"""One spelling for each Megatron parameter.

Megatron keeps the same tensor under different names, depending on the layer implementation: a norm beside its
linear or fused into it, an expert as a module of its own or as one weight of a grouped linear. Mappings are
written in one spelling, the one on the right; `canonical` converts the others to it.

    …self_attention.linear_qkv.layer_norm_weight      …input_layernorm.weight
    …self_attention.in_proj.layer_norm_weight         …input_layernorm.weight
    …mlp.linear_fc1.layer_norm_weight                 …pre_mlp_layernorm.weight
    …linear_q_up_proj.layer_norm_weight               …q_layernorm.weight
    …linear_kv_up_proj.layer_norm_weight              …kv_layernorm.weight
    …mixer.in_proj.layer_norm_weight                  …norm.weight
    …mixer.conv1d_weight                              …mixer.conv1d.weight
    decoder.final_norm.weight                         decoder.final_layernorm.weight
    mtp.layers.0.transformer_layer.…                  mtp.layers.0.mtp_model_layer.…
    …experts.local_experts.3.linear_fc1.weight        …experts.linear_fc1.weight3
    …local_experts.3.linear_fc1.weight_quantizer      …experts.linear_fc1.weight_quantizer.3
    …linear_qkv.to_wrap.weight                        …linear_qkv.weight
    …local_experts.3.linear_fc1.adapter.….weight      …experts.linear_fc1.adapter.….weight3
"""

import re

_ADAPTER = r"(?:adapter|lora_[ab]_\w+)\.[\w.]+"
_SPELLINGS = (
    (re.compile(r"\.to_wrap\."), "."),  # a linear beside its adapter
    (re.compile(r"self_attention\.(?:linear_qkv|in_proj)\.layer_norm_(weight|bias)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r"pre_mlp_layernorm.\1"),
    (re.compile(r"\.linear_(q|kv)_up_proj\.layer_norm_(weight|bias)$"), r".\1_layernorm.\2"),
    (re.compile(r"mixer\.in_proj\.layer_norm_(weight|bias)$"), r"norm.\1"),
    (re.compile(r"mixer\.conv1d_(weight|bias)$"), r"mixer.conv1d.\1"),
    (re.compile(r"^decoder\.final_norm\."), "decoder.final_layernorm."),
    (re.compile(r"^(mtp\.layers\.\d+)\.transformer_layer\."), r"\1.mtp_model_layer."),
    (re.compile(rf"experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias|{_ADAPTER})$"), r"experts.\2.\3\1"),
    (re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.(\w+_quantizer)\b"), r"experts.\2.\3.\1"),
)


def canonical(megatron_name: str) -> str:
    """The spelling that mappings use for a Megatron parameter or quantizer."""
    for spelling, replacement in _SPELLINGS:
        megatron_name = spelling.sub(replacement, megatron_name)
    return megatron_name
