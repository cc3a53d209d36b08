"""D4RL's reference returns by task name."""

from _shim_names import missing

from corl import tasks


def known() -> list[tasks.Task]:
    """Every task of D4RL that is known here, in every version."""
    names = [
        f"{robot}-{kind}-{version}"
        for robot, facts in tasks.ROBOTS.items()
        for kind in facts.kinds
        for version in facts.versions
    ]
    return [tasks.task(name) for name in names]


REF_MIN_SCORE = {task.name: task.ref_min for task in known()}
REF_MAX_SCORE = {task.name: task.ref_max for task in known()}
__getattr__ = missing("d4rl.infos")
