"""Progress on a terminal of 80 columns keeps its numbers whole; without a terminal it is lines, few and full."""

import io

import pytest
from rich.console import Console

from perce_lite import console
from perce_lite.console import no_bars, progress_bar


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    return [0.0]


@pytest.fixture
def log(monkeypatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(console, "errors", Console(file=stream, width=80, highlight=False))
    return stream


def bar_at(clock: list[float]):
    bar = progress_bar()
    bar.get_time = lambda: clock[0]
    return bar


def test_a_log_gets_a_line_every_half_minute_or_twentieth(log, clock):
    with bar_at(clock) as bar:
        task = bar.add_task("Training", total=1000, note="")
        for step in range(1, 1001):
            clock[0] += 10 if step <= 12 else 0.1
            bar.update(task, completed=step, note=f"loss a token {4 - step / 1000:.3f}")
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("Training: 3 of 1000 (0%), 0:00:30")
    assert [line.split(" of ")[0] for line in lines[:4]] == [f"Training: {count}" for count in (3, 6, 9, 12)]
    assert lines[4].startswith("Training: 62 of 1000 (6%), ")
    assert "left; loss a token 3.938" in lines[4]
    assert lines[-1] == "Training: 1000 of 1000 (100%), 0:03:38; loss a token 3.000"
    assert len(lines) == 4 + 20
    assert "\x1b" not in log.getvalue()


def test_what_is_over_at_once_is_one_line(log, clock):
    with bar_at(clock) as bar:
        task = bar.add_task("Scoring", total=50, note="")
        for _ in range(50):
            clock[0] += 0.01
            bar.advance(task)
    assert log.getvalue().splitlines() == ["Scoring: 50 of 50 (100%), 0:00:00"]


def test_inside_a_larger_bar_nothing_is_said(log, clock):
    with no_bars(), bar_at(clock) as bar:
        bar.advance(bar.add_task("Scoring", total=1, note=""))
    assert log.getvalue() == ""


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_stay_whole_on_a_terminal(monkeypatch, width):
    stream = io.StringIO()
    terminal = Console(file=stream, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(console, "errors", terminal)
    with progress_bar() as bar:
        task = bar.add_task("8 of 9: base:weighting=clip, rate 0.0006, seed 2", total=1247, completed=29, note="")
        bar.update(task, note="loss a token 3.258, rate 2.0e-04")
        bar.refresh()
    text = stream.getvalue()
    assert "29/1247" in text
    assert "0:00:00" in text
    assert "-:--:--" in text
    assert "8 of 9" in text
    assert "loss a token" in text
    lines = [line for line in text.replace("\x1b[2K", "\n").splitlines() if "29/1247" in line]
    assert all(len(line) <= width + 20 for line in lines)  # codes that move the cursor are no columns
