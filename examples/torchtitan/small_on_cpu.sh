#!/usr/bin/env bash
# The same with torchtitan's debug model on two CPU processes, from the root of this repository. torchtitan knows no CPU:
# tests/torchtitan/ has stand-ins for what it asks of CUDA, and draws tokens.
#
#   examples/torchtitan/small_on_cpu.sh [any option of torchtitan]
set -euo pipefail

# 2 processes = tp 2 for attention = ep 1 x etp 2 for experts. OVERRIDE= is torchtitan's own.
OVERRIDE=${OVERRIDE-'moesaic.integrations.torchtitan.routed_experts={"etp":2}'}

export OMP_NUM_THREADS=1
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.torchtitan.train \
  --module tests.torchtitan.models --config qwen3 \
  --parallelism.spmd_backend partial_dtensor \
  --parallelism.tensor_parallel_degree 2 \
  --parallelism.expert_parallel_degree 2 \
  --training.mixed_precision_param float32 \
  --training.steps 10 \
  ${OVERRIDE:+--override.imports "$OVERRIDE"} \
  "$@" activation-checkpoint:none
