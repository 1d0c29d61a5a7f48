"""My Llama in transformers, and its registration there.

A family file that imports this has every name and shape of an export compared with this model:

    import modeling_my_llama
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class MyLlamaConfig(LlamaConfig):
    model_type = "my_llama"


class MyLlamaLayer(LlamaDecoderLayer):
    def __init__(self, config: MyLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_norm, self.feed_forward = self.input_layernorm, self.mlp
        self.output_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        del self.input_layernorm, self.mlp

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:  # type: ignore[override]
        attended, _ = self.self_attn(hidden_states=self.attention_norm(hidden_states), **arguments)
        hidden_states = hidden_states + attended
        output: Tensor = self.feed_forward(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.output_norm(output)


class MyLlamaForCausalLM(LlamaForCausalLM):
    config_class = MyLlamaConfig

    def __init__(self, config: MyLlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(MyLlamaLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


AutoConfig.register(MyLlamaConfig.model_type, MyLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(MyLlamaConfig, MyLlamaForCausalLM, exist_ok=True)
