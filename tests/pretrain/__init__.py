"""Tests of training a base codec."""
