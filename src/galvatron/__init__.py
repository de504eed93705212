"""Automatic distributed training for Transformers."""
