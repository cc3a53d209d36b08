"""The policy that a run keeps at its switch, and the picture of it beside the last one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from short_runs import checkpoint_of, folder_of, run
from torch import nn

from algorithms import pex, td3_bc
from corl import checkpoints, trained, watch
from corl.layers import ConfigError

ROOT = Path(__file__).parent.parent
SHORT = {
    "offline_iterations": 4,
    "online_iterations": 4,
    "eval_freq": 4,
    "n_episodes": 1,
    "online_warmup": 0,
    "batch_size": 8,
}


def fine_tuned(module, folder, monkeypatch):
    """The folder of a short run, and a copy of its policy at the switch."""
    at_switch = {}
    keep = trained.keep_at_switch

    def remember(place, actor, mean, std):
        at_switch.update({k: v.clone() for k, v in actor.state_dict().items()})
        keep(place, actor, mean, std)

    monkeypatch.setattr("corl.finetune.keep_at_switch", remember)
    run(module, folder, monkeypatch, **SHORT)
    return folder_of(folder), at_switch


@pytest.mark.parametrize("module", [td3_bc, pex])
def test_a_run_brings_back_its_policies_of_both_ends(module, tmp_path, monkeypatch):
    folder, at_switch = fine_tuned(module, tmp_path, monkeypatch)
    found = trained.read(folder)
    before, after = found.before.state_dict(), found.after.state_dict()
    assert at_switch and before.keys() == at_switch.keys()
    assert all(torch.equal(before[name], at_switch[name]) for name in before)
    own = checkpoint_of(tmp_path)["parts"]["trainer"]
    own = checkpoints.unpack(own["actor_online" if module is pex else "actor"])
    last = found.after.online if module is pex else found.after
    assert all(torch.equal(last.state_dict()[name], own[name]) for name in own)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert found.step == 8 and not found.before.training
    assert np.isfinite(found.mean).all() and (found.std > 0).all()


def test_what_a_folder_lacks_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no checkpoint\.pt"):
        trained.read(tmp_path)
    folder, _ = fine_tuned(td3_bc, tmp_path, monkeypatch)
    other = tmp_path / "other.py"
    other.write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match=r"other\.py cannot be imported: Module"):
        trained.read(folder, other)
    path = folder / trained.AT_SWITCH
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="policy_at_switch.safetensors is damaged"):
        trained.read(folder)
    path.unlink()
    monkeypatch.setattr(watch, "choose_backend", lambda: None)
    with pytest.raises(ValueError, match="has not reached its online phase"):
        watch.watch(folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "states": None}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="older version wrote its checkpoint.*--resume"):
        trained.read(folder)


@pytest.mark.parametrize("module", [td3_bc, pex])
def test_a_run_that_is_not_online_yet_brings_back_its_offline_policy(
    module, tmp_path, monkeypatch
):
    run(module, tmp_path, monkeypatch, **{**SHORT, "online_iterations": 0})
    found = trained.read(folder_of(tmp_path))
    assert found.before is None and found.step == SHORT["offline_iterations"]
    own = checkpoints.unpack(checkpoint_of(tmp_path)["parts"]["trainer"]["actor"])
    last = found.after.state_dict()
    assert own and all(torch.equal(last[name], own[name]) for name in own)
    # The same as those that a run keeps when it goes online.
    data = toy.make_dataset().arrays["observations"]
    np.testing.assert_allclose(found.mean, data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.std, data.std(0) + 1e-3, rtol=1e-4)


class Walk:
    """An environment that ends after some steps; a picture of it shows their number."""

    def __init__(self, length):
        self.length, self.steps = length, 0

    def reset(self, seed):
        self.steps = 0
        return np.zeros(1), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1), float(action[0]), self.steps == self.length, False, {}

    def picture(self):
        return np.full((watch.SIZE, watch.SIZE, 3), self.steps, np.uint8)


class Two(nn.Module):
    def act(self, state, device):
        return np.array([2.0])


def frames(length, seconds):
    env = Walk(length)
    return list(watch.episode(env, Two(), env, 0, 0.01, seconds))


def test_an_episode_is_drawn_at_the_frame_rate_and_at_its_end():
    assert watch.frames_per_second(0.01) == (4, pytest.approx(25))
    assert watch.frames_per_second(0.1) == (1, pytest.approx(10))
    short, cut = frames(10, 5.0), frames(100, 0.2)
    assert [f.image[0, 0, 0] for f in short] == [0, 4, 8, 10]
    assert [f.total for f in short] == [0, 8, 16, 20]
    assert cut[-1].total == 40 and len(cut) == 6


def test_two_episodes_lie_side_by_side_in_a_gif(tmp_path):
    halves = frames(10, 5.0), frames(100, 0.2)
    pictures = watch.side_by_side(halves, ["before", "after"])
    assert len(pictures) == 6
    # The first has ended after its fourth picture.
    lower = [p[-1, [0, -1], 0].tolist() for p in pictures]
    assert lower == [[0, 0], [4, 4], [8, 8], [10, 12], [10, 16], [10, 20]]
    watch.write_film(tmp_path / "policy.gif", pictures, 25.0)
    with Image.open(tmp_path / "policy.gif") as film:
        assert film.n_frames == 6 and film.size == (2 * watch.SIZE, watch.SIZE)
        assert film.info["duration"] == 40


@pytest.mark.optional("imageio_ffmpeg")
def test_a_film_is_an_mp4_of_all_pictures(tmp_path):
    import imageio.v2 as imageio

    out = tmp_path / "policy.mp4"
    watch.check_out(out)
    shades = [np.full((64, 128, 3), 40 * i, dtype=np.uint8) for i in range(6)]
    watch.write_film(out, shades, 25.0)
    with imageio.get_reader(out) as film:
        found = [np.asarray(picture).mean() for picture in film]
        assert film.get_meta_data()["fps"] == 25.0
    # Colors are compressed.
    np.testing.assert_allclose(found, [0, 40, 80, 120, 160, 200], atol=6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("policy.avi", "ends neither in .gif nor in .mp4"),
        ("absent/policy.gif", "absent is not a folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        watch.check_out(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="one way to draw, without a choice")
def test_without_a_way_to_draw_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "PROBE", "raise SystemExit(1)")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(RuntimeError, match="neither EGL nor OSMesa works; install"):
        watch.choose_backend()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=osmesa does not work"):
        watch.choose_backend()
    monkeypatch.setattr(
        watch, "PROBE", "import os; os.environ['MUJOCO_GL'] == 'egl' or 1/0"
    )
    monkeypatch.delenv("MUJOCO_GL")
    watch.choose_backend()
    assert os.environ["MUJOCO_GL"] == "egl"


def test_the_command_draws_a_run_of_hopper(tmp_path):
    small = "--env hopper-random-v2 --dataset_rows 1500 --offline_iterations 3 "
    small += "--online_iterations 3 --eval_freq 3 --n_episodes 1 --batch_size 8 "
    small += "--dataset_source self-collected --device cpu --buffer_size 2000 "
    small += "--threads 1 --compile false --online_warmup 0"
    environment = {
        **{k: v for k, v in os.environ.items() if k != "MUJOCO_GL"},
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        "CORL_DARE_CACHE": str(tmp_path / "cache"),
    }

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = python(str(ROOT / "algorithms" / "td3_bc.py"), *small.split())
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    done = python("-m", "corl.watch", str(folder), "--seconds", "0.2")
    if "neither EGL nor OSMesa" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("return ") and "policy.gif" in done.stdout
    with Image.open(folder / "policy.gif") as film:
        first = np.asarray(film.convert("RGB"))
        halves = first[50:, : watch.SIZE], first[50:, watch.SIZE :]
    # Both begin in the same state; sky, floor and robot are more than one color.
    assert (
        np.array_equal(*halves) and len(np.unique(halves[0].reshape(-1, 3), axis=0)) > 5
    )
