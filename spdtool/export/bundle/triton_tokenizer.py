"""The tokenizer step of a Triton model repository, for Triton's Python backend; it is copied there as `model.py`.

Needs tokenizers and numpy in the backend's interpreter. Requests are padded to the next of a few
lengths, because Triton's dynamic batcher puts only requests of one shape together.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Encoding, Tokenizer

STEP = 16  # tokens


class TritonPythonModel:
    """Tokenizer of a model repository, and how it pads its rows."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and the settings that lie beside this file."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / "settings.json").read_text("utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()  # padding is up to `make_inputs`, which knows the request's length
        self.tokenizer.enable_truncation(self.settings["max_length"], direction=self.settings["truncation_side"])

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request with its token ids, or with what is wrong with its texts."""
        return [self.answer(request) for request in requests]

    def answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        """Answer one request."""
        try:
            columns = [self.read_texts(request, name, optional) for name, optional in self.settings["texts"].items()]
            prompt = self.settings["prompt"]
            texts = [prompt + text for text in columns[0] or []]  # the first column is never optional
            if len(columns) == 2 and columns[1] is not None:
                texts = list(zip(texts, columns[1], strict=True))
            rows = self.tokenizer.encode_batch(texts)
        except (UnicodeDecodeError, ValueError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the texts cannot be read: {error}"))
        inputs = self.make_inputs(rows)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, inputs[name]) for name in self.settings["inputs"]])

    def read_texts(self, request: pb_utils.InferenceRequest, name: str, optional: bool) -> list[str] | None:
        """Decode the texts of an input; None where it may be left out and is."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            if not optional:
                raise ValueError(f"{name} is missing")
            return None
        texts = [text.decode("utf-8") for text in tensor.as_numpy().ravel()]
        if not all(text.strip() for text in texts):  # the model would answer, and mean nothing by it
            raise ValueError(f"{name} has an empty text")
        return texts

    def make_inputs(self, rows: list[Encoding]) -> dict[str, np.ndarray]:
        """Make the model's inputs, each int64 [rows, tokens]."""
        width = self.padded_length(max(len(row.ids) for row in rows))
        padding = self.settings["padding"]
        inputs = {}
        for name in self.settings["inputs"]:
            inputs[name] = np.full((len(rows), width), padding.get(name, 0), np.int64)
        for number, row in enumerate(rows):
            count = len(row.ids)
            tokens = slice(count)
            if padding["side"] == "left":
                tokens = slice(width - count, width)
            values = {"input_ids": row.ids, "token_type_ids": row.type_ids, "attention_mask": [1] * count}
            for name, column in inputs.items():
                column[number, tokens] = values[name]
        return inputs

    def padded_length(self, longest: int) -> int:
        """Length to which a request is padded, at most the model's.

        Few lengths, because Triton batches only requests of the same one: powers of two, then
        multiples of STEP.
        """
        length = 1 << (longest - 1).bit_length()
        if length >= STEP:
            length = -(-longest // STEP) * STEP  # a power of two would double the work of a long text
        return min(length, int(self.settings["max_length"]))
