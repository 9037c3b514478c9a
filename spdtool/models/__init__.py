"""Hugging Face encoders: load, save, find the layers, run them."""
