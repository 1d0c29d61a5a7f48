"""The table of source formats: one entry each, chosen by what a source declares, by its tensors, or by name.

An entry knows the methods that it is declared as, and how a module in it is read: `reader` takes what was declared, and
returns a function from a module and its tensors to a `StoredWeight`. To add a format, add an entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from amaxbridge.export.model_free.converters.config_keys import AWQ_KEYS, FP8_KEYS, GPTQ_KEYS, MXFP4_KEYS, refuse
from amaxbridge.export.model_free.converters.float4 import mxfp4_weight, nvfp4_weight
from amaxbridge.export.model_free.converters.float8 import float8_weight
from amaxbridge.export.model_free.converters.integers import awq_weight, gptq_weight, modelopt_integers
from amaxbridge.export.model_free.converters.scheme_weight import scheme_weight
from amaxbridge.export.model_free.converters.stored_weight import Local, StoredWeight
from amaxbridge.export.modelopt_config import unknown_keys
from amaxbridge.export.quant_config import QuantConfig, read_quant_config
from amaxbridge.export.quantization_declared import MODELOPT
from amaxbridge.export.schemes import COMPRESSED_TENSORS
from amaxbridge.mappings.errors import UsageError

type ReadModule = Callable[[str, Local], StoredWeight | None]
"""A module's name and tensors → how its weight is held; None if it is not in the format. ValueError: it is damaged."""


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """A format in which sources are published.

    Args:
        name: `converter=`.
        methods: `quant_method` of the sources that declare it.
        what: what it is, for messages.
        reader: what is declared → the reader of modules. Raises UsageError if it asks for what is not read.
        means: schemes that compute what the format does, weights and inputs, if they hold a module's codes and scales.
        tells: True if tensors alone say all of it, so that it needs no declaration.
    """

    name: str
    methods: tuple[str, ...]
    what: str
    reader: Callable[[Mapping[str, Any]], ReadModule]
    means: tuple[str, ...] = ()
    tells: bool = False


def _fp8_block(raw: Mapping[str, Any]) -> ReadModule:
    FP8_KEYS.check(raw)
    block = raw.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(_is_size(side) for side in block)
    ):
        raise UsageError(f"weight_block_size={block!r} is not the rows and columns of a block")
    return lambda module, local: float8_weight(local, ("weight_scale_inv", "scale"), block)


def _modelopt(raw: Mapping[str, Any]) -> ReadModule:
    refuse("ModelOpt", {key: raw[key] for key in unknown_keys(raw)})

    def read(module: str, local: Local) -> StoredWeight | None:
        found: StoredWeight | None = nvfp4_weight(local) or mxfp4_weight(local, "weight", "weight_scale")
        found = found or float8_weight(local, ("weight_scale",)) or modelopt_integers(local)
        if found is not None and "weight_scale_2" in local and "weight_scale_2" not in found.tensors:
            raise ValueError("weight_scale_2 beside other than FP4 codes (W4A8) is not read")
        return found

    return read


def _compressed_tensors(raw: Mapping[str, Any]) -> ReadModule:
    return _by_config(read_quant_config({**raw, "quant_method": COMPRESSED_TENSORS}).checked())


def _kimi_int4(raw: Mapping[str, Any]) -> ReadModule:
    config = read_quant_config({**raw, "quant_method": COMPRESSED_TENSORS}).checked()
    for group in config.groups:
        weights = None if group.signature is None else group.signature.weights
        if weights is None or (weights.bits, weights.kind, weights.group_size) != (4, "int", 32):
            raise UsageError(f"converter=kimi_int4 reads INT4 in groups of 32, and config.json says {weights}")
    return _by_config(config)


def _by_config(config: QuantConfig) -> ReadModule:
    def read(module: str, local: Local) -> StoredWeight | None:
        if not {"weight_packed", "weight_scale"} & local.keys():
            return None
        for name in _spellings(module):
            if (scheme := config.scheme_of(name)) is not None:
                return scheme_weight(local, scheme)
        said = [str(group.signature) for group in config.groups]
        raise ValueError(f"is quantized, and no group of the config targets it with a known scheme: {'; '.join(said)}")

    return read


