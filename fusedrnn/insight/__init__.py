"""The gradient's flow made visible."""
