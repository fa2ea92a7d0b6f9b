"""Cross-entropy by its definition, in numpy float64: one token at a time."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """The arguments of a cross-entropy, arrays in float64 and the head as [V, D]."""

    x_BTD: np.ndarray
    head_VD: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    softcap: float | None = None
    z_loss: float = 0.0


class Result(NamedTuple):
    """What an implementation returns, and the gradients of its objective."""

    objective: float
    cross_entropy_BT: np.ndarray
    log_z_BT: np.ndarray
    dx_BTD: np.ndarray
    dhead_VD: np.ndarray
    dweights_BT: np.ndarray


def cross_entropy(case: Case) -> Result:
    """Returns losses and gradients, the latter by the chain rule written out for each token."""
    dx, dhead = np.zeros_like(case.x_BTD), np.zeros_like(case.head_VD)
    cross_entropy_BT, log_z_BT = np.zeros(case.targets_BT.shape), np.zeros(case.targets_BT.shape)
    for place in np.ndindex(case.targets_BT.shape):
        x_D, target, weight = case.x_BTD[place], case.targets_BT[place], case.weights_BT[place]
        raw_V = case.head_VD @ x_D
        cap = case.softcap
        logits_V = raw_V if cap is None else cap * np.tanh(raw_V / cap)
        largest = logits_V.max()
        log_z = largest + np.log(np.exp(logits_V - largest).sum())
        p_V = np.exp(logits_V - log_z)
        log_z_BT[place], cross_entropy_BT[place] = log_z, log_z - logits_V[target]
        slopes_V = weight * (1 + 2 * case.z_loss * log_z) * p_V
        slopes_V[target] -= weight
        if cap is not None:
            slopes_V *= 1 - np.tanh(raw_V / cap) ** 2
        dx[place] = slopes_V @ case.head_VD
        dhead += np.outer(slopes_V, x_D)
    losses_BT = cross_entropy_BT + case.z_loss * log_z_BT**2
    objective = float((case.weights_BT * losses_BT).sum())
    return Result(objective, cross_entropy_BT, log_z_BT, dx, dhead, losses_BT)
