import sys

from tests.helpers.trained_run import config, state, workdir  # noqa: F401

# CUDA builds of torch import Triton, whose own LLVM crashes when it is loaded after jaxlib.
sys.modules.setdefault("triton", None)
