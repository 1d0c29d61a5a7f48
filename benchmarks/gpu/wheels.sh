#!/bin/sh
# Downloads into .wheels/ what a GPU machine without a network lacks: x86-64 wheels for Python 3.12.
# It has PyTorch, Triton, transformers, einops and numba of its own; `benchmarks/gpu/README.md` lists them.
set -eu
cd "$(dirname "$0")/../.."
rm -rf .wheels
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform any --dest .wheels \
    megatron-core==0.19.2 nvidia-modelopt==0.47.0 compressed-tensors==0.19.0 'pulp<4' \
    pydantic==2.12.4 pydantic-core==2.41.5 typing-inspection==0.4.2 annotated-types==0.7.0 \
    loguru==0.7.3 hydra-core==1.3.2 omegaconf==2.3.0 \
    llmcompressor==0.14.0.1 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 "$@"
# The one dependency that PyPI has as source only.
python3 -m pip wheel --quiet --no-deps --wheel-dir .wheels antlr4-python3-runtime==4.9.3
du -sh .wheels
