"""The old name of a command; it will go with the next version."""

raise SystemExit("python corl/cql.py is now: python algorithms/cql.py")
