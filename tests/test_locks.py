"""Folders that a training goes on in belong to one process, and its log repeats nothing."""

import csv

import pytest

from corl import locks
from corl.standin import train_sac, train_walker


def train(folder, steps):
    options = {"snapshot_every": 2, "warmup": 2, "batch_size": 4}
    train_sac.train("hopper", steps, folder, **options)


def test_a_killed_training_of_a_policy_logs_each_snapshot_once(tmp_path):
    """The line of a snapshot is written before its state, between which it may die."""
    train(tmp_path, 2)
    log = tmp_path / "train.csv"
    (first,) = log.read_text().splitlines()[1:]
    with open(log, "a") as file:
        file.write(first.replace("2", "4", 1) + "\n")
    train(tmp_path, 4)
    with open(log, newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]


@pytest.mark.parametrize("module", [train_sac, train_walker])
def test_a_second_training_in_a_folder_is_refused(module, tmp_path, monkeypatch, capsys):
    arguments = ["x", "--out", str(tmp_path)]
    if module is train_sac:
        arguments.insert(1, "hopper")
    monkeypatch.setattr("sys.argv", arguments)
    with locks.holding(tmp_path / "train.lock", "it"):
        with pytest.raises(SystemExit, match="error: .* is in use by process"):
            module.main()
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]


@pytest.mark.parametrize("module", [train_sac, train_walker])
def test_an_interrupted_training_ends_in_one_line_and_status_130(
    module, tmp_path, monkeypatch, capsys
):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    arguments = ["x", "--out", str(tmp_path)]
    if module is train_sac:
        arguments.insert(1, "hopper")
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(module, "train", interrupt)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1
