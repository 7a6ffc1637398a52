"""The page in a browser: what a reader sees, presses and prints. Needs Debian's chromium."""

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgmp.evaluation.inspect import linear_facts
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.pack.planes import PackedWeight, pack, unpack_units
from fgmp.report.blocks import WINDOW, block_map, window
from fgmp.report.gather import gather
from fgmp.report.page import write_page
from fgmp.report.records import Checkpoint, Matrix, Rows

from .test_page import EVIL, PASSAGE, ROWS, hostile

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver, as Debian has them"
)

DESKTOP, PHONE = (1280, 900), (390, 844)
ACTION = 20.0
"""Seconds within which the page must react on a slow machine."""


class Browser:
    """A page in headless chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.js = driver.execute_script

    def media(self, scheme: str = "light", kind: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        settings = {"media": kind, "features": features}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", settings)

    def window(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        metrics["mobile"] = size == PHONE
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd(
            "Emulation.setTouchEmulationEnabled", {"enabled": size == PHONE}
        )

    def open(self, path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        self.window(size)
        self.media(scheme)
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait until a script returns something true."""
        end = time.monotonic() + ACTION
        while not (value := self.js(script, *arguments)):
            assert time.monotonic() < end, f"{script}; console: {self.errors()}"
            time.sleep(0.05)
        return value

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def text(self, id_: str) -> str:
        return str(self.js("return document.getElementById(arguments[0]).textContent", id_))

    def find(self, id_: str) -> Any:
        return self.driver.find_element("id", id_)

    def press(self, id_: str) -> None:
        element = self.find(id_)
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def choose(self, id_: str, text: str) -> None:
        self.js(
            "const s = document.getElementById(arguments[0]);"
            "s.value = [...s.options].find((o) => o.textContent === arguments[1]).value;"
            "s.dispatchEvent(new Event('change'))",
            id_,
            text,
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(folder: Path) -> Checkpoint:
    return replace(
        gather(folder, 1, WINDOW),
        comparison=Rows(ROWS, "a file.json"),
        passages=[PASSAGE],
        passages_source="From a text.",
    )


def large_weight(n: int, k: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    codes = quantize_weight(weight, tensor_scale(8.0))
    return pack(codes, torch.rand(codes.scale.shape, generator=generator) < 0.3)


@pytest.fixture(scope="module")
def large() -> PackedWeight:
    """A weight of 64 rows; with it stands a map of 4096 rows."""
    return large_weight(64, 11008)


@pytest.fixture(scope="module")
def large_flags(large: PackedWeight) -> torch.Tensor:
    flags = torch.rand(4096, 688, generator=torch.Generator().manual_seed(1)) < 0.3
    flags[:64] = large.is_fp8()
    return flags


@pytest.fixture(scope="module")
def report(
    page: Checkpoint,
    large: PackedWeight,
    large_flags: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny checkpoint with one more matrix, of 2.8 million blocks, as layer ``2``."""
    facts = replace(
        linear_facts("model.layers.2.mlp.down_proj", large),
        n=4096,
        blocks=large_flags.numel(),
        fp8_blocks=int(large_flags.sum()),
    )
    matrix = Matrix(
        facts,
        "2",
        "mlp.down_proj",
        large.t.item(),
        block_map(large_flags, 1),
        window(large, WINDOW),
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, "tiny", [replace(page, matrices=[*page.matrices, matrix])])
    return path


@pytest.fixture(scope="module")
def two(page: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "two.html"
    second = replace(page, name="second", scores=None, energy=None, comparison=None)
    second = replace(second, missing=dict.fromkeys(("scores", "energy", "comparison"), "a reason"))
    write_page(path, "two", [page, second])
    return path


# Loading.


def test_no_message_on_the_console(browser: Browser, report: Path, two: Path) -> None:
    for path in (report, two):
        for scheme, size in (("light", DESKTOP), ("dark", PHONE)):
            browser.open(path, size, scheme)
            assert browser.errors() == []


@pytest.mark.parametrize("evil", EVIL)
def test_hostile_names_run_nothing(
    evil: str, browser: Browser, page: Checkpoint, tmp_path: Path
) -> None:
    """A page full of hostile names draws its figures; nothing in them is markup or script."""
    path = tmp_path / "evil.html"
    write_page(path, evil, [hostile(page, evil), replace(page, name="plain")])
    browser.open(path)
    assert browser.errors() == []  # a refused script would be reported, an alert would block
    assert browser.js("return document.querySelectorAll('img, [onfocus]').length") == 0
    assert browser.js("return document.title") == evil
    ticks = browser.js(
        "return [...document.querySelectorAll('#plot-grid .ytick text')].map((t) => t.textContent)"
    )
    assert any(tick.endswith(evil) for tick in ticks), ticks
    assert evil in browser.js("return document.getElementById('map-layer').textContent")


def test_another_script_would_not_run(browser: Browser, report: Path, tmp_path: Path) -> None:
    """The policy stops what escaping would have missed."""
    path = tmp_path / "injected.html"
    text = report.read_text(encoding="utf-8")
    path.write_text(text.replace("</h1>", "</h1><script>window.ran = 1</script>", 1))
    browser.open(path)
    assert browser.js("return window.ran") is None
    (message,) = browser.errors()
    assert "Content Security Policy" in message


def test_missing_panels_leave_the_others(
    browser: Browser, page: Checkpoint, tmp_path: Path
) -> None:
    reasons = dict.fromkeys(("comparison", "passages", "scores", "energy", "run"), "a reason")
    bare = replace(page, comparison=None, passages=None, scores=None, energy=None, missing=reasons)
    write_page(tmp_path / "bare.html", "bare", [bare])
    browser.open(tmp_path / "bare.html")
    assert browser.errors() == []
    drawn = browser.js("return [...document.querySelectorAll('.js-plotly-plot')].map((p) => p.id)")
    assert set(drawn) == {"plot-shares", "plot-grid", "plot-bytes", "plot-map", "plot-block"}
    assert browser.js("return document.querySelectorAll('.missing[data-missing]').length") == 5


# The comparison.


def first_column(browser: Browser) -> list[str]:
    script = (
        "return [...document.getElementById('comparison-table').tBodies[0].rows]"
        ".map((r) => r.cells[0].firstChild.textContent.trim())"
    )
    return list(browser.js(script))


def test_headings_sort_by_value(browser: Browser, report: Path) -> None:
    browser.open(report)
    heading = (
        "return [...document.querySelectorAll('#comparison-table th button')]"
        ".find((b) => b.textContent === arguments[0])"
    )
    browser.js(heading, "KL").click()
    assert first_column(browser) == ["original", "fp8", "fgmp", "uniform"]
    browser.js(heading, "KL").send_keys("\ue007")  # Enter
    assert first_column(browser) == ["uniform", "fgmp", "fp8", "original"]
    sorted_by = (
        "return [...document.querySelectorAll('th[aria-sort]')]"
        ".map((t) => [t.textContent, t.ariaSort])"
    )
    assert browser.js(sorted_by) == [["KL", "descending"]]
    browser.js(heading, "KL, 99th percentile").click()  # two rows have none
    assert first_column(browser)[:2] == ["fgmp", "uniform"]


def test_the_measure_of_harm_can_be_chosen(
    browser: Browser, page: Checkpoint, tmp_path: Path
) -> None:
    rows = [
        {**row, "bits_per_weight": 5.0 + i, "bits_per_activation": 6.0 + i}
        for i, row in enumerate(ROWS)
    ]
    write_page(tmp_path / "x.html", "x", [replace(page, comparison=Rows(rows, "x"))])
    browser.open(tmp_path / "x.html")
    data = "return document.getElementById('plot-tradeoff').data.map((t) => [t.x[0], t.y[0]])"
    assert browser.js(data) == [[6.5, 0.01], [7.5, 0.03], [8.5, 0.02]]  # without the original
    browser.choose("tradeoff-measure", "perplexity")
    browser.until("return document.getElementById('plot-tradeoff').data[0].y[0] === 9.9")
    label = browser.js("return document.getElementById('plot-tradeoff').ariaLabel")
    assert "perplexity: fp8 6.50, 9.90" in label
    energy = browser.js(
        "return document.getElementById('plot-energy-tradeoff').data.map((t) => t.x[0])"
    )
    assert page.energy and energy == [100, page.energy.percent]


# Layers.


def test_the_grid_shows_what_is_chosen(browser: Browser, report: Path, page: Checkpoint) -> None:
    browser.open(report)
    grid = "return document.getElementById('plot-grid').data[0]"
    bits = browser.js(grid)
    (q,) = [m for m in page.matrices if m.facts.name == "model.layers.1.self_attn.q_proj"]
    row = bits["y"].index("self_attn.q_proj")
    expected = 8 * q.facts.plane_bytes / (q.facts.n * q.facts.k)
    assert bits["z"][row][1] == pytest.approx(expected)
    browser.choose("grid-measure", "FP8 share of activations")
    browser.until(f"{grid}.zmax === 1")
    shares = browser.js(grid)
    (site,) = [s for s in page.sites if s.layer == "0" and s.kind == "mlp.down_proj"]
    assert shares["z"][shares["y"].index("mlp.down_proj")][0] == pytest.approx(site.fp8_share)


# The block map.


def view(browser: Browser) -> list[float]:
    """Left, right, top and bottom of the map, in blocks and rows."""
    ranges = browser.js(
        "const l = document.getElementById('plot-map').layout;"
        "return [...l.xaxis.range, ...[...l.yaxis.range].reverse()]"
    )
    return [value + 0.5 for value in ranges]


def open_large(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.choose("map-layer", "2")
    browser.until("return document.getElementById('map-state').textContent.includes('4,096 rows')")


def place(browser: Browser, row: float, block: float) -> tuple[int, int]:
    """Position of a block in the window, in pixels."""
    x, y = browser.js(
        "const e = document.getElementById('plot-map');"
        "e.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const {left, top} = e.getBoundingClientRect(); const l = e._fullLayout;"
        "return [left + l.xaxis._offset + l.xaxis.d2p(arguments[1]),"
        " top + l.yaxis._offset + l.yaxis.d2p(arguments[0])]",
        row,
        block,
    )
    return round(x), round(y)


def mouse(browser: Browser, kind: str, x: int, y: int, buttons: int = 0) -> None:
    event = {"type": kind, "x": x, "y": y, "button": "left" if buttons else "none"}
    event |= {"buttons": buttons, "clickCount": 1 if kind != "mouseMoved" else 0}
    browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def test_zoom_from_the_whole_matrix_to_single_blocks(
    browser: Browser, report: Path, large_flags: torch.Tensor
) -> None:
    open_large(browser, report)
    assert view(browser) == [0, 688, 0, 4096]
    trace = "return document.getElementById('plot-map').data[0]"
    whole = browser.js(trace)
    assert len(whole["z"]) <= 220 and len(whole["z"][0]) <= 300
    dx, dy = whole["dx"], whole["dy"]
    share = large_flags[: int(dy), : int(dx)].double().mean().item()
    assert whole["z"][0][0] == pytest.approx(share, abs=1e-6)
    for _ in range(9):
        browser.press("map-in")
    left, right, top, bottom = (int(v) for v in view(browser))
    assert right - left == 4 and bottom - top <= 8
    cells = browser.js(trace)
    assert (cells["dx"], cells["dy"]) == (1, 1)
    row, block = int(cells["y0"]), int(cells["x0"])
    shown = torch.tensor(cells["z"])
    height, width = shown.shape
    stored = large_flags[row : row + height, block : block + width]
    assert torch.equal(shown.bool(), stored)
    browser.press("map-all")
    assert view(browser) == [0, 688, 0, 4096]


def test_a_rectangle_zooms_in_and_a_double_click_out(browser: Browser, report: Path) -> None:
    open_large(browser, report)
    (x0, y0), (x1, y1) = place(browser, 1000, 100), place(browser, 2000, 300)
    mouse(browser, "mouseMoved", x0, y0)
    mouse(browser, "mousePressed", x0, y0, 1)
    for step in (0.3, 0.7, 1.0):
        mouse(browser, "mouseMoved", round(x0 + step * (x1 - x0)), round(y0 + step * (y1 - y0)), 1)
    mouse(browser, "mouseReleased", x1, y1, 1)
    browser.until("return document.getElementById('map-state').textContent.includes('Shown: rows')")
    left, right, top, bottom = view(browser)
    assert abs(left - 100) < 8 and abs(right - 300) < 8
    assert abs(top - 1000) < 40 and abs(bottom - 2000) < 40
    assert browser.text("block-title") == "Row 0, block 0"  # a drag is no press
    x, y = place(browser, 1500, 200)
    for _ in range(2):
        mouse(browser, "mousePressed", x, y, 1)
        mouse(browser, "mouseReleased", x, y, 1)
    browser.until("return document.getElementById('map-state').textContent.includes('whole')")
    assert view(browser) == [0, 688, 0, 4096]


def test_hovering_shows_the_format(
    browser: Browser, report: Path, large_flags: torch.Tensor
) -> None:
    open_large(browser, report)
    for _ in range(9):
        browser.press("map-in")
    for row, block in ((0, 0), (1, 2), (3, 3)):
        x, y = place(browser, row, block)
        mouse(browser, "mouseMoved", x + 3, y + 2)
        mouse(browser, "mouseMoved", x, y)
        text = browser.until(
            "const t = document.querySelector('#plot-map .hoverlayer')?.textContent;"
            "return t?.includes(arguments[0]) ? t : null",
            f"row {row}, block {block}",
        )
        assert ("FP8" in text) == bool(large_flags[row, block])
        assert f"columns {16 * block} to {16 * block + 15}" in text


def test_a_press_shows_the_values(browser: Browser, report: Path, large: PackedWeight) -> None:
    open_large(browser, report)
    for _ in range(9):
        browser.press("map-in")
    values = unpack_units(large) * large.t
    for row, block in ((2, 1), (0, 3)):
        x, y = place(browser, row, block)
        mouse(browser, "mousePressed", x, y, 1)
        mouse(browser, "mouseReleased", x, y, 1)
        browser.until(
            "return document.getElementById('block-title').textContent === arguments[0]",
            f"Row {row}, block {block}",
        )
        shown = browser.js("return document.getElementById('plot-block').data[0].y")
        expected = values[row, 16 * block : 16 * block + 16]
        torch.testing.assert_close(torch.tensor(shown), expected)
        cells = browser.js(
            "return [...document.getElementById('block-values').rows[1].cells].slice(1)"
            ".map((c) => Number(c.textContent))"
        )
        torch.testing.assert_close(torch.tensor(cells), expected, rtol=5e-3, atol=0)


def test_scores_of_the_chosen_block(browser: Browser, report: Path, page: Checkpoint) -> None:
    browser.open(report)
    assert page.scores
    entry = page.scores["weights"][page.matrices[0].facts.name]
    raw = torch.frombuffer(bytearray(base64.b64decode(entry["scores"])), dtype=torch.bfloat16)
    score = float(f"{raw.float()[0].item():.3g}")
    facts = browser.text("block-facts")
    assert float(facts.split("score ")[1].split(" nats")[0]) == pytest.approx(score)


def test_the_keyboard_moves_and_zooms(browser: Browser, report: Path) -> None:
    open_large(browser, report)
    element = browser.find("plot-map")
    browser.js("arguments[0].focus()", element)
    for keys, title in (
        ("\ue014\ue014\ue015", "Row 1, block 2"),  # right, right, down
        ("\ue013\ue013", "Row 0, block 2"),  # up stops at the edge
        ("\ue012", "Row 0, block 1"),
        ("\ue00f", "Row 4095, block 1"),  # page down by the whole matrix
    ):
        element.send_keys(keys)
        assert browser.text("block-title") == title
    element.send_keys("++")
    browser.until("return document.getElementById('map-state').textContent.includes('Shown:')")
    left, right, top, bottom = view(browser)
    assert (left, right, bottom) == (0, 172, 4096) and bottom - top == 1024
    element.send_keys("-")
    browser.until(
        "const r = document.getElementById('plot-map').layout.xaxis.range;"
        "return r[1] - r[0] === 344"
    )
    element.send_keys("0")
    browser.until("return document.getElementById('map-state').textContent.includes('whole')")


def test_rows_and_blocks_can_be_typed(browser: Browser, report: Path) -> None:
    open_large(browser, report)
    field = browser.find("map-row")
    field.clear()
    field.send_keys("4000", "\ue007")
    browser.until(
        "return document.getElementById('block-title').textContent.startsWith('Row 4000')"
    )
    assert "format not stored" not in browser.text("block-facts")
    assert browser.js("return document.getElementById('block-values').hidden") is True
    field.clear()
    field.send_keys("999999", "\ue007")
    browser.until(
        "return document.getElementById('block-title').textContent.startsWith('Row 4095')"
    )


def test_a_large_matrix_is_drawn_fast(browser: Browser, report: Path) -> None:
    """2.8 million blocks; a page that drew each as a cell would take minutes."""
    open_large(browser, report)
    script = (
        "const done = arguments[0]; const start = performance.now();"
        "document.getElementById('map-all').click();"
        "requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)))"
    )
    assert min(browser.driver.execute_async_script(script) for _ in range(3)) < 3000


def test_a_map_of_squares(browser: Browser, page: Checkpoint, tmp_path: Path) -> None:
    """A very large model is stored as shares of squares, and its window block by block."""
    packed = large_weight(70, 1600)
    facts, blocks = linear_facts("layers.0.a", packed), block_map(packed.is_fp8(), 7)
    matrix = Matrix(facts, "0", "a", packed.t.item(), blocks, window(packed, WINDOW))
    bare = replace(page, matrices=[matrix], scores=None, missing={"scores": "a reason"})
    write_page(tmp_path / "x.html", "x", [bare])
    browser.open(tmp_path / "x.html")
    assert browser.errors() == []
    assert "squares of 7 x 7 blocks" in browser.text("map-stored")
    trace = browser.js("return document.getElementById('plot-map').data[0]")
    flags = packed.is_fp8()
    shares = torch.tensor(
        [[flags[i : i + 7, j : j + 7].double().mean().item() for j in range(0, 100, 7)]
         for i in range(0, 70, 7)]
    )  # fmt: skip
    torch.testing.assert_close(torch.tensor(trace["z"]), shares, rtol=0, atol=1 / 254)
    expected = "FP8" if flags[0, 0] else "NVFP4"
    assert browser.text("block-facts").startswith(expected)
    field = browser.find("map-block")
    field.clear()
    field.send_keys("99", "\ue007")
    browser.until("return document.getElementById('block-facts').textContent.startsWith('format')")


# Scores.


def readout(browser: Browser, side: str, prefix: str = "") -> tuple[float, float, float]:
    """FP4 share in percent, bits and harm."""
    fp4, bits, harm = (browser.text(f"{side}-{prefix}{name}") for name in ("fp4", "bits", "harm"))
    return float(fp4.rstrip("%")), float(bits), float(harm)


@pytest.mark.parametrize("side", ["weights", "activations"])
def test_the_slider_shows_bits_and_harm(
    side: str, browser: Browser, report: Path, page: Checkpoint
) -> None:
    browser.open(report)
    assert page.scores
    entries = page.scores[side].values()
    blocks = sum(e["zeros"] + sum(e["counts"]) for e in entries)
    per = 1 if side == "weights" else page.scores["tokens"]
    stored, start = readout(browser, side, "stored-"), readout(browser, side)
    assert stored[0] == pytest.approx(70, abs=1.5) and start[0] == pytest.approx(stored[0], abs=4)
    slider = browser.find(f"slider-{side}")
    slider.send_keys("\ue011")  # Home: everything in FP8 but blocks of score zero
    zeros = sum(e["zeros"] for e in entries)
    assert readout(browser, side) == pytest.approx(
        (100 * zeros / blocks, 8 - 3.5 * zeros / blocks, 0), abs=0.06
    )
    slider.send_keys("\ue010")  # End: everything in FP4
    harm = sum(sum(e["sums"]) for e in entries) / 2 / per
    assert readout(browser, side) == pytest.approx((100, 4.5, harm), rel=0.01)
    before = readout(browser, side)
    slider.send_keys("\ue012" * 8)  # left
    after = readout(browser, side)
    assert after[0] < before[0] and after[1] > before[1] and after[2] < before[2]
    edge = float(browser.text(f"{side}-threshold"))
    fp4 = sum(
        e["zeros"] + sum(n for i, n in enumerate(e["counts"])
                         if 2 ** ((e["first"] + i + 1) / 4) <= edge * 1.01)
        for e in entries
    )  # fmt: skip
    assert after[0] == pytest.approx(100 * fp4 / blocks, abs=0.06)
    browser.press(f"reset-{side}")
    assert readout(browser, side) == start
    spoken = browser.js("return arguments[0].getAttribute('aria-valuetext')", slider)
    assert f"{start[0]:.1f}% of blocks in 4 bits" in spoken


def test_a_checkpoint_without_scores_can_be_chosen(browser: Browser, two: Path) -> None:
    browser.open(two)
    browser.choose("scores-checkpoint", "second")
    hidden = "return document.getElementById('scores-weights-body').hidden"
    assert browser.js(hidden) is True
    assert "second has no fgmp_scores.json" in browser.text("scores-weights-missing")
    browser.choose("scores-checkpoint", "tiny")
    assert browser.js(hidden) is False and browser.errors() == []


# Every reader, device and printer.

CONTRAST = """
const luminance = ([r, g, b]) => {
  const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const parse = (text) => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
const over = (top, below) => {
  const a = top[3] ?? 1;
  return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]);
};
const behind = (e) => {
  const chain = [];
  for (let x = e; x; x = x.parentElement) chain.push(parse(getComputedStyle(x).backgroundColor));
  return chain.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const bad = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !e.checkVisibility?.() ||
      ["SCRIPT", "STYLE", "OPTION"].includes(e.tagName)) continue;
  const style = getComputedStyle(e);
  const svg = e instanceof SVGElement;
  const ground = behind(e);
  const ink = over(parse(svg ? style.fill : style.color), ground);
  const [a, b] = [luminance(ink), luminance(ground)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) bad.push([walker.currentNode.data.trim().slice(0, 40), ratio.toFixed(2)]);
}
return [bad, walker.root.textContent.length];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, browser: Browser, report: Path, two: Path) -> None:
    for path in (report, two):
        browser.open(path, scheme=scheme)
        browser.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        low, _ = browser.js(CONTRAST)
        assert low == []


