"""AWQ on linears whose inputs another linear makes: v's and up's rows take the vectors of o_proj and down_proj.

INT4 AWQ quantizes no inputs, so a plain model of the dequantized weights computes what quantized Megatron does.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge
from amaxbridge.export.schemes import SCHEMES
from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher, LiveRanks
from tests.workers.model import TOKENS

SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "initializer_range": 0.08,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("Qwen2", {}),
    "experts": (
        "Qwen3Moe",
        {"mlp_only_layers": [0], "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    ),
    "gemma": ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "shared_values": ("Qwen3", {"num_key_value_heads": 4}),
}
QUANTIZED = {"biases": 14, "experts": 2 * 4 + 3 + 2 * 3, "gemma": 14}


class Models:
    """The ranks of each model, started when first asked for."""

    def __init__(self, launch: Launcher, transformers: ModuleType, root: Path) -> None:
        self._launch, self._transformers, self._root = launch, transformers, root
        self._made: dict[str, LiveRanks] = {}

    def __getitem__(self, name: str) -> LiveRanks:
        if name not in self._made:
            architecture, sizes = MODELS[name]
            hf = self._root / name
            self._make(architecture, sizes, hf)
            self._made[name] = LiveRanks(self._launch, "live_row_vectors.py", hf, self._root / f"{name}_ranks")
        return self._made[name]

    def _make(self, architecture: str, sizes: dict[str, Any], hf: Path) -> None:
        """A model with outlier channels, for which AWQ is made."""
        torch.manual_seed(5)
        config = getattr(self._transformers, f"{architecture}Config")(**{**SIZES, **sizes})
        model = getattr(self._transformers, f"{architecture}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            if "v_proj" in name or "up_proj" in name:
                parameter.data[..., :8] *= 10
                parameter.data[:8] *= 10
        model.bfloat16().save_pretrained(hf)


@pytest.fixture(scope="module")
def models(launch: Launcher, transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(launch, transformers, tmp_path_factory.mktemp("row_vectors"))


def logits(transformers: ModuleType, checkpoint: Path, plain: Path) -> Tensor:
    """Of the model with dequantized weights."""
    written = tensors_in(checkpoint)
    quantized = [name.removesuffix(".weight_packed") for name in written if name.endswith(".weight_packed")]
    tensors = {name: each for name, each in written.items() if name.rpartition(".")[0] not in quantized}
    for module in quantized:
        prefix = f"{module}."
        local = {name.removeprefix(prefix): each for name, each in written.items() if name.startswith(prefix)}
        tensors[f"{module}.weight"] = SCHEMES["w4a16"].dequantize(local)
        if "bias" in local:
            tensors[f"{module}.bias"] = local["bias"]
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", ["int4_awq", "after_plain"])
@pytest.mark.parametrize("model", ["biases", "experts", "gemma"])
def test_logits_are_those_of_the_quantized_model(
    models: Models, transformers: ModuleType, tmp_path: Path, model: str, case: str, tp: int
) -> None:
    directory = models[model].at(tp=tp)
    expected = load_file(directory / f"{case}.safetensors")["logits"]
    found = logits(transformers, directory / case, tmp_path / "plain")
    original = logits(transformers, models[model].hf, tmp_path / "original")

    def error(one: Tensor) -> float:
        return float((one - expected).norm() / expected.norm())

    assert error(found) < 0.02, "rounding of norms, rows and scales"
    assert error(original) > 0.03, "INT4's noise"
    packed = sum(name.endswith(".weight_packed") for name in tensors_in(directory / case))
    assert packed == QUANTIZED[model] if case == "int4_awq" else 0 < packed < QUANTIZED[model]


@pytest.mark.parametrize("model", ["biases", "experts", "gemma"])
def test_rows_take_the_vector_and_codes_stay(models: Models, model: str) -> None:
    """Up to three roundings to the model's dtype: of ModelOpt's weight, of scales as engines hold them, of ours."""
    directory = models[model].at(tp=1)
    written, expected = tensors_in(directory / "int4_awq"), load_file(directory / "int4_awq.safetensors")
    modules = [name.removesuffix(".weight.fake") for name in expected if name.endswith(".fake")]
    assert len(modules) == QUANTIZED[model]
    multiplied = 0
    for module in modules:
        prefix = f"{module}."
        local = {name.removeprefix(prefix): each for name, each in written.items() if name.startswith(prefix)}
        fake = expected[f"{module}.weight.fake"].float()
        for before, after in (("v_proj", "o_proj"), ("up_proj", "down_proj")):
            if module.endswith(before):
                vector = expected[f"{module.removesuffix(before)}{after}.weight.vector"].float()
                assert vector.unique().numel() > 1, "the vector must do something for this to show anything"
                fake, multiplied = fake * vector[:, None], multiplied + 1
        torch.testing.assert_close(SCHEMES["w4a16"].dequantize(local).float(), fake, rtol=3 * 2**-8, atol=0)
    assert multiplied == {"biases": 4, "experts": 5, "gemma": 4}[model]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", ["biases", "experts", "gemma"])
def test_a_checkpoint_gives_the_same_bytes(models: Models, tmp_path: Path, model: str, tp: int) -> None:
    ranks = models[model]
    for case in ("int4_awq", "after_plain"):
        directory = ranks.at(tp=tp)
        AutoBridge.from_hf_pretrained(ranks.hf).convert_checkpoint(
            directory / f"checkpoint_{case}", tmp_path / case, scheme="auto"
        )
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / case / name).read_bytes() == (directory / case / name).read_bytes(), name


@pytest.mark.parametrize("tp", [1, 2])
def test_what_cannot_take_a_vector_is_named(models: Models, tp: int) -> None:
    refused = models["biases"].report(tp=tp)
    assert refused.keys() == {"nvfp4_awq", "with_cache"}
    assert "up_proj in nvfp4 cannot take a factor for each row" in refused["nvfp4_awq"]
    assert (
        "model.layers.0.self_attn.o_proj.input_quantizer._pre_quant_scale: the key-value cache"
        in (refused["with_cache"])
    )
    refused = models["experts"].report(tp=tp)
    assert refused.keys() == {"nvfp4_awq", "with_cache", "experts_in"}
    assert "experts.1.gate_proj.input_quantizer._pre_quant_scale: no norm or linear alone" in refused["experts_in"]
    assert "down_proj" not in refused["experts_in"]


def test_values_that_several_heads_share_cannot_take_a_vector(models: Models) -> None:
    refused = models["shared_values"].report(tp=1)
    assert refused.keys() == {"int4_awq", "after_plain", "nvfp4_awq", "with_cache", "experts_in"}
    assert (
        "model.layers.0.self_attn.o_proj.input_quantizer._pre_quant_scale: query heads share the 128 values that "
        "model.layers.0.self_attn.v_proj makes for 256 inputs"
    ) in refused["int4_awq"]
    assert "down_proj" not in refused["int4_awq"]
