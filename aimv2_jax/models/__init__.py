"""The model: linen modules and pure functions on arrays. Knows nothing of data, training or devices."""
