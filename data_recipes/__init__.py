"""Data in, JSONL records out. No module here imports torch."""
