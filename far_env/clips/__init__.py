"""Sources of clips: procedural worlds and videos on disk."""
