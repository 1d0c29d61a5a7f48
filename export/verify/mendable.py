"""The rules whose problems `repair` mends, where the checkpoint itself says what is right.

`verify` names the way, and `repair` knows it: this table is held against its mends by a test, both ways.
"""

from collections.abc import Mapping
from types import MappingProxyType

_TARGETS = "names in ignore, and targets"

MENDABLE: Mapping[str, str] = MappingProxyType(
    {
        "index": "the index from the headers",
        "duplicates": "one of two tensors goes",
        "total-size": "the index from the headers",
        "quantization-config": "its name, and its writer's",
        "config-keys": "keys that say nothing go",
        "two-configs": "ModelOpt's file goes",
        "version-gate": "zp_dtype of symmetric codes goes",
        "group-names": "group_0, group_1, …",
        "formats": "those of the schemes",
        "mixed-targets": _TARGETS,
        "patterns": _TARGETS,
        "suffixes": "a scale that a fused group shares, from its partners; another name",
        "input-scales": "from the partners, or removed",
        "contract": "dtypes and shapes, where bytes or numbers are right",
        "leftovers": "buffers that nothing reads go; another name",
        "kv-scales": "kv_cache_scheme, where the scales are there",
        "accounted": _TARGETS,
        "unanimous": _TARGETS,
        "quantized-is-targeted": _TARGETS,
        "plain-is-ignored": _TARGETS,
        "targeted-or-ignored": _TARGETS,
        "one-group": _TARGETS,
        "router-patterns": _TARGETS,
        "fused-weight-scales": "one scale for the group, codes stay, the change is measured",
        "fused-input-scales": "the scale of the largest amax of the group",
        "usable-weight-scales": "a scale that a fused group shares, from its partners; zeros above zeros",
        "usable-input-scales": "from the partners",
        "expert-input-scales": "from the partners, or with unseen=layer_max from the layer",
        "weight-divisors": "the reciprocal, where block scales prove it",
        "input-divisors": "the reciprocal, where all are upside down",
        "weight-shape": "the shape of the codes",
    }
)
"""Rule → what `repair` makes of it."""
