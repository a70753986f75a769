"""The model: linen modules and pure functions on arrays, independent of data, training and devices."""
