from tests.helpers.lit_run import lit_workdir  # noqa: F401
from tests.helpers.trained_run import config, state, workdir  # noqa: F401
