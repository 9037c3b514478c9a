"""The tokenizer step of a Triton model repository, for Triton's Python backend; it is copied there as `model.py`.

Needs tokenizers and numpy in the backend's interpreter. Requests are padded to the next of a few lengths, because
Triton's dynamic batcher puts only requests of one shape together.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

STEP = 16  # tokens; lengths are rounded up to a power of two below this, and to a multiple of it above


class TritonPythonModel:
    """Keeps the tokenizer and how its rows are padded."""

    def initialize(self, args):
        """Read the tokenizer that lies beside this file."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / "settings.json").read_text("utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.settings["max_length"], direction=self.settings["truncation_side"])

    def execute(self, requests):
        """Answer each request with its token ids, or with what is wrong with its texts."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """The response to one request."""
        try:
            texts, *pairs = [self.texts(request, name, optional) for name, optional in self.settings["texts"].items()]
            pairs = pairs[0] if pairs else None
            rows = self.tokenizer.encode_batch(texts if pairs is None else list(zip(texts, pairs, strict=True)))
        except (UnicodeDecodeError, ValueError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the texts cannot be read: {error}"))
        columns = self.columns(rows)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, columns[name]) for name in self.settings["inputs"]])

    def texts(self, request, name, optional):
        """The texts of an input, or None where it may be left out and is."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None and not optional:
            raise ValueError(f"{name} is missing")
        texts = None if tensor is None else [text.decode("utf-8") for text in tensor.as_numpy().ravel()]
        if texts is not None and not all(text.strip() for text in texts):
            raise ValueError(f"{name} has an empty text")
        return texts

    def columns(self, rows):
        """The model's inputs, each int64 [rows, tokens]."""
        width = self.width(max(len(row.ids) for row in rows))
        padding = self.settings["padding"]
        columns = {
            name: np.full((len(rows), width), padding.get(name, 0), np.int64) for name in self.settings["inputs"]
        }
        for number, row in enumerate(rows):
            count = len(row.ids)
            place = slice(width - count, width) if padding["side"] == "left" else slice(count)
            cells = {"input_ids": row.ids, "token_type_ids": row.type_ids, "attention_mask": [1] * count}
            for name in columns:
                columns[name][number, place] = cells[name]
        return columns

    def width(self, longest):
        """The length to which a request is padded, at most the model's."""
        power = 1 << (longest - 1).bit_length()
        return min(power if power < STEP else -(-longest // STEP) * STEP, self.settings["max_length"])
