"""The one place that states fastconv's version; pyproject.toml reads it from here."""

__version__ = "0.1.0"
