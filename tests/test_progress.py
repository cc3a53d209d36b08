"""Progress bars: one state that overwrites itself on a terminal, few lines in a log file."""

import re
import sys

import pytest
import tqdm

from corl.progress import LOG_SECONDS, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """tqdm's clock, in seconds; a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def run(bar, clock, updates):
    with bar:
        for _ in range(updates):
            clock[0] += 1.0
            bar.update()


def test_a_log_file_gets_a_line_every_30_seconds_and_the_last_state(clock, capsys):
    run(progress_bar(total=100, desc="fit"), clock, 100)
    text = capsys.readouterr().err
    assert re.findall(r"(\d+)/100", text) == ["30", "60", "90", "100"]
    assert text.count("\n") == 4 and text.endswith("\n") and "\r" not in text
    assert all(line.startswith("fit:") for line in text.splitlines())


def test_a_bar_over_before_its_first_line_writes_nothing(clock, capsys):
    run(progress_bar(total=20), clock, 20)
    list(progress_bar(range(20)))
    assert capsys.readouterr().err == ""


def test_a_slow_bar_writes_one_line_per_update(clock, capsys):
    with progress_bar(total=3) as bar:
        for _ in range(3):
            clock[0] += 2 * LOG_SECONDS
            bar.update()
    shown = re.findall(r"(\d)/3", capsys.readouterr().err)
    assert shown == ["1", "2", "3", "3"]


def test_other_lines_and_a_bar_inside_a_bar_add_no_lines(clock, capsys):
    with progress_bar(total=100, desc="outer") as outer:
        run(progress_bar(total=40, desc="inner"), clock, 40)
        for _ in range(100):
            clock[0] += 0.1
            outer.update()
            tqdm.tqdm.write("score 12", file=sys.stdout)
    shown = capsys.readouterr()
    assert shown.out == "score 12\n" * 100 and "\x1b" not in shown.err
    lines = re.findall(r"^(\w+): .*?(\d+)/\d+ .*\n", shown.err, re.MULTILINE)
    assert lines[:2] == [("inner", "30"), ("inner", "40")]
    assert lines[2:] == [("outer", "1"), ("outer", "100")]
    assert shown.err.count("\n") == 4


def test_the_pace_does_not_depend_on_the_rate_of_updates(clock, capsys):
    """tqdm's monitor thread would add lines where tqdm adapts miniters."""
    bar = progress_bar(total=10_000)
    with bar:
        for _ in range(5000):
            clock[0] += 0.01
            bar.update()
        for _ in range(5):
            clock[0] += LOG_SECONDS
            bar.update()
            assert bar.miniters == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 + 5 + 1


def test_a_terminal_gets_one_line_that_overwrites_itself(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(progress_bar(total=10), clock, 10)
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.count("\r") >= 10


def test_a_disabled_bar_writes_nothing(clock, capsys):
    run(progress_bar(total=100, disable=True), clock, 100)
    assert capsys.readouterr().err == ""
