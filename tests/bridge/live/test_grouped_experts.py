"""Grouped experts without Megatron: which names each quantizer's amax gets, and the shapes of the weights."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import GroupedQuantizer, SequentialQuantizer, TensorQuantizer
from torch import nn

from amaxbridge.bridge import AutoBridge
from amaxbridge.bridge.hf import HFModel, check_parallel_sizes
from amaxbridge.bridge.live.model_walk import unwrap, walk_parameters
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.mappings import AmaxFanoutMapping, AmaxMapping, GatedMLPMapping, RowParallelMapping
from amaxbridge.mappings.amax import per_expert_amax_map
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.families import family_of
from amaxbridge.mappings.ranks import LOCAL, Axis, Ranks, ThreadRanks, run_threads

EXPERTS, HIDDEN, WIDTH = 4, 32, 16
HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 128,
    "num_experts": EXPERTS,
    "moe_intermediate_size": WIDTH,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
HF = HFModel(Path("nowhere"), HF_CONFIG, HF_CONFIG, family_of(HF_CONFIG))


def quantizer(amax: float) -> TensorQuantizer:
    blocks = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    made = TensorQuantizer(QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=blocks))
    made.amax = torch.tensor(amax)
    return made


class GroupedLinear(nn.Module):
    """As Transformer Engine's: the weights of all local experts in one module, by local number."""

    def __init__(self, shape: tuple[int, int], experts: int) -> None:
        super().__init__()
        for expert in range(experts):
            self.register_parameter(f"weight{expert}", nn.Parameter(torch.zeros(shape)))


def grouped_model(ep: Ranks, quantizers: Callable[[range], tuple[nn.Module, nn.Module]]) -> nn.Module:
    """Layer 1's experts on one EP rank. `quantizers` makes the weight and the input quantizer of the local experts."""
    each = EXPERTS // ep.size(Axis.EP)
    local = range(ep.rank(Axis.EP) * each, (ep.rank(Axis.EP) + 1) * each)
    model, layer, mlp, experts = (nn.Module() for _ in range(4))
    for name, shape in (("linear_fc1", (2 * WIDTH, HIDDEN)), ("linear_fc2", (HIDDEN, WIDTH))):
        linear = GroupedLinear(shape, each)
        linear.weight_quantizer, linear.input_quantizer = quantizers(local)
        experts.add_module(name, linear)
    mlp.experts, mlp.local_expert_indices, layer.mlp, layer.layer_number = experts, list(local), mlp, 2
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList([layer])
    model.config = SimpleNamespace(**HF.family.transformer_config(HF_CONFIG))
    return model


def collect(size: int, quantizers: Callable[[range], tuple[nn.Module, nn.Module]]) -> list[QuantState]:
    def on_rank(ranks: ThreadRanks) -> QuantState:
        return AutoBridge(HF, ranks).collect_quant_state(grouped_model(ranks, quantizers))

    return run_threads(size, on_rank, {Axis.EP: [list(range(size))]})


