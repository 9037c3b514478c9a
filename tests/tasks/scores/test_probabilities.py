"""Probabilities: as torch computes them, finite for any logit, and in the type of the logits."""

from __future__ import annotations

import numpy as np
import torch

from spdtool.tasks.scores.probabilities import sigmoid, softmax


def test_probabilities_are_those_of_torch_and_finite() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [0.5, -2.0, 3.0]], np.float32)
    for function, expected in ((softmax, torch.tensor(logits).softmax(-1)), (sigmoid, torch.tensor(logits).sigmoid())):
        probabilities = function(logits)
        assert probabilities.dtype == np.float32, function
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert softmax(logits.astype(np.float64)).dtype == np.float64
    np.testing.assert_array_equal(softmax(logits[1]), softmax(logits)[1])
