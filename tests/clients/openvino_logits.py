"""Logits of an ONNX file by OpenVINO: python openvino_logits.py FILE < rows.json > logits.json"""

import json
import sys

import numpy as np
import openvino

core = openvino.Core()
model = core.compile_model(core.read_model(sys.argv[1]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
names = [value.get_any_name() for value in model.inputs]
rows = json.load(sys.stdin)
logits = [model({name: np.array([row[name]], np.int64) for name in names})[0][0].tolist() for row in rows]
json.dump({"version": openvino.__version__, "logits": logits}, sys.stdout)
