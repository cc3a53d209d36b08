"""Datasets: where they come from, how they are checked, what is in them."""
