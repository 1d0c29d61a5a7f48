"""The founding functions of model-free PTQ: one output file at a time, from a map of what to read for it.

Each works on the tensors that the map names, and no others: a file without linear modules is written as it is, and an
empty map makes a file without tensors. config.json beside the files is read where there is one, for what it says of
packed experts and of quantized tensors.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from amaxbridge.export.architectures.facts import GUESS, architecture_of
from amaxbridge.export.disk.io_errors import explaining
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.disk.shard_layout import Layout, Shard
from amaxbridge.export.disk.staging import StagedDirectory
from amaxbridge.export.model_free.converters.protocol import Converter
from amaxbridge.export.model_free.converters.quantized_source import recognize
from amaxbridge.export.model_free.pipeline import devices_of, write_bundles
from amaxbridge.export.model_free.shard_plan import ShardPlan, plan_shards
from amaxbridge.export.model_free.whole_directory import chain_of
from amaxbridge.export.output.config_and_index import CONFIG_FILE, read_config_json
from amaxbridge.export.output.finished_directory import BundleWriter
from amaxbridge.export.output.module_schemes import NothingToQuantizeError
from amaxbridge.export.quantization_declared import declared_quantization
from amaxbridge.export.schemes import find_scheme
from amaxbridge.mappings.errors import MappingError, OutputExistsError, listing
from amaxbridge.mappings.names import is_quantizer_state, module_of

type Wanted = Mapping[str, Sequence[str] | None]
"""Path → the tensors to read from it: None for all of them, an empty list for none."""


def process_file(
    inverse_weight_map: Wanted,
    save_path: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    device: str | torch.device | None = None,
    converter: str | Converter | Sequence[Converter] | None = None,
) -> tuple[int, dict[str, str]]:
    """Quantizes what one output file is made from, and writes the file.

    Args:
        inverse_weight_map: path → the tensors to read from it, None for all; see
            `build_microscale_inverse_weight_maps`. A fused group may be incomplete where it is so in the checkpoint.
        save_path: the file to write, in one move when it is whole.
        scheme, ignore, device, converter: as in `model_free_ptq`.

    Returns:
        Bytes of all tensors, and tensor → file name.
    """
    save_path = resolved_output(save_path)
    if save_path.exists() and not save_path.is_file():  # a directory, or a device: it would be replaced
        raise OutputExistsError(f"{save_path} exists and is not a file: choose another output")
    with (
        _file_plan(inverse_weight_map, save_path, scheme, ignore, converter) as (plan, sources),
        StagedDirectory(save_path) as staged,
    ):
        layout = plan.layout if plan.layout.shards else Layout((Shard.of(save_path.name, {}),))
        staged.open(layout)
        with BundleWriter(staged, layout, plan.finalizer, plan.sizes) as writer:
            write_bundles(plan, writer, devices=devices_of(device)[:1])
        for source in sources:
            source.check_unchanged()
        with explaining(save_path):
            (staged.path / save_path.name).replace(save_path)
    return layout.total_size, layout.weight_map


process_file_microscale_scheme = process_file
"""A scheme without groups is one with groups of one."""


def validate_file(
    inverse_weight_map: Wanted,
    save_path: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    device: str | torch.device | None = None,
    converter: str | Converter | Sequence[Converter] | None = None,
) -> None:
    """Checks, on headers alone, that `process_file` can do its work, and that whatever is targeted has two dims.

    Raises:
        MappingError: weights that cannot be quantized; all are named.
    """
    recipe = find_scheme(scheme, tuple(ignore))
    with _file_plan(inverse_weight_map, Path(save_path), scheme, ignore, converter) as (plan, _):
        specs = {name: spec for bundle in plan.bundles for name, spec in bundle.specs.items()}
        others = [
            f"{name}: {spec}"
            for name, spec in specs.items()
            if name.endswith(".weight") and len(spec.shape) != 2 and not is_quantizer_state(name)
            if recipe is not None and recipe.scheme_of(module_of(name), None) is not None
        ]
    if others:
        raise MappingError(
            f"{len(others)} weights that the scheme targets are not matrices [out, in]:{listing(others)}\n"
            "Name them in ignore"
        )


@contextmanager
def _file_plan(
    inverse_weight_map: Wanted,
    save_path: Path,
    scheme: Any,
    ignore: Iterable[str],
    converter: str | Converter | Sequence[Converter] | None,
) -> Iterator[tuple[ShardPlan, Collection[SafetensorsFile]]]:
    """The plan of one output file, and its sources while they are open."""
    recipe = find_scheme(scheme, tuple(ignore))
    named, chain = chain_of(converter)
    with ExitStack() as stack:
        files = {str(path): stack.enter_context(SafetensorsFile(Path(path))) for path in inverse_weight_map}
        wanted = {
            str(path): list(files[str(path)].tensors if names is None else names)
            for path, names in inverse_weight_map.items()
        }
        maps = {save_path.name: wanted}
        config, directory = _config_beside(files)
        stored = {
            name: files[path].tensors[name]
            for path, names in wanted.items()
            for name in names
            if name in files[path].tensors
        }
        source = None if chain else recognize(stored, declared_quantization(config, directory), wanted=named)
        known = architecture_of(config) or GUESS
        try:
            plan = plan_shards(maps, files, recipe, None, config, known, source=source, chain=chain)
        except NothingToQuantizeError:
            plan = plan_shards(maps, files, None, None, config, known, source=source, chain=chain)
        yield plan, files.values()


def _config_beside(paths: Iterable[str]) -> tuple[Mapping[str, Any], Path | None]:
    """config.json of the directory that the files are in, and the directory; nothing where there is none."""
    directories = {Path(path).absolute().parent for path in paths}
    found = [directory for directory in sorted(directories) if (directory / CONFIG_FILE).is_file()]
    return (read_config_json(found[0]), found[0]) if found else ({}, None)
