"""AIMv2 pre-training in JAX. Importing this touches no backend, no disk and no tensorflow."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    _message = "aimv2_jax runs on Python 3.11, 3.12, 3.13; this is {}.{}.".format(*sys.version_info)
    if sys.argv[:1] == ["-m"]:  # A command prints one line and exits with the code of a user error.
        print("error: " + _message, file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(_message)

from aimv2_jax.version import __version__

# How etils and fsspec reach buckets. They read these variables when they are first used, child processes inherit them,
# and values that a user has set stay.
_BUCKET_SETTINGS = {
    # etils prefers TensorFlow's file system for gs://, since tensorflow is installed with us. It cannot be pointed to
    # another server, so that no test could run what users run, and raises no OSError.
    "EPATH_USE_TF": "false",
    # gcsfs would ask for the layout of each bucket by gRPC first, which needs a right of its own.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    # A listing that is cached, by default for good, hides what other hosts write.
    "FSSPEC_GCS": '{"use_listings_cache": false}',
    # TensorStore gives up a connection that is silent for so many seconds; by default it waits for ever.
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "30",
    # s3fs makes 5 attempts, and botocore within each as many as are set here.
    "FSSPEC_S3": '{"use_listings_cache": false, "config_kwargs": {"retries": {"total_max_attempts": 3}}}',
}
for _name, _value in _BUCKET_SETTINGS.items():
    os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from aimv2_jax.pretrained.dual_encoder import load_dual_encoder
    from aimv2_jax.pretrained.encoder import load_encoder
    from aimv2_jax.pretrained.model import load as load_model

__all__ = ["__version__", "load_dual_encoder", "load_encoder", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_dual_encoder":
        from aimv2_jax.pretrained.dual_encoder import load_dual_encoder

        return load_dual_encoder
    if name == "load_encoder":
        from aimv2_jax.pretrained.encoder import load_encoder

        return load_encoder
    if name == "load_model":
        from aimv2_jax.pretrained.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
