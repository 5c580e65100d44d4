"""Export: ONNX from the graph, TorchScript from the eager module; published after they ran and agreed."""
