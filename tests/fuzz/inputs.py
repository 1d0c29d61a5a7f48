"""The inputs that are fuzzed: the smallest good one of each kind, made once for each directory."""

import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.hf import HFModel, read_hf_model
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from amaxbridge.export import model_free_ptq
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.amax.quant_state_file import ModelIdentity, quant_state_bytes
from amaxbridge.export.schemes import SCHEMES, modelopt_schemes
from tests.support import quantized_sources as held
from tests.support.quantized_sources import Held
from tests.support.stored_checkpoints import megatron_state
from tests.support.tiny_models import TINY_MODELS

HIDDEN, FFN, VOCABULARY, EXPERTS = 32, 32, 32, 2

DENSE: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
MOE: Mapping[str, Any] = {
    **DENSE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS,
    "num_experts_per_tok": 2, "moe_intermediate_size": FFN, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
CARD = "---\nlicense: apache-2.0\ntags:\n- text\nlanguage: en\n---\n# A model\n"
INDEX = "model.safetensors.index.json"
ONE = {"_disabled": False, "_num_bits": (2, 1), "_axis": None, "_block_sizes": {-1: 16, "type": "dynamic"}}


SIDE = 128
WIDE: Mapping[str, Any] = {
    **DENSE, "hidden_size": SIDE, "intermediate_size": SIDE, "vocab_size": SIDE, "head_dim": SIDE // 2,
}  # fmt: skip
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
_INT4 = {"bits": 4, "group_size": 64}
FOREIGN: Mapping[str, tuple[Callable[[Tensor], Held], Mapping[str, Any]]] = {
    "fp8 blocks": (held.blocks_of_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "modelopt nvfp4": (held.nvfp4, _MODELOPT),
    "modelopt fp8": (held.fp8_per_tensor, _MODELOPT),
    "modelopt mxfp4": (held.mxfp4, _MODELOPT),
    "modelopt int4 awq": (held.int4_of_modelopt, _MODELOPT),
    "awq": (held.awq, {"quant_method": "awq", "zero_point": True, "version": "gemm", **_INT4}),
    "gptq": (held.gptq, {"quant_method": "gptq", "desc_act": False, **_INT4}),
    "gptq, sorted": (partial(held.gptq, order=True), {"quant_method": "gptq", "desc_act": True, **_INT4}),
}
"""Formats of other programs: what holds a module, and what config.json says."""
TEXTS: Mapping[str, str] = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": "{{ messages }}", "model_max_length": 64}',
    "generation_config.json": '{"eos_token_id": [1, 2], "temperature": 0.6, "_from_model_config": true}',
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "special_tokens_map.json": '{"eos_token": {"content": "</s>"}}',
}
"""Files beside weights that are carried over."""


def make_inputs(root: Path) -> None:
    """`plain`, `quantized`, `state.safetensors`, `stored`; a directory in each scheme, foreign format and family.

    Schemes that ModelOpt has are there in its format, too.
    """
    tensors = _weights()
    _write_plain(root / "plain", tensors)
    state = _state(tensors)
    (root / "state.safetensors").write_bytes(quant_state_bytes(state, ModelIdentity.of(MOE, tensors)))
    model_free_ptq(root / "plain", root / "quantized", "nvfp4", quant_state=state)
    (root / "quantized" / "quant_state.safetensors").write_bytes((root / "state.safetensors").read_bytes())
    (root / "described").mkdir()
    (root / "described" / "config.json").write_text(json.dumps(DENSE))
    _write_stored(root / "stored", read_hf_model(root / "described"))
    _write_schemes(root)
    _write_foreign(root / "foreign")
    for name, tiny in TINY_MODELS.items():
        family = root / "families" / name
        family.mkdir(parents=True)
        tiny.make().save_pretrained(family)


def _wide_weights() -> dict[str, Tensor]:
    """A dense layer whose sides every scheme divides."""
    generator = torch.Generator().manual_seed(5)
    layer = "model.layers.0"
    rows = {
        "model.embed_tokens": SIDE, "lm_head": SIDE,
        **{f"{layer}.mlp.{each}_proj": SIDE for each in ("gate", "up", "down")},
        **{f"{layer}.self_attn.{each}_proj": SIDE for each in "qo"},
        **{f"{layer}.self_attn.{each}_proj": SIDE // 2 for each in "kv"},
    }  # fmt: skip
    norms = {f"{layer}.input_layernorm": SIDE, f"{layer}.post_attention_layernorm": SIDE, "model.norm": SIDE}
    norms |= {f"{layer}.self_attn.{each}_norm": SIDE // 2 for each in "qk"}
    made = {
        f"{name}.weight": (torch.randn(side, SIDE, generator=generator) * 0.05).bfloat16()
        for name, side in rows.items()
    }
    return made | {f"{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}


def _write_schemes(root: Path) -> None:
    tensors = _wide_weights()
    _write_one_file(root / "wide", tensors, WIDE)
    for name, scheme in SCHEMES.items():
        state = _state(tensors, scheme.format) if scheme.needs_input_amax else None
        model_free_ptq(root / "wide", root / "schemes" / name, name, quant_state=state)
    for scheme in modelopt_schemes():
        name = scheme.name
        state = _state(tensors, scheme.format) if scheme.needs_input_amax else None
        model_free_ptq(
            root / "wide", root / "modelopt" / name, name, quant_state=state, format="modelopt", verify=False
        )


def _write_foreign(directory: Path) -> None:
    """Each with what it says of itself in config.json, or beside it, as ModelOpt does."""
    for kind, (hold, declared) in FOREIGN.items():
        stored = dict[str, Tensor]()
        for name, tensor in _wide_weights().items():
            local = hold(tensor).tensors.items() if name.endswith("_proj.weight") else ()
            stored |= {name.removesuffix("weight") + each: held_tensor for each, held_tensor in local} or {name: tensor}
        beside = declared is _MODELOPT
        _write_one_file(directory / kind, stored, WIDE if beside else {**WIDE, "quantization_config": declared})
        if beside:
            content = {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
            }
            (directory / kind / "hf_quant_config.json").write_text(json.dumps(content))


def _write_one_file(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).bfloat16()

    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (VOCABULARY, HIDDEN), f"{layer}.self_attn.q_proj": (32, HIDDEN),
        f"{layer}.self_attn.k_proj": (16, HIDDEN), f"{layer}.self_attn.v_proj": (16, HIDDEN),
        f"{layer}.self_attn.o_proj": (HIDDEN, 32), f"{layer}.mlp.gate": (EXPERTS, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
    }  # fmt: skip
    for expert in range(EXPERTS):
        shapes |= {f"{layer}.mlp.experts.{expert}.{name}_proj": (FFN, HIDDEN) for name in ("gate", "up", "down")}
    norms = {f"{layer}.input_layernorm": HIDDEN, f"{layer}.post_attention_layernorm": HIDDEN, "model.norm": HIDDEN}
    norms |= {f"{layer}.self_attn.{each}_norm": 16 for each in "qk"}
    made = {f"{name}.weight": weight(*shape) for name, shape in shapes.items()}
    return made | {f"{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}


def _write_plain(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    directory.mkdir()
    files = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(MOE))
    (directory / "README.md").write_text(CARD)
    for name, text in TEXTS.items():
        (directory / name).write_text(text)


def _state(tensors: Mapping[str, Tensor], kind: str = "nvfp4") -> QuantState:
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    amax = {f"{module}.weight_quantizer._amax": tensors[f"{module}.weight"].float().abs().max() for module in modules}
    amax |= {f"{module}.input_quantizer._amax": torch.tensor(3.0) for module in modules}
    return QuantState(amax, dict.fromkeys(modules, kind))


def _write_stored(directory: Path, hf: HFModel) -> None:
    """A checkpoint as Megatron writes it, with quantizers of the MLP and the arguments of training."""
    iteration = directory / "iter_0000005"
    iteration.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("5")
    save_stored(iteration, hf, arguments_of(hf), {"weight_quantizer": ONE, "input_quantizer": ONE})


def arguments_of(hf: HFModel) -> Any:
    """The arguments that training would save for the model."""
    from types import SimpleNamespace

    parallel = SimpleNamespace(
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1, expert_tensor_parallel_size=1,
    )  # fmt: skip
    return megatron_arguments(hf, parallel)


def save_stored(iteration: Path, hf: HFModel, arguments: Any, settings: Any) -> None:
    """Saves parameters, amax, the state of two modules, and the arguments."""
    entries: dict[str, Any] = dict(megatron_state(hf))
    for linear in ("linear_fc1", "linear_fc2"):
        module = f"decoder.layers.0.mlp.{linear}"
        entries[f"{module}._extra_state/shard_0_1"] = _stream({"modelopt_quantizer_state": settings})
        entries[f"{module}.weight_quantizer._amax"] = torch.tensor([0.5])
        entries[f"{module}.input_quantizer._amax"] = torch.tensor([3.0])
    save(entries, storage_writer=FileSystemWriter(iteration), no_dist=True)
    torch.save({"args": arguments}, iteration / "common.pt")


def _stream(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream
