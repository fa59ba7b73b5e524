"""Benz, Zhang, Kweon: Batch Normalization Increases Vulnerability and Decreases Transferability (arXiv 2010.03316).

    python -m examples.benz all --data DIR --width 16

Trains ResNet-20 with and without BN, and makes the sets of images of which only some features go with the labels;
see ``docs/benz.md``.
"""
