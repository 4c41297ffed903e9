"""A package, because a foreign one of this name anywhere on the path would go before a folder."""
