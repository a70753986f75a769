"""Preparation of datasets: input formats, filters, output shards, runners and tokenizer training."""
