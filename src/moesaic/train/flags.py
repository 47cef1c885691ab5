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
    """The training data: 'stdlib' (the Python library's own sources), a folder of text files, a file, or the name or
    path of a dataset of the `datasets` library. Rows, of .jsonl for one, hold text or conversations: a column
    'messages', 'prompt' and 'completion', 'conversations' (ShareGPT), or 'instruction' and 'output' (Alpaca)."""
    text_column: str | None = None
    """The column with the text, for rows that are not conversations. By default 'text'."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of a conversation count: all messages of the assistant, its last message, or every token."""
    packing: bool = True
    """Put several conversations into one row of seq_len tokens. They do not see each other. Otherwise each
    conversation has a row of its own, with padding."""
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
    """Leave out tensors in the files of a pretrained --model that its language model does not have, such as a vision
    model or MTP layers. They are counted on the screen."""
    compute: Literal["dtensor", "local"] = "dtensor"
    """How experts compute: on DTensors or on local tensors. The results are the same."""
    capacity: int | None = None
    """Room for so many copies of tokens from each process to the experts of each other, in each layer. Then all sizes
    are known before, and no count is read from the device. A step that routes more stops the run before any weight
    changes, and the message says how many there were. By default there is as much room as is needed."""
    recompute: Literal["none", "experts", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it, from little to much: nothing; the hidden rows of the
    experts; all but products with dense weights, attention and exchanged tokens; each layer. The results are the same.
    """
    reshard_after_forward: bool = True
    """Let go of gathered weights (FSDP2) after the forward pass of a layer, and gather them again for its backward
    pass. Otherwise they are kept, which needs more memory and sends less."""
    compile: bool = False
    """Compile each layer with torch.compile. The first steps take long."""
    dtype: Literal["fp32", "bf16", "pure-bf16"] = "fp32"
    """The dtype of the computation; bf16 uses autocast. Weights and optimizer state are always fp32: pure-bf16 is
    refused, and the error says why."""
    main_grads: bool = False
    """Let the backward pass add the gradients of expert weights to fp32 buffers. With --dtype bf16 they are then not
    rounded to bf16. Needs --compute local and ep * etp = the number of processes."""


@dataclass(frozen=True)
class AdapterOptions:
    """Low-rank adapters (LoRA) of a pretrained model."""

    lora_rank: int = 0
    """Train low-rank adapters (LoRA) of this rank, and not the weights. Needs the peft package. 0: no adapters."""
    lora_alpha: float | None = None
    """Adapters are scaled by lora_alpha / lora_rank. By default this factor is 2."""
    lora_rslora: bool = False
    """Scale adapters by lora_alpha / sqrt(lora_rank) instead (rank-stabilised LoRA)."""
    lora_dropout: float = 0.0
    """The share of numbers that are zero in what adapters are applied to, other ones in each step."""
    lora_on: Literal["all", "attention", "experts"] = "all"
    """Where adapters are: in the attention projections, in the experts, or in both."""
    quantize_experts: Literal["nf4", "mxfp4", "int8"] | None = None
    """Hold the weights of the experts in 4 or 8 bits while adapters are trained (QLoRA). Each process quantises its
    part as it reads it. The export has the adapters merged into the weights before they were quantised. Files that
    have experts in MXFP4, as those of gpt-oss, need mxfp4 here; they are read as they are."""


@dataclass(frozen=True)
class LayoutOptions:
    """How processes share the work. pp * cp * tp * dp_shard * dp_replicate is their number. ep * etp must divide it,
    without pp."""

    pp: int = 1
    """Pipeline parallel size: the layers are split over this many groups of ranks. Each passes on what it computed."""
    microbatches: int | None = None
    """With --pp: how many parts a rank's part of the batch is cut into, which are in different stages at the same time;
    with --accumulate of each pass. By default twice --pp. The balance loss balances the tokens of each part."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"] = "1f1b"
    """With --pp: the order of forward and backward passes. gpipe and 1f1b have one stage on a rank, the others two or
    more. zero-bubble and zbv need dp_shard, dp_replicate and edp 1."""
    stages_per_rank: int | None = None
    """With --pp: stages of each rank. By default 1 for gpipe and 1f1b, 2 for the other schedules."""
    layers_per_stage: tuple[int, ...] = ()
    """With --pp: how many layers each stage has, the first stage first. By default as equal as they can be."""

    tp: int = 1
    """Tensor parallel size of the dense layers (with sequence parallelism)."""
    cp: int = 1
    """Context parallel size: this many ranks share each sequence, and attention gathers keys and values over them."""
    ep: int = 1
    """Expert parallel size: the experts are split over this many ranks."""
    etp: int = 1
    """Expert tensor parallel size: the matrices of each expert are split over this many ranks."""
    dp_shard: int | None = None
    """Data parallel size with sharded weights (FSDP2). By default all remaining ranks."""
    dp_replicate: int = 1
    """Data parallel size with replicated weights: the number of dp_shard groups."""
    ranks_per_node: int | None = None
    """How many processes are on each node (machine): ranks 0 to n-1 on the first, and so on. Where --ep spans nodes, a
    token then crosses to a node once, and not once for each rank; 1 turns that off. By default what torchrun started on
    each node, and a token crosses once to a node where that saves a tenth of what crosses."""
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
    """Forward and backward passes in a step. Each takes a part of the batch, which needs less memory. Gradients are
    summed over the processes once a step. The balance loss balances the tokens of each pass. With --pp each is a
    schedule of --microbatches."""
    seq_len: int | None = None
    """Tokens in a sequence. By default 128 for text. For conversations it is the length of the longest, at most 4,096
    and what the model has positions for."""
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
    """AdamW for all weights; or Muon for the matrices of hidden layers, the experts' among them, and AdamW for
    embeddings, output head, routers, norms and biases."""
    muon_lr: float | None = None
    """Peak learning rate of Muon. By default that of --lr."""
    muon_adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How Muon scales its learning rate by the shape of a matrix: to updates as large as those of AdamW, so that --lr
    suits both; or as it was first published, with which it needs a --muon-lr of its own, about 0.02."""
    muon_momentum: float = 0.95
    """The decay rate of Muon's momentum."""
    muon_steps: int = 5
    """How many Newton-Schulz iterations Muon makes."""
    muon_dtype: Literal["bf16", "fp32"] = "bf16"
    """The dtype of these iterations. fp32 is faster on processors without bf16 products."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm. 0: no clipping."""
    aux_loss_coef: float | None = None
    """Weight of the load-balancing loss. By default 0.05 for a new model. For a pretrained model it is 0, unless its
    config sets output_router_logits: then it is its router_aux_loss_coef, as in transformers."""
    aux_loss: Literal["batch", "sequence", "pooled"] | None = None
    """What that loss balances: in each layer the tokens of a step (batch) or each sequence (sequence), or all layers
    together, as in transformers (pooled). By default batch; pooled where the config sets output_router_logits."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss."""
    seed: int = 0
    """Seed for everything random, such as new weights and the order of the data."""


