"""Xie, Yuille: Intriguing Properties of Adversarial Training at Scale (arXiv 1906.03787), on CIFAR-10.

    python -m examples.xie all --data DIR --width 16

Trains ResNets of depth 20, 56 and 110 on adversarial images alone, and on clean and adversarial copies of the same
images, with one BN or with BN of their own for each; see ``docs/xie.md``.
"""
