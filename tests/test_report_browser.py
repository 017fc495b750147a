"""What a report shows and does, in a real headless browser."""

import shutil
import time

import numpy as np
import pandas as pd
import pytest
from logs import make_log, write_log, write_run

from nfzoo import report

pytestmark = pytest.mark.slow  # needs Chromium and its driver

CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1440,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver

    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.fail("no browser to open the report in: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(60)
    yield browser
    browser.quit()


class Page:
    """A report in the browser; values of plots come from what Plotly drew, not from the page's data."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, path):
        self.browser.get_log("browser")
        self.browser.get(path.as_uri())
        self.wait("return document.body?.dataset.ready === 'yes'")
        return self

    def wait(self, code, seconds=60):
        """Wait until a condition of the page holds; what is drawn may come a moment later."""
        deadline = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < deadline, (code, self.errors())
            time.sleep(0.1)

    def js(self, code, *args):
        return self.browser.execute_script(code, *args)

    def find(self, name):
        from selenium.webdriver.common.by import By

        return self.browser.find_element(By.ID, name)

    def choose(self, name, value):
        """Choose an option of a select with the keyboard's own events."""
        from selenium.webdriver.support.select import Select

        Select(self.find(name)).select_by_value(value)

    def options(self, name):
        return self.js("return [...document.getElementById(arguments[0]).options].map((o) => o.value)", name)

    def traces(self, name):
        """Traces of a plot; points that are not drawn are None."""
        code = "return document.getElementById(arguments[0]).data.map((t) => ({...t, x: [...t.x], y: [...t.y]}))"
        return self.js(code, name)

    def axis(self, name):
        return self.js("return document.getElementById(arguments[0])._fullLayout.yaxis.type", name)

    def move(self, moment):
        self.js(
            "const m = document.getElementById('moment'); m.value = arguments[0]; m.dispatchEvent(new Event('input'))",
            moment,
        )
        self.frame()

    def frame(self):
        """Wait until what was asked for is drawn."""
        self.browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))")

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture(scope="module")
def logs():
    return {"nf": make_log(), "bn": make_log(seed=1)}


