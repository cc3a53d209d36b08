"""The old name of a command; it will go with the next version."""

raise SystemExit("python corl/cal_ql.py is now: python algorithms/cal_ql.py")
