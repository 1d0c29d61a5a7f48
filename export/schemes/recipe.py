"""Recipes: one scheme for all modules, several for different modules, or each module's by its quantizers."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.schemes.modelopt import in_modelopt
from amaxbridge.export.schemes.scheme import COMPRESSED_TENSORS, MODELOPT_FORMAT, Scheme
from amaxbridge.export.schemes.targets import EVERY_LINEAR, check_sound, is_named, is_targeted
from amaxbridge.mappings.errors import UsageError

_LEFT_ALONE = re.compile(
    r"(^|.*\.)(lm_head|output_layer|score|gate|router|router\.\w+|shared_expert_gate|eh_proj|\w*norm\d*|\w*embed\w*|wte|wpe)"
    r"|(^|.*\.)(vision\w*|visual|audio\w*|multi_modal_projector|mm_projector|mtp|mtp_layers)\..*"
)

FORMATS = (COMPRESSED_TENSORS, MODELOPT_FORMAT)
"""The formats of quantized files that are written here."""


def is_left_alone(module: str) -> bool:
    """True if `Linear` does not target a module without calibration; only its own name does.

    These are heads, embeddings, routers and gates of shared experts, norms, image and audio towers, and layers for
    multi-token prediction, under their usual names. Engines run them unquantized.
    """
    return _LEFT_ALONE.fullmatch(module) is not None


class Recipe(Protocol):
    """Chooses the scheme of each module."""

    @property
    def name(self) -> str:
        """The name that users gave."""

    @property
    def format(self) -> str:
        """The format of the files: `compressed-tensors` or `modelopt`."""

    @property
    def adopts_codes(self) -> bool:
        """True if weights that training keeps as codes and scales are written without requantizing, if a scheme can."""

    @property
    def ignore(self) -> tuple[str, ...]:
        """Targets that stay unquantized, whatever else targets them."""

    def scheme_of(
        self, module: str, state: QuantState | None, stays_unquantized: Callable[[str], bool] = ...
    ) -> Scheme | None:
        """The scheme of a linear module; None to leave it unquantized.

        Args:
            state: of training; None if nothing was calibrated.
            stays_unquantized: modules that `Linear` does not target without calibration; by default `is_left_alone`.

        Raises:
            UsageError: no scheme fits the module's quantizers.
        """


@dataclass(frozen=True, slots=True)
class SchemeGroup:
    """A scheme and the modules it is for: full names, `re:` patterns matched from the beginning, or `Linear`: all."""

    scheme: Scheme
    targets: tuple[str, ...] = (EVERY_LINEAR,)


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups in order; the first that targets a module is its group. With a state, only its quantized modules count."""

    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...] = ()
    adopts_codes: bool = field(default=False, init=False)
    format: str = COMPRESSED_TENSORS

    def __post_init__(self) -> None:
        check_sound((*self.ignore, *(target for group in self.groups for target in group.targets)))

    @classmethod
    def of(cls, scheme: Scheme, ignore: Iterable[str] = ()) -> "Groups":
        """A recipe of one scheme for every linear module."""
        return cls((SchemeGroup(scheme),), tuple(ignore))

    @property
    def name(self) -> str:
        return "+".join(group.scheme.name for group in self.groups)

    def scheme_of(
        self, module: str, state: QuantState | None, stays_unquantized: Callable[[str], bool] = is_left_alone
    ) -> Scheme | None:
        if is_targeted(module, self.ignore) or (state is not None and module not in state.formats):
            return None
        if state is None and stays_unquantized(module):
            return next((group.scheme for group in self.groups if is_named(module, group.targets)), None)
        return next((group.scheme for group in self.groups if is_targeted(module, group.targets)), None)


@dataclass(frozen=True, slots=True)
class FromQuantizers:
    """`scheme=auto`: the first of `schemes` that fits a module's quantizers."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...] = ()
    name: str = "auto"
    adopts_codes: bool = field(default=True, init=False)
    format: str = COMPRESSED_TENSORS

    def __post_init__(self) -> None:
        check_sound(self.ignore)

    def scheme_of(
        self, module: str, state: QuantState | None, stays_unquantized: Callable[[str], bool] = is_left_alone
    ) -> Scheme | None:
        if state is None:
            raise UsageError("scheme=auto reads the formats from quantizers, and there are none: name a scheme")
        if module not in state.formats or is_targeted(module, self.ignore):
            return None
        found = state.formats[module]
        suited = (scheme.suited(found) for scheme in self.schemes)
        fitting = next((scheme for scheme in suited if scheme and reads_inputs_as(scheme, module, state)), None)
        if fitting is None:
            raise UsageError(
                f"{module} has {found} weights and {_inputs_of(module, state)}, which no scheme writes; choose other "
                "quantizers, or a scheme by name"
            )
        return fitting if self.format == COMPRESSED_TENSORS else in_modelopt(fitting)


def in_format(recipe: Groups | FromQuantizers | None, name: str) -> Groups | FromQuantizers | None:
    """The recipe for files in a format: `compressed-tensors` or `modelopt`.

    Raises:
        UsageError: unknown format, plain weights, which have none, or a scheme without a counterpart in it.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format={name}; known: {', '.join(FORMATS)}")
    if name == COMPRESSED_TENSORS:
        return recipe
    if recipe is None:
        raise UsageError(f"format={name} is of quantized weights, and scheme=none writes plain ones: leave it out")
    if isinstance(recipe, Groups):
        groups = tuple(SchemeGroup(in_modelopt(group.scheme), group.targets) for group in recipe.groups)
        return replace(recipe, groups=groups, format=name)
    return replace(recipe, format=name)


def reads_inputs_as(scheme: Scheme, module: str, state: QuantState) -> bool:
    """True if engines quantize the inputs of a module as training did."""
    if state.inputs is None:
        return scheme.needs_input_amax == state.calibrates_input(module)
    return scheme.input_format == state.inputs.get(module)


def _inputs_of(module: str, state: QuantState) -> str:
    if state.inputs is None:
        return "calibrated inputs" if state.calibrates_input(module) else "no calibrated inputs"
    return f"{state.inputs[module]} inputs" if module in state.inputs else "inputs that are not quantized"
