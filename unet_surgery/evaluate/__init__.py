"""Measuring models: scores of their pictures by the protocols that published numbers came from."""
