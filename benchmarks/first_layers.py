"""Cut an encoder down to its first layers, for experiments on a machine without a GPU.

    python benchmarks/first_layers.py ./all-MiniLM-L6-v2 3 ./minilm-3

The folder that is written is an ordinary pretrained encoder: `spdtool teacher --model ./minilm-3` fine-tunes it.
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
    chosen = parser.parse_args()
    model = AutoModel.from_pretrained(chosen.model, use_safetensors=True)
    whole = model.config.num_hidden_layers
    if not 0 < chosen.layers <= whole:
        parser.error(f"{chosen.model} has {whole} layers")
    stack = next(part for part in model.modules() if part.__class__.__name__ == "ModuleList" and len(part) == whole)
    del stack[chosen.layers :]
    model.config.num_hidden_layers = chosen.layers
    save_model(model, AutoTokenizer.from_pretrained(chosen.model), chosen.to)
    print(f"{chosen.to}: the first {chosen.layers} of {whole} layers of {chosen.model}")


if __name__ == "__main__":
    main()
