"""`evals.run` from shards to numbers: an oracle that can be reckoned with, real ranks, damaged images,
CLIP_benchmark's folders."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from tests.support.forked_ranks import run_ranks
from trainer.core.settings import parse
from trainer.core.types import Embeddings, Preprocess, UserError
from trainer.data.settings import DataSettings
from trainer.evals import EvalSettings, Evaluation, ZeroShotSettings, evaluate, run
from trainer.evals.encode import Encoder
from trainer.evals.examples import open_examples

FACES = ("sans", "serif", "mono")


def spell(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Letters as tokens."""
    tokens = torch.tensor(
        [[ord(letter) for letter in caption[:40].ljust(40)] for caption in captions], dtype=torch.int64
    ).reshape(-1, 40)
    return tokens, tokens != ord(" ")


class Oracle(nn.Module):
    """Knows that image i is all of grey value i, which is character i // 3 in face i % 3, and reads "CHARACTER FACE"
    likewise."""

    preprocess = Preprocess((8, 8), "squash", "bilinear", (0.5,) * 3, (0.5,) * 3, 40, spell)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def forward(self, pixels: Tensor | None, tokens: Tensor | None, token_mask: Tensor | None) -> Embeddings:
        assert not self.training
        image, text = torch.zeros(0, 103), torch.zeros(0, 103)
        if pixels is not None:
            number = pixels[:, 0, 0, 0].long()
            image = self.embed(number // 3, number % 3)
        if tokens is not None:
            words = ["".join(map(chr, row)).split() for row in tokens.tolist()]
            characters = [next((int(word) for word in line if word.isdigit()), -1) for line in words]
            faces = [next((FACES.index(word) for word in line if word in FACES), -1) for line in words]
            text = self.embed(torch.tensor(characters), torch.tensor(faces))
        self.calls.append((len(image), len(text)))
        return Embeddings(image, text, torch.ones(1), torch.zeros(1))

    @staticmethod
    def embed(character: Tensor, face: Tensor) -> Tensor:
        sums = torch.zeros(len(character), 103)
        sums[torch.arange(len(character)), character.clamp(min=0)] += (character >= 0).float()
        sums[torch.arange(len(character)), 100 + face.clamp(min=0)] += (face >= 0).float()
        return nn.functional.normalize(sums, dim=-1)


def picture(grey: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (8, 8), grey).save(data, "PNG")
    return data.getvalue()


def glyph(number: int) -> dict[str, bytes]:
    character, face = str(number // 3), FACES[number % 3]
    metadata = {"character": character, "face": face, "faces": face, "captions": [f"{character} {face}"]}
    return {"png": picture(number), "txt": f"{character} {face}".encode(), "json": json.dumps(metadata).encode()}


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, members in enumerate(samples):
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def settings(path: Path, **more: Any) -> tuple[EvalSettings, DataSettings]:
    return parse(EvalSettings, {"data": str(path), **more}, "recipe"), DataSettings(
        cache_dir=str(path.parent / "cache")
    )


def assess(path: Path, model: nn.Module | None = None, caption: str = "txt", **more: Any) -> Evaluation:
    chosen, data = settings(path, **more)
    return evaluate(model or Oracle(), chosen, Oracle.preprocess, 0, 1, data.model_copy(update={"caption": caption}))


def test_an_oracle_is_right(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [glyph(number) for number in range(30)])
    model = Oracle().train()
    found = assess(tar, model, batch_size=7, zeroshot=[{"label": "face", "templates": ["{character} {face}", "{}"]}])
    assert set(found.metrics.values()) == {1.0}
    assert {"image_to_text_r1", "text_to_image_r10", "face_top1", "face_top5", "face_mean_per_class"} == {
        *(
            name
            for name in found.metrics
            if name in ("image_to_text_r1", "text_to_image_r10") or name.startswith("face")
        )
    }
    assert found.named["face"].names == sorted(FACES)
    assert found.named["face"].by_class == dict.fromkeys(sorted(FACES), 1.0)
    assert set(found.ceilings.values()) == {1.0}
    assert found.sizes == {str(tar): {"samples": 30, "pictures": 30, "captions": 30, "damaged": 0}}
    assert model.training
    assert max(max(call) for call in model.calls) == 7


def test_retrieval_within_each_language_is_that_of_its_samples_alone(tmp_path: Path) -> None:
    samples: dict[str, list[dict[str, bytes]]] = {"de": [], "en": []}
    for number in range(40):
        sample, language = glyph(number), "de" if number % 3 else "en"
        words = sample["txt"] if language == "en" or number % 2 else b"unbekannt"
        samples[language].append({**sample, "txt": words, "json": json.dumps({"language": language}).encode()})
    found = assess(write_tar(tmp_path / "all.tar", samples["de"] + samples["en"]), by="language", limit=0)
    alone = {
        language: assess(write_tar(tmp_path / f"{language}.tar", some), limit=0) for language, some in samples.items()
    }
    for name in ("image_to_text_r1", "text_to_image_r5"):
        each = [alone[language].metrics[name] for language in ("de", "en")]
        assert [found.metrics[f"{language}/{name}"] for language in ("de", "en")] == pytest.approx(each)
        assert found.metrics[f"mean per language/{name}"] == pytest.approx(sum(each) / 2)
        assert each[0] < each[1] == 1.0
    for language, one in alone.items():
        assert found.ceilings[f"{language}/image_to_text_r1"] == pytest.approx(one.ceilings["image_to_text_r1"])
    assert found.metrics["text_to_image_r1"] < 1.0
    with pytest.raises(UserError, match=r"sample \d+ has no 'script', which eval.by asks for"):
        assess(tmp_path / "all.tar", by="script")


def test_limit_takes_a_seeded_draw(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [glyph(number) for number in range(60)])
    chosen = [
        [seen.sample for seen in assess(tar, limit=20, seed=seed).retrieved[""].pictures.seen] for seed in (0, 0, 1)
    ]
    assert len(set(chosen[0])) == 20 and chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == [seen.sample for seen in assess(tar, limit=0).retrieved[""].pictures.seen][:20]


def test_twins_share_and_the_ceiling_says_so(tmp_path: Path) -> None:
    samples = [glyph(number) for number in range(20)]
    samples[4]["png"] = samples[3]["png"]  # character 1: serif drawn as sans is
    for number in (3, 4):
        metadata = json.loads(samples[number]["json"]) | {"faces": "sans|serif"}
        samples[number]["json"] = json.dumps(metadata).encode()
    spec = [{"label": "face", "templates": ["{character} {face}"], "accept": "faces"}]
    found = assess(write_tar(tmp_path / "a.tar", samples), zeroshot=spec)
    assert found.metrics["text_to_image_r1"] == pytest.approx(
        (18 + 1 / 2 + 1 / 9) / 20
    )  # "1 serif", never drawn so, ties with 8 others
    assert found.ceilings["text_to_image_r1"] == pytest.approx(19 / 20)
    assert found.ceilings["image_to_text_r1"] == pytest.approx(19 / 20)
    assert found.metrics["face_top1"] == 1.0
    assert found.metrics["face_strict_top1"] == pytest.approx(19 / 20)
    assert found.ceilings["face_strict_top1"] == pytest.approx(19 / 20)


def test_several_captions_a_picture(tmp_path: Path) -> None:
    samples = [glyph(3 * number) for number in range(10)]
    for number, sample in enumerate(samples):
        sample["json"] = json.dumps({"captions": [f"{number} sans", f"a sans {number}", "mono"]}).encode()
    found = assess(write_tar(tmp_path / "a.tar", samples), caption="captions")
    assert found.sizes[str(tmp_path / "a.tar")] == {"samples": 10, "pictures": 10, "captions": 30, "damaged": 0}
    assert found.metrics["image_to_text_r1"] == 1.0
    # "mono" is as near to every picture: it finds its own among the first k of 10 in k of 10 orders.
    assert found.metrics["text_to_image_r1"] == pytest.approx((2 + 1 / 10) / 3)
    assert found.metrics["text_to_image_r5"] == pytest.approx((2 + 5 / 10) / 3)


def test_damaged_pictures_are_counted_and_left_out(tmp_path: Path) -> None:
    samples = [glyph(number) for number in range(12)]
    samples[5]["png"] = samples[5]["png"][:40]
    found = assess(write_tar(tmp_path / "a.tar", samples))
    assert found.sizes[str(tmp_path / "a.tar")] == {"samples": 12, "pictures": 11, "captions": 11, "damaged": 1}
    assert found.metrics["image_to_text_r1"] == 1.0
    with pytest.raises(UserError, match="none of its 1 images can be used"):
        assess(write_tar(tmp_path / "b.tar", [samples[5]]))


def test_the_pixel_limit_is_that_of_the_settings(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [glyph(number) for number in range(4)])
    evaluation, data = settings(tmp_path / "0.tar")
    side = Image.open(io.BytesIO(glyph(0)["png"])).width
    low = data.model_copy(update={"max_pixels": side * side - 1})
    with pytest.raises(UserError, match=rf"{side} x {side} pixels are above data.max_pixels"):
        evaluate(Oracle(), evaluation, Oracle.preprocess, 0, 1, low)
    exact = data.model_copy(update={"max_pixels": side * side})
    assert evaluate(Oracle(), evaluation, Oracle.preprocess, 0, 1, exact).sizes[str(tmp_path / "0.tar")]["damaged"] == 0


def test_no_file_stays_open(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [glyph(number) for number in range(6)])
    gc.collect()  # what earlier tests have left
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):  # a training evaluates many times
        found = assess(tar)
    assert found.retrieved[""].pictures.examples.read(0).captions == ["0 sans"]
    del found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def _on_ranks(path: Path) -> tuple[dict[str, float], list[tuple[int, int]]]:
    model = Oracle()
    chosen, data = settings(path, batch_size=4, zeroshot=[{"label": "face", "templates": ["{character} {face}"]}])
    return run(model, chosen, model.preprocess, dist.get_rank(), dist.get_world_size(), data), model.calls


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_and_call_the_model_equally_often(tmp_path: Path, world: int) -> None:
    samples = [glyph(number) for number in range(22)]
    samples[20]["png"] = samples[3]["png"]
    samples[21]["png"] = b"no picture"
    tar = write_tar(tmp_path / "a.tar", samples)
    alone = assess(tar, zeroshot=[{"label": "face", "templates": ["{character} {face}"]}]).metrics
    results = run_ranks(_on_ranks, world, tar)
    for metrics, calls in results:
        assert metrics == pytest.approx(alone, abs=1e-12)
        assert calls == results[0][1]
    assert alone["image_to_text_r1"] < 1.0


def test_several_datasets_keep_their_names(tmp_path: Path) -> None:
    for name in ("en", "de"):
        write_tar(tmp_path / name / "0.tar", [glyph(number) for number in range(6)])
    found = assess(tmp_path / "en", data=[str(tmp_path / "en"), str(tmp_path / "de")])
    assert {"en/image_to_text_r1", "de/text_to_image_r5"} <= set(found.metrics)
    assert set(found.ceilings) == {
        f"{name}/{way}_r1" for name in ("en", "de") for way in ("image_to_text", "text_to_image")
    }


def benchmark(root: Path, split: str = "test") -> Path:
    """A CLIP_benchmark dataset of 3 classes."""
    samples = [{"png": picture(number), "cls": str(number % 3).encode()} for number in range(12)]
    write_tar(root / split / "0.tar", samples[:6])
    write_tar(root / split / "1.tar", samples[6:])
    (root / split / "nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("\n".join(FACES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\n{c}\n")
    return root


@pytest.mark.parametrize("inner", ["", "test"])
def test_a_clip_benchmark_folder_is_read_as_it_is(tmp_path: Path, inner: str) -> None:
    found = assess(benchmark(tmp_path / "wds_faces") / inner)
    assert found.metrics == {"zeroshot_top1": 1.0, "zeroshot_top5": 1.0, "zeroshot_mean_per_class": 1.0}
    assert found.named["zeroshot"].templates == ["a {c}", "{c}"]
    assert found.named["zeroshot"].names == list(FACES)


def test_a_clip_benchmark_retrieval_folder_has_a_caption_a_line(tmp_path: Path) -> None:
    samples = [{"png": picture(3 * number), "txt": f"{number} sans\n\nsans {number}\n".encode()} for number in range(8)]
    write_tar(tmp_path / "flickr" / "test" / "0.tar", samples)
    (tmp_path / "flickr" / "dataset_type.txt").write_text("retrieval\n")
    found = assess(tmp_path / "flickr")
    assert found.sizes[str(tmp_path / "flickr")] == {"samples": 8, "pictures": 8, "captions": 16, "damaged": 0}
    assert set(found.metrics.values()) == {1.0}


def test_captions_of_clip_benchmark_end_where_it_ends_them(tmp_path: Path) -> None:
    """Its loader maps `str.splitlines` over the .txt members."""
    text = "one\r\ntwo\rthree\u2028four\x85five\n"
    write_tar(tmp_path / "flickr" / "test" / "0.tar", [{"png": picture(0), "txt": text.encode()}])
    (tmp_path / "flickr" / "dataset_type.txt").write_text("retrieval\n")
    examples = open_examples(str(tmp_path / "flickr"), DataSettings())
    assert examples.read(0).captions == text.splitlines() == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize(
    ("zeroshot", "message"),
    [
        ({"label": "style"}, "has no 'style' in its metadata .it has: captions, character, face, faces"),
        ({"label": "face", "templates": ["{font} {}"]}, "has no 'font'"),
        ({"label": "face", "accept": "font"}, "has no 'font'"),
        ({"label": "face", "classes": "{folder}/two.txt"}, "face 'mono' of .* is not among its 2 classes"),
        ({"label": "face", "classes": "{folder}/none.txt"}, "no such file"),
        ({"label": "face", "templates": ["fotos"]}, "'fotos' is neither a template"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path: Path, zeroshot: dict[str, Any], message: str) -> None:
    (tmp_path / "two.txt").write_text("sans\nserif\n")
    if "classes" in zeroshot:
        zeroshot = zeroshot | {"classes": zeroshot["classes"].format(folder=tmp_path)}
    tar = write_tar(tmp_path / "a.tar", [glyph(number) for number in range(6)])
    with pytest.raises(UserError, match=message) as caught:
        assess(tar, zeroshot=[zeroshot])
    assert "\n" not in str(caught.value)


def test_nothing_to_evaluate_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.data is empty"):
        run(Oracle(), EvalSettings(), Oracle.preprocess, 0, 1)
    with pytest.raises(UserError, match="no such folder"):
        assess(tmp_path / "absent")
    (tmp_path / "root" / "classnames.txt").parent.mkdir()
    (tmp_path / "root" / "classnames.txt").write_text("a\n")
    with pytest.raises(UserError, match="name the split"):
        assess(tmp_path / "root")


def test_settings_refuse_two_of_one_name() -> None:
    with pytest.raises(UserError, match="two zero-shot classifications are called 'face'"):
        parse(EvalSettings, {"zeroshot": [{"label": "face"}, {"label": "face"}]}, "recipe")
    assert (
        EvalSettings(zeroshot=[ZeroShotSettings(label="face"), ZeroShotSettings(label="face", name="other")]).every == 0
    )
    assert parse(EvalSettings, {"data": "shards"}, "recipe").data == ["shards"]


class OnDevice(Oracle):
    """Its scale and bias cannot be read, as if reading them waited for a device."""

    def forward(self, *inputs: Tensor | None) -> Embeddings:
        return super().forward(*inputs)._replace(scale=torch.ones(1, device="meta"), bias=torch.ones(1, device="meta"))


def test_embedding_does_not_wait_for_the_device_after_every_batch() -> None:
    encoder = Encoder(OnDevice(), EvalSettings(batch_size=2), Oracle.preprocess, 0, 1)
    assert encoder.texts([f"{number} sans" for number in range(5)]).shape == (5, 103)
    with pytest.raises(RuntimeError, match="meta"):
        print(encoder.scale)  # asked for, it is read
