"""The ring loss in a Hugging Face Trainer, whose SiglipModel by itself contrasts each rank's pairs with each other
only.

torchrun --nproc-per-node 2 -m tests.examples.hf_trainer
"""

import tempfile
from typing import Any

import ringlip
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import SiglipConfig, SiglipModel, Trainer, TrainingArguments

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = SiglipConfig(
    vision_config={**TOWER, "image_size": 16, "patch_size": 8},
    text_config={**TOWER, "vocab_size": 50, "max_position_embeddings": 6},
)


class Towers(SiglipModel):
    """Scale and bias come out of ``forward`` too: any wrapper then sees them used."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        out = super().forward(input_ids=input_ids, pixel_values=pixel_values)
        features = {"image_features": out.image_embeds, "text_features": out.text_embeds}
        return {**features, "logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias + 0.0}


class RingTrainer(Trainer):
    loss_is_scaled_for_ga = False  # a mean over one batch: divided by gradient_accumulation_steps

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = ringlip.SigLipLoss()(**outputs)
        return (loss, outputs) if return_outputs else loss


class Noise(Dataset):
    __len__ = lambda self: 64  # noqa: E731

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        dice = torch.Generator().manual_seed(index)
        pixels = torch.randn(3, 16, 16, generator=dice)
        return {"input_ids": torch.randint(50, (6,), generator=dice), "pixel_values": pixels}


def main(accumulate: int = 2) -> nn.Module:
    options = {"use_cpu": not torch.cuda.is_available(), "report_to": "none", "save_strategy": "no", "max_grad_norm": 0}
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulate, "max_steps": 2}
    with tempfile.TemporaryDirectory() as out:
        trainer = RingTrainer(Towers(CONFIG), TrainingArguments(out, **options, **batch), train_dataset=Noise())
        trainer.train()
    return trainer.model


if __name__ == "__main__":
    main()
