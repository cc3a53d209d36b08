"""Selective state-adaptive regularization (SSAR): what its algorithms share. It knows no host."""
