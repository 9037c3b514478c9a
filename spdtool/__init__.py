"""spdtool: sparse encoders by progressive distillation, exported to ONNX and measured honestly."""
