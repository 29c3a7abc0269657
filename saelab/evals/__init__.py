"""Questions asked of a finished SAE, each answered with a token count and an interval."""
