"""A browser opens the report from disk with the network shut; ``pytest -m slow``, skipped where Chromium is missing."""

import io as memory
import json
import shutil
import time

import numpy as np
import pytest
from chrome import Chrome
from PIL import Image

from fewscan.data import io, places
from fewscan.deliver.report import write_report
from fewscan.space.geometry import Geometry

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GRID = Geometry((40, 36, 20), np.diag([1.0, 1.0, 2.0, 1.0]))
OPEN = """
const button = document.querySelector(".viewer .start button"), said = document.querySelector(".viewer .said");
button.click();
for (let i = 0; i < 400 && !/^Close/.test(button.textContent) && !/could not/.test(said.textContent); i++) {
  await new Promise((done) => setTimeout(done, 50));
}
document.querySelector(".viewer .canvas").scrollIntoView();
await new Promise((done) => setTimeout(done, 300));
return said.textContent;
"""
PRESS = """
const key = new KeyboardEvent("keydown", {{ key: "{key}", bubbles: true }});
document.querySelector(".viewer .stage").dispatchEvent(key);
await new Promise((done) => setTimeout(done, 300));
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two predicted scans, one with probabilities."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    label = np.zeros(GRID.shape, np.uint16)
    label[12:28, 10:26, 6:14] = 1
    rows = []
    for i in range(2):
        scan = rng.normal(300 + 200 * (label > 0), 40).astype(np.int16)
        io.write_image(scan, folder / "scans" / f"case_{i}.nii.gz", native=GRID)
        io.write_labelmap(np.roll(label, i, 0), folder / f"case_{i}.nii.gz", native=GRID)
        rows.append({"id": f"case_{i}", "path": f"case_{i}.nii.gz"})
    probs = np.stack([np.full(GRID.shape, 100, np.uint8), np.full(GRID.shape, 155, np.uint8)])
    io.write_image(probs, folder / "case_0_probabilities.nii.gz", native=GRID)
    (folder / "predictions.json").write_text(json.dumps({"labels": {"1": "block"}, "predictions": rows}))
    kept = {f"case_{i}": {"image": folder / "scans" / f"case_{i}.nii.gz"} for i in range(2)}
    places.remember(folder / "predictions.json", kept)
    return write_report(folder, folder / "report.html").as_uri()


@pytest.fixture
def browser(tmp_path):
    found = Chrome(PROGRAM, tmp_path / "profile")
    yield found
    found.close()


def pixels(browser):
    """Of the canvas as the reader sees it."""
    box = browser.run(
        "const { x, y, width, height } = document.querySelector('.viewer canvas').getBoundingClientRect();"
        "return [x, y, x + width, y + height]"
    )
    whole = Image.open(memory.BytesIO(browser.picture())).convert("RGB")
    return np.asarray(whole.crop([round(v) for v in box])).astype(int)


def until(browser, wanted):
    """Pixels as soon as they are as wanted; drawing without a graphics card takes a while."""
    end = time.monotonic() + 15
    while not wanted(found := pixels(browser)):
        assert time.monotonic() < end, "the canvas stays as it was"
        time.sleep(0.1)
    return found


def coloured(found):
    return int((np.ptp(found, axis=-1) > 40).sum())


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_it_opens_from_disk_draws_and_answers_keys(page, browser, width, dark):
    browser.show(page, width=width, dark=dark)
    assert browser.run("return document.querySelector('.viewer canvas')") is None
    assert browser.run(OPEN) == ""
    masked = coloured(until(browser, lambda found: np.ptp(found) > 100 and coloured(found) > 500))
    browser.run(PRESS.format(key="m"))
    found = until(browser, lambda found: coloured(found) < masked / 2)
    for key in ("u", "2", "w", "]"):
        browser.run(PRESS.format(key=key))
        found = until(browser, lambda now, before=found: (now != before).any())
    chosen = browser.run("return document.querySelector('.viewer select').selectedOptions[0].text")
    assert chosen == "case_1 · predicted"
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.run(PRESS.format(key="Escape"))
    assert browser.run("return document.querySelector('.viewer canvas')") is None
    assert browser.problems() == []


def test_without_webgl_it_says_so_and_the_pictures_stay(page, tmp_path):
    browser = Chrome(PROGRAM, tmp_path / "profile", "--disable-3d-apis")
    try:
        browser.show(page)
        said, hidden, stills = browser.run(
            "return [document.querySelector('.viewer .said').textContent,"
            "document.querySelector('.viewer .start button').hidden, document.querySelectorAll('.planes svg').length]"
        )
    finally:
        browser.close()
    assert "lacks WebGL 2" in said
    assert hidden
    assert stills == 6


def test_in_print_the_pictures_take_the_place_of_the_canvas(page, browser):
    browser.show(page)
    browser.run(OPEN)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    shown = "return [...document.querySelectorAll('{}')].map((e) => e.getClientRects().length > 0)"
    assert not any(browser.run(shown.format(".viewer .stage, .viewer .start")))
    assert browser.run(shown.format(".planes svg")) == [True] * 6
