"""ONNX graphs: trace a checkpoint, name its weights, fuse, round."""
