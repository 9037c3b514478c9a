"""Tasks that read all of a text, however long: it is cut into overlapping windows, and answered as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from spdtool.data.dataset import Rows, Splits
from spdtool.data.tokens import Encoded
from spdtool.data.windows import TextWindow, WindowOutput, group_by_text, sample_windows
from spdtool.recipe.fields import Recipe
from spdtool.tasks.decision import Answer, Json
from spdtool.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class WindowDetails:
    """The windows of a split, one a row. A subclass adds what its kind of task is scored by."""

    windows: Sequence[TextWindow]

    def select(self, rows: np.ndarray) -> Self:
        """Return these windows alone."""
        return replace(self, windows=[self.windows[int(row)] for row in rows])


class WindowedTask(Task):
    """A task whose rows are windows of texts. A subclass writes `encode_split`.

    Attributes:
        stride: tokens that neighbouring windows share.
    """

    stride = 0

    def encode(self, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe) -> dict[str, Encoded]:
        """Tokenize every split in windows of `recipe.max_length` tokens."""
        self.stride = recipe.window_stride
        encoded = {}
        for split, rows in splits.items():
            encoded[split] = self.encode_split(tokenizer, rows, recipe.max_length)
        return encoded

    def encode_split(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> Encoded:
        """Tokenize one split in windows, see `tokenize_windows`; `details` are `WindowDetails`."""
        raise NotImplementedError

    @staticmethod
    def windows_of(rows: Encoded) -> Sequence[TextWindow]:
        """Return the window of each row of a split."""
        assert isinstance(rows.details, WindowDetails)
        return rows.details.windows

    def sample_scored_rows(self, rows: Encoded, count: int, seed: int) -> Encoded:
        """Draw whole texts: a window alone may hold half an answer."""
        return sample_windows(rows.select_labeled(), self.windows_of(rows), count, seed)

    def outputs_by_text(self, outputs: np.ndarray, rows: Encoded) -> list[list[WindowOutput]]:
        """Return for each text its windows with their outputs.

        Args:
            outputs: of a split, [all tokens, labels].
        """
        values = np.split(outputs, rows.offsets[1:-1])
        return group_by_text([WindowOutput(*pair) for pair in zip(self.windows_of(rows), values, strict=True)])

    def answers(self, outputs: np.ndarray, rows: Encoded, names: Sequence[str]) -> list[Answer]:
        """Return the answer to each text, as `decision` gives it with the settings of this task."""
        # The base class takes arrays, and decisions that read windows take lists of them.
        by_text: Any = self.outputs_by_text(outputs, rows)
        return self.decision(names, self.settings_of_answers()).decide(by_text)

    def settings_of_answers(self) -> Mapping[str, Json]:
        """Return the settings of `decision` that change an answer."""
        return {}

    def settings(self, outputs: np.ndarray, rows: Encoded) -> dict[str, Json]:
        """Return how far windows overlap."""
        return {"stride": self.stride}
