"""What surrounds a stage: its settings and command line, its checks, its folders and what it says about them."""
