"""AWQ: an export folds in the vectors by which input quantizers, enabled or not, multiply their inputs.

INT4 AWQ leaves its input quantizers disabled, and they still multiply. With FP8 inputs per token it is W4AFP8.
ModelOpt's own W4A8 rounds INT4 weights to FP8 once more.
"""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import tensors_in
from tests.support.launcher import Launcher, LiveRanks
from tests.workers.model import TOKENS

CASES = {"int4_awq": "w4a16", "nvfp4_awq_lite": "nvfp4", "int4_awq_fp8_inputs": "w4afp8"}
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


@pytest.fixture(scope="module")
def ranks(launch: Launcher, transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """A model with outlier channels, for which AWQ is made, and groups of 128 columns."""
    config = transformers.Qwen3Config(
        vocab_size=131, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=64, tie_word_embeddings=False,
        initializer_range=0.08,
    )  # fmt: skip
    torch.manual_seed(5)
    model = transformers.Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[:8] = 20.0
    hf = tmp_path_factory.mktemp("awq_model")
    model.bfloat16().save_pretrained(hf)
    return LiveRanks(launch, "live_awq.py", hf, tmp_path_factory.mktemp("awq"))


def of_module(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{module}."): each for name, each in tensors.items() if name.startswith(f"{module}.")}


@pytest.mark.parametrize("case", CASES)
def test_a_norm_takes_the_vector_and_the_linear_keeps_its_weight(ranks: LiveRanks, case: str) -> None:
    source, written = tensors_in(ranks.hf), tensors_in(ranks.at(tp=1) / case)
    oracle = load_file(ranks.at(tp=1) / f"{case}.safetensors")
    modules = [name.removesuffix(".weight.fake") for name in oracle if name.endswith(".fake")]
    assert len(modules) == 5
    for module in modules:
        found = SCHEMES[CASES[case]].dequantize(of_module(module, written))
        # scales of groups are stored in the model's dtype, as engines hold them
        rounding = 2**-7 if case.startswith("int4_awq") else 0
        torch.testing.assert_close(found, oracle[f"{module}.weight.fake"], rtol=rounding, atol=0)
        layer, _, part = module.rpartition(".")[0].rpartition(".")
        norm = f"{layer}.{NORMS[part]}.weight"
        vector = oracle[f"{module}.weight.vector"]
        assert vector.unique().numel() > 1, "the vector must do something for this to show anything"
        assert torch.equal(written[norm], source[norm] * vector), norm


@pytest.mark.parametrize("case", CASES)
def test_other_inputs_have_no_place_for_a_vector(ranks: LiveRanks, case: str) -> None:
    """INT4's down_proj has one, in up_proj's rows: `test_row_vectors`."""
    message = (ranks.at(tp=1) / f"{case}.txt").read_text()
    count = {"int4_awq": 1, "nvfp4_awq_lite": 2, "int4_awq_fp8_inputs": 1}[case]
    assert f"{count} modules multiply inputs by a vector (AWQ, SmoothQuant), which no engine does:" in message
    assert "model.layers.0.self_attn.o_proj.input_quantizer._pre_quant_scale: query heads share" in message
    assert ("model.layers.0.mlp.down_proj.input_quantizer._pre_quant_scale: the scales" in message) is (count == 2)
    assert "ignore=re:.*o_proj" in message


@pytest.mark.parametrize("case", CASES)
def test_weights_that_stay_plain_take_their_vectors(ranks: LiveRanks, case: str) -> None:
    """With scheme=none all weights and norms are the original's; with a scheme, those of ignored modules are."""
    source = tensors_in(ranks.hf)
    for directory, projections in ((f"{case}_plain", ""), (f"{case}_ignoring", ("o_proj.weight", "down_proj.weight"))):
        plain = tensors_in(ranks.at(tp=1) / directory)
        names = [name for name in plain if name.endswith(projections)]
        assert len(names) == (len(source) if not projections else 2)
        for name in names:
            torch.testing.assert_close(plain[name], source[name], rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["", "_ignoring", "_plain"])
def test_tensor_parallel_ranks_write_the_same_names_and_formats(ranks: LiveRanks, case: str, form: str) -> None:
    """The calibration itself may find another vector at TP=2, so values differ."""
    one, two = (tensors_in(ranks.at(tp=tp) / f"{case}{form}") for tp in (1, 2))
    assert {name: (each.shape, each.dtype) for name, each in one.items()} == {
        name: (each.shape, each.dtype) for name, each in two.items()
    }


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_gives_the_same_bytes(ranks: LiveRanks, tmp_path: Path, case: str, tp: int) -> None:
    directory, bridge = ranks.at(tp=tp), AutoBridge.from_hf_pretrained(ranks.hf)
    bridge.convert_checkpoint(directory / f"checkpoint_{case}", tmp_path / "out", scheme="auto")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / case / name).read_bytes(), name


def test_logits_are_those_of_the_quantized_model(ranks: LiveRanks, transformers: ModuleType, tmp_path: Path) -> None:
    """INT4 AWQ quantizes no inputs, so a plain model of the dequantized weights computes the same."""
    directory = ranks.at(tp=1)
    written, expected = tensors_in(directory / "int4_awq"), load_file(directory / "int4_awq.safetensors")["logits"]
    quantized = [name.removesuffix(".weight_packed") for name in written if name.endswith(".weight_packed")]
    plain = {name: each for name, each in written.items() if name.rpartition(".")[0] not in quantized}
    plain |= {f"{each}.weight": SCHEMES["w4a16"].dequantize(of_module(each, written)) for each in quantized}
    save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "int4_awq" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    def logits(path: Path) -> Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            found: Tensor = model.eval()(TOKENS).logits
        return found

    def error(found: Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    assert error(logits(tmp_path)) < 0.01 < error(logits(ranks.hf)), (
        "rounding of norms and scales, against INT4's noise"
    )


def test_int4_and_then_fp8_is_refused_because_no_scale_holds_it(ranks: LiveRanks, tmp_path: Path) -> None:
    """W4A8 AWQ. In a block, ModelOpt's values would be codes from -8 to 7 times one scale; few have one."""
    directory, bridge = ranks.at(tp=1), AutoBridge.from_hf_pretrained(ranks.hf)
    message = (directory / "w4a8.txt").read_text()
    assert message.startswith("4 attributes of quantizers change what is computed")
    for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        assert f"decoder.layers.0.{linear}.weight_quantizer: class=SequentialQuantizer: weights are rounded" in message
    assert "next step: calibrate with one INT4 quantizer for weights, and FP8 inputs per token" in message
    with pytest.raises(UsageError) as refusal:
        bridge.convert_checkpoint(directory / "checkpoint_w4a8", tmp_path / "out", scheme="auto")
    assert str(refusal.value) == message
    values = load_file(directory / "w4a8.safetensors")
    names = [name.removesuffix(".both") for name in values if name.endswith(".both")]
    assert len(names) == 4
    for name in names:
        first, both = (values[f"{name}.{stage}"].float().unflatten(1, (-1, 128)) for stage in ("first", "both"))
        assert float((first != both).float().mean()) > 0.3
        largest = both.abs().amax(-1, keepdim=True)
        exact = torch.zeros(both.shape[:2], dtype=torch.bool)
        for code in range(1, 9):  # the largest value's own
            codes = both * code / largest
            exact |= ((codes - codes.round()).abs() < 2**-6).all(-1)
        assert float(exact.float().mean()) < 0.3, name


@pytest.mark.parametrize("tp", [1, 2])
def test_int4_and_then_fp8_without_a_scheme_are_plain_weights(ranks: LiveRanks, tmp_path: Path, tp: int) -> None:
    source, plain = tensors_in(ranks.hf), tensors_in(ranks.at(tp=tp) / "w4a8_plain")
    assert plain.keys() == source.keys()
    for name, tensor in source.items():
        torch.testing.assert_close(plain[name], tensor, rtol=0.02, atol=1e-4)
    AutoBridge.from_hf_pretrained(ranks.hf).convert_checkpoint(
        ranks.at(tp=tp) / "checkpoint_w4a8", tmp_path / "out", scheme="none"
    )
    found = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert found == (ranks.at(tp=tp) / "w4a8_plain" / "model.safetensors").read_bytes()
