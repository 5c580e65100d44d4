"""Small models run fastest on one thread, and then never wait for one another."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
