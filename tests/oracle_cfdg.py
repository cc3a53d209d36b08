"""CFDG's guided denoiser and its batches written a second time, in float64 and by plain loops.

Ho and Salimans 2022 (arXiv 2207.12598), Eq. 6, in the noise that is removed; the labelled denoiser
is `oracle_edis.denoise`.
"""

import torch
from oracle_edis import denoise

OFFLINE, ONLINE, NOTHING = 0, 1, 2


def guided(p, x, sigma, label, w):
    """D of (1 + w) eps(x, label) - w eps(x, nothing), with eps = (x - D) / sigma."""
    rows = []
    for i in range(len(x)):
        place, level = x[i : i + 1], sigma[i : i + 1]
        noise = [
            (place - denoise(p, place, level, [k])) / level for k in (label, NOTHING)
        ]
        rows.append(place - level * ((1 + w) * noise[0] - w * noise[1]))
    return torch.cat(rows)


def parts(batch_size, synthetic_ratio, offline_share, mixing_ratio):
    """Rows of a batch: offline, online, generated like offline ones, like online ones."""
    generated = int(batch_size * synthetic_ratio)
    real = batch_size - generated
    return (
        int(real * mixing_ratio),
        real - int(real * mixing_ratio),
        int(generated * offline_share),
        generated - int(generated * offline_share),
    )
