"""A trained network at work: photos, folders, videos, exports and submissions."""
