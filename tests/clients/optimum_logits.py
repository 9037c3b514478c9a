"""Logits of a bundle by optimum-onnx: python optimum_logits.py FOLDER FILE_NAME < texts.json > logits.json"""

import json
import sys
from importlib import metadata

from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer

folder, file_name = sys.argv[1:]
request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = ORTModelForSequenceClassification.from_pretrained(folder, subfolder="onnx", file_name=file_name)
pairs = request["pairs"] or [None] * len(request["texts"])
logits = []
for text, pair in zip(request["texts"], pairs, strict=True):
    logits += model(**tokenizer(text, pair, truncation=True, return_tensors="pt")).logits.tolist()
json.dump({"version": metadata.version("optimum-onnx"), "logits": logits}, sys.stdout)
