"""Small models, files and texts that tests share."""
