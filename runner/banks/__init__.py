"""Embedding banks of corpora: `snac_core.speakers.bank` holds their format, this how they come about."""
