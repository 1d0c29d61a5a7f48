"""The keys of `quantization_config` that programs write for FP8, AWQ, GPTQ and MXFP4 sources.

A key is read by the reader of its format; or recorded, because the tensors say it themselves, or because it tells how
the checkpoint was made; or bound to the values with which the tensors mean what the reader takes them for. Any other
key that says something is refused by name.

Sources: transformers 5.24, `FineGrainedFP8Config`, `AwqConfig`, `GPTQConfig` and `Mxfp4Config`; what vLLM 0.33 and
SGLang 0.5.23 read; AutoGPTQ's and GPTQModel's quantize_config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from amaxbridge.mappings.errors import UsageError

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """The keys of one format.

    Args:
        program: whose config it is, for messages.
        known: keys that are read, or only recorded.
        bound: key → the values, in lower case, with which tensors are read.
    """

    program: str
    known: frozenset[str]
    bound: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuses a config with keys or values that may change what tensors mean.

        Raises:
            UsageError: names each with its value.
        """
        said = {key: value for key, value in raw.items() if value not in _NOTHING}
        refuse(self.program, {key: value for key, value in said.items() if key not in self.known | self.bound.keys()})
        refuse(self.program, {key: said[key] for key in self.bound if key in said and not self._fits(key, said[key])})

    def _fits(self, key: str, value: Any) -> bool:
        return str(value).lower().removeprefix("torch.") in self.bound[key]


def refuse(program: str, unknown: Mapping[str, Any]) -> None:
    """Refuses entries of a config that are not known; nothing if there are none.

    Raises:
        UsageError: names each with its value.
    """
    if unknown:
        said = ", ".join(f"{key}={value!r:.80}" for key, value in unknown.items())
        raise UsageError(
            f"{program}'s config says {said}, which is not known here and may change what tensors mean: quantize the "
            "checkpoint that it was made from"
        )


_CALIBRATION = frozenset(
    (
        "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
        "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "exllama_config",
        "max_input_length", "meta",
        "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "mse",
        "offload_to_disk", "offload_to_disk_path", "pad_token_id", "parallel_packing", "static_groups", "tokenizer",
        "true_sequential", "use_cuda_fp16", "use_exllama",
    )
)  # fmt: skip
"""How codes were found, and by which kernels they are to be run."""
_TOLD_BY_TENSORS = frozenset(
    (
        "desc_act", "dequantize", "group_size", "ignored_layers", "lm_head", "modules_in_block_to_quantize",
        "modules_to_convert", "modules_to_not_convert", "q_group_size", "sym", "zero_point",
    )
)  # fmt: skip
_CACHE = frozenset(("kv_cache_quant_algo", "kv_cache_scheme"))  # `check_cache` reads them

FP8_KEYS = ConfigKeys(
    "FP8",
    _TOLD_BY_TENSORS | _CACHE | {"quant_method", "weight_block_size", "activation_scheme", "packed_modules_mapping"},
    MappingProxyType({"fmt": ("e4m3", "float8_e4m3fn"), "scale_fmt": ("ue8m0", "float"), "expert_dtype": ("fp8",)}),
)
AWQ_KEYS = ConfigKeys(
    "AWQ",
    _TOLD_BY_TENSORS
    | _CALIBRATION
    | {"quant_method", "bits", "w_bit", "version", "do_fuse", "fuse_max_seq_len", "modules_to_fuse"},
    MappingProxyType({"format": ("gemm",), "checkpoint_format": ("gemm",)}),
)
GPTQ_KEYS = ConfigKeys(
    "GPTQ",
    _TOLD_BY_TENSORS | _CALIBRATION | {"quant_method", "bits", "checkpoint_format", "format", "dynamic"},
    MappingProxyType({"pack_dtype": ("int32",)}),
)
MXFP4_KEYS = ConfigKeys("MXFP4", _TOLD_BY_TENSORS | {"quant_method"})
