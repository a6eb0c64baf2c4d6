"""MLflow: a journal on disk first, then the server."""