@pytest.fixture(scope="module")
def page(chromium, logs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")

    def theory(options, log):
        return pd.DataFrame({"kind": "activation", "layer": ["stage1_block1_out", "stage1_block2_out"], "acv": [1, 2]})

    folders = [write_run(folder / name, log) for name, log in logs.items()]
    return Page(chromium).open(report.write(folders, folder / "report.html", theory=theory))


def _shown(log, kind, statistic, step, layers):
    """What the log says of some layers at a step, NaN where it says nothing."""
    return log[(log.kind == kind) & (log.step == step)].set_index("layer")[statistic].reindex(layers).to_numpy()


def _same(drawn, expected):
    np.testing.assert_allclose(np.array(drawn, float), np.array(expected, float), rtol=1e-5)


def _drawn(page, log, run, kind, statistic, step):
    """Assert that the profile shows a run's values of the log, layer by layer; return their names."""
    [trace] = [t for t in page.traces("profile") if t["meta"] == {"run": run, "role": "now"}]
    expected = _shown(log, kind, statistic, step, trace["customdata"])
    _same(trace["y"], np.where(expected > 0, expected, np.nan) if page.axis("profile") == "log" else expected)
    return trace["customdata"]


def test_every_quantity_at_every_moment_is_drawn_as_logged(page, logs):
    seen = set()
    for value in page.options("quantity"):
        kind, source, statistic = value.split("|")
        page.choose("quantity", value)
        for moment, step in ((0, 0), (2, 20)):
            page.move(moment)
            for run, log in enumerate(logs.values()):
                _drawn(page, log, run, kind, statistic, step)
        seen.add((kind, statistic))
    recorded = {("activation", "acsm"), ("gradient", "dead"), ("weight", "update_to_weight"), ("parameter", "value")}
    assert recorded | {("weight_gradient", "agc_clipped"), ("effective_weight", "acv")} <= seen
    assert page.errors() == []


def test_layers_can_be_chosen_by_place_and_by_name(page, logs):
    page.move(2)
    page.choose("quantity", "activation|probe|acv")
    assert page.options("group") == ["stream", "", "branch", "block"]
    counts = {"stream": 3, "": 6, "branch": 3, "block": 3}
    for group, count in counts.items():
        page.choose("group", group)
        names = _drawn(page, logs["nf"], 0, "activation", "acv", 20)
        assert len(names) == count and (group != "branch" or all(name.endswith("branch") for name in names))
    page.choose("group", "")
    page.find("filter").send_keys("stage2")
    assert _drawn(page, logs["nf"], 0, "activation", "acv", 20) == ["stage2_block1_branch", "stage2_block1_out"]
    assert page.options("layer") == ["stage2_block1_branch", "stage2_block1_out"]
    page.find("filter").clear()
    page.js("document.getElementById('filter').dispatchEvent(new Event('input'))")
    page.choose("quantity", "parameter|probe|value")
    page.choose("group", "skip_gain")
    assert all(name.endswith("skip_gain") for name in _drawn(page, logs["nf"], 0, "parameter", "value", 20))
    assert page.errors() == []


def test_one_layer_over_time_and_the_heat_map(page, logs):
    page.choose("quantity", "gradient|probe|second_moment")
    page.choose("group", "stream")
    for layer in page.options("layer"):
        page.choose("layer", layer)
        for run, (trace, log) in enumerate(zip(page.traces("time"), logs.values(), strict=True)):
            rows = log[(log.kind == "gradient") & (log.layer == layer)].sort_values("step")
            assert trace["meta"]["run"] == run and trace["x"] == [0, 1, 2, 3]
            _same(trace["y"], rows.second_moment)
    for run, log in enumerate(logs.values()):
        page.choose("heat-run", str(run))
        page.choose("scale", "linear")
        [trace] = page.traces("heat")
        table = log[log.kind == "gradient"].pivot(index="layer", columns="step", values="second_moment")
        blocks = [name for name in table.index if name.endswith("out")]
        np.testing.assert_allclose(np.array(trace["z"], float), table.loc[blocks].to_numpy(), rtol=1e-5)
        page.choose("scale", "log")
        [trace] = page.traces("heat")
        np.testing.assert_allclose(np.array(trace["z"], float), np.log10(table.loc[blocks]), rtol=1e-4, atol=1e-5)
    page.choose("scale", "auto")
    assert page.errors() == []


def test_the_axis_is_chosen_by_the_range_and_can_be_set(page, logs):
    page.choose("quantity", "activation|probe|acv")
    page.choose("group", "")
    drawn = [t for t in page.traces("profile") if t["meta"]["role"] != "theory"]
    values = [v for trace in drawn for v in trace["y"]]
    assert max(values) / min(values) > 30 and page.axis("profile") == "log"
    page.choose("scale", "linear")
    assert page.axis("profile") == "linear"
    page.choose("scale", "auto")
    page.choose("quantity", "activation|probe|dead")
    assert page.axis("profile") == "linear"  # a share
    page.choose("scale", "log")
    assert page.axis("profile") == "log"
    page.choose("scale", "auto")
    page.choose("quantity", "parameter|probe|value")
    assert page.axis("profile") == "linear"  # some are negative
    assert page.errors() == []


def test_runs_initialisation_and_theory_can_be_told_apart(page, logs):
    page.choose("quantity", "activation|probe|acv")
    page.choose("group", "block")
    page.move(3)
    roles = [(t["meta"]["run"], t["meta"]["role"], t["line"].get("dash")) for t in page.traces("profile")]
    assert roles == [(run, *role) for run in (0, 1) for role in (("theory", "dash"), ("first", "dot"), ("now", None))]
    first = [t for t in page.traces("profile") if t["meta"] == {"run": 1, "role": "first"}]
    _same(first[0]["y"], _shown(logs["bn"], "activation", "acv", 0, first[0]["customdata"]))
    theory = [t for t in page.traces("profile") if t["meta"] == {"run": 0, "role": "theory"}]
    assert theory[0]["y"] == [1, 2, None]
    page.find("reference").click()
    page.frame()
    assert "first" not in [t["meta"]["role"] for t in page.traces("profile")]
    page.find("reference").click()
    boxes = page.browser.find_elements("css selector", ".card input[type=checkbox]")
    boxes[0].click()
    page.frame()
    assert {t["meta"]["run"] for name in ("profile", "time", "history-loss") for t in page.traces(name)} == {1}
    boxes[1].click()
    assert page.traces("profile") == [] and page.traces("heat") == []
    boxes[0].click()
    boxes[1].click()
    page.frame()
    assert {t["meta"]["run"] for t in page.traces("profile")} == {0, 1}
    assert page.errors() == []


def test_histograms(page, logs):
    assert page.options("histogram-kind") == ["activation|probe"]
    for layer in page.options("histogram-layer")[:2]:
        page.choose("histogram-layer", layer)
        for moment, step in ((3, 30), (0, 0)):
            page.move(moment)
            for run, log in enumerate(logs.values()):
                [trace] = [t for t in page.traces("histogram") if t["meta"] == {"run": run, "role": "now"}]
                row = log[(log.kind == "activation") & (log.layer == layer) & (log.step == step)]
                _same(trace["y"], row.histogram.item())
    assert trace["customdata"] == ["below −1", "−1 to −0.1", "−0.1 to 0.1", "0.1 to 1", "above 1"]
    assert page.errors() == []


def test_the_overview_follows_the_moment_and_leads_to_the_quantity(page, logs):
    from selenium.webdriver.common.keys import Keys

    panels = page.browser.find_elements("css selector", ".panel button")
    titles = [button.text for button in panels]
    assert titles[:3] == ["Squared mean of the stream", "Variance of the stream", "Variance of residual branches"]
    assert "Clipped by AGC" in titles and "Update over weight" in titles
    for moment, step in ((1, 10), (3, 30)):
        page.move(moment)
        code = "return [...document.querySelectorAll('.panel .plot')[2].data.find((t) => t.meta.role === 'now').y]"
        rows = logs["nf"][(logs["nf"].kind == "activation") & (logs["nf"].place == "branch")]
        _same(page.js(code), rows[rows.step == step].acv)
    panels[2].send_keys(Keys.ENTER)
    assert page.find("quantity").get_property("value") == "activation|probe|acv"
    assert (
        page.find("group").get_property("value") == "branch"
        and "A definition of its own." in page.find("definition").text
    )
    assert page.errors() == []


def test_play_runs_through_the_moments(page):
    page.move(3)
    page.js("""window.seen = [];
        new MutationObserver(() => seen.push(document.getElementById("moment-label").textContent))
            .observe(document.getElementById("moment-label"), {childList: true});""")
    page.find("play").click()
    page.wait("return seen.length >= 4")
    assert page.js("return seen") == ["at initialisation", *(f"epoch {e} · step {10 * e}" for e in (1, 2, 3))]
    assert page.find("play").text == "Play" and page.errors() == []


def test_the_keyboard_reaches_and_operates_every_control(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.js("document.querySelector('.card input').focus()")
    reached = []
    for _ in range(60):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        reached.append(page.js("return document.activeElement.id || document.activeElement.tagName"))
    controls = ["play", "moment", "reference", "quantity", "group", "filter", "scale", "layer", "heat-run"]
    assert [name for name in reached if name in controls][: len(controls)] == controls
    assert {"histogram-kind", "histogram-layer", "SUMMARY", "BUTTON", "INPUT"} <= set(reached)
    page.move(2)
    page.find("moment").send_keys(Keys.ARROW_LEFT)
    assert page.find("moment-label").text == "epoch 1 · step 10"
    page.choose("quantity", "activation|probe|acsm")
    page.find("quantity").send_keys(Keys.ARROW_DOWN)
    page.frame()
    assert page.find("quantity").get_property("value") == "activation|probe|acv"
    page.browser.find_element("css selector", "details summary").send_keys(Keys.ENTER)
    assert "recipe.optimizer.learning_rate" in page.find("options").text
    assert page.errors() == []


def test_nothing_is_loaded_and_no_phone_scrolls_sideways(page):
    assert page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.wait("return document.documentElement.scrollWidth === 390")
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


HOSTILE = '</script><img src=x onerror="window.hacked=1">'


def test_names_cannot_run_code(chromium, tmp_path):
    log = make_log(blocks=2, epochs=2).replace({"layer": {"stage1_block1_out": HOSTILE}})
    log["kind"] = log.kind.replace({"gradient": HOSTILE})
    log[HOSTILE] = 1.5
    path = report.write({HOSTILE: log, "b": log}, tmp_path / "a.html")
    page = Page(chromium).open(path)
    for value in page.options("quantity"):
        page.choose("quantity", value)
    page.choose("quantity", "activation|probe|acv")
    page.choose("group", "")
    page.js("Plotly.Fx.hover('profile', [{curveNumber: 1, pointNumber: 1}])")
    assert HOSTILE in page.js("return document.querySelector('#profile .hoverlayer').textContent")
    assert page.js("return window.hacked") is None and page.js("return document.querySelector('img')") is None
    assert page.browser.title == f"Signal propagation: {HOSTILE}, b" and page.errors() == []
    assert page.js("return document.querySelector('.card h3').textContent") == HOSTILE


SIZES = {"two layers, once": (1, 1), "two hundred layers": (200, 3)}


@pytest.mark.parametrize("size", SIZES)
def test_few_and_many_layers(size, chromium, tmp_path):
    blocks, epochs = SIZES[size]
    log = make_log(blocks, epochs)
    page = Page(chromium).open(report.write([write_log(tmp_path / "only a log", log)], tmp_path / "a.html"))
    assert len(_drawn(page, log, 0, "activation", "acsm", 10 * (epochs - 1))) == blocks
    assert page.find("moment").is_enabled() == (epochs > 1)
    assert page.find("history-section").is_displayed() is False and page.errors() == []


def test_a_diverged_run_shows_gaps_and_its_alarm(chromium, tmp_path):
    log = make_log()
    log.loc[(log.step >= 20) & (log.depth > 2), ["acsm", "acv", "second_moment"]] = np.nan
    folder = write_run(tmp_path / "lost", log, status="diverged", diverged_at_step=7, test_accuracy=None)
    page = Page(chromium).open(report.write({"lost": folder, "whole": make_log(seed=1)}, tmp_path / "a.html"))
    page.choose("group", "")
    _drawn(page, log, 0, "activation", "acsm", 30)
    assert "lost: 3 of 6 layers are not finite" in page.find("profile-note").text
    card = page.browser.find_element("css selector", ".card")
    assert "diverged" in card.text and "NaN origin" in card.text and page.errors() == []


def test_a_network_that_was_watched_while_it_learned_is_shown_learning(chromium, tmp_path):
    log = make_log()
    watched = pd.concat([log[log.step == 0], log[log.step > 0].assign(source="live", first_bad=-1)])
    page = Page(chromium).open(report.write({"a": watched}, tmp_path / "watched.html"))
    drawn = "return document.querySelector('#overview .plot').data.map((t) => [t.meta.role, [...t.y], t.hovertemplate])"
    page.move(0)
    [(_, early, _)] = page.js(drawn)
    page.move(3)
    traces = {role: (y, label) for role, y, label in page.js(drawn)}
    assert not np.allclose(traces["now"][0], early) and np.allclose(traces["first"][0], early)
    assert "epoch 1, step 10" in traces["first"][1] and "initialisation" not in traces["first"][1]
    assert page.errors() == []