@dataclass(frozen=True)
class RunOptions:
    """The run folder, and how to go on in it."""

    config: Path | None = None
    """A file of settings: YAML or TOML, with the names of these flags, or the config.json of a run. Flags override what
    is in it. All settings of a run, whatever they are from, are in the config.json of its folder."""
    out: Path | None = None
    """The run folder. By default a new folder, runs/<date>-<time>."""
    resume: Annotated[bool | Literal["auto"], tyro.conf.arg(constructor=bool)] = False
    """Continue from the last checkpoint in --out, or of the latest run in runs/. The settings are those of that run;
    flags that you give override them. With '--resume auto' it starts if there is no checkpoint yet; this is also what
    happens when torchrun restarts a run (--max-restarts)."""
    choose_again: bool = False
    """With --resume on CPU: compute the experts with what is the fastest on this machine now. By default the run keeps
    the implementations that it began with, so that its numbers stay the same in every bit."""
    save_every: int = 50
    """Steps between checkpoints. 0: only one, at the end. There is always a checkpoint at the end."""
    keep: int = 2
    """How many checkpoints to keep."""
    keep_best: bool = False
    """Also keep the checkpoint with the best score, and export that at the end. A checkpoint is written whenever a
    measurement is better than all before it. Needs --eval-every."""
    export_dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of the weights in the export."""
    async_checkpoints: bool = False
    """Write checkpoints in the background: training waits only while a copy is made in the host's memory. The last one
    is written before the program ends."""
    timeout: int = 300
    """Seconds that ranks wait in a step for one that does not answer. Then all end, and say which it was. The first
    step, measurements, checkpoints and the export may take as long as they need."""


@dataclass(frozen=True)
class MeasuringOptions:
    """What is measured and shown."""

    log_every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events, if the tensorboard package is installed."""
    peak_tflops: float | None = None
    """What one process computes at best, in 10^12 operations a second, to say which part of it the model uses (MFU).
    Known for some GPUs with --dtype bf16. Elsewhere there is no MFU without this flag."""
    profile_steps: str | None = None
    """Record what each process does in these steps, such as 10 or 10:12 (both included), with torch.profiler. The
    traces are in profile/ of the run folder, for Perfetto or chrome://tracing."""
    eval_every: int = 0
    """Steps between measurements on held-out data. 0: none in between. There is always one at the end, and one
    before the first step of a pretrained model."""
    eval_bytes: int = 131_072
    """How many bytes of held-out data to measure, and of each set of --eval-data."""
    eval_data: tuple[str, ...] = ()
    """More data to measure, none of which is held out of --data: files, folders or datasets, as for --data. The score
    that decides for --early-stop and --keep-best is that of the first set, and without any that of what is held out."""
    early_stop: int = 0
    """End the training when this many measurements in a row were no better than the best before them. 0: never. Needs
    --eval-every."""
    prompt: str | None = None
    """What the trained model continues at the end: a text, or a message of the user. By default 'def main(', or a
    held-out conversation without its last answer."""
    sample_tokens: int = 120
    """How many tokens the model adds to the prompt."""
