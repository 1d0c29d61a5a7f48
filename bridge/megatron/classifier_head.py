"""The head of a reward model, critic or classifier in place of a Megatron model's output layer."""

from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from amaxbridge.bridge.hf import HFModel
from amaxbridge.mappings.families.classifiers import TOKENS
from amaxbridge.mappings.family import number_of_labels


class ClassifierHead(nn.Linear):
    """A linear that every tensor-parallel rank has whole, called as Megatron calls its output layer."""

    def __init__(self, inputs: int, labels: int, *, bias: bool, sequence_parallel: bool) -> None:
        super().__init__(inputs, labels, bias=bias)
        self.sequence_parallel = sequence_parallel
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]  # Megatron sums gradients by it

    def forward(  # type: ignore[override]  # Megatron's interface of output layers
        self, hidden: Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[Tensor, None]:
        """Values of all tokens, fp32.

        Args:
            hidden: `[tokens, batch, hidden]`, this rank's tokens in sequence parallelism.
            weight: the embedding of a model that was tied before it had this head; unused.
        """
        del weight, runtime_gather_output
        values = super().forward(hidden).float()
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def with_classifier_head(chunk: LanguageModule, hf: HFModel) -> LanguageModule:
    """Replaces the output layer, if there is one and the model is a classifier."""
    if hf.family.classifier_of is None or not chunk.post_process:
        return chunk
    head = ClassifierHead(
        chunk.config.hidden_size,
        number_of_labels(hf.config),
        bias=hf.family.architectures[0].endswith(TOKENS) and hf.config.get("token_classification_bias", True),
        sequence_parallel=chunk.config.sequence_parallel,
    )
    chunk.output_layer = head.to(next(chunk.parameters()).device)
    chunk.share_embeddings_and_output_weights = False
    return chunk
