"""Diffusion models of transitions: fit one, guide it by energies, generate rows.

The host hands over buffers and a policy, so nothing here imports another package of ours.
"""
