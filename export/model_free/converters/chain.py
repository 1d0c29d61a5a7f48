"""Converters of others, one after the other: what they check, what they make, and what they say of it.

What a converter makes must be known before anything is written. Most can be run on the meta device. Where one cannot
(AutoAWQ's, which looks at values), it is run on the tensors themselves, once for each kind of module.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from amaxbridge.export.model_free.converters.protocol import Converter
from amaxbridge.export.quant_config import QuantConfig, read_quant_config
from amaxbridge.export.schemes import COMPRESSED_TENSORS
from amaxbridge.mappings.errors import AmaxbridgeError, CheckpointError, listing
from amaxbridge.mappings.extras import need
from amaxbridge.mappings.names import kind_of
from amaxbridge.mappings.tensors import TensorSpec

type _Kind = tuple[tuple[str, TensorSpec], ...]


@dataclass(slots=True)
class ConverterChain:
    """Converters in their order.

    Raises:
        CheckpointError: in every method, if a converter refuses its input; names the tensors.
    """

    converters: Sequence[Converter]
    _made: dict[tuple[_Kind, tuple[str, ...]], dict[str, TensorSpec]] = field(default_factory=dict, init=False)

    def plan(self, specs: Mapping[str, TensorSpec], read: Callable[[], dict[str, Tensor]]) -> dict[str, TensorSpec]:
        """Checks some tensors, and returns what will be made of them.

        Args:
            specs: the tensors.
            read: reads them, if they must be looked at.
        """
        tensors: dict[str, Tensor] | None = {name: spec.meta() for name, spec in specs.items()}
        said: tuple[str, ...] | None = ()
        for converter in self.converters:
            if tensors is None:
                break
            said = self._validated(converter, tensors)
            tensors = _on_meta(converter, tensors)
        if tensors is not None:
            return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        kind = tuple((kind_of(name), spec) for name, spec in specs.items())
        names = {kind_of(name): name for name in said or ()}
        key = kind, tuple(sorted(names))
        if said is None or len(names) < len(said) or key not in self._made:
            made = {name: TensorSpec.of(tensor) for name, tensor in self.process(read()).items()}
            if said is None or len(names) < len(said) or set(said) != made.keys():
                return made
            self._made[key] = {kind_of(name): spec for name, spec in made.items()}
        return {names[each]: spec for each, spec in self._made[key].items()}

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the converters make of some tensors."""
        for converter in self.converters:
            with _refusal(tensors):
                tensors = converter.process(dict(tensors))
        return tensors

    def quantization(self, raw: Mapping[str, Any] | None) -> QuantConfig:
        """The quantization that the converters leave, of a source with this `quantization_config`."""
        config = _of_compressed_tensors(raw)
        for converter in self.converters:
            if hasattr(converter, "update_config"):
                config = converter.update_config(config)
        if config is not None and hasattr(config, "model_dump"):
            config = config.model_dump(mode="json")
        return read_quant_config(config)

    def model_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json as the converters change it."""
        changed = copy.deepcopy(dict(config))
        for converter in self.converters:
            if hasattr(converter, "update_model_config"):
                changed = converter.update_model_config(changed)
        return changed

    def _validated(self, converter: Converter, tensors: Mapping[str, Tensor]) -> tuple[str, ...] | None:
        """Names of what a converter says that it will make; None if it does not say."""
        if not hasattr(converter, "validate"):
            return None
        with _refusal(tensors):
            said = converter.validate(dict(tensors))
        return None if said is None else tuple(said)


@contextmanager
def _refusal(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Turns what a converter raises on tensors that it is not for into an error that names them."""
    try:
        yield
    except AmaxbridgeError:
        raise
    except Exception as error:  # a converter may raise anything
        shown = [f"{name}: {TensorSpec.of(tensor)}" for name, tensor in tensors.items()]
        raise CheckpointError(f"the converter refuses{listing(shown)}\n{type(error).__name__}: {error}") from error


def _on_meta(converter: Converter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What a converter makes of tensors without values; None if it needs values to tell."""
    try:
        made = converter.process(dict(tensors))
    except Exception:  # it may raise anything; `ConverterChain.plan` then runs it on the tensors themselves, and raises
        return None
    return made if all(isinstance(tensor, Tensor) for tensor in made.values()) else None


def _of_compressed_tensors(raw: Mapping[str, Any] | None) -> Any:
    """A `quantization_config` as compressed-tensors' own object, which its converters extend; None if it is not its."""
    config = read_quant_config(raw)
    if not config.groups or not raw or config.method != COMPRESSED_TENSORS:
        return None
    need("A converter after compressed-tensors", "compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig  # imported here, because it takes seconds

    return QuantizationConfig.model_validate({key: value for key, value in raw.items() if key != "version"})
