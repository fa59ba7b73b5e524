"""Reproduces Benz, Zhang and Kweon: networks with and without BN, and what their features are good for.

    python -m examples.benz all --data DIR               train and evaluate every row, print the table, draw the figures
    python -m examples.benz train ROW                    one row, after those that it needs; a set of images is made
    python -m examples.benz evaluate ROW                 one row that is trained
    python -m examples.benz table | figures | check      from what is finished
    python -m examples.benz choose ROW                   compare settings on left-out training images

In the root of the repository. Whatever is finished is kept, and what was interrupted goes on where it was, to the epoch
at least. Exit code 0: well, or stopped at the budget; 1: a check fails; 2: one line says what is wrong; 3: no check
fails, and some wait for results.
"""

from __future__ import annotations

import sys

from examples.benz import checks, figures, tables
from examples.benz.work import Benz
from examples.common.commands import Paper

PAPER = Paper(Benz, __doc__, tables.everything, checks.findings, figures.figures)
main = PAPER.main

if __name__ == "__main__":
    sys.exit(main())
