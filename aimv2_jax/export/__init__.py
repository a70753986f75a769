"""Export of models to Hugging Face and Orbax folders."""