def amax_names(kind: str) -> dict[str, int]:
    """Every amax name that a quantizer of the kind must reach, with its expert."""
    return {
        f"model.layers.1.mlp.experts.{expert}.{part}_proj.{kind}_quantizer._amax": expert
        for expert in range(EXPERTS)
        for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_shared_quantizer_reaches_the_experts_of_its_own_rank(size: int) -> None:
    """Older ModelOpt: one quantizer for the local block. Fanned out to all, the largest rank's would win everywhere."""
    for state in collect(size, lambda local: (quantizer(1.0 + local[0]), quantizer(10.0 + local[0]))):
        for kind, base in (("weight", 1.0), ("input", 10.0)):
            found = {name: value.item() for name, value in state.amax.items() if f"{kind}_quantizer" in name}
            first = {expert: expert * size // EXPERTS * EXPERTS // size for expert in range(EXPERTS)}
            assert found == {name: base + first[expert] for name, expert in amax_names(kind).items()}
        assert len(state.formats) == 3 * EXPERTS
        assert not state.divergent
        assert not state.missing


@pytest.mark.parametrize("size", [1, 2])
def test_quantizers_of_grouped_experts_get_global_numbers(size: int) -> None:
    """ModelOpt 0.47: a weight quantizer for each grouped expert, by local number, beside one shared input quantizer."""

    def quantizers(local: range) -> tuple[nn.Module, nn.Module]:
        return GroupedQuantizer(*(quantizer(1.0 + expert) for expert in local)), quantizer(10.0)

    for state in collect(size, quantizers):
        found = {name: value.item() for name, value in state.amax.items() if "weight_quantizer" in name}
        assert found == {name: 1.0 + expert for name, expert in amax_names("weight").items()}
        assert {name for name in state.amax if "input_quantizer" in name} == set(amax_names("input"))
        assert not state.divergent


def test_stages_of_a_chain_of_quantizers_are_not_taken_for_experts() -> None:
    with pytest.raises(UsageError, match=r"linear_fc1\.weight_quantizer: class=SequentialQuantizer"):
        collect(2, lambda local: (SequentialQuantizer(quantizer(1.0), quantizer(2.0)), quantizer(10.0)))


def test_amax_mappings_of_experts_one_by_one() -> None:
    stem, hf = "d.layers.*.experts", "m.layers.*.experts.*"
    weights = [
        GatedMLPMapping(f"{stem}.linear_fc1.weight*", f"{hf}.gate.weight", f"{hf}.up.weight"),
        RowParallelMapping(f"{stem}.linear_fc2.weight*", f"{hf}.down.weight"),
        RowParallelMapping("d.layers.*.linear_fc2.weight", "m.layers.*.down.weight"),
    ]
    fc1, fc2 = per_expert_amax_map(weights, ".input_quantizer._amax")
    assert isinstance(fc1, AmaxFanoutMapping)
    assert isinstance(fc2, AmaxMapping)
    resolved = fc1.resolve(("3", "17"))
    assert resolved.megatron_param == "d.layers.3.experts.linear_fc1.input_quantizer.17._amax"
    assert resolved.hf_targets == [f"m.layers.3.experts.17.{part}.input_quantizer._amax" for part in ("gate", "up")]
    assert resolved.axis is Axis.ETP


def test_per_channel_amax_of_an_expert_follows_its_weight() -> None:
    """ETP=2: each rank holds the amax of its gate rows, then of its up rows."""
    mapping = GatedMLPMapping("d.experts.linear_fc1.weight*", "m.experts.*.gate.weight", "m.experts.*.up.weight")
    amax = per_expert_amax_map([mapping])[0].resolve(("5",))
    rows = torch.arange(8.0)[:, None]  # gate 0 to 3, up 4 to 7
    joined = amax.join([rows[[0, 1, 4, 5]], rows[[2, 3, 6, 7]]], None)
    assert [value.flatten().tolist() for value in joined.values()] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class TestSizes:
    def test_translation(self) -> None:
        sizes = HF.family.transformer_config({**HF_CONFIG, "norm_topk_prob": False})
        assert sizes["num_moe_experts"] == EXPERTS
        assert sizes["moe_ffn_hidden_size"] == WIDTH
        assert sizes["moe_router_topk"] == 2
        assert sizes["moe_router_pre_softmax"] is True
        assert HF.family.transformer_config(HF_CONFIG)["moe_router_pre_softmax"] is False

    def test_both_names_of_the_number_of_experts(self) -> None:
        renamed = {key: value for key, value in HF_CONFIG.items() if key != "num_experts"}
        assert HF.family.transformer_config({**renamed, "num_local_experts": 16})["num_moe_experts"] == 16
        with pytest.raises(UsageError, match="num_experts"):
            HF.family.transformer_config(renamed)

    @pytest.mark.parametrize(
        ("dense", "step", "pattern"),
        [([], 1, [1, 1, 1, 1]), ([2], 1, [1, 1, 0, 1]), (None, 2, [0, 1, 0, 1]), ([1], 2, [0, 0, 0, 1])],
    )
    def test_which_layers_have_experts(self, dense: list[int] | None, step: int, pattern: list[int]) -> None:
        config = {**HF_CONFIG, "num_hidden_layers": 4, "mlp_only_layers": dense, "decoder_sparse_step": step}
        assert HF.family.transformer_config(config)["moe_layer_freq"] == pattern

    def test_megatron_writes_the_pattern_of_layers_as_a_number_too(self) -> None:
        def collect_with(frequency: object) -> QuantState:
            model = grouped_model(LOCAL, lambda local: (quantizer(1.0), quantizer(2.0)))
            model.config.moe_layer_freq = frequency
            return AutoBridge(HF).collect_quant_state(model)

        assert collect_with(1).amax.keys() == collect_with([1, 1]).amax.keys()
        with pytest.raises(CheckpointError, match=r"moe_layer_freq: the Megatron model has \[1, 0\]"):
            collect_with(2)

    def test_parallel_sizes_that_do_not_fit(self) -> None:
        check_parallel_sizes(HF, world=4, tp=2, pp=1, ep=4, etp=1)
        with pytest.raises(UsageError) as refusal:
            check_parallel_sizes(HF, world=6, tp=2, pp=1, ep=3, etp=5)
        message = str(refusal.value)
        assert "EP=3 does not divide 4 experts" in message
        assert "ETP=5 does not divide the expert width of 16" in message
        assert "6 processes do not divide into ETP=5 × EP=3 × PP=1" in message

    def test_the_width_of_dense_layers_counts_only_where_there_are_some(self) -> None:
        sizes = {**HF_CONFIG, "intermediate_size": 47}
        check_parallel_sizes(HFModel(HF.directory, sizes, sizes, HF.family), world=2, tp=2, pp=1)
        sizes["mlp_only_layers"] = [0]
        with pytest.raises(UsageError, match="TP=2 does not divide the MLP width of 47"):
            check_parallel_sizes(HFModel(HF.directory, sizes, sizes, HF.family), world=2, tp=2, pp=1)

    def test_a_dense_model_has_no_expert_parallelism(self) -> None:
        dense = {**HF_CONFIG, "architectures": ["Qwen3ForCausalLM"]}
        with pytest.raises(UsageError, match="EP=2 needs experts"):
            check_parallel_sizes(HFModel(HF.directory, dense, dense, family_of(dense)), world=2, tp=1, pp=1, ep=2)


def test_legacy_grouped_experts_are_walked_one_by_one() -> None:
    """Megatron's GroupedMLP: two parameters for all local experts of a layer, read as a view of each, inputs first."""
    experts, hidden, ffn = (5, 2, 7), 4, 6  # a placement that is not a block
    moe = torch.nn.Module()
    moe.local_expert_indices = experts
    moe.experts = torch.nn.Module()
    moe.experts.weight1 = torch.nn.Parameter(torch.randn(hidden, len(experts) * 2 * ffn))
    moe.experts.weight2 = torch.nn.Parameter(torch.randn(len(experts) * ffn, hidden))
    chunk = torch.nn.ModuleDict({"mlp": moe})
    found = {parameter.name: parameter.tensor for parameter in walk_parameters([chunk])}
    assert list(found) == [f"mlp.experts.linear_fc{linear}.weight{expert}" for linear in (1, 2) for expert in experts]
    x = torch.randn(3, hidden)
    for index, expert in enumerate(experts):
        legacy = moe.experts.weight1.view(len(experts), hidden, -1)[index]
        torch.testing.assert_close(x @ found[f"mlp.experts.linear_fc1.weight{expert}"].t(), x @ legacy)
    with torch.no_grad():
        found["mlp.experts.linear_fc2.weight2"].fill_(1.0)  # loading writes through the view
    assert bool((moe.experts.weight2.view(3, ffn, hidden)[1] == 1.0).all())


def test_only_a_model_is_a_model() -> None:
    with pytest.raises(UsageError, match="give the model, or the list of its chunks, on every rank; not a dict"):
        unwrap({"weight": torch.ones(1)})  # type: ignore[arg-type]


def test_adapters_of_grouped_experts() -> None:
    """One for each expert of a rank, `[experts, …]`, or one that all of them share: each expert has its own name."""
    layer = nn.Module()
    layer.layer_number = 3  # type: ignore[assignment]
    layer.mlp, fc1, side = nn.Module(), nn.Module(), nn.Module()
    layer.mlp.local_expert_indices = [4, 5]  # type: ignore[assignment]
    layer.mlp.experts, fc1.to_wrap, fc1.adapter = nn.Module(), nn.Module(), nn.Module()
    layer.mlp.experts.linear_fc1 = fc1
    fc1.to_wrap.weight0 = nn.Parameter(torch.zeros(6, 4))
    fc1.to_wrap.weight1 = nn.Parameter(torch.ones(6, 4))
    fc1.adapter.linear_in, fc1.adapter.linear_out = side, nn.Module()
    side.weight = nn.Parameter(torch.zeros(2, 4))
    fc1.adapter.linear_out.weight = nn.Parameter(torch.stack([torch.zeros(6, 2), torch.ones(6, 2)]))
    chunk = nn.Module()
    chunk.decoder = nn.Module()
    chunk.decoder.layers = nn.ModuleList([layer])
    found = {each.name: each.tensor for each in walk_parameters([chunk])}
    prefix = "decoder.layers.2.mlp.experts.linear_fc1"
    assert {name: (*tensor.shape, float(tensor.detach().max())) for name, tensor in found.items()} == {
        f"{prefix}.weight4": (6, 4, 0.0),
        f"{prefix}.weight5": (6, 4, 1.0),
        f"{prefix}.adapter.linear_in.weight4": (2, 4, 0.0),
        f"{prefix}.adapter.linear_in.weight5": (2, 4, 0.0),
        f"{prefix}.adapter.linear_out.weight4": (6, 2, 0.0),
        f"{prefix}.adapter.linear_out.weight5": (6, 2, 1.0),
    }
