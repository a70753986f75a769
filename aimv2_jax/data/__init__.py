"""From prepared records to batches: numpy only, nothing here that a worker imports brings jax or tensorflow."""
