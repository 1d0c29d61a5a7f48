"""Turning options into what the exporter takes: the recipe, and the converter that comes before it."""

from collections.abc import Sequence

from amaxbridge.configs.schema import SchemeConfig
from amaxbridge.export.model_free.inverse_weight_maps import Converter, WithoutInputScales
from amaxbridge.export.schemes import SCHEMES, FromQuantizers, Groups, Recipe, SchemeGroup, named_scheme
from amaxbridge.export.schemes.recipe import EMBEDDINGS
from amaxbridge.mappings.errors import UsageError


def recipe_of(config: SchemeConfig) -> Recipe | None:
    """The recipe of a configuration; None for plain weights.

    Raises:
        UsageError: a scheme is unknown, or there are groups beside `from_quantizers`.
    """
    ignored = tuple(config.ignore)
    if config.from_quantizers:
        if config.groups:
            raise UsageError("scheme.from_quantizers=true takes no scheme.groups: the quantizers decide all schemes")
        return FromQuantizers(tuple(SCHEMES.values()), ignored)
    if not config.groups:
        return None
    groups = (SchemeGroup(named_scheme(each.scheme, each.group_size), tuple(each.targets)) for each in config.groups)
    return Groups(tuple(groups), ignored)


def converters_of(name: str | None, directory: str) -> Sequence[Converter]:
    """The converter that dequantizes an already quantized source: one of compressed-tensors' own.

    Raises:
        UsageError: unknown name. The message lists the known ones.
    """
    if name is None:
        return ()
    from compressed_tensors.entrypoints import convert  # imported here, because it takes seconds

    if name == "fp8_block":
        return (convert.FP8BlockDequantizer.from_pretrained(directory),)
    if name == "compressed_tensors":
        embeddings = [f"re:.*{name}$" for name in EMBEDDINGS]  # `Linear` would mean them there
        return WithoutInputScales(), convert.CompressedTensorsDequantizer(directory, embeddings)
    raise UsageError(f"unknown converter {name!r}; known: fp8_block, compressed_tensors")
