"""The ring losses in open_clip's own training loop, unchanged: only ``loss`` is another object.

pip install open_clip_torch
torchrun --nproc-per-node 2 -m tests.examples.open_clip_loop
"""

from argparse import Namespace
from types import SimpleNamespace

import open_clip
import ringlip
import torch
import torch.distributed as dist
from open_clip_train.train import train_one_epoch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.examples.tiny import join, local_batch

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 8}
TEXT = {"context_length": 6, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


class Batches(list):
    num_batches, num_samples = 4, 64


def towers() -> nn.Module:
    return open_clip.CLIP(16, VISION, TEXT, init_logit_bias=-2.0, nonscalar_logit_scale=True, output_dict=True)


def main(accum_freq: int = 1) -> nn.Module:
    join()
    model = DistributedDataParallel(towers())
    args = Namespace(device="cpu", precision="fp32", distill=False, accum_freq=accum_freq, skip_scheduler=True)
    args.rank, args.world_size, args.batch_size = dist.get_rank(), dist.get_world_size(), 8
    args.horovod, args.grad_clip_norm, args.log_every_n_steps, args.wandb = False, None, 1, False
    data = SimpleNamespace(dataloader=Batches(local_batch(step) for step in range(4)), set_epoch=lambda epoch: None)
    loss = ringlip.SigLipLoss(rank=args.rank, world_size=args.world_size, dist_impl="bidir", accum_freq=accum_freq)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_one_epoch(model, {"train": data}, loss, 0, optimizer, None, None, None, args)
    return model


if __name__ == "__main__":
    main()
