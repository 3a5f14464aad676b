"""One compute thread, as the services have by default: the CPU's bits are promised for that."""

import torch

torch.set_num_threads(1)
