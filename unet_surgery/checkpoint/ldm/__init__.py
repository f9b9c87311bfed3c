"""The original layout of Stable Diffusion: one file, with the names that CompVis and Stability AI gave its tensors.

``names`` and ``infer`` are pure: a U-Net's names from its graph, and its config back from names and shapes.
"""
