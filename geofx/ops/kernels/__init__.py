"""Triton kernels of `geofx.ops`; needs Triton, which the rest of geofx does not."""
