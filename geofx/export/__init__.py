"""Export: graphs as ONNX and .pt2, the user's class as decoders and TorchScript; published if they agree."""
