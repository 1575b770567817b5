"""Two-stage training jobs: recipes in, standard model folders out."""
