"""The parts of layer_parity.py: cases, the worker under the old interpreter, and one file for each method."""
