"""Pretrained encoders and models from runs, exports, Hugging Face folders and Apple's files."""
