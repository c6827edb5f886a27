"""Where raw documents come from: two drawn worlds, emoji, your own folders, and tars of captioned images."""
