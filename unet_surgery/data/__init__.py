"""Training data: pictures and captions from where people keep them, latent caches, and the order they are seen in."""
