"""Pallas attention kernels for TPU over the flat projections [B, S, H·E]: a head is a block of columns.

Each kernel has a custom gradient rule that recomputes the probabilities, and declares a cost estimate, since the
compiler has none. On other platforms they run in Pallas's interpreter, for tests that compare them with XLA.
`cudnn_attention` is for GPUs and is made of calls of cuDNN; on other platforms XLA computes the same masks.
"""
