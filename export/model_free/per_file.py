"""The founding functions of model-free PTQ: one output file at a time, from a map of what to read for it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.disk.staging import StagedDirectory
from amaxbridge.export.model_free.inverse_weight_maps import Converter
from amaxbridge.export.model_free.pipeline import devices_of, write_bundles
from amaxbridge.export.model_free.shard_plan import ShardPlan, plan_shards
from amaxbridge.export.output.finished_directory import BundleWriter
from amaxbridge.export.schemes import find_scheme


def process_file(
    inverse_weight_map: Mapping[str, Sequence[str] | None],
    save_path: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    device: str | torch.device | None = None,
    converter: Converter | None = None,
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
    save_path = Path(save_path).absolute()
    with (
        _file_plan(inverse_weight_map, save_path, scheme, ignore, converter) as plan,
        StagedDirectory(save_path) as staged,
    ):
        staged.open(plan.layout)
        with BundleWriter(staged, plan.layout, plan.finalizer, plan.sizes) as writer:
            write_bundles(plan, writer, devices=devices_of(device)[:1])
        (staged.path / save_path.name).replace(save_path)
    return plan.layout.total_size, plan.layout.weight_map


process_file_microscale_scheme = process_file
"""A scheme without groups is one with groups of one."""


def validate_file(
    inverse_weight_map: Mapping[str, Sequence[str] | None],
    save_path: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    device: str | torch.device | None = None,
    converter: Converter | None = None,
) -> None:
    """Checks, on headers alone, that `process_file` can do its work.

    Raises:
        MappingError: weights that cannot be quantized; all are named.
    """
    with _file_plan(inverse_weight_map, Path(save_path), scheme, ignore, converter):
        pass


@contextmanager
def _file_plan(
    inverse_weight_map: Mapping[str, Sequence[str] | None],
    save_path: Path,
    scheme: Any,
    ignore: Iterable[str],
    converter: Converter | None,
) -> Iterator[ShardPlan]:
    """The plan of one output file, while its sources are open."""
    recipe = find_scheme(scheme, tuple(ignore))
    with ExitStack() as stack:
        files = {str(path): stack.enter_context(SafetensorsFile(Path(path))) for path in inverse_weight_map}
        wanted = {
            str(path): list(files[str(path)].tensors if names is None else names)
            for path, names in inverse_weight_map.items()
        }
        yield plan_shards({save_path.name: wanted}, files, recipe, None, {}, () if converter is None else (converter,))
