"""The old name of a command; it will go with the next version."""

raise SystemExit("python corl/iql.py is now: python algorithms/iql.py")
