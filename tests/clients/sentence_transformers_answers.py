"""Vectors or scores by sentence-transformers: python THIS FOLDER BACKEND < texts.json > answers.json

With pairs a CrossEncoder opens the folder, else a SentenceTransformer.
"""

import json
import sys
from importlib import metadata

from sentence_transformers import CrossEncoder, SentenceTransformer

folder, backend = sys.argv[1:]
request = json.load(sys.stdin)
options = {"backend": backend, "device": "cpu"}
if backend == "onnx":
    options["model_kwargs"] = {"file_name": "onnx/model.onnx", "provider": "CPUExecutionProvider"}
if request["pairs"]:
    model = CrossEncoder(folder, **options)
    answers = model.predict(list(zip(request["texts"], request["pairs"], strict=True)))
else:
    model = SentenceTransformer(folder, **options)
    answers = model.encode(request["texts"])
json.dump({"version": metadata.version("sentence-transformers"), "answers": answers.tolist()}, sys.stdout)
