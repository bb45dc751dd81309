"""The search page in a real browser: typing, dropping an image, filters, two models, hostile captions, a phone, keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, needs_chromium
from tests.support.search import FIELD, HOSTILE, ROWS, make_world, serving
from tests.test_search import OPTIONS, png
from trainer.search import open_library
from trainer.search.library import Library, Query
from trainer.search.server import Server

pytestmark = needs_chromium
SHOWN = "[...document.querySelectorAll('#results .column')].map(c => [...c.querySelectorAll('.hit')].map(h => Number(h.dataset.sample)))"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    world = make_world(tmp_path_factory.mktemp("search"))
    return open_library([str(world / "one"), str(world / "two")], str(world / "shards"), OPTIONS)


@pytest.fixture(scope="module")
def server(library: Library) -> Iterator[Server]:
    with serving(library) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(autouse=True)
def start(browser: Browser, server: Server) -> Iterator[None]:
    """The page anew; in the end its console has reported nothing."""
    browser.resize(1280, 900)
    browser.open("about:blank")
    browser.errors.clear()
    browser.open(server.url)
    browser.wait("document.querySelectorAll('.hit').length == 24")
    yield
    assert browser.errors == []


def nearest(library: Library, query: Query, model: int, count: int = 12, **more: str) -> list[int]:
    found = library.search(query, model, "pictures", count, tuple(more.items()))
    return [one["sample"] for one in found["results"]]


def shows(browser: Browser, *columns: list[int]) -> None:
    browser.wait(f"JSON.stringify({SHOWN}) == {json.dumps(json.dumps(list(columns), separators=(',', ':')))}")


def test_typing_shows_the_nearest_of_both_models_at_once(browser: Browser, library: Library) -> None:
    browser.run("document.getElementById('words').focus()")
    browser.type("a red house")
    query = Query(text="a red house")
    shows(browser, nearest(library, query, 0), nearest(library, query, 1))
    browser.wait("document.querySelectorAll('.line').length == 16")
    captions = library.search(query, 0, "captions", 1)["results"][0]["caption"]
    assert browser.run("document.querySelector('.line .caption').textContent") == captions
    assert browser.run("location.hash") == "#text=a+red+house"
    both = set(nearest(library, query, 0)) & set(nearest(library, query, 1))
    assert browser.run("document.querySelectorAll('.hit em.only').length") == 24 - 2 * len(both)
    browser.click("#more")
    shows(browser, nearest(library, query, 0, 60), nearest(library, query, 1, 60))
    browser.run("history.pushState(null, '', '#'), dispatchEvent(new PopStateEvent('popstate'))")
    browser.wait(f"{STATUS}.includes('type words')")


def test_a_dropped_picture_finds_its_like_and_is_named(browser: Browser, library: Library, tmp_path: Path) -> None:
    (tmp_path / "new.png").write_bytes(png())
    browser.drop(tmp_path / "new.png")
    shows(browser, nearest(library, Query(picture=png()), 0), nearest(library, Query(picture=png()), 1))
    browser.run("document.getElementById('labels').focus()")
    browser.type("cat, dog, large house")
    browser.wait("document.querySelectorAll('#named .bars').length == 2")
    wanted = [row["label"] for row in library.labels(Query(picture=png()), 1, ["cat", "dog", "large house"], "{}")]
    rows = "[...document.querySelectorAll('#named .bars')[1].children].slice(1).map(r => r.firstChild.textContent)"
    assert browser.run(rows) == wanted
    (tmp_path / "no.png").write_text("<svg onload=alert(1)>")
    browser.drop(tmp_path / "no.png")
    browser.wait(f"{STATUS}.includes('not decodable')")
    browser.errors.clear()  # the console reports the 400 that this answer is


def test_a_filter_by_a_field(browser: Browser, library: Library) -> None:
    browser.run("document.getElementById('words').focus()")
    browser.type("a cat")
    browser.choose("#filters select", "kind")
    browser.wait("document.querySelectorAll('#filters datalist option').length == 3")
    browser.type("DOG")
    query = Query(text="a cat")
    shows(browser, nearest(library, query, 0, kind="dog"), nearest(library, query, 1, kind="dog"))
    browser.wait(f"{STATUS}.startsWith('12 nearest of 20 images that match the filter')")
    browser.click("#filters button")
    shows(browser, nearest(library, query, 0), nearest(library, query, 1))
    browser.choose("#filters select", "kind")
    browser.type("mouse")
    browser.wait("document.querySelector('.empty')?.textContent == 'No image matches the filter.'")


def test_hostile_captions_and_fields_are_text(browser: Browser, library: Library) -> None:
    browser.run("document.getElementById('words').focus()")
    browser.type(HOSTILE[0])
    browser.wait("document.querySelectorAll('.line').length == 16")
    browser.run("document.getElementById('more').click()")
    browser.wait(f"document.querySelectorAll('.hit').length == {2 * ROWS}")
    for caption in HOSTILE:
        assert (
            browser.run(
                f"[...document.querySelectorAll('.hit .caption')].filter(c => c.textContent == {json.dumps(caption)}).length"
            )
            == 2
        )
    number = next(sample for sample in range(ROWS) if library.source.captions(sample) == [HOSTILE[0]])
    browser.click(f'.hit[data-sample="{number}"]')
    browser.wait("document.querySelectorAll('dialog .hit').length == 24")
    facts = browser.run(
        "Object.fromEntries([...document.querySelectorAll('dialog dt')].map(t => [t.textContent, t.nextSibling.textContent]))"
    )
    assert facts[FIELD] == HOSTILE[0] and facts["kind"] in ("cat", "Dog", "house")
    assert browser.run(
        "[window.hacked === undefined, document.scripts.length, document.querySelectorAll('b b, [onerror]').length]"
    ) == [True, 1, 0]
    assert browser.run("document.documentElement.scrollWidth") == 1280, "no caption widens the page"


def test_a_click_shows_the_sample_and_its_neighbours(browser: Browser, library: Library) -> None:
    browser.click(".hit:nth-child(3)")
    browser.wait("document.getElementById('detail').open")
    sample = browser.run("Number(document.getElementById('detail').dataset.sample)")
    assert sample == nearest(library, Query(), 0, 24)[2]
    browser.wait("document.querySelectorAll('dialog .hit').length == 24")
    near = browser.run("[...document.querySelectorAll('dialog .hits')[1].children].map(h => Number(h.dataset.sample))")
    assert near == [one for one in nearest(library, Query(sample=sample), 1, 13) if one != sample]
    assert browser.run("document.querySelector('dialog h2').textContent") == library.source.captions(sample)[0]
    browser.click("dialog .acts button")
    shows(browser, nearest(library, Query(sample=sample), 0), nearest(library, Query(sample=sample), 1))
    assert browser.run("location.hash") == f"#sample={sample}"


def test_keys_alone_are_enough(browser: Browser, library: Library) -> None:
    browser.run("document.activeElement.blur()")
    browser.press("/")
    browser.type("a small tree")
    first, second = nearest(library, Query(text="a small tree"), 0)[:2]
    shows(browser, *(nearest(library, Query(text="a small tree"), model) for model in (0, 1)))
    focused = "Number(document.activeElement.dataset.sample)"
    browser.press("ArrowDown")
    assert browser.run(focused) == first
    browser.press("ArrowRight")
    assert browser.run(focused) == second
    browser.press("Enter")
    browser.wait(
        f"document.getElementById('detail').open && document.getElementById('detail').dataset.sample == {second}"
    )
    browser.press("ArrowLeft")
    browser.wait(f"document.getElementById('detail').dataset.sample == {first}")
    browser.press("Escape")
    browser.wait("!document.getElementById('detail').open")
    browser.press("/")
    browser.press("Escape")
    browser.wait("document.getElementById('words').value == '' && document.querySelectorAll('.column').length == 1")


def test_a_phone_shows_it_all_in_its_width(browser: Browser, server: Server) -> None:
    browser.resize(390, 844)
    browser.run("document.getElementById('words').focus()")
    browser.type("a red house")
    browser.wait("document.querySelectorAll('.line').length == 16")
    wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 391 || e.getBoundingClientRect().left < -1).map(e => e.outerHTML)"
    assert browser.run(wide) == [] and browser.run("document.documentElement.scrollWidth") == 390
    assert browser.run("parseFloat(getComputedStyle(document.getElementById('words')).fontSize)") >= 16, (
        "iOS zooms in otherwise"
    )
    browser.click(".hit")
    browser.wait("document.querySelectorAll('dialog .hit').length == 24")
    assert browser.run("document.querySelector('dialog').scrollWidth <= 390")
    small = "[...document.querySelectorAll('.hit, .acts button, .close')].filter(e => Math.min(e.offsetWidth, e.offsetHeight) < 28).length"
    assert browser.run(small) == 0, "a finger finds everything"
