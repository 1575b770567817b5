"""People and clients: the browser page and the `vlm` command."""
