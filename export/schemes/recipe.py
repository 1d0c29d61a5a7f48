"""Which scheme each module gets: one for all, several for different modules, or what its quantizers say."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.schemes.scheme import Scheme
from amaxbridge.export.schemes.targets import EVERY_LINEAR, check_sound, is_named, is_targeted
from amaxbridge.mappings.errors import UsageError

_LEFT_ALONE = re.compile(
    r"(^|.*\.)(lm_head|output_layer|score|gate|router|router\.\w+|shared_expert_gate|eh_proj|\w*norm\d*|\w*embed\w*|wte|wpe)"
    r"|(^|.*\.)(vision\w*|visual|audio\w*|multi_modal_projector|mm_projector|mtp)\..*"
)


class Recipe(Protocol):
    """What chooses the schemes."""

    @property
    def name(self) -> str:
        """As users gave it."""

    @property
    def adopts_codes(self) -> bool:
        """True if weights that training keeps as codes and scales are written as they are, where a scheme can."""

    @property
    def ignore(self) -> tuple[str, ...]:
        """Targets that are left as they are, whatever else is said of them."""

    def scheme_of(self, module: str, state: QuantState | None) -> Scheme | None:
        """The scheme of a linear module, None to leave it as it is. Without a state, nothing was calibrated.

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
    """Groups in order; the first that targets a module is its group. With a state, of its quantized modules only."""

    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...] = ()
    adopts_codes: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_sound((*self.ignore, *(target for group in self.groups for target in group.targets)))

    @classmethod
    def of(cls, scheme: Scheme, ignore: Iterable[str] = ()) -> "Groups":
        """One scheme for everything."""
        return cls((SchemeGroup(scheme),), tuple(ignore))

    @property
    def name(self) -> str:
        return "+".join(group.scheme.name for group in self.groups)

    def scheme_of(self, module: str, state: QuantState | None) -> Scheme | None:
        if is_targeted(module, self.ignore) or (state is not None and module not in state.formats):
            return None
        if state is None and is_left_alone(module):
            return next((group.scheme for group in self.groups if is_named(module, group.targets)), None)
        return next((group.scheme for group in self.groups if is_targeted(module, group.targets)), None)


@dataclass(frozen=True, slots=True)
class FromQuantizers:
    """`scheme=auto`: the first of `schemes` that writes what a module's quantizers are."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...] = ()
    name: str = "auto"
    adopts_codes: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_sound(self.ignore)

    def scheme_of(self, module: str, state: QuantState | None) -> Scheme | None:
        if state is None:
            raise UsageError("scheme=auto reads the formats from a quantizer state, and there is none")
        if module not in state.formats or is_targeted(module, self.ignore):
            return None
        found, inputs = state.formats[module], state.calibrates_input(module)
        for scheme in self.schemes:
            if scheme.format == found and scheme.needs_input_amax == inputs:
                return scheme
        raise UsageError(
            f"{module} has {found} weights and {'calibrated' if inputs else 'no calibrated'} inputs, which no scheme "
            "writes; choose other quantizers, or a scheme by name"
        )


def is_left_alone(module: str) -> bool:
    """Whether a module is no target of `Linear` where nothing was calibrated: only its own name brings it in.

    Heads, embeddings, routers and gates of shared experts, norms, towers for images and sound, and layers for
    multi-token prediction, as the field names them. Engines run these unquantized.
    """
    return _LEFT_ALONE.fullmatch(module) is not None
