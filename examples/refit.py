"""A serving engine gets the weights of a model in training after every step, quantized, without the disk.

In one terminal what stands for the engine, in another the training, each for two ranks:

    python examples/refit.py serve /tmp/refit 2
    torchrun --nproc-per-node 2 examples/refit.py train HF_DIR /tmp/refit OUT

The training is that of a reinforcement-learning loop, without the learning: every step changes the weights. The refit
is planned once, before the first step. A rank sends the tensors that it owns as it makes them; together the ranks send
every tensor once. They are those of the checkpoint that `save_hf_pretrained` writes at the end, bit for bit. The engine
here puts them into a dict. A real one would load them into its modules, and between GPUs they would go by CUDA IPC or
NCCL, not through a socket.

A run is collective: a rank that waits for its engine holds up the others. So an engine must take from all ranks as they
come, not from one after the other.
"""

import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Client, Listener, wait
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

STEPS = 2
END_OF_STEP = b""


def serve(address: str, ranks: int) -> Iterator[dict[str, Tensor]]:
    """The weights after each step, until the ranks hang up."""
    with Listener(address) as listener:
        connections = [listener.accept() for _ in range(ranks)]
    while True:
        weights: dict[str, Tensor] = {}
        sending = list(connections)
        while sending:
            for connection in wait(sending):
                try:
                    message = connection.recv_bytes()
                except EOFError:
                    return
                if message == END_OF_STEP:
                    sending.remove(connection)
                else:
                    weights |= load(message)
        yield weights
        for connection in connections:  # the weights are in use: the training may go on
            connection.send_bytes(b"taken")


def train(hf: str, address: str, output: str) -> None:
    """One rank of the training, tensor-parallel over all ranks."""
    import modelopt.torch.quantization as mtq

    from amaxbridge.bridge import AutoBridge, megatron
    from amaxbridge.bridge.live.refit import Refit

    bridge = AutoBridge.from_hf_pretrained(hf)
    with megatron.distributed(tp=int(os.environ.get("WORLD_SIZE", "1"))), Client(address) as engine:
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward)
        refit = Refit(bridge, model, scheme="nvfp4")
        for _ in range(STEPS):
            change_weights(model)
            for name, tensor in refit.run():
                engine.send_bytes(save({name: tensor.cpu().contiguous()}))
            engine.send_bytes(END_OF_STEP)
            engine.recv_bytes()
        bridge.save_hf_pretrained(model, output, scheme="nvfp4")


@torch.no_grad()
def forward(model: Any) -> None:
    """The forward pass that calibrates the quantizers."""
    tokens = torch.arange(16)[None]
    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
    model.eval()(tokens, tokens, mask)


@torch.no_grad()
def change_weights(model: Any) -> None:
    """Stands for an optimizer's step."""
    for parameter in model.parameters():
        parameter.mul_(0.75)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", address, ranks]:
            for step, weights in enumerate(serve(address, int(ranks)), 1):
                nbytes = sum(tensor.nbytes for tensor in weights.values())
                print(f"step {step}: {len(weights)} tensors, {nbytes:,} bytes")
        case ["train", hf, address, output]:
            train(hf, address, output)
        case _:
            sys.exit(__doc__)
