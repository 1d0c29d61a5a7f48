"""ModelOpt's quantizers in a model that training has not calibrated: inserted all disabled, then enabled one by one.

Those of a key-value cache lie in the attention's core. ModelOpt has them in Transformer Engine's only, which needs a
GPU; `cache_quantizers` gives them to Megatron's own, under the same names.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from torch import Tensor, nn

from amaxbridge.mappings.errors import UsageError

_WEIGHTS: Mapping[str, Mapping[str, Any]] = {  # format of a scheme → a preset of ModelOpt whose weights have it
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8_block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "int8": mtq.INT8_WEIGHT_ONLY_CFG,
    "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
}
_INPUTS: Mapping[str, Mapping[str, Any]] = {  # scheme → the preset whose inputs are its; others leave inputs alone
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "w8a8": {
        "quant_cfg": [
            {
                "quantizer_name": "*input_quantizer",
                "cfg": {"num_bits": 8, "axis": None, "type": "dynamic", "block_sizes": {-1: None}},
            }
        ]
    },
}


def insert_quantizers(chunks: Sequence[nn.Module]) -> None:
    """Makes every module that ModelOpt can quantize one with quantizers, all of them disabled.

    Raises:
        UsageError: ModelOpt has no quantizers for the model at these parallel sizes.
    """
    config: Any = chunks[0].config
    if len(chunks) > 1:
        raise UsageError("ModelOpt does not save quantizers of a virtual pipeline: import without parallel.vpp")
    if config.num_moe_experts and config.expert_model_parallel_size > 1 and config.tensor_model_parallel_size > 1:
        raise UsageError(
            f"ModelOpt has no quantizers for experts at TP={config.tensor_model_parallel_size} and "
            f"EP={config.expert_model_parallel_size}: import at parallel.tp=1 or parallel.ep=1"
        )
    mtq.quantize(chunks[0], {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})


def enable_weights(quantizer: Any, format_name: str) -> None:
    """Makes a quantizer of weights what ModelOpt's presets have for a format, by its name in `Scheme.format`."""
    kind, _, group_size = format_name.partition(" group_size=")
    settings = _settings(_WEIGHTS[kind], "*weight_quantizer")
    if group_size:
        settings["block_sizes"] = {**settings["block_sizes"], -1: int(group_size)}
    _enable(quantizer, settings)


def enable_cache(quantizer: Any) -> None:
    """The same of keys or values of a cache, which is FP8."""
    _enable(quantizer, _settings(mtq.FP8_KV_CFG, "*[kv]_bmm_quantizer"))


def enable_inputs(quantizer: Any, scheme: str) -> None:
    """The same of inputs, for a scheme by name; it stays disabled where the scheme has none, or ModelOpt has not."""
    if scheme in _INPUTS:
        _enable(quantizer, _settings(_INPUTS[scheme], "*input_quantizer"))


def _settings(preset: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(next(each["cfg"] for each in preset["quant_cfg"] if each["quantizer_name"] == name))


def _enable(quantizer: Any, settings: Mapping[str, Any]) -> None:
    quantizer.set_from_attribute_config(QuantizerAttributeConfig(**{**settings, "enable": True}))


class _QuantizedAttention(QuantModule):  # type: ignore[misc]  # ModelOpt is not typed
    """What `DotProductAttention` becomes: queries, keys and values are quantized as they come, with their positions."""

    def _setup(self) -> None:
        self.q_bmm_quantizer = TensorQuantizer()
        self.k_bmm_quantizer = TensorQuantizer()
        self.v_bmm_quantizer = TensorQuantizer()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        attended: Tensor = super().forward(query, key, value, *args, **kwargs)
        return attended

    def get_extra_state(self) -> None:
        """Nothing of its own. torch asks only classes that have the method; ModelOpt then answers for the object."""

    def set_extra_state(self, state: Any) -> None:
        del state

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """There is no weight whose device the amax would have to be on; ModelOpt notes that of the attention here."""
        self.to(device=self.device)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron's own, which leaves all but sinks out, and the state of the quantizers: the same on all ranks."""
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = self.state_dict(prefix="", keep_vars=True)
        more = {name: value for name, value in state.items() if prefix + name not in own}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return {**own, **make_sharded_tensors_for_checkpoint(more, prefix, {}, sharded_offsets, **groups)}


@contextlib.contextmanager
def cache_quantizers(*, wanted: bool = True) -> Iterator[None]:
    """What ModelOpt makes of a model inside has quantizers for keys and values in Megatron's own attention."""
    if not wanted:
        yield
        return
    QuantModuleRegistry.register({DotProductAttention: "DotProductAttention"})(_QuantizedAttention)
    try:
        yield
    finally:
        QuantModuleRegistry.unregister(DotProductAttention)
