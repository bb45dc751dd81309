"""Which changes between two recipes change what is learned."""

from typing import Any

from trainer.config import Recipe
from trainer.core.help import describe
from trainer.core.settings import changes, parse


def recipe(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run": {"samples": 64},
        "model": {"path": "google/siglip-base-patch16-224"},
        "data": {"train": "shards"},
        "batch": {"size": 8},
    }
    return parse(Recipe, base | sections, "recipe").model_dump(mode="json")


def test_keys_that_only_change_cost_or_output_are_no_changes() -> None:
    other = recipe(
        run={"samples": 64, "directory": "elsewhere", "timeout": 5},
        batch={"size": 8, "micro_batch": 4, "grad_reduction": "per_micro_batch"},
        loss={"tile_rows": 7, "exchange": "gather"},
        data={"train": "shards", "workers": 3, "validation": "more"},
        model={"path": "google/siglip-base-patch16-224", "recompute": {"image": "all"}},
        log={"every": 99},
    )
    assert changes(Recipe, recipe(), other) == []


def test_keys_that_change_what_is_learned_are_named_with_both_values() -> None:
    other = recipe(run={"samples": 64, "seed": 1}, loss={"name": "softmax", "tile_rows": 7}, batch={"size": 16})
    found = changes(Recipe, recipe(), other)
    assert "run.seed 0 -> 1" in found
    assert "batch.size 8 -> 16" in found
    assert "loss.name auto -> softmax" in found
    assert not [line for line in found if "tile_rows" in line]


def test_help_tells_once_what_all_variants_share() -> None:
    text = describe(Recipe)
    assert text.count("  optim.warmup = ") == 1
    assert text.index("optim.warmup") < text.index("-- name: adamw (default)") < text.index("  optim.eps = 1e-08")
    assert text.count("  optim.beta1 = ") == 5  # each optimizer says what it means by it
