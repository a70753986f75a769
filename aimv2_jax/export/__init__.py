"""Models in and out: Hugging Face's and Apple's names, and a directory of our own."""
