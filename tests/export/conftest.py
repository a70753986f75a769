from trained_run import config, workdir  # noqa: F401
