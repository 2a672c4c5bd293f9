"""Speech: find it, check it, split it by speaker, and draw batches from it."""
