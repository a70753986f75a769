from tests.helpers.trained_run import config, state, workdir  # noqa: F401
