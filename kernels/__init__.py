"""Triton kernels; installed as ``dgate_rt.kernels`` and imported by that name only."""
