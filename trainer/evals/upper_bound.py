"""The scores of a perfect model if some images, or some captions, are identical.

A model sees pixels and words. Two images with the same pixels get the same embedding, so which of their captions
ranks first is a coin toss; these functions return the expected recall at 1 with the best possible ranking of everything
else. Only identical inputs count (after preprocessing, as the model sees them): telling similar images apart is the
model's task.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


def retrieval_ceiling(
    pictures: Sequence[Hashable], captions: Sequence[Hashable], owner: Sequence[int]
) -> dict[str, float]:
    """The highest expected recall at 1 in each direction of any function of the image and the caption.

    ``pictures`` [n] and ``captions`` [m] are keys (hashes of pixels, texts), equal exactly when the model cannot tell
    them apart.
    """
    copies_of_picture, copies_of_caption = Counter(pictures), Counter(captions)
    # For each distinct picture: the hits from ranking one distinct caption first, summed over that image's queries.
    first_caption: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    first_picture: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for caption, image in zip(captions, owner, strict=True):
        picture = pictures[image]
        first_caption[picture][caption] += 1
        first_picture[caption][picture] += 1
    image_wins = sum(
        max(n / copies_of_caption[caption] for caption, n in wins.items()) for wins in first_caption.values()
    )
    text_wins = sum(
        max(n / copies_of_picture[picture] for picture, n in wins.items()) for wins in first_picture.values()
    )
    return {
        "image_to_text_r1_ceiling": image_wins / len(pictures),
        "text_to_image_r1_ceiling": text_wins / len(captions),
    }


def naming_ceiling(pictures: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """The highest top-1 accuracy of any function from ``pictures`` [n] (keys of all that the model sees of a query) to
    ``labels`` [n]."""
    names: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for picture, label in zip(pictures, labels, strict=True):
        names[picture][label] += 1
    return sum(max(counts.values()) for counts in names.values()) / len(pictures)
