import sys

from trained_run import config, state, workdir  # noqa: F401

# Triton, which CUDA builds of torch bring, has an LLVM of its own that crashes when it is loaded after jaxlib.
sys.modules.setdefault("triton", None)
