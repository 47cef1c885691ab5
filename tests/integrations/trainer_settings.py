"""What tests give transformers' Trainer: every step is logged, on the CPU, and nothing is saved."""

SETTINGS = {
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}
# Without an eps near the size of gradients the first step is their sign, that of rounding errors too.
COMPARED = {**SETTINGS, "adam_epsilon": 1e-3}
