"""The ring loss under Lightning Fabric, in the place of a SigLIP loss over fabric.all_gather, which holds all ranks'
texts and loses their gradient unless asked to keep it.

    fabric run --accelerator cpu --devices 2 tests/examples/fabric.py
"""

import os

import ringlip
import torch
from lightning_fabric import Fabric
from torch import nn

from tests.examples.tiny import TwoTowers, local_batch


def main() -> nn.Module:
    fabric = Fabric(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))),
        strategy="ddp",
    )
    fabric.launch()
    model = TwoTowers()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = ringlip.SigLipLoss()  # asks the process group for rank and world size: no all_gather of your own
    for step in range(3):
        images, texts = (fabric.to_device(part) for part in local_batch(step))
        fabric.backward(loss(**model(images, texts)))
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main()
