"""The live page: runs are read as they grow, served on loopback, and drawn in a browser."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import threading
import time

import numpy as np
import pytest

from corl import files
from corl.run_tables import Tables
from corl.tasks import D4RL, RAW
from experiments import growing, watch
from experiments.cells import write_state
from experiments.growing import MOST, SCORE, Bins, Runs

CONFIG = """
env: {env}
name: {name}
seed: {seed}
offline_iterations: 20
online_iterations: 80
"""


class Written:
    """A run folder that grows as a run's does: the same class writes its tables."""

    def __init__(self, folder, env="hopper-medium-v2", name="iql", seed=0, scale=D4RL):
        self.folder = folder
        folder.mkdir(parents=True)
        text = CONFIG.format(env=env, name=json.dumps(name), seed=seed)
        files.write_text(folder / "config.yaml", text)
        (folder / "run.lock").write_text("process 1 on here\n")
        self.tables = Tables(["q_loss", "exchanged"], scale)
        self.tables.create(folder)

    def steps(self, *steps, phase="offline"):
        for step in steps:
            self.tables.add_metrics(step, phase, {"q_loss": 1 / step})
        return self

    def evaluation(self, step, returns, phase="offline"):
        returns = np.array(returns, dtype=float)
        self.tables.add_evaluation(step, phase, returns, returns / 10)
        return self

    def end(self):
        (self.folder / "run.lock").write_text("")
        (self.folder / "summary.json").write_text("{}")


@pytest.fixture
def grown(tmp_path):
    """Two runs of D4RL's hopper, and one that is told in returns."""
    runs = {
        "iql-s0": Written(tmp_path / "iql-s0"),
        "sweep/cell/run": Written(tmp_path / "sweep/cell/run", name="dare", seed=1),
        "own": Written(tmp_path / "own", env="my_package:Walk-v0", scale=RAW),
    }
    for run in runs.values():
        run.steps(10, 20).evaluation(20, [100, 300])
    return runs


# ---------------------------------------------------------------- reading


def test_all_runs_below_a_folder_are_found_with_what_they_are(grown, tmp_path):
    (tmp_path / ".hidden").mkdir()
    shutil.copy(tmp_path / "own/metrics.csv", tmp_path / ".hidden")
    told = Runs(tmp_path).answer(SCORE, 0)
    assert told["names"] == sorted(grown) == list(told["runs"])
    assert told["metrics"] == [SCORE, "q_loss"]
    run = told["runs"]["sweep/cell/run"]
    assert (run["method"], run["task"], run["seed"]) == ("dare", "hopper-medium-v2", "1")
    assert (run["switch"], run["total"], run["step"]) == (20, 100, 20)
    assert (run["unit"], run["last"], run["curve"]) == (D4RL.label, 20.0, [[20, 20.0]])
    own = told["runs"]["own"]
    assert (own["unit"], own["last"], own["task"]) == (
        "raw return",
        200.0,
        "my_package:Walk-v0",
    )
    assert abs(own["written"] - time.time()) < 60 and own["state"] == "running"
    alone = Runs(tmp_path / "own").answer("q_loss", 0)
    assert alone["runs"]["."]["curve"] == [[10, 0.1], [20, 0.05]]


def test_only_what_has_grown_is_told_again(grown, tmp_path):
    runs = Runs(tmp_path)
    clock = runs.answer(SCORE, 0)["clock"]
    again = runs.answer(SCORE, clock)
    assert again["runs"] == {} and again["names"] == sorted(grown)
    grown["own"].steps(30, phase="online").evaluation(30, [500, 700], "online")
    news = runs.answer("q_loss", again["clock"])
    assert list(news["runs"]) == ["own"] and news["clock"] > again["clock"] > clock
    assert news["runs"]["own"]["curve"][-1] == [30, pytest.approx(1 / 30)]
    assert (news["runs"]["own"]["last"], news["runs"]["own"]["best"]) == (600.0, 600.0)
    # Another page, which knows nothing, is told everything.
    assert len(runs.answer(SCORE, 0)["runs"]) == 3
    shutil.rmtree(tmp_path / "own")
    assert runs.answer(SCORE, news["clock"])["names"] == ["iql-s0", "sweep/cell/run"]


