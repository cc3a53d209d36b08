"""A run's policy before and after its online phase, side by side, as a GIF or a video.

    python -m corl.watch runs/NAME
    python -m corl.watch runs/NAME --out policy.mp4 --seconds 20 --seed 3

Left is the policy that the online phase began with, right the one of the last checkpoint. Both act
without noise and begin in the same state. MuJoCo draws off-screen with EGL, or with OSMesa where
EGL does not work.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from corl import arguments, files, machine, trained

# Nothing here imports MuJoCo at the top: it reads MUJOCO_GL once, when it is imported.
BACKENDS = ("egl", "osmesa")
# Height and width of each half in pixels, and the frames of a second at most.
SIZE, FPS = 240, 25
# Of the palette of a GIF: fewer make it smaller.
COLORS = 64
PROBE = "import mujoco; mujoco.GLContext(16, 16).make_current()"


class Frame(NamedTuple):
    """A picture (H, W, 3) uint8, and what had been reached when it was taken."""

    image: np.ndarray
    seconds: float
    total: float  # return so far


def choose_backend() -> None:
    """Set MUJOCO_GL to a way to draw without a screen that works here.

    Raises:
        RuntimeError: there is none.
    """
    if not sys.platform.startswith("linux"):
        # MuJoCo has one way there, which needs no choice.
        return
    asked = os.environ.get("MUJOCO_GL")
    for kind in (asked,) if asked else BACKENDS:
        # In a process of its own: a library that fails cannot be loaded again as another one.
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, "MUJOCO_GL": kind},
            capture_output=True,
        )
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = kind
            return
    tried = (
        f"MUJOCO_GL={asked} does not work" if asked else "neither EGL nor OSMesa works"
    )
    raise RuntimeError(
        f"MuJoCo cannot draw without a screen here: {tried}; install one of them, for example "
        "the system package libegl1 or libosmesa6"
        + (", or unset MUJOCO_GL" if asked else "")
    )


class Camera:
    """Pictures of an environment: beside the robot, or of a whole maze from above.

    Raises:
        ValueError: MuJoCo does not know the environment.
    """

    def __init__(self, env: Any, from_above: bool):
        base: Any = env.unwrapped
        if not hasattr(base, "model") or not hasattr(base, "data"):
            raise ValueError(
                f"{type(base).__name__} is no MuJoCo environment, so it cannot be drawn"
            )
        import mujoco

        self._data = base.data
        self._renderer = mujoco.Renderer(base.model, SIZE, SIZE)
        self._view: Any = mujoco.MjvCamera()
        mujoco.mjv_defaultFreeCamera(base.model, self._view)
        if from_above:
            self._view.elevation = -70.0
        elif mujoco.mj_name2id(base.model, mujoco.mjtObj.mjOBJ_CAMERA, "track") >= 0:
            # The models of gymnasium have it.
            self._view = "track"

    def picture(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        self._renderer.update_scene(self._data, self._view)
        return self._renderer.render()

    def close(self) -> None:
        """Give the drawing context back."""
        self._renderer.close()


def frames_per_second(dt: float) -> tuple[int, float]:
    """Steps between two pictures, and the pictures of a second, where a step takes dt seconds."""
    every = max(1, round(1.0 / (FPS * dt)))
    return every, 1.0 / (every * dt)


@torch.no_grad()
def episode(
    env: Any, actor: Any, camera: Any, seed: int, dt: float, seconds: float
) -> Iterator[Frame]:
    """The pictures of one episode; the last one is of its end, or of `seconds`.

    Args:
        env: gives the states as the policy reads them.
        actor: in evaluation mode.
        camera: has `picture`.
        seed: of the start state.
        dt: seconds of a step.
    """
    every, _ = frames_per_second(dt)
    state, _ = env.reset(seed=seed)
    total, steps, over = 0.0, 0, False
    yield Frame(camera.picture(), 0.0, 0.0)
    while not over and steps * dt < seconds:
        state, reward, terminated, truncated, _ = env.step(actor.act(state, "cpu"))
        total, steps = total + float(reward), steps + 1
        over = terminated or truncated or steps * dt >= seconds
        if over or steps % every == 0:
            yield Frame(camera.picture(), steps * dt, total)


def side_by_side(
    halves: Sequence[Sequence[Frame]], titles: Sequence[str]
) -> list[np.ndarray]:
    """Pictures (H, W, 3) of two episodes; the shorter one stays at its last picture."""
    from PIL import Image, ImageDraw

    made = []
    for number in range(max(map(len, halves))):
        whole = Image.new("RGB", (2 * SIZE, SIZE))
        write = ImageDraw.Draw(whole)
        for place, (frames, title) in enumerate(zip(halves, titles, strict=True)):
            frame = frames[min(number, len(frames) - 1)]
            whole.paste(Image.fromarray(frame.image), (place * SIZE, 0))
            text = f"{title}\n{frame.seconds:.1f} s, return {frame.total:.0f}"
            corner = place * SIZE + 8, 6
            write.text(corner, text, fill="white", stroke_width=2, stroke_fill="black")
        made.append(np.asarray(whole))
    return made


def write_film(path: Path, pictures: Sequence[np.ndarray], fps: float) -> None:
    """Write pictures (H, W, 3) as the GIF or the MP4 that the name of the file says.

    Raises:
        CannotWrite: as of `files.replacing`.
    """
    if path.suffix == ".gif":
        from PIL import Image

        # One palette and no dithering, so that what stands still costs nothing.
        images = [Image.fromarray(picture) for picture in pictures]
        some = np.concatenate(pictures[:: max(1, len(pictures) // 8)])
        palette = Image.fromarray(some).quantize(COLORS, dither=Image.Dither.NONE)
        few = [
            image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images
        ]
        options = {"duration": round(1000 / fps), "loop": 0, "optimize": True}
        with files.replacing(path) as file:
            few[0].save(
                file, format="GIF", save_all=True, append_images=few[1:], **options
            )
        return
    import imageio.v2 as imageio

    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "film.mp4"
        imageio.mimwrite(film, list(pictures), fps=fps)
        with files.replacing(path) as file:
            file.write(film.read_bytes())


def check_out(path: Path) -> None:
    """Refuse a name that cannot be written, before anything is drawn.

    Raises:
        ValueError: neither .gif nor .mp4, or the package for .mp4 is not installed.
        CannotWrite: the folder does not take files.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"--out {path} ends neither in .gif nor in .mp4")
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(
            "an .mp4 needs the package imageio-ffmpeg: pip install -r requirements-video.txt, or "
            "name a .gif"
        )
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {path.parent} is not a folder")
    files.check_writable(path.parent)


