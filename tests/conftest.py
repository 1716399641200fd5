"""One operator thread: tensors are small here, and two threads waiting for a core are slow."""

import torch

torch.set_num_threads(1)
