"""Parse every config.pbtxt of a Triton model repository with tritonclient: python triton_config.py FOLDER > json"""

import json
import sys
from importlib import metadata
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

configs = {}
for file in sorted(Path(sys.argv[1]).glob("*/config.pbtxt")):
    parsed = text_format.Parse(file.read_text("utf-8"), model_config_pb2.ModelConfig())
    assert parsed.name == file.parent.name
    configs[parsed.name] = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
json.dump({"version": metadata.version("tritonclient"), "models": configs}, sys.stdout)
