"""No test looks for data on the network."""

import os

os.environ["CORL_DARE_D4RL_URL"] = ""
