"""Triton twins of functions in `mmcompress.ops`, under the same file names. Needs the extra `mmcompress[kernels]`."""
