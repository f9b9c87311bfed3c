"""The original layout of Stable Diffusion: one file, with the names that CompVis and Stability AI gave its tensors.

A U-Net's names follow from its graph (:mod:`unet_surgery.lower.original`); ``infer`` is the way back.
"""
