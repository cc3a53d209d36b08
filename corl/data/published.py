"""What is published of D4RL's own files: names, addresses, checksums, sizes, returns."""

import os

from corl import tasks

SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"

ANTMAZE_FILE = "Ant_maze_{}_noisy_multistart_{}_multigoal_{}_sparse_fixed.hdf5"
ANTMAZE_FIELDS = {
    "umaze": ("u-maze", False, False),
    "umaze-diverse": ("u-maze", True, True),
    "medium-play": ("big-maze", True, False),
    "medium-diverse": ("big-maze", True, True),
    "large-play": ("hardest-maze", True, False),
    "large-diverse": ("hardest-maze", True, True),
}

# Bytes and SHA-256 of D4RL's -v2 files, from the checksum lists of tensorflow-datasets,
# which lack antmaze-medium-play.
CHECKSUMS = """
hopper
random 152525345 63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054
medium 152756557 5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0
medium-replay 75854457 e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b
medium-expert 304537315 9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26
expert 152427435 01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b
full-replay 187998921 56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e
halfcheetah
random 237338037 25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba
medium 237727262 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
medium-replay 59448533 48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
medium-expert 474567252 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
expert 237464597 d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f
full-replay 291381762 27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0
walker2d
random 216109364 4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa
medium 232254996 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
medium-replay 86323963 e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
medium-expert 462197079 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
expert 230567195 2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a
full-replay 285115514 f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a
antmaze
umaze 232532949 5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130
umaze-diverse 230854272 c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932
medium-diverse 231095166 ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7
large-play 230880653 6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471
large-diverse 231183710 84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284
"""

# Raw return of the complete episodes in D4RL's -v2 files: mean, std, min, max. From public logs
# of the Decision Transformer's download script.
D4RL_RETURNS = {
    "hopper-random": (18.40, 17.45, 2.93, 292.55),
    "hopper-medium": (1422.06, 378.95, 315.87, 3222.36),
    "hopper-medium-replay": (467.30, 511.03, -1.44, 3192.93),
    "hopper-expert": (3511.36, 328.59, 1645.28, 3759.08),
    "halfcheetah-random": (-288.80, 80.43, -525.96, -85.36),
    "halfcheetah-medium": (4770.33, 355.75, -310.23, 5309.38),
    "halfcheetah-medium-replay": (3093.29, 1680.69, -638.49, 4985.14),
    "halfcheetah-expert": (10656.43, 441.68, 2045.83, 11252.04),
    "walker2d-random": (1.87, 5.81, -17.01, 75.03),
    "walker2d-medium": (2852.09, 1095.44, -6.61, 4226.94),
    "walker2d-medium-replay": (682.70, 895.96, -50.20, 4132.00),
    "walker2d-expert": (4920.51, 136.39, 763.42, 5011.69),
}

# Rows of D4RL's medium-replay files.
REPLAY_ROWS = {"hopper": 402_000, "halfcheetah": 202_000, "walker2d": 302_000}

# Rows of D4RL's files, those of a last, unfinished episode included where that is known.
D4RL_ROWS = {
    **{
        f"{robot}-{kind}": 1_000_000
        for robot in REPLAY_ROWS
        for kind in ("random", "medium", "expert", "full-replay")
    },
    **{f"{robot}-medium-replay": rows for robot, rows in REPLAY_ROWS.items()},
    "hopper-medium-expert": 1_999_906,
    "halfcheetah-medium-expert": 2_000_000,
    "walker2d-medium-expert": 1_999_995,
    **{f"antmaze-{kind}": 1_000_000 for kind in tasks.ANTMAZES},
}


def file_name(task: tasks.Task) -> str:
    """The name of a task's file in D4RL's dataset folder.

    Raises:
        ValueError: a task of -v0 or -v1 that is not Adroit's -v1; their files are named otherwise.
    """
    if tasks.ROBOTS[task.robot].kinds is tasks.ADROIT and task.version == "v1":
        return f"{task.name}.hdf5"
    if task.version != "v2":
        raise ValueError(
            f"{task.name}: D4RL's file names are known here for -v2 tasks only; pass "
            "the file as dataset_path"
        )
    if task.robot == "antmaze":
        return ANTMAZE_FILE.format(*ANTMAZE_FIELDS[task.kind])
    return f"{task.robot}_{task.kind.replace('-', '_')}-v2.hdf5"


def url(task: tasks.Task) -> str:
    """The address of a task's file on `server`.

    Raises:
        ValueError: as of `file_name`.
    """
    name = file_name(task)
    if task.version == "v1":
        folder = "hand_dapg_v1"
    else:
        folder = "ant_maze_v2" if task.robot == "antmaze" else "gym_mujoco_v2"
    return f"{server()}/{folder}/{name}"


def server() -> str:
    """D4RL's server, or the one that `CORL_DARE_D4RL_URL` names; empty: no downloads."""
    return os.environ.get("CORL_DARE_D4RL_URL", SERVER).rstrip("/")


def known_files() -> dict[str, tuple[int, str]]:
    """Task name -> (bytes, SHA-256) of D4RL's own file, where the checksum is public."""
    known, robot = {}, ""
    for line in CHECKSUMS.split("\n"):
        match line.split():
            case [robot]:
                pass
            case [kind, size, digest]:
                known[f"{robot}-{kind}-v2"] = (int(size), digest)
    return known


def returns(task: tasks.Task) -> tuple[float, float, float, float] | None:
    """Mean, std, min and max of the returns of D4RL's file; None where nobody published them."""
    return D4RL_RETURNS.get(task.name.removesuffix("-v2"))


def rows(task: tasks.Task) -> int:
    """The rows of D4RL's file of a -v2 task."""
    return D4RL_ROWS[task.name.removesuffix("-v2")]
