"""The old name of a command; it will go with the next version."""

raise SystemExit("python -m corl_dare.d4rl_shim is now: python -m corl.shim")