def watch(
    folder: Path,
    out: Path | None = None,
    seconds: float = 10.0,
    seed: int | None = None,
    algorithm: Path | None = None,
) -> tuple[Path, list[float]]:
    """Draw both policies of a run.

    Args:
        folder: of the run.
        out: .gif or .mp4; default: policy.gif in the folder.
        seconds: of each episode at most.
        seed: of the start state; default: that of the run's evaluations.
        algorithm: the run's algorithm file, where this clone does not have it.

    Returns:
        The file, and the return of each policy up to where it was drawn.

    Raises:
        ValueError, RuntimeError: no such run, nothing to draw with, or a bad `out`.
    """
    out = out or folder / "policy.gif"
    check_out(out)
    choose_backend()
    from corl import acting, envs

    run = trained.read(folder, algorithm)
    if run.before is None:
        raise ValueError(
            f"{folder} has no {trained.AT_SWITCH}: the run has not reached its online phase, or "
            "an older version made it; go on with --resume, or run it again"
        )
    config = run.config
    online = run.step - config.offline_iterations
    seed = config.eval_seed if seed is None else seed
    halves, fps = [], 1.0
    for actor in (run.before, run.after):
        raw = envs.make(config.env, config.env_backend)
        camera = Camera(raw, from_above=config.env.startswith("antmaze"))
        base: Any = raw.unwrapped
        _, fps = frames_per_second(base.dt)
        checked = acting.CheckedEnv(raw, "evaluation", config)
        env = acting.wrap_env(checked, run.mean, run.std)
        try:
            frames = list(episode(env, actor, camera, seed, base.dt, seconds))
        finally:
            camera.close()
        halves.append(frames)
    titles = "before fine-tuning", f"after {online} online steps"
    write_film(out, side_by_side(halves, titles), fps)
    return out, [frames[-1].total for frames in halves]


def command_line(argv: Sequence[str] | None = None) -> None:
    """`python -m corl.watch RUN [--out FILE]`."""
    parser = arguments.Parser(
        prog="python -m corl.watch",
        description="Draw a run's policy before and after fine-tuning, side by side.",
    )
    parser.add_argument("run", type=arguments.path, help="run folder")
    parser.add_argument(
        "--out", type=arguments.path, help=".gif or .mp4; default: policy.gif in RUN"
    )
    parser.add_argument(
        "--seconds",
        type=arguments.number(float, "(0, 600]"),
        default=10.0,
        help="of each episode at most; default: 10",
    )
    parser.add_argument(
        "--seed",
        type=arguments.number(int, arguments.SEED),
        help="of the start state; default: that of the run's evaluations",
    )
    parser.add_argument(
        "--algorithm",
        type=arguments.path,
        help="the run's algorithm file, where this clone does not have it",
    )
    args = parser.parse_args(argv)
    with arguments.errors_in_one_line():
        out, (before, after) = watch(
            args.run, args.out, args.seconds, args.seed, args.algorithm
        )
        print(f"return {before:.0f} before, {after:.0f} after: {machine.tidy_path(out)}")


if __name__ == "__main__":
    command_line()
