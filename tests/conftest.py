"""One operator thread: tensors are small here, and two threads waiting for a core are slow."""

import os

import torch

torch.set_num_threads(1)
os.environ["WANDB_MODE"] = "disabled"  # the tests of W&B say otherwise