def test_the_theme_follows_the_system(browser: Browser, report: Path) -> None:
    browser.open(report)
    ink = (
        "return [getComputedStyle(document.body).backgroundColor, "
        "document.querySelector('#plot-shares .xtick text').style.fill]"
    )
    light = browser.js(ink)
    browser.media("dark")
    browser.until(
        "return document.querySelector('#plot-shares .xtick text').style.fill !== arguments[0]",
        light[1],
    )
    dark = browser.js(ink)
    assert light[0] == "rgb(255, 255, 255)" and dark[0] == "rgb(20, 22, 26)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(
    scheme: str, browser: Browser, report: Path, two: Path
) -> None:
    for path in (report, two):
        for size in (PHONE, (320, 640)):
            browser.open(path, size, scheme)
            browser.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
            width, inner = browser.js(
                "return [document.documentElement.scrollWidth, window.innerWidth]"
            )
            assert width <= inner == size[0]


def test_print_is_light_and_has_no_controls(browser: Browser, report: Path) -> None:
    browser.open(report, scheme="dark")
    browser.media("dark", "print")
    browser.until("return getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    browser.until(
        "return document.querySelector('#plot-shares .xtick text').style.fill === 'rgb(22, 24, 29)'"
    )
    headings = "return document.querySelector('#comparison-table th button').checkVisibility()"
    assert browser.js(headings)
    widest = (
        "const widths = [...document.querySelectorAll('.plot .main-svg')]"
        ".map((s) => s.width.baseVal.value); return Math.max(...widths)"
    )
    assert browser.js(widest) < 700  # of A4 and letter
    for selector in ("nav", "#map-in", ".slider"):
        display = f"return getComputedStyle(document.querySelector('{selector}')).display"
        assert browser.js(display) == "none"
    document = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(document["data"])
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") > 1


