"""Data pipeline from prepared records to batches. Numpy only: workers import no jax or tensorflow from here."""
