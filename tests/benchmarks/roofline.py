"""The planner's forecast of speed, card by card: steps of two towers, and the fast sigmoid loss.

python -m tests.benchmarks.roofline
"""

from __future__ import annotations

from trainer.losses import SigmoidSettings
from trainer.models import ModelSettings
from trainer.plan.memory import Job
from trainer.plan.model_shapes import KNOWN, stand_in
from trainer.plan.profile import Survey, look
from trainer.plan.roofline import CARDS, step_seconds
from trainer.plan.search import zero_section

NAMES = ("h100", "a100", "rtx4090", "v100", "t4")
TOWERS = {
    "SigLIP ViT-B/16, 256": ("google/siglip-base-patch16-224", 256),
    "CLIP ViT-L/14, 32": ("openai/clip-vit-large-patch14", 32),
}
"""Title, with the micro-batch -> model and micro-batch."""
ROWS = 65536


def surveys(name: str) -> dict[str, Survey]:
    """The model as it is in each precision that the cards compute in."""
    with stand_in(ModelSettings(path=name), KNOWN[name]) as known:
        settings = ModelSettings.model_validate({"config": KNOWN[name], "tokenizer": known.path})
        return {precision: look(settings, precision, "cuda") for precision in ("bf16", "fp16")}


def pairs_per_second(survey: Survey, card: str, rows: int, micro_batch: int) -> float:
    job = Job(1, rows, micro_batch, loss=SigmoidSettings())
    precision = CARDS[card].precision("auto")
    return rows / sum(step_seconds(survey, zero_section("zero0"), job, CARDS[card], precision, 1e9).values())


def main() -> None:
    known = {title: surveys(name) for title, (name, _) in TOWERS.items()}
    heads = [f"{title} in {passes}" for title in TOWERS for passes in ("one pass", "4 micro-batches")]
    print(f"| card | {' | '.join(heads)} | loss of {ROWS:,} pairs, fast, width 768 |")
    print("|---|" + "---:|" * (len(heads) + 1))
    for name in NAMES:
        card, cells = CARDS[name], []
        for title, (_, micro_batch) in TOWERS.items():
            survey = known[title][card.precision("auto")]
            cells += [f"{pairs_per_second(survey, name, k * micro_batch, micro_batch):.0f}" for k in (1, 4)]
        loss = 6 * ROWS * ROWS * 768 / card.attained("fp16")
        print(f"| {name}, {card.precision('auto')} | {' | '.join(cells)} | {1e3 * loss:.0f} ms |")


if __name__ == "__main__":
    main()
