"""Data: dataset versions that git and DVC name, and their files. The only room that imports DVC."""
