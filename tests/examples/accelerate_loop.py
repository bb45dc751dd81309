"""The ring loss in an accelerate loop with gradient accumulation.

accelerate launch --cpu --num_processes 2 -m tests.examples.accelerate_loop
"""

import ringlip
import torch
from accelerate import Accelerator
from torch import nn

from tests.examples.tiny import TwoTowers, join, local_batch


def main(accumulate: int = 2) -> nn.Module:
    join()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=accumulate)
    model = TwoTowers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss = ringlip.SigLipLoss()
    for step in range(4):
        with accelerator.accumulate(model):  # each batch is contrasted with itself: for more negatives see two_pass.py
            accelerator.backward(loss(**model(*local_batch(step))))  # divides by ``accumulate``
            optimizer.step()
            optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main()
