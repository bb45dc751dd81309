"""`ringlip search`: columns made once and gone on with, answers those of the model, and a server that answers this
machine alone."""

from __future__ import annotations

import argparse
import http.client
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.support.search import FIELD, HOSTILE, ROWS, make_world, serving
from tests.support.shards import overwrite
from tests.test_models_vision_text import pair, towers  # noqa: F401 (a fixture)
from trainer.core.types import UserError
from trainer.data import embedding_column
from trainer.data.transforms import decode, fit
from trainer.models.precomputed import fingerprint
from trainer.search import main, open_library
from trainer.search.library import Library, Query
from trainer.search.model import WholeEmbedder
from trainer.search.server import Server

OPTIONS = argparse.Namespace(batch_size=16, caption=None, ema=False, forget_others=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def library(world: Path) -> Library:
    return open_library([str(world / "one"), str(world / "two")], str(world / "shards"), OPTIONS)


@pytest.fixture(scope="module")
def server(library: Library) -> Iterator[Server]:
    with serving(library) as found:
        yield found


def ask(
    server: Server, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **params: Any
) -> tuple[int, dict[str, str], Any]:
    """(status, headers, answer) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(
        method, path + (f"?{urlencode(params, doseq=True)}" if params else ""), body or None, headers or {}
    )
    answer = connection.getresponse()
    data, found = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return answer.status, found, json.loads(data) if "json" in found["content-type"] else data


def png(size: tuple[int, int] = (20, 20)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(9).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("model", [0, 1])
def test_the_nearest_are_those_of_the_model(library: Library, model: int) -> None:
    """Cosines of embeddings that are made here, with plain torch: words to images and captions, an image to both."""
    chosen, source = library.models[model], library.source
    pixels = torch.stack([fit(decode(source.picture(one), 10**6), chosen.model.preprocess) for one in range(ROWS)])
    new = fit(decode(png(), 10**6), chosen.model.preprocess)[None]
    with torch.no_grad():
        images = chosen.model.embed_images(pixels)
        captions = [source.captions(one)[0] for one in range(ROWS)]
        texts = chosen.model.embed_texts(*chosen.model.preprocess.tokenize(captions))
        words = chosen.model.embed_texts(*chosen.model.preprocess.tokenize(["a red cat"]))[0]
        drawn = chosen.model.embed_images(new)[0]
    for query, vector in (
        (Query(text="a red cat"), words),
        (Query(picture=png()), drawn),
        (Query(sample=5), images[5]),
    ):
        for kind, stored in (("pictures", images), ("captions", texts)):
            found = library.search(query, model, kind, 10)["results"]  # type: ignore[arg-type]
            scores = (stored @ vector).numpy()
            assert len(found) == 10
            for one in found:
                assert one["score"] == pytest.approx(scores[one["sample"]], abs=2e-3)  # stored in float16
                assert one["caption"] == captions[one["sample"]]
            assert [one["score"] for one in found] == pytest.approx(np.sort(scores)[::-1][:10].tolist(), abs=2e-3)
            across = bool(chosen.bias) and bool(query.text) == (kind == "pictures")
            assert ("probability" in found[0]) == across, "only of an image with a caption, by a model with a bias"
    assert chosen.bias if model == 0 else not chosen.bias


def test_probabilities_and_labels_are_those_of_the_loss(library: Library) -> None:
    chosen = library.models[0]
    best = library.search(Query(text="a dog"), 0, "pictures", 1)["results"][0]
    logit = chosen.scale * best["score"] + chosen.bias
    assert best["probability"] == pytest.approx(1 / (1 + np.exp(-logit)))
    rows = library.labels(Query(sample=3), 0, ["cat", "dog", "house"], "a {}")
    cosines = {text: float(chosen.text(f"a {text}") @ chosen.pictures.row(3)) for text in ("cat", "dog", "house")}
    assert [row["label"] for row in rows] == sorted(cosines, key=lambda label: -cosines[label])
    assert sum(row["softmax"] for row in rows) == pytest.approx(1)
    for row in rows:
        assert row["score"] == pytest.approx(cosines[row["label"]], abs=1e-6)
        assert row["sigmoid"] == pytest.approx(1 / (1 + np.exp(-chosen.scale * row["score"] - chosen.bias)), rel=1e-5)
    assert "sigmoid" not in library.labels(Query(sample=3), 1, ["cat", "dog"], "{}")[0], "CLIP has no bias"
    with pytest.raises(UserError, match="labels are for an image"):
        library.labels(Query(text="words"), 0, ["cat"], "{}")


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ((("kind", "dog"),), lambda number: number % 3 == 1),
        ((("kind", "*o*"),), lambda number: number % 3 in (1, 2)),
        ((("weight", ">= 2.5"), ("kind", "cat")), lambda number: number >= 25 and number % 3 == 0),
        ((("width", "16"),), lambda number: True),
        ((("kind", "[c]at"),), lambda number: False),
    ],
)
def test_filters_leave_what_has_the_value(library: Library, filters: Any, passes: Any) -> None:
    weights = [library.source.metadata(sample)["weight"] for sample in range(ROWS)]
    wanted = {sample for sample, weight in enumerate(weights) if passes(round(float(weight) * 10))}
    for query in (Query(text="a cat"), Query()):
        found = library.search(query, 0, "pictures", 500, filters)
        assert {one["sample"] for one in found["results"]} == wanted
        assert found["total"] == len(wanted)


def test_the_values_of_a_field_are_proposed(library: Library) -> None:
    assert sorted(library.fields.common("kind")) == [("Dog", 20), ("cat", 20), ("house", 20)]
    assert {"kind", "weight", FIELD, "width"} <= set(library.fields.names)
    with pytest.raises(UserError, match="has a field 'colour'"):
        library.fields.mask("colour", "red")


def test_a_stop_in_the_middle_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    monkeypatch.setattr(embedding_column, "ROWS", 16)
    made: list[range] = []
    plain, stop = WholeEmbedder.rows, [True]

    def rows(self: WholeEmbedder, source: Any, samples: range) -> Any:
        if len(made) == 2 and stop:
            raise KeyboardInterrupt
        made.append(samples)
        return plain(self, source, samples)

    monkeypatch.setattr(WholeEmbedder, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        open_library([str(world / "one")], str(world / "shards"), OPTIONS)
    stop.clear()
    found = open_library([str(world / "one")], str(world / "shards"), OPTIONS)
    image, text = made[:4], made[4:]
    assert image == text == [range(16), range(16, 32), range(32, 48), range(48, 60)], "no part is made twice"
    made.clear()
    again = open_library([str(world / "one")], str(world / "shards"), OPTIONS)
    assert not made, "what is there is used"
    query = Query(text="a red cat")
    assert found.search(query, 0, "pictures", 9) == again.search(query, 0, "pictures", 9)


def test_embeddings_of_other_models_can_be_deleted(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    shards = world / "shards"
    first = open_library([str(world / "one")], str(shards), OPTIONS).models[0].columns
    forget_others = argparse.Namespace(**{**vars(OPTIONS), "forget_others": True})
    second = open_library([str(world / "two")], str(shards), forget_others).models[0].columns
    assert sorted(json.loads((shards / "manifest.json").read_text())["columns"]) == sorted(second)
    assert sorted(path.stem for path in (shards / "columns").glob("*.npy")) == sorted(second)
    assert not set(first) & set(second)


@torch.no_grad()
def test_padding_is_left_out_only_where_it_does_not_matter(library: Library) -> None:
    for number, family in enumerate(("siglip", "clip")):
        chosen = library.models[number]
        assert chosen.model.family == family
        texts = ["a red cat", "dog", "a small tree under an old house"]
        whole = chosen.model.embed_texts(*chosen.model.preprocess.tokenize(texts)).numpy()
        np.testing.assert_allclose(chosen.texts(texts), whole, atol=1e-6)


def test_a_damaged_picture_is_no_answer(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    overwrite(world / "shards", 0, 4)
    library = open_library([str(world / "one")], str(world / "shards"), OPTIONS)
    found = library.search(Query(text="a cat"), 0, "pictures", 500)["results"]
    assert sorted(one["sample"] for one in found) == [sample for sample in range(ROWS) if sample != 4]
    with pytest.raises(UserError, match="could not be decoded"):
        library.search(Query(sample=4), 0, "pictures", 5)


@torch.no_grad()
def test_columns_are_of_one_model(towers: Any) -> None:  # noqa: F811
    """A pair whose projection alone is another has other embeddings: its key differs, and the locked tower's does not."""
    model = pair(towers)
    before = [fingerprint(model.towers, model.preprocess, "image", projected=projected) for projected in (True, False)]
    projection: nn.Linear = model.towers.get_submodule("visual_projection")  # type: ignore[assignment]
    projection.weight[0, 0] += 1
    after = [fingerprint(model.towers, model.preprocess, "image", projected=projected) for projected in (True, False)]
    assert before[0] != after[0] and before[1] == after[1]


def test_the_page_and_its_answers(server: Server) -> None:
    status, headers, page = ask(server, "GET", "/")
    assert status == 200 and b"<script>" not in page and b"style=" not in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    for path in ("/page.css", "/page.js", "/results.js"):
        status, headers, text = ask(server, "GET", path)
        assert status == 200 and headers["x-content-type-options"] == "nosniff"
        assert b"http://" not in text and b"https://" not in text, "nothing is asked of another machine"
    status, _, found = ask(server, "POST", "/api/search", text="a dog", count=3, field=["kind", ""], value=["cat", "x"])
    assert status == 200 and len(found["results"]) == 3 and found["total"] == 20
    status, _, found = ask(server, "POST", "/api/search", png(), model=1, kind="captions", count=2)
    assert status == 200 and len(found["results"]) == 2
    status, headers, data = ask(server, "GET", "/picture", sample=0, side=64)
    assert status == 200 and headers["content-type"] == "image/png" and data.startswith(b"\x89PNG")
    status, _, found = ask(server, "GET", "/api/sample", sample=0)
    assert found["captions"] == [HOSTILE[0]] or found["captions"][0]


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        ("POST", "/api/search?model=7&text=a", b"", "model 7: 2 are loaded"),
        ("POST", "/api/search?model=-1&text=a", b"", "not a number"),
        ("POST", "/api/search?kind=sounds&text=a", b"", "pictures or captions"),
        ("POST", "/api/search?sample=60", b"", "which has 0 to 59"),
        ("POST", "/api/search", b"<svg onload=alert(1)>", "not decodable"),
        ("POST", "/api/search?field=nothing&value=x", b"", "a field 'nothing'"),
        ("POST", "/api/labels?sample=1", b"", "no labels"),
        ("GET", "/picture", b"", "sample is missing"),
        ("GET", "/picture?sample=99999999999999999999", b"", "not a number"),
        ("GET", "/../../etc/passwd", b"", "no such page"),
    ],
)
def test_mistakes_are_answered_in_words(server: Server, method: str, path: str, body: bytes, says: str) -> None:
    status, headers, found = ask(server, method, path, body)
    assert status in (400, 404) and says in found["error"]
    assert headers["content-type"].startswith("application/json")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name that its owner has pointed here
        {"Host": "localhost.evil.example:7860"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://evil.example"},
    ],
)
def test_other_sites_are_refused(server: Server, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/api/about"), ("GET", "/picture?sample=1"), ("POST", "/api/search?text=a")):
        status, answered, found = ask(server, method, path, headers=headers)
        assert status == 403 and "error" in found
        assert answered["cross-origin-resource-policy"] == "same-origin"
    assert ask(server, "GET", "/api/about", headers={"Host": "localhost:1234"})[0] == 200, "through a tunnel"


def test_another_address_needs_the_token(library: Library) -> None:
    with serving(library, "0.0.0.0") as server:
        assert len(server.token) > 16 and f"?token={server.token}" in server.url
        assert ask(server, "GET", "/")[0] == 403
        assert ask(server, "GET", "/api/about", headers={"Cookie": "ringlip=wrong"})[0] == 403
        status, headers, _ = ask(server, "GET", "/", token=server.token)
        assert status == 200 and "HttpOnly" in headers["set-cookie"] and "SameSite=Strict" in headers["set-cookie"]
        cookie = headers["set-cookie"].split(";")[0]
        assert ask(server, "GET", "/api/about", headers={"Cookie": cookie})[0] == 200


def test_a_body_that_is_too_large_is_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.search.server.MOST_BYTES", 10)
    status, _, found = ask(server, "POST", "/api/search", b"x" * 11)
    assert status == 413 and "larger than" in found["error"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shards"], "name a model and the shards"),
        (["a", "b", "c", "shards"], "one or two"),
        (["nowhere", "pairs.csv"], "data_tools shard"),
        (["one", "shards", "--batch-size", "0"], "must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(world: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        main([str(world / one) if not one.startswith("-") and not one.isdigit() else one for one in arguments])
    assert "\n" not in str(raised.value)


def test_a_port_that_is_taken_is_named(library: Library, server: Server) -> None:
    with pytest.raises(UserError, match="give another, or 0 for any"):
        Server(library, "127.0.0.1", server.server_address[1])
