"""The endpoints, one file per topic; each has a ``router``."""
