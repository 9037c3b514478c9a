"""From logits to probabilities, in numpy alone: a server answers with them, and scores are computed from them."""

from __future__ import annotations

import numpy as np

LARGEST_LOGIT = 80  # exp overflows in float32 beyond 88


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis, in the type of the logits."""
    # Less the largest one: its exp is 1, so none overflows whatever the logits.
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the sigmoid of each logit, float32."""
    clipped = np.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT)
    return np.asarray(1 / (1 + np.exp(-clipped)), np.float32)
