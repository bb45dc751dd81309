"""The ring loss under plain DistributedDataParallel.

torchrun --nproc-per-node 2 -m tests.examples.ddp
"""

import ringlip
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.examples.tiny import TwoTowers, join, local_batch


def main() -> nn.Module:
    join()
    model = DistributedDataParallel(TwoTowers())
    loss = ringlip.SigLipLoss()  # the mean over ranks of what it returns is the loss of the global batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss(**model(*local_batch(step))).backward()  # DDP averages: exactly what the loss expects
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main()
