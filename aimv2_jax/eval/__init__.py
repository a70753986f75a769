"""What is done with a trained model: pictures, held-out figures, captions. Knows nothing of the loop."""
