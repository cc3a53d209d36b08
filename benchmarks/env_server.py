"""Plays a task for a program that has no MuJoCo, over its standard input and output.

    python -m benchmarks.env_server hopper-medium-v2

`whole_run.py` uses it for JAX-CORL, whose Python is another one. The first line that it writes has
the task's reference scores. Then each line of input, a JSON value, is answered by one: `null`
begins an episode and gives the observation, an action (A,) gives observation, reward and done.
"""

import importlib
import json
import sys

from corl.shim import launch


def main() -> None:
    with launch.installed():
        env = importlib.import_module("gym").make(sys.argv[1])
    facts = {
        "scores": [env.ref_min_score, env.ref_max_score],
        "sizes": [env.task.state_dim, env.task.action_dim],
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        action = json.loads(line)
        if action is None:
            answer = env.reset().tolist()
        else:
            observation, reward, done, _ = env.step(action)
            answer = [observation.tolist(), float(reward), done]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
