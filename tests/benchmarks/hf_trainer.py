"""A real Hugging Face Trainer run under DeepSpeed, timed step by step: the peer in tests/benchmarks/step.py that brings
its own loop.

Its loss can only contrast each micro-batch with itself, because a Trainer calls the loss once per micro-batch.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.tensor_memory import TensorMemory
from trainer.core.types import Batch


class LocalLoss(nn.Module):
    """A dual encoder that returns its sigmoid loss over the micro-batch, as a Trainer wants it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, tokens: Tensor, token_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        z = self.encoder(pixels, tokens, token_mask)
        logits = z.scale * z.image @ z.text.T + z.bias
        signs = 2 * torch.eye(len(logits)) - 1
        return {"loss": -torch.nn.functional.logsigmoid(signs * logits).sum() / len(logits)}


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same pairs again and again, ready in memory."""

    def __init__(self, batch: Batch, length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = index % len(self.batch.pixels)
        return {
            "pixels": self.batch.pixels[row],
            "tokens": self.batch.tokens[row],
            "token_mask": self.batch.token_mask[row],
        }


def measure(
    encoder: nn.Module, batch: Batch, micro_batches: int, rounds: int, stage: int
) -> tuple[list[float], list[float], int]:
    """On one rank of several: (processor seconds, wall seconds, peak bytes) of ``rounds`` steps on ``batch``, after one
    to warm up."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29555")
    memory, processor, wall = TensorMemory(), list[float](), list[float]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                memory.__enter__()
            self.began = time.process_time(), time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                memory.__exit__(None, None, None)
                return
            processor.append(time.process_time() - self.began[0])
            wall.append(time.perf_counter() - self.began[1])

    rows = len(batch.pixels)
    ranks = int(os.environ["WORLD_SIZE"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows // micro_batches,
            gradient_accumulation_steps=micro_batches,
            max_steps=rounds + 1,
            learning_rate=1e-4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            deepspeed={
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                **dict.fromkeys(
                    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"
                ),
            },
        )
        pairs = Pairs(batch, rows * ranks * (rounds + 1))
        Trainer(model=LocalLoss(encoder), args=arguments, train_dataset=pairs, callbacks=[Clock()]).train()
    return processor, wall, memory.peak
