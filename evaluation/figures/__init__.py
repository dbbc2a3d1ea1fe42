"""The figures of the report, one file per family: each takes numbers and hands back a `Figure` that holds them."""
