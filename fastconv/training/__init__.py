"""What it takes to train a network here and see what it learned: data, loop, metrics, plots."""
