"""The tables of a task: the scores of all its runs, their differences tested, beside the paper's figures."""
