"""Training a small speaker encoder of one's own, and measuring how well encoders tell speakers apart."""