def test_a_file_is_read_from_where_it_stood(grown, tmp_path, monkeypatch):
    runs = Runs(tmp_path / "own")
    runs.answer(SCORE, 0)
    taken = []
    take = growing.GrowingTable._take
    monkeypatch.setattr(
        growing.GrowingTable,
        "_take",
        lambda self, line: (taken.append(line), take(self, line)),
    )
    grown["own"].steps(30, phase="online")
    runs.answer(SCORE, 0)
    assert [line.split(",")[0] for line in taken] == ["30"]


@pytest.mark.parametrize("name", growing.TABLES)
def test_a_half_written_row_waits_for_its_end(name, grown, tmp_path):
    path = tmp_path / "own" / name
    whole = path.read_bytes()
    runs = Runs(tmp_path / "own")
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        told = runs.answer(SCORE, 0)["runs"]["."]
        assert told["trouble"] == "", size
    path.write_bytes(whole)
    at_once = Runs(tmp_path / "own").answer(SCORE, 0)["runs"]["."]
    assert runs.answer(SCORE, 0)["runs"]["."] == at_once


def test_what_a_resume_wrote_anew_is_read_again(grown, tmp_path):
    run = grown["own"].steps(30, 40, 50, phase="online")
    runs = Runs(tmp_path / "own")
    runs.answer("q_loss", 0)
    lines = (run.folder / "metrics.csv").read_text().splitlines(keepends=True)
    # Back at the checkpoint of step 30; then other rows, so that the file is longer than before.
    files.write_text(run.folder / "metrics.csv", "".join(lines[:4]))
    run.steps(31, 32, 33, 34, phase="online")
    curve = runs.answer("q_loss", 0)["runs"]["."]["curve"]
    assert [step for step, _ in curve] == [10, 20, 30, 31, 32, 33, 34]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: files.append(f / "metrics.csv", "30,online\n"), "metrics.csv has a"),
        (lambda f: files.append(f / "metrics.csv", "x,y,1,2,3\n"), "metrics.csv has a"),
        (
            lambda f: (f / "metrics.csv").write_bytes(b"\x00\xff\n1\n"),
            "no table of a run",
        ),
        (lambda f: (f / "evaluations.csv").unlink(), "evaluations.csv cannot be read"),
        (lambda f: (f / "config.yaml").write_text("{"), "config.yaml cannot be read"),
        (lambda f: (f / "config.yaml").unlink(), "config.yaml cannot be read"),
    ],
)
def test_a_damaged_run_says_so_and_stops_no_other(spoil, says, grown, tmp_path):
    spoil(tmp_path / "own")
    told = Runs(tmp_path).answer(SCORE, 0)["runs"]
    assert says in told["own"]["trouble"]
    assert told["iql-s0"]["trouble"] == "" and told["iql-s0"]["last"] == 20.0
    json.dumps(told, allow_nan=False)


def test_how_a_run_stands(grown, tmp_path):
    def state():
        return Runs(tmp_path).answer(SCORE, 0)["runs"]["sweep/cell/run"]["state"]

    assert state() == "running"
    (tmp_path / "sweep/cell/run/run.lock").write_text("")
    assert state() == "stopped"
    write_state(tmp_path / "sweep/cell", state="failed", error=["a trap"])
    (tmp_path / "sweep/cell/log.txt").write_text("error: a trap\n")
    told = Runs(tmp_path).answer(SCORE, 0)["runs"]["sweep/cell/run"]
    assert (told["state"], told["trouble"]) == ("failed", "error: a trap")
    grown["own"].end()
    assert Runs(tmp_path).answer(SCORE, 0)["runs"]["own"]["state"] == "finished"


def test_numbers_that_are_none_leave_gaps(tmp_path):
    run = Written(tmp_path / "run").steps(1)
    files.append(run.folder / "metrics.csv", "2,offline,,nan,inf\n3,offline,,7,\n")
    files.append(run.folder / "evaluations.csv", "3,offline,0,nan,nan\n")
    told = Runs(tmp_path).answer("q_loss", 0)
    assert told["runs"]["run"]["curve"] == [[1, 1.0], [3, 7.0]]
    assert told["runs"]["run"]["last"] is None and told["metrics"] == [SCORE, "q_loss"]


