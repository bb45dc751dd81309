"""The ring loss under FSDP2 (torch's fully_shard).

torchrun --nproc-per-node 2 -m tests.examples.fsdp2
"""

import ringlip
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.examples.tiny import TwoTowers, join, local_batch


def main() -> nn.Module:
    join()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model = TwoTowers()
    for tower in (model.image, model.text):
        fully_shard(tower, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the root holds scale and bias, which forward returns: read them from there
    loss = ringlip.ClipLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss(**model(*local_batch(step))).backward()  # FSDP2 averages in its reduce-scatter
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main()