def test_every_figure_has_a_text_alternative(browser: Browser, report: Path) -> None:
    browser.open(report)
    labels = browser.js(
        "return Object.fromEntries([...document.querySelectorAll('.plot')]"
        ".map((p) => [p.id, p.getAttribute('aria-label')]))"
    )
    assert len(labels) == 10
    for name, label in labels.items():
        if not name.endswith("tradeoff"):  # these rows have no bits, hence no points
            assert len(label) > 35 and any(c.isdigit() for c in label), (name, label)
    unnamed = browser.js(
        "return [...document.querySelectorAll('select, input, button, table, figure .plot')]"
        ".filter((e) => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel).length"
    )
    assert unnamed == 0


def test_the_tab_key_reaches_every_control(browser: Browser, report: Path) -> None:
    browser.open(report)
    expected = browser.js(
        "const controls = 'a, button, select, input, summary, [tabindex=\"0\"]';"
        "return [...document.querySelectorAll(controls)].filter((e) => e.checkVisibility()).length"
    )
    body = browser.driver.find_element("tag name", "body")
    reached = []
    for _ in range(expected + 5):
        body = browser.driver.switch_to.active_element
        body.send_keys("\ue004")
        focus = browser.js(
            "const e = document.activeElement; const s = getComputedStyle(e);"
            "return [e.id || e.textContent.trim().slice(0, 20), s.outlineStyle]"
        )
        reached.append(focus)
    names = {name for name, _ in reached}
    assert {"map-layer", "map-in", "plot-map", "slider-weights", "reset-activations"} <= names
    assert "Skip to the report" in names
    assert all(outline != "none" for name, outline in reached if name == "plot-map")


def test_it_is_one_file(browser: Browser, report: Path, tmp_path: Path) -> None:
    """Alone in a folder, and without a network, the page asks for nothing."""
    alone = tmp_path / "page.html"
    alone.write_bytes(report.read_bytes())
    browser.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        browser.open(alone)
        entries = browser.js("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert [name for name in entries if not name.startswith("blob:")] == []
        assert browser.errors() == []
    finally:
        browser.driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {**offline, "offline": False, "downloadThroughput": -1, "uploadThroughput": -1},
        )
    assert json.dumps(browser.js("return Object.keys(localStorage)")) == "[]"
