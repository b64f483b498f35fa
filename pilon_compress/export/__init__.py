"""Writes models: PILON folders, dense, packed and ONNX files; loads PILON folders in transformers."""
