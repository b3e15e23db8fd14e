"""Where clips come from: procedural worlds and videos on disk."""
