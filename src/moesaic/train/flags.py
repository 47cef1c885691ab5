"""The settings of `moesaic train`, one group of flags a class; `moesaic train --help` prints the docstrings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class TextOptions:
    """What the model learns from."""

    data: str = "stdlib"
    """The training data: 'stdlib' (the source code of Python's standard library), a folder of text files, a file, or
    the name or path of a dataset of the `datasets` library. Files with rows, such as .jsonl, hold text or
    conversations. Conversations have the columns 'messages', 'prompt' and 'completion', 'conversations' (ShareGPT), or
    'instruction' and 'output' (Alpaca)."""
    text_column: str | None = None
    """The column with the text, for rows that are not conversations. By default 'text'."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of a conversation are learned: all messages of the assistant, its last message only, or every token.
    """
    packing: bool = True
    """Put several conversations into one row of --seq-len tokens. They do not see each other. Without packing each
    conversation has its own row, with padding."""
    tokenizer: str | None = None
    """A transformers tokenizer: a folder or a name. By default the tokenizer of a pretrained --model. For a new model
    a byte-level BPE tokenizer is trained on the text and cached; its size is the model's vocab_size."""


@dataclass(frozen=True)
class ModelOptions:
    """The model, and how it computes."""

    model: str = "qwen3-moe-small"
    """To fine-tune a pretrained model: a folder with weights, or a name on the Hugging Face hub. To train a new model:
    the name of a config in this package, a config.json, or a folder with a config.json and no weights."""
    ignore_unexpected: bool = False
    """Skip tensors in the files of a pretrained --model that its language model does not have, such as a vision model
    or MTP layers. The program prints how many."""
    compute: Literal["dtensor", "local"] = "dtensor"
    """Run the experts' operators on DTensors or on local tensors. The results are the same."""
    capacity: int | None = None
    """In each layer every process sends room for this many copies of tokens to every other. Then sizes are fixed, and
    the host does not wait for counts from the device. If a step routes more copies, the run stops before any weight
    changes, and the message says how many there were. By default a process sends exactly the tokens that there are."""
    recompute: Literal["none", "experts", "selective", "full"] = "none"
    """What the backward pass computes again, to save memory. none: nothing. experts: the hidden activations of experts.
    selective: everything but products with dense weights, attention and exchanged tokens. full: each layer. The results
    are the same."""
    reshard_after_forward: bool = True
    """Free the gathered weights (FSDP2) of a layer after its forward pass, and gather them again for its backward pass.
    Otherwise they are kept, which needs more memory but sends less."""
    compile: bool = False
    """Compile each layer with torch.compile. The first steps take long."""
    dtype: Literal["fp32", "bf16", "pure-bf16"] = "fp32"
    """The dtype of the computation; bf16 uses autocast. Weights and optimizer state are always fp32: pure-bf16 is an
    error that says why."""
    main_grads: bool = False
    """Let the backward pass add the gradients of expert weights to fp32 buffers. With --dtype bf16 they are then not
    rounded to bf16. Needs --compute local and ep * etp = the number of processes."""


@dataclass(frozen=True)
class AdapterOptions:
    """Low-rank adapters (LoRA) of a pretrained model."""

    lora_rank: int = 0
    """Train low-rank adapters (LoRA) of this rank in place of the weights. Needs the peft package. 0: no adapters."""
    lora_alpha: float | None = None
    """Adapters are scaled by lora_alpha / lora_rank. By default this factor is 2."""
    lora_rslora: bool = False
    """Scale adapters by lora_alpha / sqrt(lora_rank) instead (rank-stabilised LoRA)."""
    lora_dropout: float = 0.0
    """The share of numbers in the adapters' inputs that are set to zero, at random in each step."""
    lora_on: Literal["all", "attention", "experts"] = "all"
    """Where to put adapters: on the attention projections, on the experts, or on both (all)."""
    quantize_experts: Literal["nf4", "mxfp4", "int8"] | None = None
    """Store the weights of the experts in 4 or 8 bits while adapters are trained (QLoRA). Each process quantises its
    part while it reads it. In the export the adapters are merged into the original weights, not into the quantised
    ones. If the files have experts in MXFP4, as those of gpt-oss, use mxfp4; they are read as they are."""


@dataclass(frozen=True)
class LayoutOptions:
    """How processes share the work. Their number is pp * cp * tp * dp_shard * dp_replicate. ep * etp must divide cp *
    tp * dp_shard * dp_replicate."""

    pp: int = 1
    """Pipeline parallel size: the layers are split over this many groups of ranks."""
    microbatches: int | None = None
    """With --pp: the batch of a rank is cut into this many parts, which different stages compute at the same time. With
    --accumulate this is so in each pass. By default twice --pp. The balance loss balances the tokens of each part."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"] = "1f1b"
    """With --pp: the order of forward and backward passes. gpipe and 1f1b have one stage on a rank, the others two or
    more. zero-bubble and zbv need dp_shard, dp_replicate and edp 1."""
    stages_per_rank: int | None = None
    """With --pp: stages of each rank. By default 1 for gpipe and 1f1b, 2 for the other schedules."""
    layers_per_stage: tuple[int, ...] = ()
    """With --pp: the number of layers of each stage, beginning with the first stage. By default as equal as possible.
    """

    tp: int = 1
    """Tensor parallel size: attention heads, and the sequence between attention layers, are split over this many ranks.
    """
    cp: int = 1
    """Context parallel size: this many ranks share each sequence, and attention gathers their keys and values."""
    ep: int = 1
    """Expert parallel size: the experts are split over this many ranks."""
    etp: int = 1
    """Expert tensor parallel size: the matrices of each expert are split over this many ranks."""
    dp_shard: int | None = None
    """Data parallel size with sharded weights (FSDP2). By default all ranks that the other sizes leave."""
    dp_replicate: int = 1
    """Data parallel size with replicated weights: this many groups of ranks each hold all weights."""
    ranks_per_node: int | None = None
    """How many processes are on each node (machine): ranks 0 to n-1 on the first, and so on. If --ep spans nodes, a
    token is then sent to each node once, not to each of its ranks; 1 turns that off. By default torchrun says how many,
    and this is done if at least a tenth less crosses between nodes."""
    device: str | None = None
    """Device type: cpu, cuda, ... By default the accelerator, if there is one."""


@dataclass(frozen=True)
class OptimisationOptions:
    """Steps, batches, learning rate and losses."""

    steps: int = 160
    """Total number of optimizer steps."""
    batch_size: int = 16
    """Sequences in a step, over all ranks: a multiple of the number of data parallel ranks times --accumulate times
    --microbatches."""
    accumulate: int = 1
    """The number of forward and backward passes in a step. Each has a part of the batch, which needs less memory.
    Gradients are summed over the processes once in a step. The balance loss balances the tokens of each pass. With --pp
    each pass is a schedule of --microbatches."""
    seq_len: int | None = None
    """Tokens in a sequence. By default 128 for text. For conversations it is the length of the longest one, but at most
    4,096 and at most the number of positions of the model."""
    lr: float | None = None
    """Peak learning rate. By default 3e-3 for a new model, 1e-5 for a pretrained one and 1e-4 for adapters."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """The learning rate after the warm-up: a cosine; or (wsd) constant, with a linear decay in the last 20 % of the
    steps."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises from zero to its peak. By default 20, but at most an eighth of --steps."""
    min_lr_ratio: float = 0.1
    """The last learning rate, as a fraction of the peak."""
    weight_decay: float | None = None
    """Weight decay, for matrices only. By default 0.1 for a new model and 0 for a pretrained one."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The two decay rates of AdamW."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all weights. muon: Muon for the matrices of hidden layers and experts, and AdamW for embeddings,
    output head, routers, norms and biases."""
    muon_lr: float | None = None
    """Peak learning rate of Muon. By default that of --lr."""
    muon_adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How Muon scales its learning rate by the shape of a matrix. match_rms_adamw: updates are as large as those of
    AdamW, so --lr suits both. original: as first published; then give a --muon-lr, about 0.02."""
    muon_momentum: float = 0.95
    """The decay rate of Muon's momentum."""
    muon_steps: int = 5
    """How many Newton-Schulz iterations Muon makes."""
    muon_dtype: Literal["bf16", "fp32"] = "bf16"
    """The dtype of these iterations. fp32 is faster on processors without bf16 products."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm. 0: no clipping."""
    aux_loss_coef: float | None = None
    """Weight of the load-balancing loss. By default 0.05 for a new model. For a pretrained model it is 0, or
    router_aux_loss_coef of its config if that sets output_router_logits, as in transformers."""
    aux_loss: Literal["batch", "sequence", "pooled"] | None = None
    """What the load-balancing loss balances. batch: all tokens, in each layer. sequence: each sequence, in each layer.
    pooled: all tokens of all layers together, as in transformers. By default batch, or pooled if the config sets
    output_router_logits."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss."""
    seed: int = 0
    """Seed for everything random, such as new weights and the order of the data."""


@dataclass(frozen=True)
class RunOptions:
    """The run folder, checkpoints, and how to continue a run."""

    config: Path | None = None
    """A file of settings: YAML or TOML with the names of these flags, or the config.json of a run. Flags override it.
    The config.json in a run folder has all settings of the run."""
    out: Path | None = None
    """The run folder. By default a new folder, runs/<date>-<time>."""
    resume: Annotated[bool | Literal["auto"], tyro.conf.arg(constructor=bool)] = False
    """Continue from the last checkpoint in --out, or of the latest run in runs/. The settings are those of that run;
    flags that you give override them. With '--resume auto' a new run starts if there is no checkpoint yet. This also
    happens when torchrun restarts a run (--max-restarts)."""
    choose_again: bool = False
    """With --resume on CPU: compute the experts with the implementations that are the fastest on this machine. By
    default the run keeps those that it began with, so that its numbers are the same in every bit."""
    save_every: int = 50
    """Steps between checkpoints. There is always a checkpoint at the end. 0: only that one."""
    keep: int = 2
    """How many checkpoints to keep."""
    keep_best: bool = False
    """Write a checkpoint whenever a measurement is better than all before it. Keep the best one, and export it at the
    end. Needs --eval-every."""
    export_dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of the weights in the export."""
    async_checkpoints: bool = False
    """Write checkpoints in the background: training waits only until they are copied to the host's memory. The program
    ends after the last one is written."""
    timeout: int = 300
    """Seconds that ranks wait in a step for a rank that does not answer. Then all end, and name that rank. The first
    step, measurements, checkpoints and the export may take as long as they need."""


@dataclass(frozen=True)
class MeasuringOptions:
    """What is measured and shown."""

    log_every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events, if the tensorboard package is installed."""
    peak_tflops: float | None = None
    """The peak of the device of one process, in 10^12 operations a second, to compute which fraction of it the model
    uses (MFU). Known for some GPUs with --dtype bf16. For others there is no MFU without this flag."""
    profile_steps: str | None = None
    """Record what each process does in these steps, such as 10 or 10:12 (both included), with torch.profiler. The
    traces are in profile/ of the run folder, for Perfetto or chrome://tracing."""
    eval_every: int = 0
    """Steps between measurements on held-out data. There is always one at the end, and one before the first step of a
    pretrained model. 0: only these."""
    eval_bytes: int = 131_072
    """How many bytes of held-out data to measure, and of each set of --eval-data."""
    eval_data: tuple[str, ...] = ()
    """More data to measure, in addition to the held-out part of --data: files, folders or datasets, as for --data.
    --early-stop and --keep-best use the score of the first set, or without any the score of the held-out part."""
    early_stop: int = 0
    """End the training when this many measurements in a row were not better than the best one before them. 0: never.
    Needs --eval-every."""
    prompt: str | None = None
    """What the trained model continues at the end: a text, or a message of the user. By default 'def main(', or a
    held-out conversation without its last answer."""
    sample_tokens: int = 120
    """How many tokens the model adds to the prompt."""
