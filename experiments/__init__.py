"""Many runs: sweeps, stored results, tables and figures. Run it from a clone of the repository."""
