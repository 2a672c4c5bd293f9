"""Build the report of a study from its result files."""
