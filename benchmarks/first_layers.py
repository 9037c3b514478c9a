"""Cut an encoder down to its first layers, for experiments on a machine without a GPU.

    python benchmarks/first_layers.py ./all-MiniLM-L6-v2 3 ./minilm-3

Writes an ordinary pretrained encoder, which `spdtool teacher --model ./minilm-3` fine-tunes. Needs the model's folder,
or the network for a name of the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from spdtool.models.load import save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("layers", type=int)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    model = AutoModel.from_pretrained(options.model, use_safetensors=True)
    depth = model.config.num_hidden_layers
    if not 0 < options.layers <= depth:
        parser.error(f"{options.model} has {depth} layers")
    stack = next(
        module for module in model.modules() if module.__class__.__name__ == "ModuleList" and len(module) == depth
    )
    del stack[options.layers :]
    model.config.num_hidden_layers = options.layers
    save_model(model, AutoTokenizer.from_pretrained(options.model), options.to)
    print(f"{options.to}: the first {options.layers} of {depth} layers of {options.model}")


if __name__ == "__main__":
    main()
