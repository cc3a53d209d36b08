"""`finetune.Session` alone, around parts that only count: steps, switch, clock, estimate."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wiring

from corl import checkpoints, duration, finetune

OFFLINE, ONLINE, WARMUP, UTD = (
    wiring.COMMON[name]
    for name in ("offline_iterations", "online_iterations", "online_warmup", "utd")
)
ACT, UPDATE = 1.0, 4.0  # seconds of the false clock
pytestmark = pytest.mark.makes("estimate")


class Clock:
    """Stands still until somebody moves it."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Actor:
    """Stands still."""

    def __init__(self, clock):
        self.clock = clock

    def act(self, state, device):
        self.clock.now += ACT
        return np.zeros(2, np.float32)

    def train(self):
        pass

    eval = train


class Part:
    """What a session keeps; remembers what was done with it."""

    def __init__(self):
        self.calls, self.stopped = [], None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        self.calls.append("load_state_dict")

    def load_weights(self, state):
        self.calls.append(("load_weights", state))

    def estimate(self, seconds_of):
        self.calls.append("estimate")
        return {"first": seconds_of(lambda: None)}

    def begin(self, should_stop):
        self.calls.append("begin")
        self.stopped = should_stop


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a session on the toy, with a false clock."""
    clock = Clock()

    def open_session(name="cal_ql", **fields):
        config = wiring.make_config(name, tmp_path, **fields)
        wiring.install(monkeypatch, wiring.Record(name, config), None, tmp_path)
        session = finetune.Session(config, f"{name}.py", [])
        session.clock, session.actor = clock, Actor(clock)
        return session

    wiring.make_known(monkeypatch)
    for module in (duration, finetune):
        monkeypatch.setattr(module, "time", clock)
    return open_session


def nothing():
    return {}


def go_through(session, switched, stop_at=None):
    """The loop of an algorithm; asks to stop in the step `stop_at`. Returns its updates."""
    updates = []

    def update(t):
        session.clock.now += UPDATE
        updates.append(t)

    def end_of(t):
        session.log({})
        session.run.stop_requested = t == stop_at

    with session:
        session.keep("trainer", Part())
        session.start(nothing, nothing, estimate=False)
        for t in session.offline(session.actor):
            update(t)
            end_of(t)
        session.switch(lambda: switched.append(session.run.step))
        for t in session.online(session.actor):
            for _ in session.updates():
                update(t)
            end_of(t)
        session.finish()
    return updates


ONLINE_STEPS = range(OFFLINE + WARMUP, OFFLINE + ONLINE)
ALL_UPDATES = [*range(OFFLINE), *sorted([*ONLINE_STEPS] * UTD)]


@pytest.mark.parametrize("stop_at", [3, OFFLINE, OFFLINE + WARMUP + 3, None])
def test_the_switch_is_made_once_wherever_the_run_was_stopped(opened, stop_at):
    switched, first = [], opened()
    updates = go_through(first, switched, stop_at)
    if stop_at is not None:
        assert not (first.run.folder / "summary.json").exists()
        again = opened(resume=str(first.run.folder))
        updates += go_through(again, switched)
    assert switched == [OFFLINE]
    assert updates == ALL_UPDATES


def test_a_run_without_online_steps_makes_no_switch(opened):
    switched = []
    updates = go_through(opened(online_iterations=0), switched)
    assert switched == [] and updates == [*range(OFFLINE)]


def test_the_speed_of_updates_counts_them_and_their_time_alone(opened):
    """Neither environment steps nor evaluations, over a stop and a resume."""
    first = opened()
    go_through(first, [], stop_at=OFFLINE + 5)
    run = first.run
    assert run.update_seconds == UPDATE * run.updates > 0
    again = opened(resume=str(run.folder))
    go_through(again, [])
    assert again.run.updates == len(ALL_UPDATES)
    assert again.run.update_seconds == UPDATE * len(ALL_UPDATES)


def estimated(session, capsys, offline=2.0, online=3.0):
    """What the session says before it starts; a call takes so many seconds."""

    def taking(seconds):
        def update():
            session.clock.now += seconds

        return update

    session.start(taking(offline), taking(online))
    return capsys.readouterr().out


def test_the_estimate_is_the_sum_over_what_is_left(opened, capsys):
    with opened(utd=1) as session:
        said = estimated(session, capsys)
    assert "(offline 14 s, online 48 s)" in said and ": 1 min (" in said
    with opened(utd=2, online_iterations=9) as session:
        said = estimated(session, capsys)
        assert "(offline 14 s, online 54 s)" in said
        session.run.step = 4
        assert "(offline 6 s, online 54 s)" in estimated(session, capsys)
        session.run.step = 12
        assert "(online 24 s)" in estimated(session, capsys)
        session.run.step = 16
        assert "nothing is left to do" in estimated(session, capsys)


def test_the_estimate_is_the_mean_of_several_short_calls(opened, capsys):
    with opened(utd=1) as session:
        said = estimated(session, capsys, offline=1.0, online=0.25)
    assert "(offline 7 s, online 4 s)" in said


class Fitted:
    """A part with work of its own before the first online step."""

    def estimate(self, seconds_of):
        return {"behavior model": 5.0}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_the_estimate_of_a_run_that_has_switched_leaves_out_what_came_before(
    opened, capsys
):
    with opened(utd=1) as session:
        session.keep("hook", Fitted())
        assert "behavior model 5 s" in estimated(session, capsys)
        session.run.switched = True
        assert "behavior model" not in estimated(session, capsys)


def test_a_run_of_more_than_an_hour_names_its_quick_start():
    def said(seconds, file):
        return "\n".join(duration.lines("cpu", {"online": seconds}, {}, file))

    assert "--config" not in said(3600.0, "quick.yaml")
    assert "--config quick.yaml" in said(3601.0, "quick.yaml")
    assert "--config" not in said(3601.0, None)


def test_the_estimate_is_made_of_whole_periods(opened, capsys):
    """Every third update takes longer, the first of its kind much longer: it compiles."""
    with opened(utd=1) as session:
        calls = []

        def update():
            calls.append(None)
            third = len(calls) % 3 == 0
            session.clock.now += 100.0 if len(calls) <= 3 else 4.0 if third else 1.0

        session.start(update, lambda: None, period=3)
        assert "(offline 14 s, online 0 s)" in capsys.readouterr().out
        assert len(calls) % 3 == 0


def test_parts_are_asked_for_their_share_and_begin_before_a_checkpoint_is_restored(
    opened, capsys
):
    first = opened()
    go_through(first, [], stop_at=3)
    with opened(resume=str(first.run.folder)) as session:
        part = session.keep("trainer", Part())
        said = estimated(session, capsys)
        assert "(first 0 s, " in said
        # The estimate is rolled back, so it left no trace.
        assert part.calls == ["begin", "load_state_dict"]
        assert not part.stopped()
        session.run.stop_requested = True
        assert part.stopped()


def test_weights_of_corls_file_go_into_the_part_that_names_its_keys(opened, monkeypatch):
    monkeypatch.setattr(
        checkpoints,
        "load_corl_checkpoint",
        lambda path, keys: {"from": path, "keys": keys},
    )
    with opened(load_model="some.pt") as session:
        one, other = Part(), Part()
        session.keep("trainer", one, loads=("actor",))
        session.keep("hook", other)
    assert one.calls == [("load_weights", {"from": Path("some.pt"), "keys": ("actor",)})]
    assert other.calls == []


def test_panels_and_means_go_to_the_run(opened):
    with opened() as session:
        session.show([{"label": "x"}], {"mean": "metric"})
        assert session.run.panels == [{"label": "x"}]
        assert session.run.means == {"mean": "metric"}


def test_facts_are_those_of_the_session(opened):
    with opened() as session:
        facts = SimpleNamespace(**session.facts())
        assert facts.offline is session.offline_buffer
        assert facts.online is session.online_buffer is not facts.offline
        assert facts.mixing_ratio == session.config.mixing_ratio
        assert facts.max_action == wiring.MAX_ACTION
        assert facts.seed == session.config.seed != session.config.eval_seed
        assert facts.dataset_hash == "toy-data" and facts.compile is None
        assert Path(facts.cache_dir).is_absolute()
        rows = slice(wiring.ROWS)
        raw = facts.unnormalize(session.offline_buffer._states[rows])
        expected = wiring.make_arrays()["observations"]
        np.testing.assert_allclose(raw, expected, atol=1e-4)
