"""A registry: all mappings of a family, found by name in either direction.

A look-up is one dictionary access: the name with every number replaced by `*` is the key. Patterns with `**` are
few and tried one by one. Overlapping patterns are refused when the registry is built, so the order of mappings
never decides.

A model may have exceptions: names that a wildcard would match but that mean something else in this model (an MTP layer,
which Hugging Face numbers like a decoder layer). They are a registry of their own, asked first.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import chain, combinations, product

from amaxbridge.mappings.errors import AmbiguousMappingError, listing
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import overlap, pattern

_NUMBERS = re.compile(r"[\d*]+")


class MappingRegistry:
    """Mappings by Megatron and by Hugging Face name.

    Args:
        alternatives: mappings for Megatron names that some models have in place of other names, with the same Hugging
            Face names (an expert's own quantizer in place of a shared one). Found by Megatron name only.

    Raises:
        AmbiguousMappingError: two mappings could claim the same Megatron name, or write the same Hugging Face name.
    """

    def __init__(
        self,
        *mappings: MegatronParamMapping,
        alternatives: Iterable[MegatronParamMapping] = (),
        file: str | None = None,
    ) -> None:
        self.file = file
        self._mappings = (*mappings, *alternatives)
        self._by_megatron = _Index((mapping.megatron_param, mapping) for mapping in self._mappings)
        self._by_hf = _Index((target, mapping) for mapping in mappings for target in mapping.targets)
        self._exceptions: MappingRegistry | None = None

    def with_exceptions(self, exceptions: "MappingRegistry") -> "MappingRegistry":
        """A copy in which `exceptions` win, in both directions."""
        registry = copy(self)
        registry._exceptions = exceptions
        return registry

    def megatron_to_hf_lookup(self, megatron_param_name: str) -> MegatronParamMapping | None:
        """The resolved mapping that takes a global Megatron name, or None."""
        if self._exceptions and (exception := self._exceptions.megatron_to_hf_lookup(megatron_param_name)):
            return exception
        found = self._by_megatron.find(megatron_param_name)
        return found[1].resolve(found[2]) if found else None

    def hf_to_megatron_lookup(self, hf_param_name: str) -> MegatronParamMapping | None:
        """The resolved mapping that writes a Hugging Face name, or None."""
        if self._exceptions and (exception := self._exceptions.hf_to_megatron_lookup(hf_param_name)):
            return exception
        found = self._by_hf.find(hf_param_name)
        if found is None:
            return None
        target, mapping, captures = found
        megatron_name = pattern(target).translate(captures, mapping.pattern)
        matched = mapping.pattern.match(megatron_name)
        assert matched is not None, f"{mapping.megatron_param} does not match {megatron_name}"
        return mapping.resolve(matched)

    def get_all_mappings(self) -> list[MegatronParamMapping]:
        """All mappings, unresolved, in the order given, alternatives last; the exceptions after them."""
        return [*self._mappings, *(self._exceptions or ())]

    def __iter__(self) -> Iterator[MegatronParamMapping]:
        return iter(self.get_all_mappings())

    def __len__(self) -> int:
        return len(self.get_all_mappings())


MegatronMappingRegistry = MappingRegistry
"""The name that Megatron-Bridge has for it."""


class _Index:
    """Patterns of one side, each with its mapping.

    A name and a pattern without `**` can only match if they have the same shape: every run of digits and `*` replaced
    by one `*`.
    """

    def __init__(self, entries: Iterable[tuple[str, MegatronParamMapping]]) -> None:
        self._by_shape: dict[str, list[tuple[str, MegatronParamMapping]]] = {}
        self._with_paths: list[tuple[str, MegatronParamMapping]] = []
        for text, mapping in entries:
            if "**" in text:
                self._with_paths.append((text, mapping))
            else:
                self._by_shape.setdefault(_NUMBERS.sub("*", text), []).append((text, mapping))
        self._refuse_overlaps()

    def find(self, name: str) -> tuple[str, MegatronParamMapping, Sequence[str]] | None:
        """The pattern that matches `name`, its mapping and its captures."""
        for text, mapping in (*self._by_shape.get(_NUMBERS.sub("*", name), ()), *self._with_paths):
            captures = pattern(text).match(name)
            if captures is not None:
                return text, mapping, captures
        return None

    def _refuse_overlaps(self) -> None:
        plain = [text for entries in self._by_shape.values() for text, _ in entries]
        paths = [text for text, _ in self._with_paths]
        alike = (combinations([text for text, _ in entries], 2) for entries in self._by_shape.values())
        suspects = chain(chain.from_iterable(alike), combinations(paths, 2), product(paths, plain))
        clashes = [f"{one!r} and {other!r}" for one, other in suspects if overlap(one, other)]
        if clashes:
            raise AmbiguousMappingError(f"mappings overlap, so a name would have two owners:{listing(clashes)}")
