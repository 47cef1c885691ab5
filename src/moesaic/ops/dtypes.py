"""The dtypes that operators take."""

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)
