#!/usr/bin/env bash
# torchtitan trains Qwen3-30B-A3B on the 8 GPUs of one machine, with moesaic's exchange of tokens and experts.
#
#   examples/torchtitan/qwen3_8_gpus.sh [any option of torchtitan]
#
# Of torchtitan's repository it needs the tokenizer: scripts/download_hf_assets.py --repo_id Qwen/Qwen3-30B-A3B
set -euo pipefail

# 8 GPUs = dp 4 x tp 2 for attention = ep 4 x etp 2 for experts. OVERRIDE= is torchtitan's own.
OVERRIDE=${OVERRIDE-'moesaic.integrations.torchtitan.routed_experts={"etp": 2}'}

exec torchrun --standalone --nproc-per-node "${GPUS:-8}" -m torchtitan.train \
  --module qwen3 --config qwen3_30b_a3b \
  --parallelism.spmd_backend partial_dtensor \
  --parallelism.tensor_parallel_degree 2 \
  --parallelism.expert_parallel_degree 8 \
  --training.disable_cuda_graphs \
  ${OVERRIDE:+--override.imports "$OVERRIDE"} \
  "$@"
