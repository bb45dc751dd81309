"""A whole run from Python, by a recipe: the same as ``deepspeed --module trainer.train RECIPE``.

torchrun --nproc-per-node 2 -m tests.examples.train shards/train
"""

import sys

import ringlip


def main(shards: str, directory: str = "runs/example", **model: object) -> ringlip.TrainResult:
    recipe = {
        "run": {"directory": directory, "samples": 48},
        "model": model or {"path": "google/siglip-base-patch16-224"},
        "data": {"train": shards, "workers": 0},
        "batch": {"size": 16, "micro_batch": 4},
    }
    result = ringlip.train(recipe, {"optim.lr": 1e-3, "loss": {"tile_rows": 256}})
    print(f"{result.exit_reason} after {result.samples_seen} pairs, loss {result.metrics['loss']:.3f}")
    return result


if __name__ == "__main__":
    main(sys.argv[1])
