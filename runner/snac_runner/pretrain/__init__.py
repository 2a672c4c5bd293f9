"""Train a base codec from speech, and measure it."""
