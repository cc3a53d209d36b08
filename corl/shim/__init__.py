"""Runs other people's unmodified scripts on today's Python, gymnasium and MuJoCo.

Scripts of offline RL import `gym` 0.23, `d4rl`, which needs mujoco_py, and `wandb`. The folder
`packages/` has packages of these names. They stand on the path of the script's process and of its
workers. Environments are those of `corl.envs` and of gymnasium, data is what
`corl.data.sources` finds, the log needs no account. Nobody's file is changed.

    python -m corl.shim CORL/algorithms/finetune/iql.py --env hopper-medium-v2 --device cpu
    python -m corl.shim -m JaxCQL.conservative_sac_main --env hopper-medium-v2

Options of the shim stand before the script or `-m`; docs/shim.md has them, and a table of what
runs. Start states come from gymnasium's generators, so a seed gives other episodes than it did
with old gym.
"""