def _spellings(module: str) -> list[str]:
    """A module's name in the files, and in the config of the language model inside a larger one."""
    names = [module]
    for prefix in ("model.language_model.", "language_model."):
        if module.startswith(prefix):
            rest = module.removeprefix(prefix)
            names += [rest, f"model.{rest}"]
    return names


def _awq(raw: Mapping[str, Any]) -> ReadModule:
    AWQ_KEYS.check(raw)
    version = str(raw.get("version", "gemm")).lower()
    if version != "gemm":
        raise UsageError(
            f"AWQ in the layout {version!r} is not read, only 'gemm': convert it with the program that made it"
        )
    bits = raw.get("bits", raw.get("w_bit", 4))
    if bits != 4 or isinstance(bits, bool):
        raise UsageError(f"AWQ in {bits!r} bits is not read, only in 4: take the checkpoint that it was made from")
    return lambda module, local: awq_weight(local, bits)


def _gptq(raw: Mapping[str, Any]) -> ReadModule:
    GPTQ_KEYS.check(raw)
    refuse("GPTQ", {"dynamic": raw["dynamic"]} if not _only_leaves_out(raw.get("dynamic")) else {})
    said = [str(raw[key]).lower() for key in ("checkpoint_format", "format") if raw.get(key)]
    if len(set(said)) > 1:
        raise UsageError(f"GPTQ: checkpoint_format and format contradict each other: {said[0]!r} and {said[1]!r}")
    version, bits = said[0] if said else "gptq", raw.get("bits")
    if version not in ("gptq", "gptq_v2") or not isinstance(bits, int) or not raw:
        raise UsageError(
            f"GPTQ: bits={bits!r}, checkpoint_format={version!r}; needed are the bits, and gptq or gptq_v2, in the "
            "quantization_config of config.json or in quantize_config.json"
        )
    return lambda module, local: gptq_weight(local, bits, less_one=version == "gptq")


def _only_leaves_out(dynamic: Any) -> bool:
    """True if GPTQModel's rules for single modules only leave modules unquantized (`-:`)."""
    return not dynamic or (isinstance(dynamic, dict) and all(str(rule).startswith("-:") for rule in dynamic))


def _gpt_oss(raw: Mapping[str, Any]) -> ReadModule:
    MXFP4_KEYS.check(raw)
    return lambda module, local: mxfp4_weight(local, "blocks", "scales")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_ENTRIES = (
    SourceFormat(
        "fp8_block",
        ("fp8",),
        "FP8 in blocks (DeepSeek-V3, transformers), scales fp32 or E8M0",
        _fp8_block,
        ("fp8_block", "fp8"),
        tells=True,
    ),
    SourceFormat(
        "modelopt",
        (MODELOPT,),
        "ModelOpt's NVFP4, FP8, MXFP4, MXFP8, INT4 and INT8",
        _modelopt,
        ("nvfp4", "fp8"),
        tells=True,
    ),
    SourceFormat(
        "compressed_tensors",
        (COMPRESSED_TENSORS,),
        "every scheme of compressed-tensors known here",
        _compressed_tensors,
    ),
    SourceFormat("kimi_int4", (COMPRESSED_TENSORS,), "compressed-tensors' INT4 in groups of 32", _kimi_int4),
    SourceFormat("awq", ("awq",), "AutoAWQ, 4 bits, gemm", _awq, ("w4a16", "w4a16_asym")),
    SourceFormat(
        "gptq",
        ("gptq",),
        "GPTQ, 4 and 8 bits, with sorted columns, too",
        _gptq,
        ("w4a16", "w4a16_asym", "w8a16"),
    ),
    SourceFormat("gpt_oss", ("mxfp4",), "MXFP4 in packed experts (GPT-OSS)", _gpt_oss, tells=True),
)
SOURCE_FORMATS: Mapping[str, SourceFormat] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every format, by name. Of several with one method, the first is chosen."""


def format_named(name: str) -> SourceFormat:
    """The format of this name.

    Raises:
        UsageError: unknown name. The message lists the known ones.
    """
    if name not in SOURCE_FORMATS:
        raise UsageError(f"unknown converter {name!r}; known: {', '.join(SOURCE_FORMATS)}")
    return SOURCE_FORMATS[name]


def format_declared(method: str) -> SourceFormat | None:
    """The first format with this `quant_method`; None if there is none."""
    return next((entry for entry in _ENTRIES if method in entry.methods), None)
