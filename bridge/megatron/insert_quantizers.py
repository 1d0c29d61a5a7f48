"""ModelOpt's quantizers in an uncalibrated model: all are inserted disabled, then enabled one by one.

Quantizers of a key-value cache lie in the attention core. ModelOpt only has them in Transformer Engine's core, which
needs a GPU; `cache_quantizers` adds them to Megatron's own core, under the same names.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from modelopt.torch.utils.distributed import ParallelState
from torch import Tensor, nn

from amaxbridge.export.schemes.quantizer_settings import QuantizerSettings
from amaxbridge.mappings.errors import UsageError

_HEADS = 2  # the axis of keys and values, [tokens, batch, heads, head_dim]


def insert_quantizers(chunks: Sequence[nn.Module]) -> None:
    """Adds quantizers, all disabled, to every module that ModelOpt can quantize.

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


def enable_quantizer(quantizer: Any, settings: QuantizerSettings) -> None:
    """Enables a disabled quantizer with the settings of a scheme, or of a format of the key-value cache.

    A quantizer of static blocks also gets the axes that ModelOpt notes in its first forward pass: without them,
    ModelOpt saves the amax of one tensor-parallel rank as that of all.
    """
    quantizer.set_from_attribute_config(QuantizerAttributeConfig(**settings.attributes, enable=True))
    blocks = settings.block_sizes or {}
    cut = [dim for dim, size in blocks.items() if isinstance(dim, int) and size]
    if cut and blocks.get("type") != "dynamic":
        quantizer.axis = tuple(range(0, 2 * len(cut), 2))


class _QuantizedAttention(QuantModule):  # type: ignore[misc]  # ModelOpt is not typed
    """`DotProductAttention` with quantized queries, keys and values, which already include their positions."""

    def _setup(self) -> None:
        self.q_bmm_quantizer = TensorQuantizer()
        self.k_bmm_quantizer = TensorQuantizer()
        self.v_bmm_quantizer = TensorQuantizer()
        data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.parallel_state = ParallelState(data_parallel, parallel_state.get_tensor_model_parallel_group())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        attended: Tensor = super().forward(query, key, value, *args, **kwargs)
        return attended

    def get_extra_state(self) -> None:
        """No state of its own. torch only asks classes with this method; ModelOpt then answers for the object."""

    def set_extra_state(self, state: Any) -> None:
        del state

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Moves the amax to the device that ModelOpt noted: attention has no weight to follow.

        One for each head takes the shape of this rank's heads: checkpoints are loaded at other sizes than saved.
        """
        for quantizer in (self.k_bmm_quantizer, self.v_bmm_quantizer):
            if quantizer.axis == _HEADS and (amax := getattr(quantizer, "_amax", None)) is not None:
                quantizer._amax = amax.new_ones(1, 1, self.num_query_groups_per_partition, 1)
        self.to(device=self.device)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Megatron's own state, which only has sinks, and that of the quantizers.

        An amax of one number is the same on all ranks; of one for each head, every rank has those of its heads.
        """
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = self.state_dict(prefix="", keep_vars=True)
        more = {name: value for name, value in state.items() if prefix + name not in own}
        of_heads = [
            f"{letter}_bmm_quantizer" for letter in "kv" if getattr(self, f"{letter}_bmm_quantizer").axis == _HEADS
        ]
        heads = {name: _HEADS for name in more if name.removesuffix("._amax") in of_heads}
        more |= {name: more[name].view(1, 1, -1, 1) for name in heads}  # ModelOpt keeps that of a single head as []
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return {**own, **make_sharded_tensors_for_checkpoint(more, prefix, heads, sharded_offsets, **groups)}


@contextlib.contextmanager
def cache_quantizers(*, wanted: bool = True) -> Iterator[None]:
    """Inside, ModelOpt also inserts quantizers for keys and values into Megatron's own attention.

    If ModelOpt already knows that attention, from an outer context or by itself, nothing changes.
    """
    if not wanted or DotProductAttention in QuantModuleRegistry:
        yield
        return
    QuantModuleRegistry.register({DotProductAttention: "DotProductAttention"})(_QuantizedAttention)
    try:
        yield
    finally:
        QuantModuleRegistry.unregister(DotProductAttention)
