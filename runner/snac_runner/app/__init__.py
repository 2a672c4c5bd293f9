"""The local page of `runner app`: conversions, folders, and the reports of studies, in a browser."""
