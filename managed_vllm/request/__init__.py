"""One request, written, sent, retried, resumed and read: everything between a caller's words and typed outputs."""
