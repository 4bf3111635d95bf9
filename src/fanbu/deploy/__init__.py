"""What runs a model where it is used: ONNX files made of it, and small runners for every format."""
