"""Evaluation of a trained model: held-out metrics, captions, features, probes, plots. Independent of the train loop."""
