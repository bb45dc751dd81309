"""The loader in a training loop of your own: batches of this rank, exact order, exact resume.

torchrun --nproc-per-node 2 -m tests.examples.dataset shards/train google/siglip-base-patch16-224
"""

import sys

import ringlip
from torch.utils.data import DataLoader

from tests.examples.tiny import join


def main(shards: str, preprocess: ringlip.Preprocess) -> list[list[int]]:
    join()
    pairs = ringlip.dataset(shards, preprocess, batch_size=16, samples=48, workers=0)
    seen = []
    for batch in DataLoader(pairs, batch_size=None):  # num_workers stays 0: ringlip.dataset(workers=N) has its own
        seen.append(batch.ids.tolist())
        if len(seen) == 2:
            break  # stop here ...
    state = pairs.state_dict()
    pairs = ringlip.dataset(shards, preprocess, batch_size=16, samples=48, workers=0)
    pairs.load_state_dict(state)  # ... and go on, with any number of ranks
    seen += [batch.ids.tolist() for batch in DataLoader(pairs, batch_size=None)]
    return seen


if __name__ == "__main__":
    main(sys.argv[1], ringlip.preprocess(sys.argv[2]))
