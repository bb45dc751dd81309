"""What fits on a GPU that is not rented yet, for a module of your own. Runs on any machine, without weights.

python -m tests.examples.plan
"""

import ringlip
import torch
from transformers import SiglipConfig, SiglipModel


def main() -> list[str]:
    with torch.device("meta"):  # no memory is taken for the weights
        model = Towers(SiglipConfig())
    inputs = torch.empty(1, 3, 224, 224), torch.zeros(1, 64, dtype=torch.int64)
    plan = ringlip.plan(model, "24GiB", gpus=8, inputs=inputs, batch_size=32768)
    lines = []
    for option in plan.options:
        gib = option.peak.total / 2**30
        lines.append(f"{option.ds_config:<22} micro-batch {option.micro_batch:>4}  {gib:5.1f} GiB, fits: {option.fits}")
    print(*lines, f"take {plan.chosen.ds_config}" if plan.chosen else "nothing fits", sep="\n")
    return lines


class Towers(SiglipModel):
    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = super().forward(input_ids=texts, pixel_values=images)
        return out.image_embeds, out.text_embeds


if __name__ == "__main__":
    main()
