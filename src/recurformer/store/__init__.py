"""Folders of models, checkpoints and runs: save, load, and resolve what a user typed."""
