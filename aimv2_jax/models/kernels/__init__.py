"""Attention as Pallas kernels for TPU, over the flat projections [B, S, H·E]: a head is a block of columns.

Each has a gradient rule of its own that computes the probabilities again, and declares its cost, since the compiler has
no estimate for it. On other machines they run in Pallas's interpreter, for the tests that hold them to XLA's result.
"""
