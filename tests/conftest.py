"""What all tests share."""

import torch

torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring, and bits depend on their number
