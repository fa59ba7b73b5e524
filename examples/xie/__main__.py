"""Reproduces Xie and Yuille on CIFAR-10: clean and adversarial images through one BN or each through its own.

    python -m examples.xie all --data DIR                train and evaluate every row, print the table, draw the figures
    python -m examples.xie train ROW                     one row, to the end
    python -m examples.xie evaluate ROW                  one row that is trained
    python -m examples.xie table | figures | check       from what is finished
    python -m examples.xie choose ROW                    compare settings on left-out training images

In the root of the repository. Whatever is finished is kept, and what was interrupted goes on where it was, to the epoch
at least. Exit code 0: well, or stopped at the budget; 1: a check fails; 2: one line says what is wrong; 3: no check
fails, and some wait for results.
"""

from __future__ import annotations

import sys

from examples.xie import checks, figures, tables
from examples.xie.work import Xie
from examples.common.commands import Paper

PAPER = Paper(Xie, __doc__, tables.everything, checks.findings, figures.figures)
main = PAPER.main

if __name__ == "__main__":
    sys.exit(main())
