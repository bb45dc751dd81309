"""Charts of one run, or of several runs overlaid."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.report.chart import line_chart
from trainer.report.curves import Log

DIRECTIONS = {"image_to_text": "image to caption", "text_to_image": "caption to image"}
METRIC = re.compile(r"(?P<data>.*/)?(?P<way>image_to_text|text_to_image)_r(?P<k>\d+)")
DIMENSIONS = "participation ratio: how many directions the embeddings use"
AVERAGED = "of the running average of the weights"


def words(metric: str) -> str:
    """image_to_text_r1 -> image to caption R@1; face_top1 -> face top-1."""
    found = METRIC.fullmatch(metric)
    if found:
        return f"{found['data'] or ''} {DIRECTIONS[found['way']]} R@{found['k']}".strip()
    return (
        re.sub(r"_top(\d)$", r" top-\1", metric)
        .replace("_mean_per_class", ", mean over classes")
        .replace("_strict", ", filed name only,")
    )


def headlines(metrics: Iterable[str], most: int = 4) -> list[str]:
    """The main metrics: recall and accuracy at 1."""
    return [name for name in metrics if name.endswith(("_r1", "_top1")) and not name.endswith("_strict_top1")][:most]


def run_charts(logs: dict[str, Log], averaged: bool = False) -> str:
    """HTML of all charts. ``logs`` has the names of the runs as keys; ``averaged``: evaluations used averaged
    weights."""
    learning = [
        _over_pairs("Loss", logs, "loss", log=True, wide=True, about="mean over the global batch"),
        *_scores(logs, averaged),
        _over_pairs("Learning rate", logs, "lr", own="rate", zero=True),
        _over_pairs("Gradient norm", logs, "grad_norm", own="norm", log=True, about="before clipping"),
        _over_pairs("Temperature", logs, "scale", own="t", about="t, the factor on cosines"),
        _over_pairs("Bias", logs, "bias", own="b", about="b, added to the logits"),
        _over_pairs(
            "Retrieved in the batch",
            logs,
            "vitals.image_to_text_r1",
            own="R@1",
            zero=True,
            about="among at most 512",
        ),
        _over_pairs("Logit of matched pairs", logs, "vitals.logit_matched", own="mean"),
        _over_pairs("Logit of other pairs", logs, "vitals.logit_other", own="mean"),
        _over_pairs("Dimensions of the images", logs, "vitals.dims_images", own="number", about=DIMENSIONS),
    ]
    last = max((log.last.get("seconds", 0.0) for log in logs.values()), default=0.0)
    unit, length = ("hours", 3600) if last > 2 * 3600 else ("minutes", 60) if last > 180 else ("seconds", 1)
    speed = [
        line_chart(
            title,
            {name if len(logs) > 1 else title: log.curve(key, "seconds") for name, log in logs.items()},
            unit,
            x_scale=1 / length,
            unit=sign,
            scale=scale,
            zero=True,
            about=about,
        )
        for title, key, sign, scale, about in (
            ("Pairs per second", "pairs_per_second", "", 1.0, "all ranks together"),
            ("Step time", "step_seconds", " s", 1.0, ""),
            ("Memory", "memory_bytes", " GiB", 2**-30, "of the rank that uses most"),
            ("Waiting for data", "data_wait", "%", 100.0, "share of the time, worst rank"),
        )
    ]
    found = ""
    if any(learning):
        about = "Over the pairs seen. Touch or point at a curve for its values."
        found += f'<h2>Learning</h2><p>{about}</p><div class="charts">{"".join(learning)}</div>'
    if any(speed):
        found += (
            f'<h2>Speed and memory</h2><p>Over the time spent training.</p><div class="charts">{"".join(speed)}</div>'
        )
    return found


def _over_pairs(
    title: str,
    logs: dict[str, Log],
    key: str,
    own: str = "",
    log: bool = False,
    zero: bool = False,
    wide: bool = False,
    about: str = "",
) -> str:
    """``own`` names the curve if there is one run."""
    curves = {name if len(logs) > 1 else own or key: one.curve(key) for name, one in logs.items()}
    return line_chart(title, curves, "pairs", log=log, zero=zero, wide=wide, about=about)


def _scores(logs: dict[str, Log], averaged: bool) -> list[str]:
    """One run: one chart with all scores. Several: one chart per score."""
    keys = dict.fromkeys(key for log in logs.values() for key in log.columns if key.startswith("eval."))
    main = headlines(key.removeprefix("eval.") for key in keys)
    about = AVERAGED if averaged else ""
    if len(logs) == 1:
        (log,) = logs.values()
        charts = [("Held-out scores", {words(name): log.curve(f"eval.{name}") for name in main}, len(main) > 2)]
    else:
        charts = [(words(name), {run: log.curve(f"eval.{name}") for run, log in logs.items()}, False) for name in main]
    return [
        line_chart(title, curves, "pairs", unit="%", scale=100, zero=True, wide=wide, about=about)
        for title, curves, wide in charts
    ]