def test_a_long_curve_is_the_means_of_equal_bins():
    bins, generator = Bins(), np.random.default_rng(0)
    rows = generator.normal(size=(4 * MOST + 37, 2))
    rows[generator.random(rows.shape) < 0.3] = np.nan
    for step, row in enumerate(rows):
        bins.add(step, row)
    size = next(s for s in (1, 2, 4, 8, 16) if len(rows) / s < MOST)
    for column in range(2):
        parts = [rows[i : i + size, column] for i in range(0, len(rows), size)]
        last = [min(i + size, len(rows)) - 1 for i in range(0, len(rows), size)]
        expected = [
            [step, pytest.approx(np.nanmean(part))]
            for step, part in zip(last, parts, strict=True)
            if np.isfinite(part).any()
        ]
        assert bins.curve(column) == expected
    assert len(bins.steps) < MOST


# ---------------------------------------------------------------- serving


@contextlib.contextmanager
def serving(folder):
    with watch.Server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server, path, host=None):
    """Status, headers and body of a request."""
    connection = http.client.HTTPConnection(watch.HOST, server.server_port, timeout=10)
    headers = {} if host is None else {"Host": host}
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    body = reply.read().decode()
    connection.close()
    return reply.status, reply.headers, body


def test_the_page_and_its_numbers_are_served(grown, tmp_path):
    with serving(tmp_path) as server:
        status, headers, page = get(server, "/")
        assert status == 200 and page == watch.PAGE.read_text()
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert "connect-src 'self'" in headers["Content-Security-Policy"]
        status, headers, text = get(server, "/runs?metric=q_loss&since=0")
        assert status == 200 and headers["Cache-Control"] == "no-store"
        told = json.loads(text)
        assert told["names"] == sorted(grown)
        assert told["runs"]["own"]["curve"] == [[10, 0.1], [20, 0.05]]
        grown["own"].steps(30)
        news = json.loads(get(server, f"/runs?metric=q_loss&since={told['clock']}")[2])
        assert list(news["runs"]) == ["own"] and len(news["runs"]["own"]["curve"]) == 3
        assert get(server, "/runs?since=-1")[0] == 400
        for path in ("/own/config.yaml", "/../watch.py", "//127.0.0.1/own", "/runs/"):
            assert get(server, path)[0] == 404


def test_the_page_needs_nothing_from_elsewhere():
    page = watch.PAGE.read_text()
    addresses = [word for word in page.split() if "://" in word]
    # The name of SVG's elements, which nobody fetches.
    assert all("www.w3.org/2000/svg" in word for word in addresses)
    assert "src=" not in page and "@import" not in page and "innerHTML" not in page


