"""Walter, Stutz, Schiele: On Fragile Features and Batch Normalization in Adversarial Training (arXiv 2204.12393).

    python -m examples.walter all --data DIR --width 16

Trains and evaluates all rows of the paper's Table 2, and draws its figures; see ``docs/walter.md``.
"""
