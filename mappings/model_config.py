"""The sizes of a model that mappings read: they decide how Megatron fuses and shards its parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

EXPERT_COUNTS = ("num_moe_experts", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""The names of the number of routed experts in Megatron, its modules and Hugging Face configurations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes of a model, each named as in Megatron's `TransformerConfig` or model class.

    A size is None if the model has no such module or its configuration does not say; mappings that need it then fail.

    Args:
        num_attention_heads: query heads.
        num_query_groups: key and value heads; None if as many as query heads.
        attention_output_gate: each query head has an output gate beside it.
        q_lora_rank, kv_lora_rank, qk_pos_emb_head_dim: widths of multi-head latent attention.
        mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim: sizes of a Mamba-2 mixer.
        linear_num_key_heads, linear_key_head_dim, linear_num_value_heads, linear_value_head_dim: sizes of a gated delta
            net.
        num_moe_experts: routed experts in a layer.
        vocab_size: rows of the embedding on the Hugging Face side.
        padded_vocab_size: rows of Megatron's embedding; None for no padding.
        num_labels: rows of the head of a classifier.
        transformer_impl: the implementation of its layers: `local` for Megatron-Core's, `transformer_engine`, …
    """

    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    attention_output_gate: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_pos_emb_head_dim: int | None = None
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    mamba_num_groups: int | None = None
    mamba_state_dim: int | None = None
    linear_num_key_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_num_value_heads: int | None = None
    linear_value_head_dim: int | None = None
    num_moe_experts: int | None = None
    vocab_size: int | None = None
    padded_vocab_size: int | None = None
    num_labels: int | None = None
    transformer_impl: str = "local"

    @classmethod
    def of(cls, source: object) -> Self:
        """The sizes in a configuration.

        Args:
            source: an object with attributes or items of these names: a `TransformerConfig`, a family's table of
                config.json, the settings of `megatron_settings.from_arguments`; a ModelConfig; or None if nothing is
                known.
        """
        if isinstance(source, cls):
            return source
        found = {each.name: _look_up(source, each.name) for each in fields(cls)}
        found["num_moe_experts"] = number_of_experts(source)
        return cls(**{name: value for name, value in found.items() if value is not None})

    @classmethod
    def of_module(cls, module: object) -> Self:
        """The sizes in the `config` of a live module. The module itself may have the number of experts."""
        config = cls.of(getattr(module, "config", None))
        return config if config.num_moe_experts else replace(config, num_moe_experts=number_of_experts(module))

    def padded_to(self, multiple: int) -> Self:
        """A copy whose vocabulary is padded to a multiple, as Megatron pads it to shard it over ranks."""
        (rows,) = self.sizes("vocab_size")
        return replace(self, padded_vocab_size=rows + -rows % multiple)

    def sizes(self, *names: str) -> list[int]:
        """The sizes with these names.

        Raises:
            ValueError: some sizes are unknown. The message names them.
        """
        found = {name: getattr(self, name) for name in names}
        unknown = [name for name, size in found.items() if size is None]
        if unknown:
            raise ValueError(f"the configuration of the model does not say {', '.join(unknown)}")
        return list(found.values())


def number_of_experts(config: object) -> int | None:
    """The number of routed experts in Megatron's or Hugging Face's configuration, None without experts."""
    counts = (_look_up(config, name) for name in EXPERT_COUNTS)
    return next((count for count in counts if isinstance(count, int) and count), None)


def _look_up(source: object, name: str) -> Any:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
