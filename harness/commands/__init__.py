"""One file a command. Only click is imported at the top; the rest where a command needs it."""
