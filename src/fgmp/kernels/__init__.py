"""Fast versions of what ``formats`` and ``pack`` define, bit for bit where those define bits."""
