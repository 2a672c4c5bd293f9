"""Measuring conversions and judging the numbers."""
