"""Where raw documents come from: two made-up worlds, emoji, folders, and tars of captioned images."""
