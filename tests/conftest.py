"""One operator thread: the tests' tensors are small, and two threads that wait for a core are slow."""

import torch

torch.set_num_threads(1)
