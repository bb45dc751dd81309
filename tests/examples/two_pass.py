"""The two-pass step under DDP, FSDP2, Fabric and accelerate: every pair of the batch is contrasted with every
other, while the towers see ``micro_batch`` of them at a time. Any function of two encoders may be in model's place.

    torchrun --nproc-per-node 2 -m tests.examples.two_pass
"""

import ringlip
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.examples.tiny import TwoTowers, join, local_batch


def main(wrapper: str = "ddp", micro_batch: int = 3) -> nn.Module:
    join()
    towers = TwoTowers()
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
    keywords: dict = {}
    model: nn.Module = towers
    if wrapper == "ddp":
        model = DistributedDataParallel(towers)
    elif wrapper == "fsdp2":
        model = fully_shard(towers, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elif wrapper == "fabric":
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
        fabric.launch()
        model, optimizer = fabric.setup(towers, optimizer)
        keywords = {"backward": fabric.backward, "no_sync": lambda: fabric.no_backward_sync(model)}
    elif wrapper == "accelerate":
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(towers, optimizer)
        keywords = {"backward": accelerator.backward, "no_sync": lambda: accelerator.no_sync(model)}

    loss = ringlip.SigLipLoss()
    for step in range(3):
        ringlip.two_pass(model, local_batch(step), loss, micro_batch=micro_batch, **keywords)
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main()