def test_other_sites_and_other_machines_get_nothing(grown, tmp_path):
    with serving(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert get(server, "/runs", "attacker.example")[0] == 403
        assert get(server, "/runs", f"localhost:{server.server_port}")[0] == 200
        # Behind a tunnel the port is another one.
        assert get(server, "/runs", "127.0.0.1:9999")[0] == 200


def test_what_cannot_be_served_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(
        SystemExit, match="error: .*nowhere is not a folder; name the one"
    ):
        watch.command_line([str(tmp_path / "nowhere")])
    with socket.socket() as taken:
        taken.bind((watch.HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(
            SystemExit, match=f"error: port {port} cannot be had.*--port"
        ):
            watch.command_line([str(tmp_path), "--port", port])

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.Server, "serve_forever", interrupted)
    with pytest.raises(SystemExit):
        watch.command_line([str(tmp_path), "--port", "0"])
    assert "http://127.0.0.1:" in capsys.readouterr().out


# ---------------------------------------------------------------- a browser

# Milliseconds, on a machine that is busy.
WAIT = 20_000
WICKED = "<img src=x onerror=document.title=1>"


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox does not work for root.
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    problems = []
    page.on("console", lambda line: line.type == "error" and problems.append(line.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert problems == []


def expect(locator):
    """Waits without eval, which the page's policy forbids."""
    from playwright.sync_api import expect

    return expect(locator)


def rows_of(page):
    return [row.get_attribute("data-run") for row in page.locator("#rows tr").all()]


def curves_of(page):
    return sorted(
        line.get_attribute("data-run") for line in page.locator("polyline").all()
    )


@pytest.mark.optional("browser")
def test_a_browser_shows_all_runs_and_follows_them(grown, tmp_path, page):
    with serving(tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("#rows tr")
        assert rows_of(page) == sorted(grown) == curves_of(page)
        assert page.locator("#legend").inner_text().split() == ["dare", "iql"]
        # Scores and returns never share an axis.
        titles = page.locator("h2").all_inner_texts()
        assert titles == [
            "hopper-medium-v2, D4RL-normalized score",
            "my_package:Walk-v0, raw return",
        ]
        own = page.locator('tr[data-run="own"]')
        assert "20 (20 %)" in own.inner_text() and "200" in own.inner_text()
        before = page.locator('polyline[data-run="own"]').get_attribute("points")
        grown["own"].steps(60, phase="online").evaluation(60, [800, 800], "online")
        expect(own).to_contain_text("800", timeout=WAIT)
        assert "60 (60 %)" in own.inner_text()
        points = page.locator('polyline[data-run="own"]').get_attribute("points")
        assert len(points.split()) == 2 > len(before.split())
        # A new run comes, another one goes.
        Written(tmp_path / "later").steps(10).evaluation(10, [10])
        shutil.rmtree(tmp_path / "iql-s0")
        page.wait_for_selector('tr[data-run="later"]')
        assert rows_of(page) == ["later", "own", "sweep/cell/run"]


@pytest.mark.optional("browser")
def test_a_browser_filters_sorts_and_changes_the_curve(grown, tmp_path, page):
    with serving(tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("#rows tr")
        page.fill("#words", "hopper s1")
        assert rows_of(page) == curves_of(page) == ["sweep/cell/run"]
        page.fill("#words", "")
        page.select_option("#task", "my_package:Walk-v0")
        assert rows_of(page) == ["own"]
        page.select_option("#task", "")
        page.select_option("#method", "dare")
        assert rows_of(page) == ["sweep/cell/run"]
        page.select_option("#method", "")
        page.get_by_role("button", name="last").click()
        assert rows_of(page)[-1] == "own"
        page.get_by_role("button", name="last").click()
        assert rows_of(page)[0] == "own"
        page.get_by_label("curve of own").uncheck()
        assert curves_of(page) == ["iql-s0", "sweep/cell/run"]
        page.select_option("#metric", "q_loss")
        expect(page.locator("h2")).to_have_text("hopper-medium-v2, q_loss", timeout=WAIT)
        points = page.locator('polyline[data-run="iql-s0"]').get_attribute("points")
        assert len(points.split()) == 2
        page.check("#online")
        ticks = page.locator("#panels text").all_text_contents()
        assert "-10" in ticks


@pytest.mark.optional("browser")
def test_names_of_runs_are_never_read_as_html(tmp_path, page):
    Written(tmp_path / WICKED, name=WICKED, env=json.dumps(WICKED)).steps(1).evaluation(
        1, [1]
    )
    with serving(tmp_path) as server:
        page.goto(server.url)
        page.wait_for_selector("#rows tr")
        assert rows_of(page) == [WICKED] and page.title() == "Runs"
        assert page.locator("img").count() == 0
        assert WICKED in page.locator("h2").inner_text()


@pytest.mark.optional("browser")
def test_a_page_says_when_there_is_nothing_and_when_nobody_answers(tmp_path, browser):
    page = browser.new_page()
    with serving(tmp_path) as server:
        page.goto(server.url)
        expect(page.locator("#about")).to_contain_text("no runs here yet", timeout=WAIT)
    expect(page.locator("#about")).to_contain_text("does not answer", timeout=WAIT)
    page.close()
