"""The student as an ONNX file, and what inference costs."""
