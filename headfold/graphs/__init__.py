"""Models as ONNX graphs: what is traced, how it is written, and how it is compared with the model in onnxruntime."""
